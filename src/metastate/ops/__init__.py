"""Pure functions on tensors: the WKV recurrence of RWKV-7, readers of its states, the meta state.

Every function checks its arguments and hands them to one backend: `reference` (the meaning),
`chunked` (PyTorch, any device), `cpu` (native kernels), `triton` (GPU kernels), `fla` (those of
flash-linear-attention), chosen by an argument, never by environment. `auto` is `cpu` on a CPU where
Numba is installed, `triton` on an NVIDIA GPU where Triton is and heads are not wider than its
kernels take, else `chunked`.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from metastate.config import LARGEST_HEAD
from metastate.errors import ConfigError, ShapeError
from metastate.ops import chunked, fused, reference
from metastate.ops.reference import Trajectory, check_state, check_tensors, state_dtype

__all__ = ["BACKENDS", "Trajectory", "meta_state", "resolve_backend", "state_dtype", "wkv7"]
__all__ += ["wkv7_trajectory"]

BACKENDS = ("auto", "reference", "chunked", "cpu", "triton", "fla")
NUMBA_FOUND = importlib.util.find_spec("numba") is not None
TRITON_FOUND = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, device: torch.device, head_size: int = 0) -> str:
    """Return the backend that `backend` means on `device`; ConfigError if it cannot run there.

    Heads of `head_size` channels must suit it; 0 asks about the device alone.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; allowed: {', '.join(BACKENDS)}")
    if backend == "auto":
        if device.type == "cpu" and NUMBA_FOUND:
            return "cpu"
        fits = TRITON_FOUND and head_size <= LARGEST_HEAD
        return "triton" if fits and _runs_triton(device) else "chunked"
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(f"backend 'cpu' cannot run on {device}; use 'auto' or 'chunked'")
    if backend == "cpu" and not NUMBA_FOUND:
        raise ConfigError("backend 'cpu' needs Numba: pip install numba, or use 'chunked'")
    if backend == "triton" and not TRITON_FOUND:
        raise ConfigError("backend 'triton' needs Triton: pip install 'metastate[cuda]'")
    if backend == "triton" and not (_runs_triton(device) or _interprets_triton(device)):
        raise ConfigError(
            f"backend 'triton' cannot run on {device}: it needs an NVIDIA GPU of capability 8.0 or "
            "later (on a CPU its kernels can only be interpreted, for tests: TRITON_INTERPRET=1 in "
            "the environment); use 'auto'"
        )
    if backend == "triton" and head_size > LARGEST_HEAD:
        raise ConfigError(
            f"heads of {head_size} channels are too wide for backend 'triton', which takes "
            f"{LARGEST_HEAD} at most; use 'auto' or 'chunked', or more heads"
        )
    if backend == "fla":
        from metastate.ops import fla

        fla.require(device)
    return backend


def _runs_triton(device: torch.device) -> bool:
    """Say whether `device` is an NVIDIA GPU that Triton compiles for."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _interprets_triton(device: torch.device) -> bool:
    """Say whether Triton was imported as an interpreter, which takes tensors of the CPU."""
    if device.type != "cpu":
        return False
    from metastate.ops import triton

    return triton.INTERPRETED


def _module(backend: str, x: Tensor) -> Any:
    """Return the module of the backend for inputs like x, [B, T, H, N]."""
    name = resolve_backend(backend, x.device, x.shape[-1])
    if name == "cpu":
        from metastate.ops import cpu

        return cpu
    if name == "triton":
        from metastate.ops import triton

        return triton
    if name == "fla":
        from metastate.ops import fla

        return fla
    return {"reference": reference, "chunked": chunked}[name]


def _check(
    tensors: dict[str, Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    offsets_checked: bool,
) -> tuple[Tensor, Tensor | None]:
    """Check shapes, dtypes and devices; return the initial state and the offsets, contiguous.

    The state is zeros where `state` is None. The offsets' values are looked at, for which a GPU
    must finish all its work, only where they come from outside (`offsets_checked` is False).
    """
    check_tensors(tensors)
    first = next(iter(tensors.values()))
    batch, length, heads, size = first.shape
    rows = batch
    if cu_seqlens is not None:
        if cu_seqlens.dtype != torch.int64 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
            raise ShapeError("cu_seqlens must be int64 [n + 1]")
        if cu_seqlens.device != first.device:
            raise ShapeError(f"cu_seqlens is on {cu_seqlens.device}, the inputs on {first.device}")
        cu_seqlens = cu_seqlens.contiguous()
        # Reading values would also break a graph that is being compiled.
        if not offsets_checked and not torch.compiler.is_compiling():
            ends = (int(cu_seqlens[0]), int(cu_seqlens[-1]))
            if ends != (0, batch * length) or bool((cu_seqlens.diff() < 1).any()):
                raise ShapeError(
                    f"cu_seqlens must rise from 0 to B * T = {batch * length}; it runs from "
                    f"{ends[0]} to {ends[1]}"
                )
        rows = len(cu_seqlens) - 1
    double = any(x.dtype == torch.float64 for x in tensors.values())
    dtype = torch.float64 if double else torch.float32
    shape = (rows, heads, size, size)
    if state is None:
        return first.new_zeros(shape, dtype=dtype), cu_seqlens
    check_state(state, shape, first.device)
    return state.to(dtype), cu_seqlens


def wkv7_trajectory(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    offsets_checked: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Trajectory]:
    """Run the RWKV-7 recurrence as `wkv7` does and keep what later readers of its states need.

    Returns:
        y [B, T, H, N] in r's dtype, and the Trajectory: `.state` is the final state,
        `.read(x)` gives x_t S_t^T, `.recur(r, k, v, state)` runs a second memory through the same
        transitions.
    """
    tensors = {"r": r, "log_w": log_w, "k": k, "v": v, "kappa": kappa, "a": a}
    state, cu_seqlens = _check(tensors, state, cu_seqlens, offsets_checked)
    return _module(backend, r).wkv7(r, log_w, k, v, kappa, a, state, cu_seqlens)


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    offsets_checked: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the RWKV-7 recurrence over a sequence and read it with r.

    S_t = S_{t-1} (diag(exp log_w_t) - kappa_t^T (a_t * kappa_t)) + v_t^T k_t;   y_t = r_t S_t^T

    Args:
        r: receptance, [B, T, H, N], any float dtype.
        log_w: log decay a token, [B, T, H, N], in (-exp(-0.5), 0). `cpu` and `reference` take any
            below 0; the others divide by those of up to 64 tokens, which must not overflow.
        k: replacement key, [B, T, H, N].
        v: value, [B, T, H, N].
        kappa: removal key, [B, T, H, N], unit norm over N.
        a: in-context learning rate, [B, T, H, N], in (0, 1).
        state: state before token 0, [B, H, N_v, N_k] float32 (float64 for float64 inputs); None
            means zeros. With cu_seqlens one a sequence, [n, H, N_v, N_k].
        cu_seqlens: [n + 1] int64, offsets of n documents in the flattened B * T tokens, from 0 to
            B * T; every document starts from its own row of `state`.
        offsets_checked: the offsets are known to rise from 0 to B * T, as a Packing's are: looking
            again would make the host wait for a GPU at every call.
        backend: `auto`, `reference`, `chunked`, `cpu`, `triton` or `fla`.

    Returns:
        y [B, T, H, N] in r's dtype, and the state after the last token of every sequence. Both are
        differentiable in every input, `state` included.

    Raises:
        ShapeError: shapes, dtypes or devices disagree.
        ConfigError: the backend is unknown or cannot run here.

    Source: RWKV-7, arXiv:2503.14456, eqs 16-21; the meaning is ops/reference.py.
    """
    tensors = {"r": r, "log_w": log_w, "k": k, "v": v, "kappa": kappa, "a": a}
    state, cu_seqlens = _check(tensors, state, cu_seqlens, offsets_checked)
    module = _module(backend, r)
    # Nobody will read these states again: the native kernels then need not keep them.
    run = getattr(module, "wkv7_without_trajectory", module.wkv7)
    y, trajectory = run(r, log_w, k, v, kappa, a, state, cu_seqlens)
    return y, trajectory.state


def meta_state(
    x: Tensor,
    e: Tensor,
    q: Tensor | None,
    trajectory: Trajectory,
    state: Tensor | None = None,
    *,
    update: str = "delta",
    first_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the meta state, whose transition is the WKV state's own, and read it with q.

        self:  M_t = M_{t-1} G_t + e_t^T e_t        G_t = diag(w_t) - kappa_t^T (a_t * kappa_t)
        input: M_t = M_{t-1} G_t + e_t^T x_t N_0^-1/2
        delta: M_t = M_{t-1} (diag(w_t) - x^_t^T (a_t * x^_t)) + e_t^T (a_t * x^_t),  x^ = x / |x|
        y_t = q_t M_t^T

    Args:
        x: the layer's input by head, [B, T, H, N].
        e: the state-encoded token, [B, T, H, N].
        q: query, [B, T, H, N]; None means x (for `delta` the normalised x^).
        trajectory: of the WKV pass over the same tokens; its w, kappa, a are reused.
        state: M before token 0, [n, H, N, N]; None means zeros.
        update: `self`, `input` or `delta`.
        first_size: N_0, the head size that the model began with; N if None.
        backend: as in `wkv7`; used by `delta`, which has a geometry of its own.

    Returns:
        y [B, T, H, N] in e's dtype, and M after the last token of every sequence.

    Raises:
        ShapeError, ConfigError: as `wkv7`.

    Source: Meta-State, arXiv:2504.08247, eqs 2, 3, 9 (our reconstruction); `delta` is ours.
    """
    given = {"the trajectory": trajectory.log_w, "x": x, "e": e, "q": x if q is None else q}
    state, cu_seqlens = _check(given, state, trajectory.cu_seqlens, True)
    if update == "delta":
        x = fused.unit(x.to(state.dtype), fused=fused.can_fuse(x, backend))
        a = trajectory.a.to(state.dtype)
        y, state = wkv7(
            x if q is None else q,
            trajectory.log_w,
            a * x,
            e,
            x,
            a,
            state,
            cu_seqlens=cu_seqlens,
            offsets_checked=True,
            backend=backend,
        )
        return y.to(e.dtype), state
    if update not in ("self", "input"):
        raise ConfigError(f"update is {update!r}; allowed: 'self', 'input', 'delta'")
    key = e if update == "self" else x * (first_size or x.shape[-1]) ** -0.5
    y, state = trajectory.recur(x if q is None else q, key, e, state)
    return y.to(e.dtype), state
