"""The recurrence on a CPU: Numba kernels as torch custom ops, so that autograd and compile work.

`wkv7` keeps u_t = kappa_t S_{t-1}^T of every token and the state at every C-th token; the backward
pass and a later reader work from those; ops/links.py says how its gradient comes back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metastate.ops import cpu_kernels as kernels
from metastate.ops.links import differentiable, make_links
from metastate.ops.reference import Trajectory
from metastate.ops.step import wkv7_step
from metastate.ops.threads import run_pieces

L1_BYTES = 24 * 1024  # of a 32 KiB first-level cache, for a block of the state
GRAIN = 64 * 64 * 64  # state elements a thread: below, waking it takes longer than the work
PIECES = 4  # pieces of work a thread, so that a disturbed thread does not hold up the rest


def _run(kernel: Any, args: list[Any], cu_seqlens: Tensor, tasks_a_sequence: int) -> None:
    """Run `kernel` over all tasks, spread over torch.get_num_threads() threads.

    `args`: H, N, then addresses and contiguous tensors, which are passed by address.
    """
    addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in args]
    num_tasks = (cu_seqlens.numel() - 1) * tasks_a_sequence
    offsets = cu_seqlens.numpy()
    heads, size = args[:2]
    work = int(offsets[-1]) * heads * size**2
    num_threads = min(torch.get_num_threads(), num_tasks, 1 + work // GRAIN)
    if num_threads == 1:
        kernel(*addresses, 0, num_tasks)
        return
    cuts = _cuts(offsets, tasks_a_sequence, min(num_threads * PIECES, num_tasks))
    runs = zip(cuts[:-1], cuts[1:], strict=True)
    run_pieces(kernel, [(*addresses, *run) for run in runs], num_threads)


def _cuts(offsets: np.ndarray, tasks_a_sequence: int, count: int) -> list[int]:
    """Cut the tasks into `count` runs of about equally many tokens."""
    tokens = np.linspace(0, offsets[-1], count + 1)
    sequence = np.searchsorted(offsets, tokens[1:-1], side="right") - 1
    lengths = np.maximum(np.diff(offsets)[sequence], 1)
    inside = (tokens[1:-1] - offsets[sequence]) / lengths * tasks_a_sequence
    cuts = np.rint(sequence * tasks_a_sequence + inside).astype(int).tolist()
    return [0, *cuts, (len(offsets) - 1) * tasks_a_sequence]


def _dtypes(state: Tensor) -> tuple[torch.dtype, type]:
    """Return the dtype that the kernels compute in: the state's."""
    return state.dtype, np.float64 if state.dtype == torch.float64 else np.float32


def _lanes(size: int, itemsize: int, num_tasks: int) -> int:
    """Return how many value lanes a forward task takes: its block must fit the cache.

    Where there are fewer heads and sequences than threads, the lanes are spread as well.
    """
    lanes = whole = kernels.padded(size)
    threads = torch.get_num_threads()
    for blocks in range(1, whole // 16 + 1):
        if whole % (16 * blocks):
            continue
        lanes = whole // blocks
        if whole * lanes * itemsize <= L1_BYTES and num_tasks * blocks >= threads:
            break
    return lanes


def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return y, final state, w, u, checkpoints; the last two empty unless `keep`."""
    dtype, number = _dtypes(state)
    batch, length, heads, size = r.shape
    n = cu_seqlens.numel() - 1
    w = torch.exp(log_w.to(dtype).contiguous())
    given = [x.to(dtype).contiguous() for x in (k, v, kappa, a)]
    state = state.contiguous()
    y = r.new_empty(r.shape, dtype=dtype)
    final = torch.empty_like(state)
    u = y.new_empty(r.shape if keep else (0,))
    checkpoints = y.new_empty((batch * length // kernels.C + n if keep else 0, heads, size, size))
    lanes = _lanes(size, state.itemsize, n * heads)
    kernel = kernels.forward_kernel(kernels.padded(size), lanes, keep, number)
    reads = r.to(dtype).contiguous()
    args = [heads, size, reads, w, *given, state, cu_seqlens, y, u, checkpoints, final]
    _run(kernel, args, cu_seqlens, heads * (kernels.padded(size) // lanes))
    return y.to(r.dtype), final, w, u, checkpoints


@torch.library.custom_op("metastate::wkv7", mutates_args=())
def wkv7_forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence and keep its trajectory.

    Args:
        r: receptance [B, T, H, N], any float dtype, as the next five.
        log_w: log decay.
        k: replacement key.
        v: value.
        kappa: removal key.
        a: in-context learning rate.
        state: [n, H, N_v, N_k], float32 or float64: the dtype that everything is computed in.
        cu_seqlens: [n + 1] int64 offsets of the sequences in the flattened B * T tokens.

    Returns:
        y [B, T, H, N] in r's dtype; the final state; w; u [B, T, H, N]; the checkpoints
        [B * T // C + n, H, N_k, N_v]; and three link tensors [B, T, H, N] (see ops/links.py).
    """
    out = _forward(r, log_w, k, v, kappa, a, state, cu_seqlens, True)
    return *out, *make_links(out[2])


@wkv7_forward.register_fake
def _(r, log_w, k, v, kappa, a, state, cu_seqlens):  # type: ignore[no-untyped-def]
    batch, length, heads, size = r.shape
    w = state.new_empty(r.shape)
    num_checkpoints = batch * length // kernels.C + cu_seqlens.numel() - 1
    checkpoints = state.new_empty((num_checkpoints, heads, size, size))
    final = state.new_empty(state.shape)
    return r.new_empty(r.shape), final, w, torch.empty_like(w), checkpoints, *make_links(w)


@torch.library.custom_op("metastate::wkv7_backward", mutates_args=())
def wkv7_backward(
    dy: Tensor,
    dstate: Tensor,
    dlinks: list[Tensor],
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    cu_seqlens: Tensor,
    u: Tensor,
    checkpoints: Tensor,
    final: Tensor,
) -> list[Tensor]:
    """Return dr, dlog_w, dk, dv, dkappa, da and dstate0, all in the state's dtype.

    `dlinks` holds the three link gradients of a later reader, or nothing.
    """
    dtype, number = _dtypes(final)
    heads, size = r.shape[2:]
    inputs = [x.to(dtype).contiguous() for x in (r, w, k, v, kappa, a)]
    links = [x.to(dtype).contiguous() for x in dlinks]
    grads = [torch.empty_like(inputs[0]) for _ in range(6)]
    grads.append(torch.empty_like(final))
    kernel = kernels.backward_kernel(kernels.padded(size), bool(links), number)
    args: list[Any] = [heads, size, *inputs, cu_seqlens, u, checkpoints, final]
    args += links or [0, 0, 0]
    args += [dy.to(dtype).contiguous(), dstate.contiguous(), *grads]
    _run(kernel, args, cu_seqlens, heads)
    return grads


@wkv7_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, dstate, dlinks, r, w, k, v, kappa, a, cu_seqlens, u, checkpoints, final
):
    return [w.new_empty(w.shape) for _ in range(6)] + [final.new_empty(final.shape)]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    r, log_w, k, v, kappa, a, state, cu_seqlens = inputs
    _, final, w, u, checkpoints, *_ = output
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x.dtype for x in inputs[:7]]
    ctx.save_for_backward(r, w, k, v, kappa, a, cu_seqlens, u, checkpoints, final)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    r, final = saved[0], saved[-1]
    dy, dstate, *dlinks = grads[0], grads[1], *grads[5:]
    dy = torch.zeros_like(r) if dy is None else dy
    dstate = torch.zeros_like(final) if dstate is None else dstate
    links = [x for x in dlinks if x is not None]
    out = wkv7_backward(dy, dstate, links, *saved)
    return *(x.to(dtype) for x, dtype in zip(out, ctx.dtypes, strict=True)), None


wkv7_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("metastate::wkv7_read", mutates_args=())
def wkv7_read(
    x: Tensor,
    links: list[Tensor],
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    cu_seqlens: Tensor,
    u: Tensor,
    checkpoints: Tensor,
    by_key: bool,
) -> Tensor:
    """Read a kept trajectory: e_t = x_t S_t^T (by key) or x_t S_t (by value), in x's dtype."""
    return _read(x, w, k, v, kappa, a, cu_seqlens, u, checkpoints, by_key).to(x.dtype)


@wkv7_read.register_fake
def _(x, links, w, k, v, kappa, a, cu_seqlens, u, checkpoints, by_key):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _read(
    x: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    cu_seqlens: Tensor,
    u: Tensor,
    checkpoints: Tensor,
    by_key: bool,
) -> Tensor:
    dtype, number = _dtypes(checkpoints)
    heads, size = x.shape[2:]
    inputs = [t.to(dtype).contiguous() for t in (x, w, k, v, kappa, a)]
    e = torch.empty_like(inputs[0])
    kernel = kernels.read_kernel(kernels.padded(size), by_key, number)
    _run(kernel, [heads, size, *inputs, cu_seqlens, u, checkpoints, e], cu_seqlens, heads)
    return e


@torch.library.custom_op("metastate::wkv7_read_backward", mutates_args=())
def wkv7_read_backward(
    de: Tensor,
    x: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    cu_seqlens: Tensor,
    u: Tensor,
    checkpoints: Tensor,
    e: Tensor,
    by_key: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx and the column product sum_i S_ij (dL/dS)_ij of the reader's term."""
    dx = _read(de, w, k, v, kappa, a, cu_seqlens, u, checkpoints, not by_key)
    product = x * dx if by_key else de * e
    return dx, product.to(dx.dtype)


@wkv7_read_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    de, x, w, k, v, kappa, a, cu_seqlens, u, checkpoints, e, by_key
):
    return w.new_empty(w.shape), w.new_empty(w.shape)


def _save_read(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, w, k, v, kappa, a, cu_seqlens, u, checkpoints, by_key = inputs
    ctx.by_key = by_key
    ctx.save_for_backward(x, w, k, v, kappa, a, cu_seqlens, u, checkpoints, output)


def _read_gradients(ctx: Any, de: Tensor) -> tuple[Any, ...]:
    x, *saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
    dx, product = wkv7_read_backward(de, x, *saved, ctx.by_key)
    state_side = product.dtype
    sides = (de, x) if ctx.by_key else (x, de)
    links = [*(side.to(state_side) for side in sides), product]
    return dx.to(x.dtype), links, *[None] * 9


wkv7_read.register_autograd(_read_gradients, setup_context=_save_read)


@dataclass(frozen=True)
class CpuTrajectory(Trajectory):
    """u of every token and the state at every C-th one.

    `read` repeats the pass for a second differentiated reader: the links serve one only.
    """

    inputs: tuple[Tensor, ...]  # r, log_w, k, v, kappa, a, state, cu_seqlens
    kept: tuple[Tensor, ...] | None  # w, u, checkpoints, links; None after a single token
    readers: list[str] = field(default_factory=list)

    def _read(self, x: Tensor, by: str) -> Tensor:
        if self.kept is None:
            return self._read_last(x, by)
        _, _, k, v, kappa, a, _, cu_seqlens = self.inputs
        kept = self.kept
        # What was run without gradients has none to give.
        if torch.is_grad_enabled() and differentiable(*kept[-3:]):
            if self.readers:
                kept = wkv7_forward(*self.inputs)[2:]
            self.readers.append(by)
        w, u, checkpoints, *links = kept
        by_key = by == "key"
        w, k, v, kappa, a, u, checkpoints = (
            t.detach() for t in (w, k, v, kappa, a, u, checkpoints)
        )
        if not differentiable(x, *links):
            return _read(x, w, k, v, kappa, a, cu_seqlens, u, checkpoints, by_key).to(x.dtype)
        return wkv7_read(x, links, w, k, v, kappa, a, cu_seqlens, u, checkpoints, by_key)

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, other = wkv7(r, self.log_w, k, v, self.kappa, self.a, state, self.cu_seqlens)
        return y, other.state


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, CpuTrajectory]:
    """Run the recurrence; arguments and result as ops.reference.wkv7.

    `keep=False` promises that the trajectory will not be read; without gradients it then holds
    the final state only.
    """
    batch, length = r.shape[:2]
    needs_gradients = differentiable(r, log_w, k, v, kappa, a, state)
    if length == 1 and cu_seqlens is None and not needs_gradients:
        y, final = wkv7_step(r, log_w, k, v, kappa, a, state)
        return y, CpuTrajectory(final, log_w, kappa, a, None, (), None)
    offsets = cu_seqlens
    if offsets is None:
        offsets = torch.arange(0, batch * length + 1, length, device=r.device)
    inputs = (r, log_w, k, v, kappa, a, state, offsets)
    kept: tuple[Tensor, ...] | None = None
    if needs_gradients:
        y, final, *rest = wkv7_forward(*inputs)
        kept = tuple(rest)
    else:
        y, final, *rest = _forward(*inputs, keep)
        kept = (*rest, *make_links(rest[0])) if keep else None
    return y, CpuTrajectory(final, log_w, kappa, a, cu_seqlens, inputs, kept)


wkv7_without_trajectory = partial(wkv7, keep=False)
