"""Numba kernels, float32, of the elementwise work around the recurrences, one pass each.

A row is one token, channels are [H, N]. Every kernel works on rows start .. stop - 1; gradients of
per-channel parameters go to row `piece` of an accumulator, one piece a thread, added up afterwards.
Loops over channels are plain, LLVM makes vectors of them.
"""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic

OPTIONS: Any = {"nogil": True, "fastmath": {"contract", "reassoc", "nsz"}, "error_model": "numpy"}
DECAY_SCALE = np.float32(-math.exp(-0.5))
ONE, ZERO, TINY = np.float32(1), np.float32(0), np.float32(1e-12)

LIMIT, LOG2E = np.float32(87.0), np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
HALF, C3, C4 = np.float32(0.5), np.float32(1 / 6), np.float32(1 / 24)
C5, C6 = np.float32(1 / 120), np.float32(1 / 720)

_inline = nb.njit(inline="always", **OPTIONS)


def _jit(function: Any) -> Any:
    """Compile a kernel, cached on disk where any cache folder can be written."""
    try:
        return nb.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no writable cache folder anywhere: compile in every process
        return nb.njit(**OPTIONS)(function)


@intrinsic
def _as_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """Return the float32 with the bit pattern of an int32."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


@nb.njit(inline="always", **OPTIONS)
def _exp(x):  # type: ignore[no-untyped-def]
    """Return e^x = 2^n p(f), |f| <= ln 2 / 2; x is clamped to +-87, relative error below 3e-7."""
    y = min(max(x, -LIMIT), LIMIT)
    n = np.float32(math.floor(y * LOG2E + HALF))
    f = (y - n * LN2_HIGH) - n * LN2_LOW
    p = ONE + f * (ONE + f * (HALF + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    bits = (np.int32(n) + np.int32(127)) << np.int32(23)
    return p * _as_float(np.int32(bits))  # type: ignore[call-arg, arg-type]


@nb.njit(inline="always", **OPTIONS)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return ONE / (ONE + _exp(-x)) + (x - x)  # the last term keeps a NaN


@_inline
def _moments(y, t, h, N, eps):  # type: ignore[no-untyped-def]
    """Return the mean and 1 / sqrt(var + eps) of y[t, h : h + N]."""
    total = ZERO
    for j in range(h, h + N):
        total += y[t, j]
    mean = total / np.float32(N)
    square = ZERO
    for j in range(h, h + N):
        square += (y[t, j] - mean) * (y[t, j] - mean)
    return mean, ONE / np.float32(math.sqrt(square / np.float32(N) + eps))


@_jit
def token_mix_forward(x, last, keep, mu, y, start, stop):  # type: ignore[no-untyped-def]
    """y_i = x_t + (x_{t-1} - x_t) mu_i, i = 0, 1, ...

    x [B T, D]; last [B, D]; keep [B T], 0 where a document starts; mu [I, D]; y I times [B T, D].
    """
    length, D = x.shape[0] // last.shape[0], x.shape[1]
    for t in range(start, stop):
        before = last[t // length] if t % length == 0 else x[t - 1]
        for i in range(len(y)):
            for j in range(D):
                y[i][t, j] = x[t, j] + (keep[t] * before[j] - x[t, j]) * mu[i, j]


@_jit
def token_mix_backward(x, last, keep, mu, g, dx, dlast, dmu, piece, start, stop):  # type: ignore[no-untyped-def]
    """Gradients of token_mix_forward; g I times [B T, D], dlast zero before, dmu [pieces, I, D]."""
    length, D = x.shape[0] // last.shape[0], x.shape[1]
    for t in range(start, stop):
        first, inside = t % length == 0, (t + 1) % length != 0
        before = last[t // length] if first else x[t - 1]
        for j in range(D):
            dx[t, j] = ZERO
        for i in range(len(g)):
            for j in range(D):
                gj = g[i][t, j]
                dx[t, j] += gj * (ONE - mu[i, j])
                dmu[piece, i, j] += gj * (keep[t] * before[j] - x[t, j])
            if inside:
                for j in range(D):
                    dx[t, j] += keep[t + 1] * g[i][t + 1, j] * mu[i, j]
            if first:
                for j in range(D):
                    dlast[t // length, j] += keep[t] * g[i][t, j] * mu[i, j]


@_jit
def wkv_inputs_forward(  # type: ignore[no-untyped-def]
    k, v, d, c, m, v_first, w0, a0, v0, k_k, k_a, log_w, a, kappa, key, value, N, start, stop
):
    """Compute what fused.wkv_inputs says.

    All [B T, H N] but the vectors w0 .. k_a [H N]; m, v_first and value are empty in layer 0.
    """
    D = k.shape[1]
    mix = m.shape[0] > 0
    for t in range(start, stop):
        for j in range(D):
            log_w[t, j] = DECAY_SCALE * _sigmoid(d[t, j] + w0[j])
            aj = _sigmoid(c[t, j] + a0[j])
            a[t, j] = aj
            key[t, j] = k[t, j] * (ONE + (aj - ONE) * k_a[j])
        if mix:
            for j in range(D):
                s = _sigmoid(m[t, j] + v0[j])
                value[t, j] = v[t, j] + (v_first[t, j] - v[t, j]) * s
        for h in range(0, D, N):
            square = ZERO
            for j in range(h, h + N):
                x = k[t, j] * k_k[j]
                square += x * x
            scale = ONE / max(np.float32(math.sqrt(square)), TINY)
            for j in range(h, h + N):
                kappa[t, j] = k[t, j] * k_k[j] * scale


@_jit
def wkv_inputs_backward(  # type: ignore[no-untyped-def]
    k, v, m, v_first, v0, k_k, k_a, log_w, a, kappa, dlog_w, da, dkappa, dkey, dvalue,
    dk, dv, dd, dc, dm, dv_first, params, N, piece, start, stop,
):  # fmt: skip
    """Gradients; params [pieces, 5, H N] gains those of w0, a0, v0, k_k, k_a."""
    D = k.shape[1]
    mix = m.shape[0] > 0
    for t in range(start, stop):
        for j in range(D):
            s = log_w[t, j] / DECAY_SCALE
            grad = dlog_w[t, j] * log_w[t, j] * (ONE - s)
            dd[t, j] = grad
            params[piece, 0, j] += grad
            aj = a[t, j]
            grad = (da[t, j] + dkey[t, j] * k[t, j] * k_a[j]) * aj * (ONE - aj)
            dc[t, j] = grad
            params[piece, 1, j] += grad
            params[piece, 4, j] += dkey[t, j] * k[t, j] * (aj - ONE)
        if mix:
            for j in range(D):
                s = _sigmoid(m[t, j] + v0[j])
                grad = dvalue[t, j] * (v_first[t, j] - v[t, j]) * s * (ONE - s)
                dm[t, j] = grad
                params[piece, 2, j] += grad
                dv_first[t, j] = dvalue[t, j] * s
                dv[t, j] = dvalue[t, j] * (ONE - s)
        for h in range(0, D, N):
            square, along = ZERO, ZERO
            for j in range(h, h + N):
                x = k[t, j] * k_k[j]
                square += x * x
                along += dkappa[t, j] * kappa[t, j]
            scale = ONE / max(np.float32(math.sqrt(square)), TINY)
            for j in range(h, h + N):
                grad = (dkappa[t, j] - kappa[t, j] * along) * scale
                dk[t, j] = grad * k_k[j] + dkey[t, j] * (ONE + (a[t, j] - ONE) * k_a[j])
                params[piece, 3, j] += grad * k[t, j]


@_jit
def wkv_output_forward(y, r, k, v, g, r_k, weight, bias, eps, o, N, start, stop):  # type: ignore[no-untyped-def]
    """O = (group_norm(y) + (sum_N r r_k k) v) * g; all [B T, H N], r_k, weight, bias [H N]."""
    D = y.shape[1]
    for t in range(start, stop):
        for h in range(0, D, N):
            mean, rstd = _moments(y, t, h, N, eps)
            bonus = ZERO
            for j in range(h, h + N):
                bonus += r[t, j] * k[t, j] * r_k[j]
            for j in range(h, h + N):
                p = (y[t, j] - mean) * rstd * weight[j] + bias[j] + bonus * v[t, j]
                o[t, j] = p * g[t, j]


@_jit
def wkv_output_backward(  # type: ignore[no-untyped-def]
    y, r, k, v, g, r_k, weight, bias, eps, do, dy, dr, dk, dv, dg, params, N, piece, start, stop
):
    """Gradients of wkv_output_forward; params [pieces, 3, H N] gains those of r_k, weight, bias."""
    D = y.shape[1]
    for t in range(start, stop):
        for h in range(0, D, N):
            mean, rstd = _moments(y, t, h, N, eps)
            bonus, dbonus, total, along = ZERO, ZERO, ZERO, ZERO
            for j in range(h, h + N):
                bonus += r[t, j] * k[t, j] * r_k[j]
                dp = do[t, j] * g[t, j]
                dbonus += dp * v[t, j]
                unit = (y[t, j] - mean) * rstd
                total += dp * weight[j]
                along += dp * weight[j] * unit
            total, along = total / np.float32(N), along / np.float32(N)
            for j in range(h, h + N):
                dp = do[t, j] * g[t, j]
                unit = (y[t, j] - mean) * rstd
                dg[t, j] = do[t, j] * (unit * weight[j] + bias[j] + bonus * v[t, j])
                dv[t, j] = dp * bonus
                dr[t, j] = dbonus * k[t, j] * r_k[j]
                dk[t, j] = dbonus * r[t, j] * r_k[j]
                dy[t, j] = rstd * (dp * weight[j] - total - unit * along)
                params[piece, 0, j] += dbonus * r[t, j] * k[t, j]
                params[piece, 1, j] += dp * unit
                params[piece, 2, j] += dp


@_jit
def norm_sum_forward(ys, weights, biases, x, eps, o, N, start, stop):  # type: ignore[no-untyped-def]
    """O = (sum_i group_norm(y_i)) * x; ys a tuple of [B T, H N], weights and biases [I, H N]."""
    D = x.shape[1]
    for t in range(start, stop):
        for h in range(0, D, N):
            for i in range(len(ys)):
                mean, rstd = _moments(ys[i], t, h, N, eps)
                for j in range(h, h + N):
                    p = (ys[i][t, j] - mean) * rstd * weights[i, j] + biases[i, j]
                    o[t, j] = p if i == 0 else o[t, j] + p
            for j in range(h, h + N):
                o[t, j] *= x[t, j]


@_jit
def norm_sum_backward(ys, weights, biases, x, eps, do, dys, dx, params, N, piece, start, stop):  # type: ignore[no-untyped-def]
    """Gradients of norm_sum_forward; params [pieces, 2, I, H N] gains weights' and biases'."""
    D = x.shape[1]
    for t in range(start, stop):
        for h in range(0, D, N):
            for j in range(h, h + N):
                dx[t, j] = ZERO
            for i in range(len(ys)):
                mean, rstd = _moments(ys[i], t, h, N, eps)
                total, along = ZERO, ZERO
                for j in range(h, h + N):
                    dp = do[t, j] * x[t, j] * weights[i, j]
                    total += dp
                    along += dp * (ys[i][t, j] - mean) * rstd
                total, along = total / np.float32(N), along / np.float32(N)
                for j in range(h, h + N):
                    unit = (ys[i][t, j] - mean) * rstd
                    dp = do[t, j] * x[t, j]
                    dys[i][t, j] = rstd * (dp * weights[i, j] - total - unit * along)
                    dx[t, j] += do[t, j] * (unit * weights[i, j] + biases[i, j])
                    params[piece, 0, i, j] += dp * unit
                    params[piece, 1, i, j] += dp


@_jit
def unit_forward(x, y, N, start, stop):  # type: ignore[no-untyped-def]
    """Y = x / |x| by head; [B T, H N]."""
    for t in range(start, stop):
        for h in range(0, x.shape[1], N):
            square = ZERO
            for j in range(h, h + N):
                square += x[t, j] * x[t, j]
            scale = ONE / max(np.float32(math.sqrt(square)), TINY)
            for j in range(h, h + N):
                y[t, j] = x[t, j] * scale


@_jit
def unit_backward(x, y, dy, dx, N, start, stop):  # type: ignore[no-untyped-def]
    """Dx = (dy - y (dy . y)) / |x|, 0 where x is."""
    for t in range(start, stop):
        for h in range(0, x.shape[1], N):
            square, along = ZERO, ZERO
            for j in range(h, h + N):
                square += x[t, j] * x[t, j]
                along += dy[t, j] * y[t, j]
            scale = ONE / max(np.float32(math.sqrt(square)), TINY)
            for j in range(h, h + N):
                dx[t, j] = (dy[t, j] - y[t, j] * along) * scale
