"""The language model: blocks, states, decoding, presets, checkpoints, loss."""
