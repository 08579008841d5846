"""Arithmetic on the vectors of one row of a batch, float32 values at addresses, for decoding."""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np

from metastate.ops.fused_kernels import ONE, TINY, ZERO, _as_float, _sigmoid
from metastate.ops.jit import INNER, pointer

LN_EPS, GROUP_EPS = np.float32(1e-5), np.float32(64e-5)
NONE, TANH, SIGMOID, RELU2 = range(4)  # what `activate` does

_njit: Any = nb.njit(**INNER)


@_njit
def vector(address, index):  # type: ignore[no-untyped-def]
    """Return a pointer to value `index` of the float32 array at `address`."""
    return pointer(address + index * 4, ZERO)


@_njit
def standardise(x, n, eps):  # type: ignore[no-untyped-def]
    """Return the mean of x and 1 / sqrt(var + eps)."""
    total = ZERO
    for j in range(n):
        total += x[j]
    mean = total / np.float32(n)
    square = ZERO
    for j in range(n):
        square += (x[j] - mean) * (x[j] - mean)
    return mean, ONE / np.float32(math.sqrt(square / np.float32(n) + eps))


@_njit
def layer_norm(x, weight, bias, out, n):  # type: ignore[no-untyped-def]
    """Write the layer norm of x to `out`."""
    mean, scale = standardise(x, n, LN_EPS)
    for j in range(n):
        out[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@_njit
def head_norm(y, weight, bias, out, n):  # type: ignore[no-untyped-def]
    """Add the group norm of one head to `out`."""
    mean, scale = standardise(y, n, GROUP_EPS)
    for j in range(n):
        out[j] += (y[j] - mean) * scale * weight[j] + bias[j]


@_njit
def mix(x, shift, mu, num_mixes, out, rows, b, D):  # type: ignore[no-untyped-def]
    """out_i = x + (shift - x) mu_i for every mix i, then shift = x, of one row."""
    for i in range(num_mixes):
        to, factor = vector(out, (i * rows + b) * D), vector(mu, i * D)
        for j in range(D):
            to[j] = x[j] + (shift[j] - x[j]) * factor[j]
    for j in range(D):
        shift[j] = x[j]


@_njit
def activate(kind, y, n):  # type: ignore[no-untyped-def]
    """Apply the function `kind` to y in place."""
    if kind == TANH:
        for j in range(n):
            y[j] = math.tanh(y[j])
    elif kind == SIGMOID:
        for j in range(n):
            y[j] = _sigmoid(y[j])
    elif kind == RELU2:
        for j in range(n):
            y[j] = max(y[j], ZERO) * max(y[j], ZERO) + (y[j] - y[j])  # the last term keeps a NaN


@_njit
def unit(x, out, n):  # type: ignore[no-untyped-def]
    """Write x / max(|x|, 1e-12) to `out`."""
    square = ZERO
    for j in range(n):
        square += x[j] * x[j]
    scale = ONE / max(np.float32(math.sqrt(square)), TINY)
    for j in range(n):
        out[j] = x[j] * scale


@_njit
def advance(S, w, kappa, b, k, v, r, y, N):  # type: ignore[no-untyped-def]
    """S = S (diag(w) - kappa^T b) + v^T k;  y = r S^T;  one head, S [N_v, N_k] at an address."""
    for i in range(N):
        row = vector(S, i * N)
        u = ZERO
        for j in range(N):
            u += row[j] * kappa[j]
        vi = v[i]
        for j in range(N):
            row[j] = row[j] * w[j] - u * b[j] + vi * k[j]
        total = ZERO
        for j in range(N):
            total += row[j] * r[j]
        y[i] = total


@_njit
def widened(w, size, n, out):  # type: ignore[no-untyped-def]
    """Write the n values of a matrix at w as float32."""
    if size == 4:
        exact = vector(w, 0)
        for j in range(n):
            out[j] = exact[j]
    else:
        half = pointer(w, np.uint16(0))
        for j in range(n):
            out[j] = _as_float(np.int32(np.uint32(half[j]) << np.uint32(16)))
