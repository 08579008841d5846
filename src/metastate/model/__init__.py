"""The language model: blocks, states, presets, checkpoints, loss."""
