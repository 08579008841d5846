"""The surprise memory: a meta state for the whole model, written with what it did not expect.

Sources: the cache of hidden states and of the tokens that followed them (Grave et al.,
arXiv:1612.04426), here of constant size; fast weights and the delta rule (Schlag et al.,
arXiv:2102.11174); writing by surprise (Titans, arXiv:2501.00663), here a token's own logit; dynamic
evaluation (Krause et al., arXiv:1709.07432), whose gradient step on the head it resembles. As a
meta state of this architecture it is ours; docs/log.md has what led to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metastate import ops
from metastate.config import ModelConfig
from metastate.layers.common import OUTPUT, VECTOR, Growth, Packing, handed_on, last_of_rows
from metastate.ops import context, fused

# Near where runs of a quarter of a million parameters ended that had begun elsewhere, rate and gain
# in the older form; the decay where a hundred tokens a parameter took it (docs/log.md).
FIRST_DECAY, FIRST_RATE = -10.0, -2.0  # logits: a half-life of 25,000 tokens, a rate of 0.12
FIRST_GAIN = 1.5
FIRST_LOGIT = -0.5  # a token surprises the less the higher its logit was


@dataclass(frozen=True)
class MemoryState:
    """What the surprise memory carries from token to token; constant in size.

    Attributes:
        M: meta state, [B, H, N_v, N_k], float32 (float64 in a float64 model).
        key: k of the last token, [B, D], like M; zeros before the first.
        features: h of the last token, [B, D], like M.
    """

    M: Tensor
    key: Tensor
    features: Tensor

    def map(self, fn: Callable[[Tensor], Tensor]) -> MemoryState:
        """Return a state whose tensors are `fn` of this one's."""
        return MemoryState(*(fn(x) for x in vars(self).values()))

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(x.nbytes for x in vars(self).values())


class SurpriseMemory(nn.Module):
    """Correct features u by what came, unexpected, after features like them.

    k_t  = unit((h_t + c) * d)  per head            h = ln(u); H = `memory_heads`, N = D / H
    s_t  = 2 sigmoid(l h_{t-1} . W[x_t] + p . h_{t-1} + q . W[x_t] + b)  per head: the surprise
    M_t  = M_{t-1} (diag(w) - k_{t-1}^T (a * k_{t-1})) + (s_t W[x_t])^T k_{t-1}
    u'_t = u_t + concat_h(k_t M_t^T) * g

    u is what enters the block `memory_layer`, and ln a norm of the memory's own; or, where that is
    None, what the head reads, u = h = ln_out(x).

    The token x_t is the last one read, so nothing looks ahead; W [V, D] are the weights of the
    head. M associates what came with the features that it came after, the more the less it was
    expected, as its own logit tells, and the rate a takes away what M held of it already. c, d, w,
    a and g [D], l and b (a number for every head), p and q ([D] for every head) are learned and the
    same for all tokens. M has as many numbers as one block's S at the same head size.

    Gradient descent on -log p(x_t) by a matrix that corrects h would write
    W[x_t] - softmax(h_{t-1} W^T) W, for two more readings of the head; the share of it that lies
    along W[x_t] is the probability of any other token, for which s_t stands. It was measured, and
    is no better (docs/log.md).
    """

    # A model that is given a memory is not corrected by it at first.
    GROWS: ClassVar[dict[str, Growth]] = {"gain": ("D", OUTPUT)}
    GROUPS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("center", "scale", "decay", "rate", "gain", "logit", "place", "token", "bias"), VECTOR
    )

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.memory_heads is not None
        D = config.hidden_size
        self.num_heads, self.head_size = config.memory_heads, D // config.memory_heads
        self.norm = None if config.memory_layer is None else nn.LayerNorm(D)
        self.center = nn.Parameter(torch.zeros(D))
        self.scale = nn.Parameter(torch.ones(D))
        self.decay = nn.Parameter(torch.full((D,), FIRST_DECAY))
        self.rate = nn.Parameter(torch.full((D,), FIRST_RATE))
        self.gain = nn.Parameter(torch.full((D,), FIRST_GAIN))
        self.logit = nn.Parameter(torch.full((self.num_heads,), FIRST_LOGIT))
        self.place = nn.Parameter(torch.zeros(self.num_heads, D))
        self.token = nn.Parameter(torch.zeros(self.num_heads, D))
        self.bias = nn.Parameter(torch.zeros(self.num_heads))

    def init_state(self, batch_size: int) -> MemoryState:
        """Return the state before the first token: zeros."""
        H, N = self.num_heads, self.head_size
        dtype, device = ops.state_dtype(self.gain.dtype), self.gain.device
        zeros = torch.zeros(batch_size, H * N, dtype=dtype, device=device)
        return MemoryState(zeros.new_zeros(batch_size, H, N, N), zeros, zeros.clone())

    def log_w(self) -> Tensor:
        """Return the log decay of every channel, [D]: -exp(-0.5) sigmoid(decay)."""
        return fused.DECAY_SCALE * torch.sigmoid(self.decay.to(ops.state_dtype(self.decay.dtype)))

    def surprise(self, before: Tensor, row: Tensor) -> Tensor:
        """Return s of each head, [..., H] from 0 to 2, for W[x_t] after the features h_{t-1}.

        Both are [..., D]; s has the dtype of `row`, in which the weights are read.
        """
        weights = (self.logit, self.place, self.token, self.bias)
        logit, place, token, bias = (p.to(row.dtype) for p in weights)
        z = (before * row).sum(-1, keepdim=True) * logit + F.linear(before, place, bias)
        return 2 * torch.sigmoid(z + F.linear(row, token))

    def forward(
        self,
        u: Tensor,
        tokens: Tensor,
        weight: Tensor,
        state: MemoryState | None,
        packing: Packing | None = None,
        start: MemoryState | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, MemoryState]:
        """Return u [B, T, D], corrected, and the state after the last token.

        Args:
            u: [B, T, D].
            tokens: [B, T], those that led to u.
            weight: of the head, [V, D].
            state: before token 0; None means nothing was read.
            packing: where documents start; None means nowhere.
            start: one row whose M documents start from; None means zeros.
            backend: of metastate.ops.

        Raises:
            ConfigError: heads wider than the backend takes.
        """
        h = u if self.norm is None else self.norm(u)
        batch, length, D = h.shape
        heads = (batch, length, self.num_heads, self.head_size)
        dtype = ops.state_dtype(h.dtype)
        state = (self.init_state(batch) if state is None else state).map(lambda x: x.to(dtype))
        first = (self.init_state(1) if start is None else start).M[0].to(dtype)
        exact = h.to(dtype)
        z = ((exact + self.center) * self.scale).view(heads)
        key = fused.unit(z, fused=fused.can_fuse(z, backend)).flatten(2)
        before = _before(key, state.key, packing).view(heads)
        # Not weight[tokens], whose gradient several threads add up in the order in which they come.
        row = F.embedding(tokens, weight).to(exact.dtype)
        with torch.autocast(h.device.type, enabled=False):  # a state is never rounded
            s = self.surprise(_before(exact, state.features, packing), row)
        v = row.view(heads) * s[..., None]
        a = torch.sigmoid(self.rate.to(exact.dtype)).view(heads[2:]).expand(heads)
        log_w = self.log_w().view(heads[2:]).expand(heads)
        options: Any = {"backend": backend}
        if packing is not None:
            options |= {"cu_seqlens": packing.cu_seqlens, "offsets_checked": True}

        def run(v: Tensor, M: Tensor) -> tuple[Tensor, Tensor]:
            return ops.wkv7(key.view(heads), log_w, before, v, before, a, M, **options)

        M = handed_on(lambda v, M: run(v, M)[1], v, state.M, first, packing)
        y, final = run(v, M if packing is None else packing.initial(M, first))
        corrected = u.to(dtype) + y.flatten(2) * self.gain
        last = (key[:, -1].clone(), exact[:, -1].clone())  # a view would keep all tokens' alive
        after = MemoryState(last_of_rows(final, packing), *last)
        return corrected.to(u.dtype), after


def _before(x: Tensor, last: Tensor, packing: Packing | None) -> Tensor:
    """Return x [B, T, D] a token later: first `last` [B, D], zeros where a document starts."""
    if packing is not None and packing.group is not None:
        last = context.last_before(x[:, -1], last, packing.group)
    out = torch.cat([last.to(x.dtype)[:, None], x[:, :-1]], 1)
    return out if packing is None else out.masked_fill(packing.resets[..., None], 0)
