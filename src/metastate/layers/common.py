"""What every layer shares: optimizer groups, document packing, token shift, per-segment norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from metastate.ops import context, fused

# Optimizer groups. A layer's GROUPS names one for each parameter that it owns.
MATRIX = "matrix"  # weight decay, learning rate x 1
VECTOR = "vector"  # no weight decay, learning rate x 1
DECAY_BASE = "decay_base"  # no weight decay, learning rate x 2 (w0 of RWKV-7)

# Growth. A layer's GROWS names the axes of each parameter that growth lengthens (H heads, N
# channels of a head, P parameter tokens, F hidden channels or slots, A attention slots; other
# letters stay) and what new entries hold.
Growth = tuple[str, str]
RANDOM = "random"  # what a new layer starts from: nothing old reads these entries
OUTPUT = "output"  # zero, in new blocks too: what reads new channels into the residual stream
ZERO = "zero"  # zero in old blocks: what adds to an old head's state
IDENTITY = "identity"  # as KEY; where the parent has no such parameter it had the identity
KEY = "key"  # zero where an old head gets a new channel: the old state must not be written there


def declared_groups(module: nn.Module) -> dict[str, str]:
    """Return what a module's GROUPS says; torch's own modules have none, so theirs stand here."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return {"weight": MATRIX}
    if isinstance(module, nn.LayerNorm):
        return {"weight": VECTOR, "bias": VECTOR}
    return getattr(module, "GROUPS", {})


@dataclass(frozen=True)
class Packing:
    """Where documents start inside a [B, T] batch; sequences are counted row after row.

    Attributes:
        resets: [B, T] bool, True where a document starts.
        cu_seqlens: [n + 1] int64 offsets of the n sequences in the flattened [B * T] tokens. A row
            start is always an offset; it resets the state only where `resets` says so.
        first: [B] int64, the index of the sequence that starts row b.
        last: [B] int64, the index of the sequence that ends row b.
        start: one row whose S and M a document of this layer starts from; None means the layer's
            own S_0, and M zero.
        group: the ranks that share the rows, each T tokens of them; None where rows are whole.
    """

    resets: Tensor
    cu_seqlens: Tensor
    first: Tensor
    last: Tensor
    start: RecurrentState | None = None
    group: dist.ProcessGroup | None = None

    @classmethod
    def from_resets(cls, resets: Tensor, group: dist.ProcessGroup | None = None) -> Packing:
        """Compute the offsets once for all layers from `resets` [B, T] bool."""
        batch, length = resets.shape
        starts = resets.clone()
        starts[:, 0] = True
        places = starts.flatten().nonzero().flatten()  # the one value a forward pass waits for
        cu_seqlens = torch.cat([places, places.new_full((1,), batch * length)])
        last = starts.sum(1).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        return cls(resets, cu_seqlens, first, last, group=group)

    def initial(self, state: Tensor, fresh: Tensor) -> Tensor:
        """Return one initial state a sequence, [n, ...].

        `state` [B, ...] is what row b carries in, `fresh` [...] what a new document starts from.
        """
        n = self.cu_seqlens.numel() - 1
        out = fresh.to(state).expand(n, *fresh.shape)
        keep = ~self.resets[:, 0]
        rows = torch.where(keep.view(-1, *[1] * fresh.dim()), state, fresh.to(state))
        return out.index_copy(0, self.first, rows)


@dataclass(frozen=True)
class RecurrentState:
    """What one recurrent block carries from token to token; constant in size.

    Attributes:
        S: WKV state, [B, H, N_v, N_k], float32 (float64 in a float64 model).
        time_shift: the last input of time mixing, [B, D].
        M: meta state, [B, H, N_v, N_k], or None where the block has none.
        channel_shift: the last input of the second layer, [B, D], or None where it has no shift.
    """

    S: Tensor
    time_shift: Tensor
    M: Tensor | None = None
    channel_shift: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> RecurrentState:
        """Return a state whose tensors are `fn` of this one's."""
        fields = (None if x is None else fn(x) for x in vars(self).values())
        return RecurrentState(*fields)  # type: ignore[arg-type]

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(x.nbytes for x in vars(self).values() if x is not None)


def token_shift(
    x: Tensor,
    last: Tensor,
    mu: Tensor,
    packing: Packing | None,
    backend: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return x_t + (x_{t-1} - x_t) mu_i for every row of mu [I, D]; `last` [B, D] is x_{-1}.

    `dtype` of the results, None for x's: for results that nothing but products meet, which would
    round them to the dtype of the layer's matrices anyway.
    """
    resets = None if packing is None else packing.resets
    if packing is not None and packing.group is not None:
        last = context.last_before(x[:, -1], last, packing.group)
    return fused.token_mix(x, last, mu, resets, dtype=dtype, fused=fused.can_fuse(x, backend))


def handed_on(
    write: Callable[[Tensor, Tensor], Tensor],
    value: Tensor,
    state: Tensor,
    fresh: Tensor,
    packing: Packing | None,
) -> Tensor:
    """Return the states before this rank's tokens, [B, H, N, N]: `state` where rows are whole.

    Args:
        write: (what the tokens write [B, T, H, N], one state a sequence) -> the states after them;
            it must be affine in the two together, and writing zeros must write nothing.
        value: what the tokens write.
        state: the states before the first token of all, [B, H, N, N].
        fresh: what a new document starts from, [H, N, N].
        packing: where documents start, and the ranks that share the rows.
    """
    if packing is None or packing.group is None:
        return state
    none = torch.zeros_like(state)
    B = last_of_rows(write(value, packing.initial(none, fresh)), packing)
    # A document that starts here cuts the row off from what came before: its A is zero.
    unit = packing.initial(context.unit_state(none), none[0])
    A = last_of_rows(write(torch.zeros_like(value), unit), packing)
    return context.state_before(A, B, state, packing.group)


def last_of_rows(state: Tensor, packing: Packing | None) -> Tensor:
    """Return the states that the rows end with, [B, ...], from one state a sequence."""
    return state if packing is None else state[packing.last]


def segment_norm(x: Tensor, kind: str, segments: tuple[int, ...]) -> Tensor:
    """Normalise x [..., N] by growth segment: `l2` x/|x|, `rms` x/sqrt(mean x^2), `none` x."""
    if kind == "none":
        return x
    parts = []
    for part in x.split(segments, -1):
        unit = F.normalize(part, dim=-1)
        parts.append(unit if kind == "l2" else unit * part.shape[-1] ** 0.5)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


class GroupNorm(nn.Module):
    """Affine group norm over each head and growth segment of [B, T, H, N].

    y = (x - mean) / sqrt(var + eps) * weight + bias, mean and var over one segment of one head.
    """

    GROUPS: ClassVar[dict[str, str]] = {"weight": VECTOR, "bias": VECTOR}

    def __init__(
        self, num_heads: int, segments: tuple[int, ...], eps: float = 64e-5, gain: float = 1.0
    ) -> None:
        super().__init__()
        size = num_heads * sum(segments)
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.bias = nn.Parameter(torch.zeros(size))
        self.num_heads, self.segments, self.eps = num_heads, segments, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x, [B, T, H * N]."""
        batch, length, heads, size = x.shape
        if len(self.segments) == 1 and batch * length * size > 1:  # torch refuses a single value
            flat = x.reshape(batch * length, heads * size)
            y = F.group_norm(flat, heads, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
            return y.view(batch, length, heads * size)
        parts = [F.layer_norm(p, p.shape[-1:], eps=self.eps) for p in x.split(self.segments, -1)]
        return torch.cat(parts, -1).flatten(2) * self.weight + self.bias


class LowRank(nn.Module):
    """Low-rank map f(x A) B (+ bias), A [D, rank], B [rank, out]; `loramlp` of RWKV-7."""

    GROUPS: ClassVar[dict[str, str]] = {"A": VECTOR, "B": VECTOR, "bias": VECTOR}

    def __init__(self, size: int, rank: int, out: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(size, rank))
        self.B = nn.Parameter(torch.empty(rank, out))
        self.bias: Any = None if bias is None else parameter(bias)
        orthogonal_(self.B, 0.1 * max(1.0, rank / out) ** 0.5)

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return activation(x A) B, [..., out]; the caller adds the bias."""
        hidden = x @ self.A
        return (hidden if activation is None else activation(hidden)) @ self.B


# A model is often built on the meta device, for its shapes alone. Arithmetic there, and drawing,
# would import torch's compiler, which takes longer than loading a small model: so first values are
# computed on the CPU, and nothing is drawn.


def parameter(x: Tensor) -> nn.Parameter:
    """Return x, which was computed on the CPU, as a parameter on the default device."""
    return nn.Parameter(x.to(torch.get_default_device()))


def normal_(x: Tensor, std: float) -> Tensor:
    """Fill x with normal values; nothing is drawn on the meta device."""
    return x if x.is_meta else nn.init.normal_(x, std=std)


def orthogonal_(x: Tensor, gain: float) -> None:
    """Fill x with an orthogonal matrix times `gain`; nothing is drawn on the meta device."""
    if not x.is_meta:
        exact = torch.empty_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
        nn.init.orthogonal_(exact, gain)
        with torch.no_grad():
            x.copy_(exact)  # QR knows no half precision


def low_rank_size(given: int | None, factor: float, size: int, head_size: int = 64) -> int:
    """Return `given`, or RWKV-7's rank: factor sqrt(D) N/64, rounded to 32, at least 32."""
    return given or max(32, round(factor * size**0.5 * head_size / 64 / 32) * 32)


def is_plain(module: nn.Module) -> bool:
    """Say whether a module does what its class's `forward` says and nothing else.

    No hook, no `forward` of its own, not moved about by accelerate; a Linear also without a bias.
    An adapter, a quantised or parametrized layer is of another class, which is the caller's to see.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")
    biased = type(module) is nn.Linear and module.bias is not None
    return not (hooks or biased or "forward" in vars(module))


def linear(size_in: int, size_out: int, gain: float) -> nn.Linear:
    """Return a bias-free nn.Linear with an orthogonal weight times `gain`; zero where gain is 0."""
    layer = nn.Linear(size_in, size_out, bias=False, device="meta")  # without torch's first values
    layer.weight = nn.Parameter(torch.empty(size_out, size_in))
    if gain == 0:
        nn.init.zeros_(layer.weight)
    else:
        orthogonal_(layer.weight, gain)
    return layer
