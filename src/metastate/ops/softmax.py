"""What a head's softmax expects, over a vocabulary too large to hold its logits for all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metastate.ops.links import differentiable_once

LOGITS = 2**25  # logits of one chunk: 128 MiB in float32
FLOAT16_ROWS = 512  # of a chunk in float16, which holds their sum where features are below 128


def chunk_of(x: Tensor, weight: Tensor) -> tuple[torch.dtype, torch.dtype, int]:
    """Return in which dtypes to multiply features [n, D] by a head [V, D] and to sum, and rows.

    Products are in autocast's dtype where that is on, sums in float32 or float64; so many rows'
    logits are held at once.
    """
    kind = x.device.type
    product = torch.promote_types(x.dtype, weight.dtype)
    if torch.is_autocast_enabled(kind) and product != torch.float64:
        product = torch.get_autocast_dtype(kind)
    rows = max(1, min(len(x), LOGITS // len(weight)))
    if product == torch.float16:
        rows = min(rows, FLOAT16_ROWS)
    return product, torch.promote_types(product, torch.float32), rows


def expected_row(x: Tensor, weight: Tensor) -> Tensor:
    """Return the row of `weight` that is expected where the next token is drawn from the softmax.

    m = p W,   p = softmax(x W^T)

    so that, y the token that comes, W[y] - m is minus the gradient of -log p(y) with respect to x.
    Logits are made a chunk of rows at a time, and once more in the backward pass:

    dz = p * (dm W^T - dm . m),   dx = dz W,   dW = dz^T x + p^T dm

    Args:
        x: [n, D] features, any float dtype.
        weight: [V, D].

    Returns:
        m [n, D], float32, or float64 for float64 inputs. A second derivative raises RuntimeError.
    """
    return _ExpectedRow.apply(x, weight)  # type: ignore[no-untyped-call]


class _ExpectedRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        product, exact, rows = chunk_of(x, weight)
        out = x.new_empty(x.shape, dtype=exact)
        with torch.autocast(x.device.type, enabled=False):
            W = weight.to(product)
            for i in range(0, len(x), rows):
                p = _probabilities(x[i : i + rows], W, exact)
                out[i : i + rows] = p.to(product) @ W
        ctx.save_for_backward(x, weight, out)
        ctx.chunk = product, exact, rows
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight, out = ctx.saved_tensors
        product, exact, rows = ctx.chunk
        need_x, need_weight = ctx.needs_input_grad
        dx = torch.empty_like(x) if need_x else None
        dW = torch.zeros_like(weight, dtype=exact) if need_weight else None
        with torch.autocast(x.device.type, enabled=False):
            W = weight.to(product)
            inner = (grad * out).sum(1, keepdim=True)
            for i in range(0, len(x), rows):
                part, dm = x[i : i + rows].to(product), grad[i : i + rows].to(product)
                p = _probabilities(part, W, exact)
                dz = (dm @ W.T).to(exact).sub_(inner[i : i + rows]).mul_(p).to(product)
                if dx is not None:
                    dx[i : i + rows] = dz @ W
                if dW is not None:
                    dW += dz.T @ part
                    dW += p.to(product).T @ dm
        return dx, None if dW is None else dW.to(weight.dtype)


def _probabilities(x: Tensor, W: Tensor, exact: torch.dtype) -> Tensor:
    p = (x.to(W.dtype) @ W.T).to(exact)  # in place: fresh memory costs more than the arithmetic
    p.sub_(p.amax(-1, keepdim=True)).exp_()
    return p.div_(p.sum(-1, keepdim=True))
