"""One token for a batch of states, without gradients: what decoding runs, in microseconds."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metastate.ops.jit import kernel, pointer


@cache
def step_kernel(dtype: type) -> Any:
    """Compile one step of every state, any head size; a state's rows need nothing of each other."""

    def step(  # type: ignore[no-untyped-def]
        count, N, r_, log_w_, k_, v_, kappa_, a_, state_, y_, out_
    ):
        W: Any = np.empty(2 * N, dtype)
        w, b = W[:N], W[N:]
        zero = dtype(0)
        r_, log_w_, k_ = pointer(r_, zero), pointer(log_w_, zero), pointer(k_, zero)
        v_, kappa_, a_ = pointer(v_, zero), pointer(kappa_, zero), pointer(a_, zero)
        state_, y_, out_ = pointer(state_, zero), pointer(y_, zero), pointer(out_, zero)
        for head in range(count):
            f = head * N
            for j in range(N):
                w[j] = math.exp(log_w_[f + j])
                b[j] = a_[f + j] * kappa_[f + j]
            for i in range(N):
                row = (f + i) * N
                u = zero
                for j in range(N):
                    u += state_[row + j] * kappa_[f + j]
                y = zero
                for j in range(N):
                    s = state_[row + j] * w[j] - u * b[j] + v_[f + i] * k_[f + j]
                    out_[row + j] = s
                    y += s * r_[f + j]
                y_[f + i] = y

    return kernel(step)


def wkv7_step(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, kappa: Tensor, a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S = S_0 (diag(exp log_w) - kappa^T (a * kappa)) + v^T k;  y = r S^T, for one token.

    Args:
        r: [B, 1, H, N], any float dtype, as the next five.
        log_w: log decay.
        k: replacement key.
        v: value.
        kappa: removal key.
        a: in-context learning rate.
        state: S_0, [B, H, N_v, N_k], float32 or float64; it is not changed.

    Returns:
        y [B, 1, H, N] in r's dtype and the new state.
    """
    dtype = state.dtype
    given = [x.to(dtype).contiguous() for x in (r, log_w, k, v, kappa, a, state)]
    y, out = torch.empty_like(given[0]), torch.empty_like(given[6])
    run = step_kernel(np.float64 if dtype == torch.float64 else np.float32)
    batch, _, heads, size = r.shape
    run(batch * heads, size, *(x.data_ptr() for x in (*given, y, out)))
    return y.to(r.dtype), out
