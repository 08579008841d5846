"""The elementwise work around the recurrences, each group one function.

The PyTorch form is the meaning and runs everywhere. On a CPU in float32 (and the half types) the
same function is one pass over memory by a Numba kernel, forward and backward: in PyTorch's eager
mode these dozens of passes cost more than the matrix products between them. The kernels' gradients
cannot be differentiated again and say so; those of the PyTorch form can (backend `chunked`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metastate.ops.links import differentiable_once
from metastate.ops.threads import run_pieces

DECAY_SCALE = -math.exp(-0.5)


def token_mix(
    x: Tensor,
    last: Tensor,
    mu: Tensor,
    resets: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    fused: bool = False,
) -> list[Tensor]:
    """Mix every token with the one before it: y_i = x_t + (x_{t-1} - x_t) mu_i.

    Args:
        x: [B, T, D].
        last: x_{-1}, [B, D].
        mu: one row a mix, [I, D].
        resets: [B, T] bool, True where x_{t-1} counts as 0; None means nowhere.
        dtype: of the results; None means x's (fused: mu's, which autocast does not round).
        fused: use the native kernel; the caller knows that it can run (`can_fuse`).

    Returns:
        I tensors [B, T, D].
    """
    if fused:
        batch, length, _ = x.shape
        keep = (
            x.new_ones(batch, length, dtype=torch.float32) if resets is None else (~resets).float()
        )
        dtype = mu.dtype if dtype is None else dtype
        return [y.to(dtype) for y in _call(_TokenMix, x, last, mu, keep, dtype)]
    shifted = torch.cat([last.unsqueeze(1).to(x.dtype), x[:, :-1]], 1)
    if resets is not None:
        shifted = shifted.masked_fill(resets.unsqueeze(-1), 0)
    delta = shifted - x
    return [torch.addcmul(x, delta, m).to(dtype or x.dtype) for m in mu.to(x.dtype)]


def wkv_inputs(
    k: Tensor,
    v: Tensor,
    d: Tensor,
    c: Tensor,
    m: Tensor | None,
    v_first: Tensor | None,
    w0: Tensor,
    a0: Tensor,
    v0: Tensor | None,
    k_k: Tensor,
    k_a: Tensor,
    *,
    head_size: int,
    fused: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn the projections of time mixing into what the recurrence takes.

    log_w = -exp(-0.5) sigmoid(d + w0)      a = sigmoid(c + a0)       kappa = unit(k * k_k) by head
    key = k (1 + (a - 1) k_a)               value = v + (v_first - v) sigmoid(m + v0)

    Args:
        k: key projection, [B, T, H N]; so v, d, c, m and v_first.
        v: value projection.
        d: decay projection without its bias.
        c: in-context learning rate projection without its bias.
        m: value-residual projection without its bias; None in layer 0.
        v_first: layer 0's value; None in layer 0.
        w0: bias of d, [H N]; so a0 of c, v0 of m, k_k and k_a.
        a0: see w0.
        v0: see w0; None in layer 0.
        k_k: removal-key scale.
        k_a: how far the rate scales the replacement key.
        head_size: N.
        fused: as in `token_mix`.

    Returns:
        log_w, a, kappa, key, value, [B, T, H N].

    Source: RWKV-7, arXiv:2503.14456, section 4.
    """
    if fused:
        mixed = [] if m is None else [m, v_first, v0]
        out = _call(_WkvInputs, head_size, k, v, d, c, w0, a0, k_k, k_a, *mixed)
        return out[0], out[1], out[2], out[3], v if m is None else out[4]
    log_w = DECAY_SCALE * torch.sigmoid(d + w0)
    a = torch.sigmoid(c + a0)
    value = v
    if m is not None:
        assert v_first is not None and v0 is not None
        value = v + (v_first - v) * torch.sigmoid(m + v0)
    kappa = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1, eps=1e-12).flatten(-2)
    return log_w, a, kappa, k * (1 + (a - 1) * k_a), value


def wkv_output(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    r_k: Tensor,
    norm: Callable[[Tensor], Tensor],
    *,
    dtype: torch.dtype,
    fused: bool = False,
) -> Tensor:
    """Return (norm(y) + (sum over N of r * r_k * k) v) * g, [B, T, H N], in `dtype`.

    Args:
        y: what r read from the states, [B, T, H, N].
        r: receptance, [B, T, H, N].
        k: replacement key, [B, T, H, N].
        v: value, [B, T, H, N].
        g: gate, [B, T, H N].
        r_k: bonus, [H, N].
        norm: a GroupNorm of one segment, with weight, bias and eps.
        dtype: of the result.
        fused: as in `token_mix`.
    """
    if fused:
        flat = [x.flatten(2) for x in (y, r, k, v)]
        args = (*flat, g, r_k.flatten(), norm.weight, norm.bias)  # type: ignore[attr-defined]
        out = _call(_WkvOutput, y.shape[-1], norm.eps, dtype, *args)  # type: ignore[attr-defined]
    else:
        bonus = (r * k * r_k).sum(-1, keepdim=True) * v
        out = (norm(y) + bonus.flatten(2)) * g
    return out.to(dtype)


def relu_squared(x: Tensor, *, fused: bool = False) -> Tensor:
    """Return max(x, 0)^2, [B, T, F] in x's dtype; `fused` as in `token_mix`."""
    return _call(_ReluSquared, x) if fused else F.relu(x).square()


def norm_product(
    ys: Sequence[Tensor], norms: Sequence[Any], x: Tensor, *, fused: bool = False
) -> Tensor:
    """Return (sum_i norm_i(y_i)) * x, [B, T, H N]; each y_i [B, T, H, N], x [B, T, H N]."""
    if fused:
        weights = torch.stack([norm.weight for norm in norms])
        biases = torch.stack([norm.bias for norm in norms])
        flat = [y.flatten(2) for y in ys]
        return _call(_NormProduct, ys[0].shape[-1], norms[0].eps, weights, biases, x, *flat)
    total = norms[0](ys[0])
    for norm, y in zip(norms[1:], ys[1:], strict=True):
        total = total + norm(y)
    return total * x


def unit(x: Tensor, *, fused: bool = False) -> Tensor:
    """Return x / max(|x|, 1e-12) over the last axis, [B, T, H, N]."""
    if fused:
        return _call(_Unit, x)
    return F.normalize(x, dim=-1, eps=1e-12)


def can_fuse(x: Tensor, backend: str) -> bool:
    """Say whether the native kernels serve x: on a CPU, not float64, not while torch compiles.

    They answer in float32 unless told otherwise, which autocast's products take and those of a
    bfloat16 model do not.
    """
    if backend != "cpu" or torch.compiler.is_compiling():
        return False
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return x.dtype == torch.float32 or (narrow and torch.is_autocast_enabled("cpu"))


def _call(function: type[torch.autograd.Function], *args: Any) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def _rows(x: Tensor) -> Any:
    """Return x [B, T, ...] as a float32 NumPy array [B T, ...], contiguous."""
    return x.detach().float().contiguous().flatten(0, 1).numpy()


def _values(x: Tensor) -> Any:
    """Return x as `_rows` does, but bfloat16 as its bits."""
    if x.dtype != torch.bfloat16:
        return _rows(x)
    return x.detach().contiguous().flatten(0, 1).view(torch.int16).numpy().view(np.uint16)


def _vector(x: Tensor) -> Any:
    # A copy: numpy() on a weight itself would keep FSDP from freeing it after the layer.
    return x.detach().float().contiguous().clone().numpy()


def _like(x: Tensor, count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return empty tensors of x's shape, float32 or bfloat16: the kernels write no other dtype."""
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return [torch.empty(x.shape, dtype=dtype, device="cpu") for _ in range(count)]


def _sums(*shape: int) -> Tensor:
    """Return zeroed accumulators of per-channel gradients, one a thread."""
    return _zeros(torch.get_num_threads(), *shape)


def _zeros(*shape: int) -> Tensor:
    # What the kernels write to, whatever PyTorch's default dtype and device are.
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _spread(kernel: str, num_rows: int, *args: Any, numbered: bool = False) -> None:
    """Run a kernel of ops/fused_kernels.py on all rows, cut into a piece a thread.

    It gets `args`, with `numbered` the number of its piece, and where that starts and stops.
    """
    from metastate.ops import fused_kernels  # which needs Numba

    pieces = min(torch.get_num_threads(), max(1, num_rows // 64))
    cuts = [num_rows * i // pieces for i in range(pieces + 1)]
    number = [(i,) if numbered else () for i in range(pieces)]
    calls = [(*args, *number[i], cuts[i], cuts[i + 1]) for i in range(pieces)]
    run_pieces(getattr(fused_kernels, kernel), calls, pieces)


class _TokenMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, last: Tensor, mu: Tensor, keep: Tensor, dtype: torch.dtype
    ) -> Any:
        ctx.save_for_backward(x, last, mu, keep)
        out = _like(x, len(mu), dtype)
        args = (_rows(x), _vector(last), keep.flatten().numpy(), _vector(mu))
        _spread("token_mix_forward", keep.numel(), *args, tuple(map(_values, out)))
        return tuple(out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, last, mu, keep = ctx.saved_tensors
        dx, dlast, sums = _like(x, 1)[0], _zeros(*last.shape), _sums(*mu.shape)
        args = (_rows(x), _vector(last), keep.flatten().numpy(), _vector(mu))
        out = (tuple(map(_rows, grads)), _rows(dx), dlast.numpy(), sums.numpy())
        _spread("token_mix_backward", keep.numel(), *args, *out, numbered=True)
        return dx.to(x.dtype), dlast.to(last.dtype), sums.sum(0).to(mu.dtype), None, None


class _WkvInputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        head_size: int,
        k: Tensor,
        v: Tensor,
        d: Tensor,
        c: Tensor,
        w0: Tensor,
        a0: Tensor,
        k_k: Tensor,
        k_a: Tensor,
        *mixed: Tensor,
    ) -> Any:
        m, v_first, v0 = mixed or (k.new_empty(0, 1, 1), k.new_empty(0, 1, 1), w0)
        out = _like(k, 5 if mixed else 4)
        value = out[4] if mixed else _zeros(0, 1, 1)
        args = [_values(t) for t in (k, v, d, c, m, v_first)]
        args += [_vector(t) for t in (w0, a0, v0, k_k, k_a)]
        results = [_rows(t) for t in (*out[:4], value)]
        _spread("wkv_inputs_forward", k.shape[0] * k.shape[1], *args, *results, head_size)
        ctx.save_for_backward(k, v, m, v_first, v0, k_k, k_a, *out[:3])
        ctx.head_size, ctx.mixed = head_size, bool(mixed)
        ctx.dtypes = [t.dtype for t in (k, v, d, c, w0, a0, k_k, k_a, *mixed)]
        return tuple(out)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        k, mixed = saved[0], ctx.mixed
        dvalue = grads[4] if mixed else _zeros(0, 1, 1)
        out = _like(k, 6 if mixed else 3)
        dk, dd, dc = out[:3]
        dv, dm, dv_first = out[3:] if mixed else [_zeros(0, 1, 1)] * 3
        sums = _sums(5, k.shape[-1])
        args = [_rows(t) if t.dim() == 3 else _vector(t) for t in saved]
        args += [_rows(t) for t in (*grads[:4], dvalue)]
        args += [_rows(t) for t in (dk, dv, dd, dc, dm, dv_first)]
        rows = k.shape[0] * k.shape[1]
        _spread("wkv_inputs_backward", rows, *args, sums.numpy(), ctx.head_size, numbered=True)
        dw0, da0, dv0, dk_k, dk_a = sums.sum(0)
        found = [dk, dv if mixed else None, dd, dc, dw0, da0, dk_k, dk_a]
        found += [dm, dv_first, dv0] if mixed else []
        pairs = zip(found, ctx.dtypes, strict=True)
        return None, *(t if t is None else t.to(dtype) for t, dtype in pairs)


class _WkvOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head_size: int, eps: float, dtype: torch.dtype, *tensors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.head_size, ctx.eps = head_size, np.float32(eps)
        y = tensors[0]
        out = _like(y, 1, dtype)[0]
        args = [_values(t) if t.dim() == 3 else _vector(t) for t in tensors]
        rows = y.shape[0] * y.shape[1]
        _spread("wkv_output_forward", rows, *args, ctx.eps, _values(out), head_size)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        y = tensors[0]
        out, sums = _like(y, 5), _sums(3, y.shape[-1])
        args = [_rows(t) if t.dim() == 3 else _vector(t) for t in tensors]
        args += [ctx.eps, _rows(grad), *map(_rows, out), sums.numpy(), ctx.head_size]
        _spread("wkv_output_backward", y.shape[0] * y.shape[1], *args, numbered=True)
        found = zip((*out, *sums.sum(0)), tensors, strict=True)
        return None, None, None, *(t.to(like.dtype) for t, like in found)


class _NormProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head_size: int, eps: float, *tensors: Tensor) -> Tensor:
        weights, biases, x, *ys = tensors
        ctx.save_for_backward(*tensors)
        ctx.head_size, ctx.eps = head_size, np.float32(eps)
        out = _like(x, 1)[0]
        args = (tuple(map(_rows, ys)), _vector(weights), _vector(biases), _rows(x), ctx.eps)
        rows = x.shape[0] * x.shape[1]
        _spread("norm_sum_forward", rows, *args, _rows(out), head_size)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, biases, x, *ys = ctx.saved_tensors
        dx, *dys = _like(x, 1 + len(ys))
        sums = _sums(2, *weights.shape)
        args = (tuple(map(_rows, ys)), _vector(weights), _vector(biases), _rows(x), ctx.eps)
        out = (_rows(grad), tuple(map(_rows, dys)), _rows(dx), sums.numpy(), ctx.head_size)
        rows = x.shape[0] * x.shape[1]
        _spread("norm_sum_backward", rows, *args, *out, numbered=True)
        dweights, dbiases = sums.sum(0)
        found = [(dweights, weights), (dbiases, biases), (dx, x), *zip(dys, ys, strict=True)]
        return None, None, *(t.to(like.dtype) for t, like in found)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = _like(x, 1)[0]
        rows, size = x.shape[0] * x.shape[1], x.shape[-1]
        _spread("unit_forward", rows, _rows(x.flatten(2)), _rows(out.flatten(2)), size)
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, y = ctx.saved_tensors
        dx = _like(x, 1)[0]
        args = [_rows(t.flatten(2)) for t in (x, y, grad, dx)]
        _spread("unit_backward", x.shape[0] * x.shape[1], *args, x.shape[-1])
        return dx.to(x.dtype)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = _like(x, 1, x.dtype)[0]
        rows = x.shape[0] * x.shape[1]
        _spread("relu_squared_forward", rows, _values(x), _values(out))
        return out.to(x.dtype)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = _like(x, 1, x.dtype)[0]
        args = [_values(t) for t in (x, grad, dx)]
        _spread("relu_squared_backward", x.shape[0] * x.shape[1], *args)
        return dx.to(x.dtype)
