"""The recurrence on a GPU: Triton kernels as torch custom ops, so that autograd and compile work.

Four passes forward, three of them over all chunks at once: the geometry T = (I - A)^-1, the
correction rows that an empty state has, the states along the chunks (sequential; a program holds
some rows of one state), and a read. `wkv7` keeps T, the correction rows U and the state at every
chunk's start; the backward pass and later readers work from those (ops/links.py says how a reader's
gradient comes back) and compute everything else again. A second memory with the same transitions
(`recur`) reuses T.

Like ops/chunked.py, and unlike the CPU's kernels, this divides by the cumulative decay: RWKV-7's
bound log w > -exp(-0.5) keeps float32 exact for a chunk, decays far beyond it do not.

Where an input is of half precision (under autocast r always is) products are taken in TF32, else,
and where they make T, in full precision; sums and states are float32, for float64 inputs float64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metastate.ops import triton_backward as backward
from metastate.ops import triton_kernels as kernels
from metastate.ops.links import differentiable, make_links
from metastate.ops.reference import Trajectory

# The kernels run on a CPU, slowly, where TRITON_INTERPRET=1 was set before triton was imported.
INTERPRETED = not isinstance(kernels.geometry_kernel, triton.runtime.JITFunction)

# Compiled for compute capability 8.0 and 9.0 no kernel takes more than 99 KiB of shared memory or
# spills much at C = 32; at 64 the backward ones take up to 160 KiB and spill kilobytes.
CHUNK = 32
# All that 8 warps can have: left alone, the assembler gives some kernels 32 and spills kilobytes.
MAX_REGISTERS = 255


def chunk_size(num_tokens: int) -> int:
    """Return C: 32, or 16 (the least that a matrix product takes) for a few tokens."""
    return CHUNK if num_tokens > 16 else 16


def tile_sizes(head_size: int, half: bool) -> tuple[int, int, int]:
    """Return the columns of a tile, those of a whole state, and the rows of a state a program.

    `half` as in Launch: a product in full precision needs more registers.
    """
    whole = max(16, triton.next_power_of_2(head_size))
    return min(whole, 64 if half else 32), whole, 16 if whole in (16, 256) else 32


@dataclass(frozen=True)
class Launch:
    """What every kernel of one pass is started with; `half`: its products are taken in TF32."""

    offsets: Tensor
    num_tokens: int
    H: int
    N: int
    C: int
    dtype: torch.dtype
    half: bool

    @classmethod
    def of(cls, x: Tensor, offsets: Tensor, chunk: int, dtype: torch.dtype, half: bool) -> Launch:
        """Describe a pass over x [B, T, H, N], computed in `dtype` (the states')."""
        batch, length, heads, size = x.shape
        return cls(offsets, batch * length, heads, size, chunk, dtype, half)

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return self.offsets.numel() - 1

    @property
    def num_slots(self) -> int:
        """Number of chunks that there is room for."""
        return num_slots(self.num_tokens, self.num_sequences, self.C)

    def chunks(self, kernel: Any, *args: Tensor, **constants: Any) -> None:
        """Start a program a chunk and head."""
        grid = (self.num_slots, self.H)
        tile, _, _ = tile_sizes(self.N, self.half)
        given = (*args, self.offsets, self.num_sequences)
        self._start(kernel, grid, given, BK=tile, **constants)

    def states(self, kernel: Any, *args: Tensor, **constants: Any) -> None:
        """Start a program a sequence, head and block of a state's rows."""
        _, whole, rows = tile_sizes(self.N, self.half)
        grid = (self.num_sequences * self.H, triton.cdiv(self.N, rows))
        self._start(kernel, grid, (*args, self.offsets), BK=whole, BV=rows, **constants)

    def _start(self, kernel: Any, grid: tuple, args: tuple, **constants: Any) -> None:
        with _on(self.offsets):
            kernel[grid](
                *args,
                H=self.H,
                N=self.N,
                C=self.C,
                DTYPE=tl.float64 if self.dtype == torch.float64 else tl.float32,
                PRECISION="tf32" if self.half else precise(self.dtype),
                num_warps=num_warps(constants["BK"]),
                num_stages=1,
                maxnreg=MAX_REGISTERS,
                **constants,
            )


def num_warps(columns: int) -> int:
    """Return the warps of a program whose tiles are `columns` wide."""
    return 4 if columns <= 32 else 8


def precise(dtype: torch.dtype) -> str:
    """Return how matrices of `dtype` are multiplied without losing digits.

    In float32 a product is three of TF32 on the tensor cores: "ieee" would unroll into so many
    scalar multiply-adds that a kernel takes minutes to compile and spills most of its registers.
    """
    return "ieee" if dtype == torch.float64 else "tf32x3"


def num_slots(num_tokens: int, num_sequences: int, chunk: int) -> int:
    """Return how many chunks N sequences of together `num_tokens` tokens can have at most."""
    return num_tokens // chunk + num_sequences


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Make x's device the current one: that is where a kernel starts."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.contiguous() for x in tensors]


@torch.library.custom_op("metastate::triton_geometry", mutates_args=())
def geometry(
    log_w: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    offsets: Tensor,
    chunk: int,
    half: bool,
) -> Tensor:
    """Return T = (I - A)^-1 of every chunk and head, [slots, H, C, C] in the state's dtype.

    It has no gradient: whoever solves with it accounts for A's (ops/triton_backward.py).
    """
    run = Launch.of(log_w, offsets, chunk, state.dtype, half)
    inverse = state.new_empty(run.num_slots, run.H, chunk, chunk)
    log_w, kappa, a = _contiguous(log_w, kappa, a)
    options = {"LEVELS": chunk.bit_length() - 1, "SOLVE": precise(state.dtype)}
    run.chunks(kernels.geometry_kernel, log_w, kappa, a, inverse, **options)
    return inverse


@geometry.register_fake
def _(log_w, kappa, a, state, offsets, chunk, half):  # type: ignore[no-untyped-def]
    slots = num_slots(log_w.shape[0] * log_w.shape[1], offsets.numel() - 1, chunk)
    return state.new_empty(slots, log_w.shape[2], chunk, chunk)


def _forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final state, U and the chunk-start states."""
    run = Launch.of(v, offsets, inverse.shape[-1], state.dtype, half)
    r, log_w, k, v, kappa, a, state = _contiguous(r, log_w, k, v, kappa, a, state)
    P, U = (torch.empty_like(v, dtype=state.dtype) for _ in range(2))
    starts = state.new_empty(run.num_slots, run.H, run.N, run.N)
    final = torch.empty_like(state)
    run.chunks(kernels.correction_kernel, log_w, k, v, kappa, inverse, P, U)
    run.states(kernels.state_kernel, log_w, k, v, kappa, a, state, P, U, starts, final)
    y = torch.empty_like(r)
    run.chunks(kernels.read_by_key_kernel, r, log_w, k, v, kappa, a, U, starts, y)
    return y, final, U, starts


@torch.library.custom_op("metastate::triton_wkv7", mutates_args=())
def wkv7_forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the recurrence and keep its trajectory.

    Args:
        r: receptance [B, T, H, N], any float dtype, as the next five.
        log_w: log decay.
        k: replacement key.
        v: value.
        kappa: removal key.
        a: in-context learning rate.
        state: [n, H, N_v, N_k], float32 or float64: the dtype that everything is computed in.
        offsets: [n + 1] int64 offsets of the sequences in the flattened B * T tokens.
        inverse: T of `geometry`.
        half: whether products are taken in TF32.

    Returns:
        y [B, T, H, N] in r's dtype; the final state; U [B, T, H, N]; the chunk-start states
        [slots, H, N, N]; and three link tensors [B, T, H, N].
    """
    out = _forward(r, log_w, k, v, kappa, a, state, offsets, inverse, half)
    return *out, *make_links(out[2])


@wkv7_forward.register_fake
def _(r, log_w, k, v, kappa, a, state, offsets, inverse, half):  # type: ignore[no-untyped-def]
    U = state.new_empty(v.shape)
    starts = state.new_empty(inverse.shape[0], *state.shape[1:])
    return r.new_empty(r.shape), state.new_empty(state.shape), U, starts, *make_links(U)


@torch.library.custom_op("metastate::triton_wkv7_backward", mutates_args=())
def wkv7_backward(
    dy: Tensor,
    dstate: Tensor,
    dlinks: list[Tensor],
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    offsets: Tensor,
    inverse: Tensor,
    U: Tensor,
    starts: Tensor,
    half: bool,
) -> list[Tensor]:
    """Return dr, dlog_w, dk, dv, dkappa, da in their tensors' dtypes, and dstate0.

    `dlinks` holds the three link gradients of a later reader, or nothing.
    """
    run = Launch.of(v, offsets, inverse.shape[-1], U.dtype, half)
    dy, dstate, r, log_w, k, v, kappa, a = _contiguous(dy, dstate, r, log_w, k, v, kappa, a)
    # dr_t = dy_t S_t: what r gets is a read of the other kind.
    chunk = inverse.shape[-1]
    dr = _read(dy, log_w, k, v, kappa, a, offsets, U, starts, chunk, False, half)
    product = dr * r
    links = _contiguous(*dlinks)
    if links:
        product += links[2]
    readers = [dy, r, *(links[:2] or (dy, r))]
    two = bool(links)
    P, dU = torch.empty_like(U), torch.empty_like(U)
    ends, dstate0 = torch.empty_like(starts), torch.empty_like(dstate)
    dlog_w, dk, dv, dkappa, da = (torch.empty_like(x) for x in (log_w, k, v, kappa, a))
    given: Any = (*readers, log_w, kappa, a, inverse, P, dU)
    run.chunks(backward.local_gradient_kernel, *given, TWO=two)
    given = (*readers, log_w, kappa, a, dstate, P, dU, ends, dstate0)
    run.states(backward.state_gradient_kernel, *given, TWO=two)
    given = (*readers, log_w, k, kappa, inverse, dU, ends, dv)
    run.chunks(backward.value_gradient_kernel, *given, TWO=two)
    given = (*readers, product, log_w, k, v, kappa, a, U, dU, starts, ends)
    run.chunks(backward.key_gradient_kernel, *given, dlog_w, dk, dkappa, da, TWO=two)
    return [dr.to(r.dtype), dlog_w, dk, dv, dkappa, da, dstate0]


@wkv7_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    dy, dstate, dlinks, r, log_w, k, v, kappa, a, offsets, inverse, U, starts, half
):
    return [x.new_empty(x.shape) for x in (r, log_w, k, v, kappa, a, dstate)]


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    r, log_w, k, v, kappa, a, state, offsets, inverse, ctx.half = inputs
    _, final, U, starts, *_ = output
    ctx.set_materialize_grads(False)
    ctx.state_like = final.shape
    ctx.save_for_backward(r, log_w, k, v, kappa, a, offsets, inverse, U, starts)


def _gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    r, starts = saved[0], saved[-1]
    dy, dstate, *dlinks = grads[0], grads[1], *grads[4:]
    dy = torch.zeros_like(r) if dy is None else dy
    dstate = starts.new_zeros(ctx.state_like) if dstate is None else dstate
    links = [x for x in dlinks if x is not None]
    return *wkv7_backward(dy, dstate, links, *saved, ctx.half), None, None, None


wkv7_forward.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("metastate::triton_wkv7_read", mutates_args=())
def wkv7_read(
    x: Tensor,
    links: list[Tensor],
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    offsets: Tensor,
    U: Tensor,
    starts: Tensor,
    chunk: int,
    by_key: bool,
    half: bool,
) -> Tensor:
    """Read a kept trajectory: e_t = x_t S_t^T (by key) or x_t S_t (by value), in x's dtype."""
    return _read(x, log_w, k, v, kappa, a, offsets, U, starts, chunk, by_key, half).to(x.dtype)


@wkv7_read.register_fake
def _(  # type: ignore[no-untyped-def]
    x, links, log_w, k, v, kappa, a, offsets, U, starts, chunk, by_key, half
):
    return x.new_empty(x.shape)


def _read(
    x: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    offsets: Tensor,
    U: Tensor,
    starts: Tensor,
    chunk: int,
    by_key: bool,
    half: bool,
) -> Tensor:
    """Return e in the states' dtype."""
    run = Launch.of(v, offsets, chunk, U.dtype, half)
    e = torch.empty_like(U)
    kernel = kernels.read_by_key_kernel if by_key else kernels.read_by_value_kernel
    run.chunks(kernel, *_contiguous(x, log_w, k, v, kappa, a), U, starts, e)
    return e


@torch.library.custom_op("metastate::triton_wkv7_read_backward", mutates_args=())
def wkv7_read_backward(
    de: Tensor,
    x: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    offsets: Tensor,
    U: Tensor,
    starts: Tensor,
    e: Tensor,
    chunk: int,
    by_key: bool,
    half: bool,
) -> tuple[Tensor, Tensor]:
    """Return dx and the column product sum_i S_ij (dL/dS)_ij of the reader's term."""
    dx = _read(de, log_w, k, v, kappa, a, offsets, U, starts, chunk, not by_key, half)
    return dx, (x * dx if by_key else de * e).to(dx.dtype)


@wkv7_read_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    de, x, log_w, k, v, kappa, a, offsets, U, starts, e, chunk, by_key, half
):
    return U.new_empty(U.shape), U.new_empty(U.shape)


def _save_read(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, *kept, chunk, by_key, half = inputs
    ctx.options = chunk, by_key, half
    ctx.save_for_backward(x, *kept, output)


def _read_gradients(ctx: Any, de: Tensor) -> tuple[Any, ...]:
    x, saved = ctx.saved_tensors[0], ctx.saved_tensors[1:]
    dx, product = wkv7_read_backward(de, x, *saved, *ctx.options)
    sides = (de, x) if ctx.options[1] else (x, de)
    links = [*(side.to(product.dtype) for side in sides), product]
    return dx.to(x.dtype), links, *[None] * 11


wkv7_read.register_autograd(_read_gradients, setup_context=_save_read)


@dataclass(frozen=True)
class TritonTrajectory(Trajectory):
    """U of every token and the state at every chunk's start.

    `read` repeats the pass for a second differentiated reader: the links serve one only.
    """

    inputs: tuple[Any, ...]  # of wkv7_forward
    kept: tuple[Tensor, ...] | None  # U, starts, links; None after a single token
    readers: list[str] = field(default_factory=list)

    def _read(self, x: Tensor, by: str) -> Tensor:
        if self.kept is None:
            return self._read_last(x, by)
        _, *given, _, offsets, inverse, half = self.inputs
        kept = self.kept
        # What was run without gradients has none to give.
        if torch.is_grad_enabled() and differentiable(*kept[-3:]):
            if self.readers:
                kept = wkv7_forward(*self.inputs)[2:]
            self.readers.append(by)
        U, starts, *links = kept
        args: Any = (*(t.detach() for t in given), offsets, U.detach(), starts.detach())
        options: Any = (inverse.shape[-1], by == "key", half)
        if not differentiable(x, *links):
            return _read(x, *args, *options).to(x.dtype)
        return wkv7_read(x, links, *args, *options)

    def _recur(self, r: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        inverse = self.inputs[-2] if self.inputs else None
        inputs = (r, self.log_w, k, v, self.kappa, self.a, state)
        y, other = wkv7(*inputs, self.cu_seqlens, inverse)
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
    inverse: Tensor | None = None,
) -> tuple[Tensor, TritonTrajectory]:
    """Run the recurrence; arguments and result as ops.reference.wkv7.

    `inverse` is the geometry of an earlier pass with the same log_w, kappa, a and sequences.
    """
    batch, length = r.shape[:2]
    needs_gradients = differentiable(r, log_w, k, v, kappa, a, state)
    if length == 1 and cu_seqlens is None and not needs_gradients:
        y, final = wkv7_step(r, log_w, k, v, kappa, a, state)
        return y, TritonTrajectory(final, log_w, kappa, a, None, (), None)
    half = any(x.element_size() == 2 for x in (r, log_w, k, v, kappa, a))
    half = half and state.dtype != torch.float64
    offsets = cu_seqlens
    if offsets is None:
        offsets = torch.arange(0, batch * length + 1, length, device=r.device)
    if inverse is None:
        longest = length if cu_seqlens is None else batch * length
        chunk = chunk_size(longest)
        transition = (t.detach() for t in (log_w, kappa, a))
        inverse = geometry(*transition, state.detach(), offsets, chunk, half)
    inputs = (r, log_w, k, v, kappa, a, state, offsets, inverse, half)
    y, final, *kept = (wkv7_forward if needs_gradients else _forward)(*inputs)
    if not needs_gradients:
        kept.extend(make_links(kept[0]))
    return y, TritonTrajectory(final, log_w, kappa, a, cu_seqlens, inputs, tuple(kept))


def wkv7_step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Move every state on by one token, without gradients; arguments as ops.step.wkv7_step."""
    batch, _, heads, size = r.shape
    inputs = _contiguous(r, log_w, k, v, kappa, a, state)
    y, final = torch.empty_like(inputs[0]), torch.empty_like(inputs[-1])
    _, whole, rows = tile_sizes(size, False)
    with _on(r):
        kernels.step_kernel[(batch * heads, triton.cdiv(size, rows))](
            *inputs,
            y,
            final,
            N=size,
            BK=whole,
            BV=rows,
            DTYPE=tl.float64 if state.dtype == torch.float64 else tl.float32,
            num_warps=4,
        )
    return y, final
