"""The recurrence over a sequence whose tokens are split over processes, all at work at once.

The tokens of one rank act on the state as an affine map, whatever it is before them:

    S_out = S_in A + B      A [N, N] the product of their transitions G_t,  B what they wrote

So every rank computes its A and B from nothing, all exchange them, each composes the maps of the
ranks before it into its own S_in, and runs the ordinary recurrence from there. A rank gives 2 N^2
numbers a head and sequence, however many tokens it has, and gets as many back as gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from metastate import ops
from metastate.ops.links import differentiable_once
from metastate.ops.reference import without_autocast


def wkv7_context_parallel(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    *,
    group: dist.ProcessGroup,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run `ops.wkv7` over a sequence of which every rank of `group` holds a stretch of tokens.

    Args:
        r: receptance of this rank's tokens, [B, T, H, N]; the stretches follow each other in the
            order of the ranks and may differ in T. Likewise the next five.
        log_w: log decay.
        k: replacement key.
        v: value.
        kappa: removal key.
        a: in-context learning rate.
        state: state before the first token of all, [B, H, N, N], the same on every rank; None means
            zeros. Its gradient is the sum of what the ranks get.
        group: the ranks that share the sequence.
        backend: of `ops.wkv7`.

    Returns:
        y [B, T, H, N] of this rank's tokens, and the state after them; the last rank's is the
        sequence's.

    Raises:
        ShapeError, ConfigError: as `ops.wkv7`.
    """

    def write(v: Tensor, state: Tensor | None) -> Tensor:
        return ops.wkv7(r, log_w, k, v, kappa, a, state, backend=backend)[1]

    B = write(v, None)
    if state is None:
        state = torch.zeros_like(B)
    state = state_before(write(torch.zeros_like(v), unit_state(B)), B, state.to(B), group)
    return ops.wkv7(r, log_w, k, v, kappa, a, state, backend=backend)


def unit_state(like: Tensor) -> Tensor:
    """Return the identity as a state like `like` [n, H, N, N]: tokens that write nothing make A."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand(like.shape)


@without_autocast
def state_before(A: Tensor, B: Tensor, state: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the state before this rank's first token; every rank of `group` must call it.

    S_0 = state;  S_{i+1} = S_i A_i + B_i over the ranks i before this one

    Args:
        A: product of this rank's transitions, [n, H, N, N].
        B: this rank's state after its tokens when it started from zeros, like A.
        state: the state before the first token of all, like A, the same on every rank.
        group: the ranks that share the sequences.
    """
    return _StateBefore.apply(A, B, state, group)  # type: ignore[no-untyped-call]


def last_before(x: Tensor, first: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what the rank before this one gave as x; `first` on the first rank.

    Args:
        x: any shape, the same on every rank: the last input of this rank's tokens.
        first: like x; only the first rank's is used.
        group: the ranks that share the sequences; every one of them must call it.
    """
    return _LastBefore.apply(x, first.to(x.dtype), group)  # type: ignore[no-untyped-call]


def of_last(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the last rank's x on every rank, without gradient."""
    x = x.detach().clone()
    dist.broadcast(x, dist.get_global_rank(group, group.size() - 1), group)
    return x


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return every rank's x, [P, ...]."""
    out = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(out.unbind()), x.contiguous(), group)
    return out


def _sum_of_mine(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over ranks of their x[i], i this rank; x [P, ...]."""
    out = torch.empty_like(x[0])
    dist.reduce_scatter(out, list(x.contiguous().unbind()), group=group)
    return out


# One autograd function each, so that every rank takes part in the backward exchange too: composed
# of smaller ones the first rank, whose state depends on nobody's, would never enter it.
class _StateBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, state: Tensor, group: Any) -> Tensor:
        maps = _gather(torch.stack([A, B]), group)[: group.rank()]
        states = [state]
        for A, B in maps:
            states.append(states[-1] @ A + B)
        ctx.save_for_backward(maps, torch.stack(states))
        ctx.group = group
        return states[-1].clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, states = ctx.saved_tensors
        out = grad.new_zeros(ctx.group.size(), 2, *grad.shape)
        for i in reversed(range(len(maps))):
            out[i, 0], out[i, 1] = states[i].mT @ grad, grad
            grad = grad @ maps[i, 0].mT
        dA, dB = _sum_of_mine(out, ctx.group)
        return dA, dB, grad, None


class _LastBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, first: Tensor, group: Any) -> Tensor:
        ctx.group = group
        everyone = _gather(x, group)
        return everyone[group.rank() - 1].clone() if group.rank() else first.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank = ctx.group.rank()
        out = grad.new_zeros(ctx.group.size(), *grad.shape)
        if rank:
            out[rank - 1] = grad
        return _sum_of_mine(out, ctx.group), None if rank else grad, None
