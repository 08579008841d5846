"""One block of each architecture: x = x + mix(ln1(x)); x = x + second(ln2(x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metastate.config import ModelConfig
from metastate.layers.attention import Attention, AttentionState, Mlp, Sight
from metastate.layers.channel_mix import ChannelMix
from metastate.layers.common import Packing, RecurrentState
from metastate.layers.meta_state import MetaState
from metastate.layers.pattention import PattentionAttention, feed_forward
from metastate.layers.time_mix import TimeMix


class RecurrentBlock(nn.Module):
    """Time mixing, then the Meta-State layer, RWKV-7's channel mixing, or both.

    x = x + TimeMix(ln1(x))                                  also yields the WKV trajectory S_t
    x = x + MetaState(ln2(x), S_t);  x = x + ChannelMix(ln3(x))             `ffn_order="after"`
    x = x + MetaState(ln2(x), S_t) + ChannelMix(ln2(x))                     `ffn_order=None`
    x = x + ChannelMix(ln2(x))       RWKV-7; either layer only where `second_layers` says so
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.ln1 = nn.LayerNorm(config.hidden_size)
        self.time_mix = TimeMix(config, layer)
        self.ln2 = nn.LayerNorm(config.hidden_size)
        has_meta_state, has_channel_mix = config.second_layers(layer)
        self.meta_state = MetaState(config) if has_meta_state else None
        self.channel_mix = ChannelMix(config, layer) if has_channel_mix else None
        is_after = config.ffn_order == "after" and has_meta_state and has_channel_mix
        self.ln3 = nn.LayerNorm(config.hidden_size) if is_after else None

    def init_state(self, batch_size: int) -> RecurrentState:
        """Return the state before the first token: S_0, everything else zero."""
        config, weight = self.config, self.ln1.weight
        S = self.time_mix.initial_state()
        S = S.expand(batch_size, *S.shape).clone()  # rows of their own: a caller may write to one
        has_M = self.meta_state is not None and self.meta_state.has_meta
        has_shift = self.channel_mix is not None or config.meta_state.token_shift
        last, shift = (weight.new_zeros(batch_size, config.hidden_size) for _ in range(2))
        M = torch.zeros_like(S) if has_M else None
        return RecurrentState(S, last, M, shift if has_shift else None)

    def forward(
        self,
        x: Tensor,
        state: RecurrentState | None,
        v_first: Tensor | None,
        packing: Packing | None,
        backend: str,
        state_only: bool = False,
    ) -> tuple[Tensor, RecurrentState, Tensor | None, Tensor | None]:
        """Return x [B, T, D], the new state, layer 0's v for the layers above, and a KL term.

        With `state_only` x is not what the block computes: channel mixing, whose state is nothing
        but its last input, is left out.

        The state before the first token is made here if it is None: only while a sharded block
        runs are its weights, parameter tokens among them, whole.
        """
        state = self.init_state(len(x)) if state is None else state
        y, S, time_shift, v_first, trajectory = self.time_mix(
            self.ln1(x), state.S, state.time_shift, v_first, packing, backend
        )
        x = x + y
        M, shift, kl = None, None, None
        z = self.ln2(x)
        if self.meta_state is not None:
            asks = self.config.meta_state.asks_by_receptance
            q = self.time_mix.receptance(z) if asks else None
            y, M, shift, kl = self.meta_state(
                z, trajectory, state.M, state.channel_shift, packing, backend, q
            )
            x = x + y
        if self.channel_mix is not None:
            z = z if self.ln3 is None else self.ln3(x)
            if state_only:
                return x, RecurrentState(S, time_shift, M, z[:, -1].clone()), v_first, kl
            y, shift = self.channel_mix(z, state.channel_shift, packing, backend)
            x = x + y
        return x, RecurrentState(S, time_shift, M, shift), v_first, kl


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward layer; a TokenFormer's norms have no parameters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        slots = config.architecture == "tokenformer"
        self.ln1 = nn.LayerNorm(config.hidden_size, elementwise_affine=not slots)
        self.attention = PattentionAttention(config) if slots else Attention(config)
        self.ln2 = nn.LayerNorm(config.hidden_size, elementwise_affine=not slots)
        self.mlp = feed_forward(config) if slots else Mlp(config)

    def init_state(self, batch_size: int) -> AttentionState:
        """Return an empty key-value cache."""
        weight, layer = next(self.parameters()), self.attention
        return AttentionState.empty(
            batch_size, layer.num_heads, layer.head_size, device=weight.device, dtype=weight.dtype
        )

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None,
        sight: Sight,
        state_only: bool = False,
    ) -> tuple[Tensor, AttentionState]:
        """Return x [B, T, D] and the new cache; None before the first token means an empty one.

        `sight` says which tokens these see, for all blocks.

        With `state_only` x is not what the block computes: the feed-forward layer is left out.
        """
        y, state = self.attention(self.ln1(x), state, sight)
        x = x + y
        return x if state_only else x + self.mlp(self.ln2(x)), state
