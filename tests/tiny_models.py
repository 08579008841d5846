"""Tiny models of bytes for tests in which every token matters."""

import torch

from metastate.config import ModelConfig
from metastate.model.lm import LanguageModel


def tiny(seed=0, std=0.25, **fields):
    """A model far from uniform, whose tokens are bytes."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = LanguageModel(ModelConfig(**sizes | fields))
    model.backend = "reference"
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=std)
    return model
