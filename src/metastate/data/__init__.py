"""Text to tokens: tokenizers, the .bin/.idx format, preparing a corpus, drawing batches from it."""
