"""Pattention against its formula, by hand in NumPy."""

import math

import numpy as np
import torch

from metastate.config import ModelConfig
from metastate.layers.pattention import Pattention, PattentionAttention
from metastate.model.lm import LanguageModel


def by_hand(x, K, V, scale):
    s = x @ K.T
    s = s / np.sqrt((s * s).sum(-1, keepdims=True)) * scale
    erf = np.vectorize(math.erf)
    return (0.5 * s * (1 + erf(s / math.sqrt(2)))) @ V


def test_the_formula():
    layer = Pattention(5, 7, 4, first=3, gain=1.0).double()
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    expected = by_hand(x.numpy(), *(p.detach().numpy() for p in layer.parameters()), 3**0.5)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-13)


def test_a_zero_input_is_no_division_by_zero():
    layer = Pattention(5, 7, 4, first=7, gain=1.0)
    x = torch.zeros(1, 2, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.abs().max() == 0 and x.grad.isfinite().all()


def test_positions_turn_a_quarter_of_the_channels():
    config = ModelConfig(architecture="tokenformer", hidden_size=32, num_heads=2, vocab_size=11)
    layer = LanguageModel(config).blocks[0].attention
    assert isinstance(layer, PattentionAttention) and layer.rotary_size == 4
    assert (config.attention_slots, config.ffn_size, config.first_slots) == (24, 96, (24, 96))
    x = torch.randn(1, 1, 32).expand(1, 3, 32)
    _, state = layer(x)
    keys = state.visible()[0]
    torch.testing.assert_close(keys[0, :, 0, 4:], keys[0, :, 2, 4:])
    assert not torch.allclose(keys[0, :, 0, :4], keys[0, :, 2, :4])
