"""How a reader of kept states hands its gradient to the one backward pass of the recurrence.

A reader does not run a backward pass of its own: the forward op also returns three `link` tensors
without content, the read op takes them as inputs, and what it hands back as their gradients is the
rank-one gradient of every state:

    by key    e_t = x_t S_t^T:   dL/dS_t += de_t^T x_t
    by value  e_t = x_t S_t:     dL/dS_t += x_t^T de_t

as (value side, key side, sum_i S_ij (dL/dS)_ij of the term). The one backward pass adds it in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def make_links(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors of `like`'s shape that take no memory; only their gradients matter."""
    links = [like.new_zeros(()).expand(like.shape) for _ in range(3)]
    return links[0], links[1], links[2]


def differentiable(*tensors: Tensor) -> bool:
    """Say whether a custom op is needed; without gradients a plain call saves its overhead."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let what `backward` of an autograd function returns raise where it is differentiated.

    torch's own decorator does so only where the gradient that comes in depends on something; what
    the function saved would be taken for constants, and a second derivative be silently wrong.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def raising(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():  # only while the gradients' own graph is made
            grads = tuple(grad.detach().requires_grad_() for grad in grads)
        return once(ctx, *grads)

    return raising
