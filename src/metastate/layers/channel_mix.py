"""RWKV-7 channel mixing: the feed-forward layer that the Meta-State layer replaces."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from metastate.config import ModelConfig
from metastate.layers.common import (
    OUTPUT,
    RANDOM,
    VECTOR,
    Growth,
    Packing,
    linear,
    parameter,
    token_shift,
)
from metastate.ops import fused


class ChannelMix(nn.Module):
    """Channel mixing of RWKV-7: o = relu(lerp(x_t, x_{t-1}, mu) W_k)^2 W_v, hidden width 4 D.

    Source: arXiv:2503.14456, section 4.
    """

    GROWS: ClassVar[dict[str, Growth]] = {
        "key.weight": ("F D", RANDOM),
        "value.weight": ("D F", OUTPUT),
    }

    GROUPS: ClassVar[dict[str, str]] = {"mu": VECTOR}

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        hidden = config.hidden_channels
        rest = 1 - layer / config.num_layers
        self.mu = parameter(1 - (torch.arange(D, device="cpu") / D) ** rest**4)
        self.key = linear(D, hidden, 1.0)
        self.value = linear(hidden, D, 0.0)

    def forward(
        self, x: Tensor, shift: Tensor, packing: Packing | None = None, backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Return y [B, T, D] and the new shift [B, D]; x [B, T, D], the carried shift [B, D]."""
        mu, dtype = self.mu.unsqueeze(0), self.key.weight.dtype
        hidden = self.key(token_shift(x, shift, mu, packing, backend, dtype)[0])
        y = self.value(fused.relu_squared(hidden, fused=fused.can_fuse(hidden, backend)))
        return y, x[:, -1].clone()
