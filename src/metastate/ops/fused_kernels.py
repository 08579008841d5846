"""Numba kernels, float32, of the elementwise work around the recurrences, one pass each.

A row is one token, channels are [H, N]. Every kernel works on rows start .. stop - 1; gradients of
per-channel parameters go to row `piece` of an accumulator, one piece a thread, added up afterwards.
Where a kernel says "or bits" an array may hold bfloat16 as its bits in uint16: what stands between
two products in bfloat16 then needs no copies.
Loops over channels are plain, with few arrays and one store each: LLVM makes vectors of those
(one loop over everything at once needs more checks for overlap than it is willing to make).
"""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from metastate.ops.jit import OPTIONS, kernel

DECAY_SCALE = np.float32(-math.exp(-0.5))
ONE, ZERO, TINY = np.float32(1), np.float32(0), np.float32(1e-12)
NAN = np.uint16(0x7FC0)  # of bfloat16

LIMIT, LOG2E = np.float32(87.0), np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
HALF, C3, C4 = np.float32(0.5), np.float32(1 / 6), np.float32(1 / 24)
C5, C6 = np.float32(1 / 120), np.float32(1 / 720)

_inline = nb.njit(inline="always", **OPTIONS)


def _reinterpreted(source: Any, kind: Any) -> Any:
    """Return a function that gives the `kind` with the bits of its argument, made a `source`."""

    @intrinsic
    def same_bits(typing_context, x):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.bitcast(args[0], context.get_value_type(kind))

        return kind(source), build

    return same_bits


_as_float = _reinterpreted(types.int32, types.float32)
_as_bits = _reinterpreted(types.float32, types.uint32)


def _row(rows, t, buffer):  # type: ignore[no-untyped-def]
    """Return row t of float32 or bits, to read in float32; bits are widened into `buffer`."""


@overload(_row, inline="always", jit_options=OPTIONS)
def _(rows, t, buffer):  # type: ignore[no-untyped-def]
    if rows.dtype == types.float32:
        return lambda rows, t, buffer: rows[t]

    def widen(rows, t, buffer):  # type: ignore[no-untyped-def]
        row = rows[t]
        for j in range(row.size):
            buffer[j] = _as_float(np.int32(np.uint32(row[j]) << np.uint32(16)))
        return buffer

    return widen


def _own(rows, t, buffer):  # type: ignore[no-untyped-def]
    """Return where to write row t in float32; for bits `buffer`, which `_round` then stores."""


@overload(_own, inline="always", jit_options=OPTIONS)
def _(rows, t, buffer):  # type: ignore[no-untyped-def]
    if rows.dtype == types.float32:
        return lambda rows, t, buffer: rows[t]
    return lambda rows, t, buffer: buffer


def _round(rows, t, buffer):  # type: ignore[no-untyped-def]
    """Round `buffer` to row t of bits, to the nearest, ties to even; float32 stands there."""


@overload(_round, inline="always", jit_options=OPTIONS)
def _(rows, t, buffer):  # type: ignore[no-untyped-def]
    if rows.dtype == types.float32:
        return lambda rows, t, buffer: None

    def narrow(rows, t, buffer):  # type: ignore[no-untyped-def]
        row = rows[t]
        for j in range(row.size):
            bits = _as_bits(buffer[j])
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            row[j] = np.uint16(rounded) if buffer[j] == buffer[j] else NAN

    return narrow


@nb.njit(inline="always", **OPTIONS)
def _exp(x):  # type: ignore[no-untyped-def]
    """Return e^x = 2^n p(f), |f| <= ln 2 / 2; x is clamped to +-87, relative error below 3e-7."""
    y = min(max(x, -LIMIT), LIMIT)
    n = np.float32(math.floor(y * LOG2E + HALF))
    f = (y - n * LN2_HIGH) - n * LN2_LOW
    p = ONE + f * (ONE + f * (HALF + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    bits = (np.int32(n) + np.int32(127)) << np.int32(23)
    return p * _as_float(np.int32(bits))


@nb.njit(inline="always", **OPTIONS)
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return ONE / (ONE + _exp(-x)) + (x - x)  # the last term keeps a NaN


@_inline
def _normalise(y, unit, rstd, N, eps):  # type: ignore[no-untyped-def]
    """Write (y - mean) / sqrt(var + eps) of every head to `unit`, 1 / sqrt(var + eps) to `rstd`."""
    for h in range(0, y.size, N):
        # Slices, because an index that starts at h could be negative for all that LLVM knows.
        head, out, scales = y[h : h + N], unit[h : h + N], rstd[h : h + N]
        total = ZERO
        for j in range(N):
            total += head[j]
        mean = total / np.float32(N)
        square = ZERO
        for j in range(N):
            square += (head[j] - mean) * (head[j] - mean)
        scale = ONE / np.float32(math.sqrt(square / np.float32(N) + eps))
        for j in range(N):
            out[j] = (head[j] - mean) * scale
        for j in range(N):
            scales[j] = scale


@_inline
def _dot3(a, b, c, out, N):  # type: ignore[no-untyped-def]
    """Write sum_N a b c of every head to `out`."""
    for h in range(0, a.size, N):
        x, y, z, sums = a[h : h + N], b[h : h + N], c[h : h + N], out[h : h + N]
        total = ZERO
        for j in range(N):
            total += x[j] * y[j] * z[j]
        for j in range(N):
            sums[j] = total


@_inline
def _norm_gradient(dp, unit, rstd, weight, dy, dweight, dbias, N):  # type: ignore[no-untyped-def]
    """Write dy of p = unit * weight + bias to `dy`; add to `dweight` and `dbias`."""
    for j in range(dp.size):
        dbias[j] += dp[j]
    for j in range(dp.size):
        dweight[j] += dp[j] * unit[j]
    for h in range(0, dp.size, N):
        p, x, scale = dp[h : h + N], unit[h : h + N], rstd[h : h + N]
        w, out = weight[h : h + N], dy[h : h + N]
        total, along = ZERO, ZERO
        for j in range(N):
            total += p[j] * w[j]
        for j in range(N):
            along += p[j] * w[j] * x[j]
        total, along = total / np.float32(N), along / np.float32(N)
        for j in range(N):
            out[j] = scale[j] * (p[j] * w[j] - total - x[j] * along)


@_inline
def _norms(x, N, out):  # type: ignore[no-untyped-def]
    """Write 1 / |x| of every head to `out`."""
    for h in range(0, x.size, N):
        head, scales = x[h : h + N], out[h : h + N]
        square = ZERO
        for j in range(N):
            square += head[j] * head[j]
        scale = ONE / max(np.float32(math.sqrt(square)), TINY)
        for j in range(N):
            scales[j] = scale


@_inline
def _unit_gradient(dy, y, scale, dx, N):  # type: ignore[no-untyped-def]
    """Write dx of y = x * scale, scale = 1 / |x| by head."""
    for h in range(0, y.size, N):
        grad, unit = dy[h : h + N], y[h : h + N]
        out, factor = dx[h : h + N], scale[h : h + N]
        along = ZERO
        for j in range(N):
            along += grad[j] * unit[j]
        for j in range(N):
            out[j] = (grad[j] - unit[j] * along) * factor[j]


@kernel
def token_mix_forward(x, last, keep, mu, y, start, stop):  # type: ignore[no-untyped-def]
    """y_i = x_t + (x_{t-1} - x_t) mu_i, i = 0, 1, ...

    x [B T, D]; last [B, D]; keep [B T], 0 where a document starts; mu [I, D]; y I times [B T, D],
    or bits.
    """
    length, D = x.shape[0] // last.shape[0], x.shape[1]
    buffer = np.empty(D, np.float32)
    for t in range(start, stop):
        row, before = x[t], last[t // length] if t % length == 0 else x[t - 1]
        for i in range(len(y)):
            out, mix = _own(y[i], t, buffer), mu[i]
            for j in range(D):
                out[j] = row[j] + (keep[t] * before[j] - row[j]) * mix[j]
            _round(y[i], t, out)


@kernel
def token_mix_backward(x, last, keep, mu, g, dx, dlast, dmu, piece, start, stop):  # type: ignore[no-untyped-def]
    """Gradients of token_mix_forward; g I times [B T, D], dlast zero before, dmu [pieces, I, D]."""
    length, D = x.shape[0] // last.shape[0], x.shape[1]
    delta = np.empty(D, np.float32)
    for t in range(start, stop):
        row, grad = x[t], dx[t]
        before = last[t // length] if t % length == 0 else x[t - 1]
        for j in range(D):
            delta[j] = keep[t] * before[j] - row[j]
            grad[j] = ZERO
        inside = (t + 1) % length != 0
        for i in range(len(g)):
            own, mix, gained = g[i][t], mu[i], dmu[piece, i]
            for j in range(D):
                grad[j] += own[j] * (ONE - mix[j])
            for j in range(D):
                gained[j] += own[j] * delta[j]
            if inside:
                after = g[i][t + 1]
                for j in range(D):
                    grad[j] += keep[t + 1] * after[j] * mix[j]
        if t % length == 0:
            for i in range(len(g)):
                for j in range(D):
                    dlast[t // length, j] += keep[t] * g[i][t, j] * mu[i, j]


@kernel
def wkv_inputs_forward(  # type: ignore[no-untyped-def]
    k, v, d, c, m, v_first, w0, a0, v0, k_k, k_a, log_w, a, kappa, key, value, N, start, stop
):
    """Compute what fused.wkv_inputs says.

    All [B T, H N] but the vectors w0 .. k_a [H N]; m, v_first and value are empty in layer 0.
    k .. v_first: or bits.
    """
    D = k.shape[1]
    mix = m.shape[0] > 0
    scaled, scale = np.empty(D, np.float32), np.empty(D, np.float32)
    wide = np.empty((6, D), np.float32)
    for t in range(start, stop):
        kt, dt, ct = _row(k, t, wide[0]), _row(d, t, wide[1]), _row(c, t, wide[2])
        wt, at, keyt = log_w[t], a[t], key[t]
        for j in range(D):
            wt[j] = DECAY_SCALE * _sigmoid(dt[j] + w0[j])
        for j in range(D):
            at[j] = _sigmoid(ct[j] + a0[j])
        for j in range(D):
            keyt[j] = kt[j] * (ONE + (at[j] - ONE) * k_a[j])
        if mix:
            mt, vt, ft = _row(m, t, wide[3]), _row(v, t, wide[4]), _row(v_first, t, wide[5])
            out = value[t]
            for j in range(D):
                out[j] = vt[j] + (ft[j] - vt[j]) * _sigmoid(mt[j] + v0[j])
        for j in range(D):
            scaled[j] = kt[j] * k_k[j]
        _norms(scaled, N, scale)
        out = kappa[t]
        for j in range(D):
            out[j] = scaled[j] * scale[j]


@kernel
def wkv_inputs_backward(  # type: ignore[no-untyped-def]
    k, v, m, v_first, v0, k_k, k_a, log_w, a, kappa, dlog_w, da, dkappa, dkey, dvalue,
    dk, dv, dd, dc, dm, dv_first, params, N, piece, start, stop,
):  # fmt: skip
    """Gradients; params [pieces, 5, H N] gains those of w0, a0, v0, k_k, k_a."""
    D = k.shape[1]
    mix = m.shape[0] > 0
    scaled, scale, grad = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    dw0, da0, dv0 = params[piece, 0], params[piece, 1], params[piece, 2]
    dk_k, dk_a = params[piece, 3], params[piece, 4]
    for t in range(start, stop):
        kt, wt, at, dwt, dat, dkeyt = k[t], log_w[t], a[t], dlog_w[t], da[t], dkey[t]
        ddt, dct, dkt = dd[t], dc[t], dk[t]
        for j in range(D):
            ddt[j] = dwt[j] * wt[j] * (ONE - wt[j] / DECAY_SCALE)
        for j in range(D):
            dw0[j] += ddt[j]
        for j in range(D):
            dct[j] = (dat[j] + dkeyt[j] * kt[j] * k_a[j]) * at[j] * (ONE - at[j])
        for j in range(D):
            da0[j] += dct[j]
        for j in range(D):
            dk_a[j] += dkeyt[j] * kt[j] * (at[j] - ONE)
        if mix:
            mt, vt, ft, gt = m[t], v[t], v_first[t], dvalue[t]
            dmt, dvt, dft = dm[t], dv[t], dv_first[t]
            for j in range(D):
                scaled[j] = _sigmoid(mt[j] + v0[j])
            for j in range(D):
                dmt[j] = gt[j] * (ft[j] - vt[j]) * scaled[j] * (ONE - scaled[j])
            for j in range(D):
                dv0[j] += dmt[j]
            for j in range(D):
                dft[j] = gt[j] * scaled[j]
            for j in range(D):
                dvt[j] = gt[j] * (ONE - scaled[j])
        for j in range(D):
            scaled[j] = kt[j] * k_k[j]
        _norms(scaled, N, scale)
        _unit_gradient(dkappa[t], kappa[t], scale, grad, N)
        for j in range(D):
            dkt[j] = grad[j] * k_k[j] + dkeyt[j] * (ONE + (at[j] - ONE) * k_a[j])
        for j in range(D):
            dk_k[j] += grad[j] * kt[j]


@kernel
def wkv_output_forward(y, r, k, v, g, r_k, weight, bias, eps, o, N, start, stop):  # type: ignore[no-untyped-def]
    """Compute o = (group_norm(y) + (sum_N r r_k k) v) * g; [B T, H N] or bits, vectors [H N]."""
    D = y.shape[1]
    unit, rstd, bonus = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    wide = np.empty((6, D), np.float32)
    for t in range(start, stop):
        vt, gt, ot = _row(v, t, wide[0]), _row(g, t, wide[1]), _own(o, t, wide[2])
        _normalise(_row(y, t, wide[3]), unit, rstd, N, eps)
        _dot3(_row(r, t, wide[4]), _row(k, t, wide[5]), r_k, bonus, N)
        for j in range(D):
            ot[j] = (unit[j] * weight[j] + bias[j] + bonus[j] * vt[j]) * gt[j]
        _round(o, t, ot)


@kernel
def wkv_output_backward(  # type: ignore[no-untyped-def]
    y, r, k, v, g, r_k, weight, bias, eps, do, dy, dr, dk, dv, dg, params, N, piece, start, stop
):
    """Gradients of wkv_output_forward; params [pieces, 3, H N] gains those of r_k, weight, bias."""
    D = y.shape[1]
    unit, rstd, bonus = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    dp, dbonus, ones = np.empty(D, np.float32), np.empty(D, np.float32), np.ones(D, np.float32)
    dr_k, dweight, dbias = params[piece, 0], params[piece, 1], params[piece, 2]
    for t in range(start, stop):
        rt, kt, vt, gt, dot = r[t], k[t], v[t], g[t], do[t]
        _normalise(y[t], unit, rstd, N, eps)
        _dot3(rt, kt, r_k, bonus, N)
        drt, dkt, dvt, dgt = dr[t], dk[t], dv[t], dg[t]
        for j in range(D):
            dgt[j] = dot[j] * (unit[j] * weight[j] + bias[j] + bonus[j] * vt[j])
        for j in range(D):
            dp[j] = dot[j] * gt[j]
        for j in range(D):
            dvt[j] = dp[j] * bonus[j]
        _dot3(dp, vt, ones, dbonus, N)
        for j in range(D):
            drt[j] = dbonus[j] * kt[j] * r_k[j]
        for j in range(D):
            dkt[j] = dbonus[j] * rt[j] * r_k[j]
        for j in range(D):
            dr_k[j] += dbonus[j] * rt[j] * kt[j]
        _norm_gradient(dp, unit, rstd, weight, dy[t], dweight, dbias, N)


@kernel
def norm_sum_forward(ys, weights, biases, x, eps, o, N, start, stop):  # type: ignore[no-untyped-def]
    """Compute o = (sum_i group_norm(y_i)) * x; ys I times [B T, H N], weights, biases [I, H N]."""
    D = x.shape[1]
    unit, rstd, total = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    for t in range(start, stop):
        xt, ot = x[t], o[t]
        total[:] = ZERO
        for i in range(len(ys)):
            weight, bias = weights[i], biases[i]
            _normalise(ys[i][t], unit, rstd, N, eps)
            for j in range(D):
                total[j] += unit[j] * weight[j] + bias[j]
        for j in range(D):
            ot[j] = total[j] * xt[j]


@kernel
def norm_sum_backward(ys, weights, biases, x, eps, do, dys, dx, params, N, piece, start, stop):  # type: ignore[no-untyped-def]
    """Gradients of norm_sum_forward; params [pieces, 2, I, H N] gains weights' and biases'."""
    D = x.shape[1]
    unit, rstd, dp = np.empty(D, np.float32), np.empty(D, np.float32), np.empty(D, np.float32)
    for t in range(start, stop):
        xt, dot, dxt = x[t], do[t], dx[t]
        for j in range(D):
            dp[j] = dot[j] * xt[j]
        dxt[:] = ZERO
        for i in range(len(ys)):
            weight, bias = weights[i], biases[i]
            _normalise(ys[i][t], unit, rstd, N, eps)
            for j in range(D):
                dxt[j] += dot[j] * (unit[j] * weight[j] + bias[j])
            dy, dweight, dbias = dys[i][t], params[piece, 0, i], params[piece, 1, i]
            _norm_gradient(dp, unit, rstd, weight, dy, dweight, dbias, N)


@kernel
def unit_forward(x, y, N, start, stop):  # type: ignore[no-untyped-def]
    """Compute y = x / |x| by head; [B T, H N]."""
    scale = np.empty(x.shape[1], np.float32)
    for t in range(start, stop):
        xt, yt = x[t], y[t]
        _norms(xt, N, scale)
        for j in range(xt.size):
            yt[j] = xt[j] * scale[j]


@kernel
def unit_backward(x, y, dy, dx, N, start, stop):  # type: ignore[no-untyped-def]
    """Compute dx = (dy - y (dy . y)) / |x| by head."""
    scale = np.empty(x.shape[1], np.float32)
    for t in range(start, stop):
        _norms(x[t], N, scale)
        _unit_gradient(dy[t], y[t], scale, dx[t], N)


@kernel
def relu_squared_forward(x, y, start, stop):  # type: ignore[no-untyped-def]
    """Compute y = max(x, 0)^2; [B T, F], or bits."""
    wide = np.empty((2, x.shape[1]), np.float32)
    for t in range(start, stop):
        xt, yt = _row(x, t, wide[0]), _own(y, t, wide[1])
        for j in range(xt.size):
            kept = ZERO if xt[j] < ZERO else xt[j]  # a NaN stays
            yt[j] = kept * kept
        _round(y, t, yt)


@kernel
def relu_squared_backward(x, dy, dx, start, stop):  # type: ignore[no-untyped-def]
    """Compute dx = 2 max(x, 0) dy, 0 where x is not above 0 whatever dy; or bits."""
    wide = np.empty((3, x.shape[1]), np.float32)
    for t in range(start, stop):
        xt, gt, out = _row(x, t, wide[0]), _row(dy, t, wide[1]), _own(dx, t, wide[2])
        for j in range(xt.size):
            out[j] = ZERO if xt[j] <= ZERO else (xt[j] + xt[j]) * gt[j]
        _round(dx, t, out)
