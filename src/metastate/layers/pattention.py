"""TokenFormer's layers: every linear map is attention over learned key-value slots."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metastate.config import ModelConfig
from metastate.layers.attention import Attention
from metastate.layers.common import MATRIX, RANDOM, ZERO, Growth, normal_


class Pattention(nn.Module):
    """Attention of a token over n learned slots, in place of a linear map.

    y = gelu(sqrt(n_0) s / |s|) V,  s = x K^T;  K [n, D_in], V [n, D_out], |s| over the slots.

    n_0 is the number of slots that the layer began with. Growth keeps it, and gives new slots zero
    keys: their s is zero, so |s| and y stay. The released code scales by sqrt(n) with n as it is
    now, which changes y when n grows.

    Source: arXiv:2410.23168, eqs 4-6, with the norm over the slots as in the released code.
    """

    GROWS: ClassVar[dict[str, Growth]] = {"keys": ("F D", ZERO), "values": ("F D", RANDOM)}
    GROUPS: ClassVar[dict[str, str]] = {"keys": MATRIX, "values": MATRIX}

    def __init__(self, size_in: int, slots: int, size_out: int, first: int, gain: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(normal_(torch.empty(slots, size_in), size_in**-0.5))
        self.values = nn.Parameter(normal_(torch.empty(slots, size_out), gain * first**-0.5))
        self.scale = first**0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return y [..., D_out] for x [..., D_in]."""
        return F.gelu(F.normalize(x @ self.keys.T, dim=-1) * self.scale) @ self.values


class AttentionSlots(Pattention):
    """A Pattention layer of `attention_slots` slots, which grow apart from those of the FFN."""

    GROWS: ClassVar[dict[str, Growth]] = {"keys": ("A D", ZERO), "values": ("A D", RANDOM)}


class PattentionAttention(Attention):
    """Causal self-attention whose four projections are Pattention layers.

    Positions turn a quarter of the channels, as in the released configurations.
    """

    GROWS: ClassVar[dict[str, Growth]] = {}

    def build(self, config: ModelConfig) -> None:
        """Make the projections."""
        assert config.attention_slots is not None and config.first_slots is not None
        D, size = config.hidden_size, config.attention_size
        n, first = config.attention_slots, config.first_slots[0]
        self.rotary_size = max(2, self.head_size // 8 * 2)
        self.query = AttentionSlots(D, n, size, first, 1.0)
        self.key = AttentionSlots(D, n, size, first, 1.0)
        self.value = AttentionSlots(D, n, size, first, 1.0)
        self.output = AttentionSlots(size, n, D, first, (2 * config.num_layers) ** -0.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of x, [B, H, T, N] each."""
        heads = (self.num_heads, self.head_size)
        q, k, v = (
            layer(x).unflatten(-1, heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return q, k, v


def feed_forward(config: ModelConfig) -> Pattention:
    """Return the feed-forward layer, one Pattention of `ffn_size` slots."""
    assert config.ffn_size is not None and config.first_slots is not None
    D, gain = config.hidden_size, (2 * config.num_layers) ** -0.5
    return Pattention(D, config.ffn_size, D, config.first_slots[1], gain)
