"""The Transformer's two layers: causal attention with rotary positions and a feed-forward layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metastate.config import ModelConfig
from metastate.layers.common import OUTPUT, RANDOM, Growth, normal_

MIN_CAPACITY = 64  # tokens; below it a buffer is not worth growing in small steps
_CLAIM = threading.Lock()  # two threads may go on from one state


class _Watermark:
    """How many tokens of a shared buffer are written; the state that ends there owns the rest."""

    def __init__(self, filled: int) -> None:
        self.filled = filled

    def claim(self, start: int, end: int) -> bool:
        """Take the places of tokens start to end, for one state alone; False where others did."""
        with _CLAIM:
            is_free = self.filled == start
            self.filled = end if is_free else self.filled
            return is_free


@dataclass(frozen=True, eq=False)
class AttentionState:
    """The key-value cache of one attention layer; it grows with every token.

    The buffers may be longer than `length` and shared with other states. A state never reads beyond
    its own length, and writes in place only if nobody has written behind its last token before it,
    so what an older state (or a fork) sees never changes and decoding still appends in amortised
    constant time.

    Attributes:
        keys: rotated keys, [B, H, capacity, N].
        values: [B, H, capacity, N].
        start: [B] int64, the first position that row b still sees (its document starts there);
            None means 0 in every row.
        length: number of tokens held; the capacity unless given.
    """

    keys: Tensor
    values: Tensor
    start: Tensor | None = None
    length: int = -1
    watermark: _Watermark = field(default_factory=lambda: _Watermark(-1), repr=False)

    def __post_init__(self) -> None:
        if self.length < 0:
            object.__setattr__(self, "length", self.keys.shape[2])
        if self.watermark.filled < 0:
            self.watermark.filled = self.length

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_heads: int,
        head_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> AttentionState:
        """Return the state before the first token."""
        keys = torch.empty(batch_size, num_heads, 0, head_size, device=device, dtype=dtype)
        return cls(keys, torch.empty_like(keys))

    def visible(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of this state's own tokens, [B, H, length, N] each."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def map(self, fn: Callable[[Tensor], Tensor]) -> AttentionState:
        """Apply `fn` to every tensor, the buffers cut to `length` first; `fn` keeps the time axis.

        `map(torch.Tensor.detach)`, `map(torch.clone)`, `map(lambda t: t[rows])` are the uses.
        """
        keys, values = self.visible()
        start = None if self.start is None else fn(self.start)
        return AttentionState(fn(keys), fn(values), start)

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys and values that some later token can still see."""
        rows, heads, _, size = self.keys.shape
        tokens = rows * self.length - (0 if self.start is None else int(self.start.sum()))
        return 2 * tokens * heads * size * self.keys.element_size()

    def append(self, k: Tensor, v: Tensor, start: Tensor | None) -> AttentionState:
        """Return the state with the tokens of k and v, [B, H, T, N] each, behind its own.

        With gradients enabled the buffers are built anew, since a write in place would change what
        the backward pass needs.
        """
        if torch.is_grad_enabled():
            old_k, old_v = self.visible()
            keys = torch.cat([old_k.to(k), k], 2) if self.length else k
            values = torch.cat([old_v.to(v), v], 2) if self.length else v
            return AttentionState(keys, values, start)
        keys, values, watermark = self.keys, self.values, self.watermark
        length = self.length + k.shape[2]
        # torch refuses to write into a tensor of inference mode outside of it.
        may_write = torch.is_inference_mode_enabled() or not keys.is_inference()
        fits = length <= keys.shape[2] and keys.dtype == k.dtype and may_write
        if not (fits and watermark.claim(self.length, length)):
            # A first prefill gets exactly its size; growing by half keeps appending amortised.
            spare = max(self.length // 2, MIN_CAPACITY) if self.length else 0
            shape = (*k.shape[:2], max(length, self.length + spare), k.shape[3])
            old_k, old_v = self.visible()
            keys, values = k.new_empty(shape), v.new_empty(shape)
            keys[:, :, : self.length], values[:, :, : self.length] = old_k, old_v
            watermark = _Watermark(length)
        keys[:, :, self.length : length] = k
        values[:, :, self.length : length] = v
        return AttentionState(keys, values, start, length, watermark)


def rotary_table(
    length: int, first: int, head_size: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of the angles p theta^(-2 i / N), [length, N/2], p = first, first + 1, ...

    Angles are float64: at p = 100,000 a float32 angle is already wrong in the third decimal. The
    cache lets all layers of a forward pass share one table; tensors of `torch.export`, which have
    no values, are not kept.
    """
    is_real = type(torch.empty(0, device="meta")) is Tensor
    make = _rotary_table if is_real else _rotary_table.__wrapped__
    return make(length, first, head_size, theta, dtype, device)


@lru_cache(maxsize=8)
def _rotary_table(
    length: int, first: int, head_size: int, theta: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the table outlives the caller's mode
        position = torch.arange(first, first + length, device=device, dtype=torch.float64)
        index = torch.arange(0, head_size, 2, device=device, dtype=torch.float64)
        angle = torch.outer(position, theta ** (-index / head_size))
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + n/2) of x [..., T, N] by the angles of `rotary_table`, [T, n/2].

    Channels from n on stay. Source: RoFormer, arXiv:2104.09864, eq 34, with the half-split pairing
    of GPT-NeoX.
    """
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Sight:
    """Which tokens every query of a pass sees: the same in all layers, so it is made once.

    Attributes:
        starts: the first position that each query sees, [B, T] or [B, 1] int64; None means 0.
        mask: bool, True where a query sees a key, [T, past + T] or [B, 1, T, past + T]; None where
            causal attention says it all.
    """

    starts: Tensor | None = None
    mask: Tensor | None = None
    _biases: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls, length: int, state: AttentionState | None, resets: Tensor | None, device: torch.device
    ) -> Sight:
        """Compute it for T = `length` queries.

        Args:
            length: T.
            state: of any layer before the first query; None means that nothing was read.
            resets: [B, T] bool, True where a document starts: earlier tokens, also those of
                `state`, are hidden from there on. None means nowhere.
            device: where the masks are made.
        """
        past, start = (0, None) if state is None else (state.length, state.start)
        if resets is not None and past == 0 and not resets[:, 1:].any():
            resets = None  # only whole rows start a document: causal attention is the same
        position = torch.arange(past + length, device=device)
        starts = None if start is None else start[:, None]
        if resets is not None:
            own = torch.where(resets, position[past:], 0).cummax(1).values
            starts = own if starts is None else torch.maximum(own, starts)
        mask = None
        if starts is not None or (past and length > 1):
            mask = position <= position[past:, None]  # [T, past + T]
            if starts is not None:
                mask = mask & (position >= starts[:, None, :, None])  # [B, 1, T, past + T]
        return cls(starts, mask)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return 0 where a query sees a key and -inf elsewhere, None where `mask` is.

        Attention makes this of a mask in any case, once a layer, and keeps it for its backward
        pass: [B, 1, T, T] numbers a layer, where one for all will do.
        """
        if self.mask is None:
            return None
        if dtype not in self._biases:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._biases[dtype] = bias.masked_fill_(~self.mask, -torch.inf)
        return self._biases[dtype]


class Attention(nn.Module):
    """Causal self-attention with rotary positions.

    q, k, v = x W_qkv;  y_t = sum_s softmax_{s <= t}(R_t q_t (R_s k_s)^T / sqrt(N)) v_s
    o = concat_h(y) W_o;  R_t the rotation of position t

    Source: arXiv:1706.03762 with arXiv:2104.09864; the arrangement of GPT-2, without biases.
    """

    GROWS: ClassVar[dict[str, Growth]] = {"output.weight": ("D H N", OUTPUT)}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_size = config.attention_size // config.num_heads
        self.theta = config.rope_theta
        self.rotary_size = self.head_size
        self.build(config)

    def build(self, config: ModelConfig) -> None:
        """Make the projections."""
        output = nn.Linear(config.attention_size, config.hidden_size, bias=False)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.attention_size, bias=False)
        self.output: nn.Module = output
        init_gpt(self.qkv, output, config)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v of x, [B, H, T, N] each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_size))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(
        self, x: Tensor, state: AttentionState | None = None, sight: Sight | None = None
    ) -> tuple[Tensor, AttentionState]:
        """Attend from every token to the tokens of its document up to itself.

        Args:
            x: [B, T, D], T >= 1.
            state: what came before; None means nothing. It is not changed.
            sight: which tokens these see, of this state; None means that no document starts here.

        Returns:
            o [B, T, D] in x's dtype (under autocast in its own), and the state after the end.
        """
        batch, length, _ = x.shape
        heads = (batch, self.num_heads, self.head_size)
        past = 0 if state is None else state.length
        q, k, v = self.project(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        table = rotary_table(length, past, self.rotary_size, self.theta, dtype, x.device)
        q, k = rotate(q, *table), rotate(k, *table)

        if sight is None:
            sight = Sight.of(length, state, None, x.device)
        if state is None:
            state = AttentionState.empty(*heads, device=k.device, dtype=k.dtype)
        state = state.append(k, v, None if sight.starts is None else sight.starts[:, -1])
        keys, values = state.visible()
        bias = sight.bias(q.dtype)
        # T = 1 without a mask sees everything, and CPU and GPU take their flash kernels.
        y = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=bias, is_causal=bias is None and length > 1
        )
        return self.output(y.transpose(1, 2).reshape(batch, length, -1)), state


class Mlp(nn.Module):
    """Feed-forward layer, y = gelu(x W_k) W_v; width `ffn_size`, 4 D unless the config gives it."""

    GROWS: ClassVar[dict[str, Growth]] = {
        "key.weight": ("F D", RANDOM),
        "value.weight": ("D F", OUTPUT),
    }

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.hidden_channels
        self.key = nn.Linear(config.hidden_size, size, bias=False)
        self.value = nn.Linear(size, config.hidden_size, bias=False)
        init_gpt(self.key, self.value, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return gelu(x W_k) W_v for x [..., D]."""
        return self.value(F.gelu(self.key(x)))


def init_gpt(inner: nn.Linear, output: nn.Linear, config: ModelConfig) -> None:
    """Initialise normal with std 1/sqrt(fan-in), the residual output 1/sqrt(2 L) of it.

    GPT-2's 0.02 is this rule at width 2,500. At our small widths it is far too small and would make
    a weak baseline: byte-level Tiny Shakespeare, D 128, L 4, 400 steps of 16 x 128, training loss
    2.029 -> 1.934 nats at learning rate 1e-3 and 1.891 -> 1.857 at 3e-3.
    """
    normal_(inner.weight, inner.in_features**-0.5)
    normal_(output.weight, (output.in_features * 2 * config.num_layers) ** -0.5)
