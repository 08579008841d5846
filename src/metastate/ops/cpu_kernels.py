"""Numba kernels of the RWKV-7 recurrence on a CPU: forward, backward, later reads.

One task is one head of one sequence. Its state lives transposed, [N_k, N_v], in the first-level
cache, so that the rows i of S (which are independent, given the shared vectors) fill the vector
lanes, and neither the read with r nor the removal read with kappa needs a horizontal sum.

Everything a kernel touches in its loops is copied into ONE flat scratch array at offsets that are
compile-time constants, rows padded with zeros to a multiple of 16 lanes. LLVM then knows every
distance between loads and stores, needs no alias checks and turns the plain loops below into
full-width fused multiply-adds (measured: 2.6x over the same loops on separate arrays). Arrays come
in as addresses: indexing a pointer has no negative-index wraparound to hinder the vectoriser.

Notation: b = a * kappa; u_t = kappa_t S_{t-1}^T (the removal read); G_t = dL/dS_t; P = N padded.
Tokens are flat, [num_tokens, H, N]; cu [n + 1] holds the sequences' offsets. Chunks of C tokens
count from each sequence's start; a chunk's checkpoint is the transposed state before it, at
checkpoint[cu[s] // C + s + c] for chunk c of sequence s. `fastmath` allows reassociation and
contraction, never "no NaNs": a NaN propagates.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numba as nb
import numpy as np

from metastate.ops.jit import OPTIONS, kernel, pointer

C = 32  # tokens a checkpoint
LINE = 64  # bytes of a cache line: vectors that straddle two lines load at half speed
# Inlined into the kernels, so that P and the offsets become constants there.
_inline: Any = nb.njit(forceinline=True, **OPTIONS)


def padded(N: int) -> int:
    """Return N rounded up to a multiple of 16 lanes."""
    return -(-N // 16) * 16


@_inline
def _copy(to, at, step, source, start, stride, m, n):  # type: ignore[no-untyped-def]
    """Copy m rows of n values; rows are `step` and `stride` values apart."""
    for t in range(m):
        for i in range(n):
            to[at + t * step + i] = source[start + t * stride + i]


@_inline
def _clear(W, dst, n, zero):  # type: ignore[no-untyped-def]
    for i in range(n):
        W[dst + i] = zero


@_inline
def _copy_transposed(to, at, step, source, start, stride, m, n):  # type: ignore[no-untyped-def]
    """Copy m rows of n values to n rows of m."""
    for t in range(m):
        for i in range(n):
            to[at + i * step + t] = source[start + t * stride + i]


@_inline
def _matmul(W, dst, m, coef, mat, P):  # type: ignore[no-untyped-def]
    """W[dst][t] = sum_k W[coef][t, k] W[mat][k] for t < m rounded up to 4; all rows P long."""
    for t in range(0, m, 4):
        d = dst + t * P
        for k in range(0, P, 4):
            c = coef + t * P + k
            a0, a1, a2, a3 = W[c], W[c + 1], W[c + 2], W[c + 3]
            c += P
            b0, b1, b2, b3 = W[c], W[c + 1], W[c + 2], W[c + 3]
            c += P
            c0, c1, c2, c3 = W[c], W[c + 1], W[c + 2], W[c + 3]
            c += P
            d0, d1, d2, d3 = W[c], W[c + 1], W[c + 2], W[c + 3]
            o = mat + k * P
            for i in range(P):
                x0 = W[o + i]
                x1 = W[o + P + i]
                x2 = W[o + 2 * P + i]
                x3 = W[o + 3 * P + i]
                W[d + i] += a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3
                W[d + P + i] += b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
                W[d + 2 * P + i] += c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
                W[d + 3 * P + i] += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3


@_inline
def _read_value(W, out, m, x, last, S, w, k, b, v, u, P, zero):  # type: ignore[no-untyped-def]
    """out_t = x_t S_t (last = 1) or x_t S_{t-1} (last = 0); W[S] is the chunk's S_0, [N_v, N_k].

    Without forming S_s: x_t S_s = (x_t S_{s-1}) * w_s + (x_t . v_s) k_s - (x_t . u_s) b_s.
    """
    _clear(W, out, C * P, zero)
    _matmul(W, out, m, x, S, P)
    for t in range(m):
        d = out + t * P
        c = x + t * P
        for s in range(t + last):
            o = s * P
            xv = zero
            xu = zero
            for i in range(P):
                xv += W[c + i] * W[v + o + i]
                xu += W[c + i] * W[u + o + i]
            for j in range(P):
                W[d + j] = W[d + j] * W[w + o + j] + xv * W[k + o + j] - xu * W[b + o + j]


@_inline
def _read_key(W, out, m, x, S, w, k, b, v, u, row, P, zero):  # type: ignore[no-untyped-def]
    """out_t = x_t S_t^T; W[S] is the chunk's S_0 transposed, [N_k, N_v]. Overwrites W[x].

    Without forming S_t: out_t = (x_t W_t) S_0^T + sum_s (x_t . k_s W_t / W_s) v_s - (x_t . b_s W_t
    / W_s) u_s, where the decayed k_s, b_s and W_t are carried from token to token, not divided.
    W[row], four rows, holds what a pass over t changes or reads often, at a fixed place.
    """
    kk, bb, vs, us = row, row + P, row + P * 2, row + P * 3
    _clear(W, out, C * P, zero)
    for s in range(m):
        for i in range(P):
            W[kk + i] = W[k + s * P + i]
            W[bb + i] = W[b + s * P + i]
            W[vs + i] = W[v + s * P + i]
            W[us + i] = W[u + s * P + i]
        for t in range(s, m):
            o = t * P
            xk = zero
            xb = zero
            for j in range(P):
                xk += W[x + o + j] * W[kk + j]
                xb += W[x + o + j] * W[bb + j]
            for i in range(P):
                W[out + o + i] += xk * W[vs + i] - xb * W[us + i]
            for j in range(P):
                W[kk + j] *= W[w + o + P + j]
                W[bb + j] *= W[w + o + P + j]
    for j in range(P):
        W[kk + j] = W[w + j]
    for t in range(m):
        for j in range(P):
            W[x + t * P + j] *= W[kk + j]
            W[kk + j] *= W[w + t * P + P + j]
    _matmul(W, out, m, x, S, P)


@_inline
def _advance(W, S, w, b, k, r, q, u, v, y, n, P, L):  # type: ignore[no-untyped-def]
    """S = S diag(w) - u^T b + v^T k;  y += r S^T;  n += q S^T;  the state transposed, [P, L]."""
    for j in range(0, P, 4):
        w0, w1, w2, w3 = W[w + j], W[w + j + 1], W[w + j + 2], W[w + j + 3]
        b0, b1, b2, b3 = W[b + j], W[b + j + 1], W[b + j + 2], W[b + j + 3]
        k0, k1, k2, k3 = W[k + j], W[k + j + 1], W[k + j + 2], W[k + j + 3]
        r0, r1, r2, r3 = W[r + j], W[r + j + 1], W[r + j + 2], W[r + j + 3]
        q0, q1, q2, q3 = W[q + j], W[q + j + 1], W[q + j + 2], W[q + j + 3]
        o = j * L
        for i in range(L):
            s0 = S[o + i] * w0 - W[u + i] * b0 + W[v + i] * k0
            s1 = S[o + L + i] * w1 - W[u + i] * b1 + W[v + i] * k1
            s2 = S[o + 2 * L + i] * w2 - W[u + i] * b2 + W[v + i] * k2
            s3 = S[o + 3 * L + i] * w3 - W[u + i] * b3 + W[v + i] * k3
            S[o + i] = s0
            S[o + L + i] = s1
            S[o + 2 * L + i] = s2
            S[o + 3 * L + i] = s3
            W[y + i] += s0 * r0 + s1 * r1 + s2 * r2 + s3 * r3
            W[n + i] += s0 * q0 + s1 * q1 + s2 * q2 + s3 * q3


@cache
def forward_kernel(P: int, L: int, save: bool, dtype: type) -> Any:
    """Compile the forward pass for padded head size P in blocks of L value lanes (L divides P).

    y_t = r_t S_t^T. Task = (sequence, head, lane block), counted in that order. With `save`,
    u [num_tokens, H, N] and the checkpoints are written, without it those two are left alone.
    """
    blocks = P // L
    rows, lane_rows = (C + 1) * P, (C + 1) * L
    r, w, k, q, b = (rows * i for i in range(5))
    v, u, y = (rows * 5 + lane_rows * i for i in range(3))
    ut, vt, yt, nt = (rows * 5 + lane_rows * 3 + L * i for i in range(4))
    total = rows * 5 + lane_rows * 3 + L * 4
    state_size = P * L + L  # with u of the token to come

    def forward(  # type: ignore[no-untyped-def]
        H, N, r_, w_, k_, v_, kappa_, a_, state0_, cu_, y_, u_, checkpoint_, state_, start, stop
    ):
        group = min(stop - start, H * blocks)
        scratch: Any = np.zeros(total + LINE, dtype)
        states: Any = np.zeros(group * state_size + LINE, dtype)
        zero = dtype(0)
        W = pointer((scratch.ctypes.data + LINE - 1) // LINE * LINE, zero)
        sources = (
            pointer(r_, zero), pointer(w_, zero), pointer(k_, zero), pointer(kappa_, zero),
            pointer(a_, zero),
        )  # fmt: skip
        v_, y_, u_ = pointer(v_, zero), pointer(y_, zero), pointer(u_, zero)
        state0_, state_, cu = pointer(state0_, zero), pointer(state_, zero), pointer(cu_, H)
        checkpoint_ = pointer(checkpoint_, zero)
        while start < stop:
            # The heads of a sequence advance together, chunk by chunk: their rows are neighbours.
            s = start // (H * blocks)
            end = min(stop, (s + 1) * H * blocks)
            lo, hi = cu[s], cu[s + 1]
            chunks = (hi - lo + C - 1) // C
            scratch[:] = zero
            states[:] = zero
            for c in range(-1, chunks + 1):
                t0 = lo + c * C
                m = min(C, hi - t0)
                for task in range(start, end):
                    first = task % blocks * L
                    h = task // blocks % H
                    lanes = min(L, N - first)
                    place = states.ctypes.data + (task - start) * state_size * states.itemsize
                    S = pointer((place + LINE - 1) // LINE * LINE, zero)
                    f = ((s * H + h) * N + first) * N
                    if c < 0:
                        _copy_transposed(S, 0, L, state0_, f, N, lanes, N)
                        for j in range(N):
                            for i in range(L):
                                S[P * L + i] += S[j * L + i] * sources[3][(lo * H + h) * N + j]
                        continue
                    if c == chunks:
                        _copy_transposed(state_, f, N, S, 0, L, N, lanes)
                        continue
                    f = (t0 * H + h) * N
                    for i in range(5):
                        _copy(W, r + i * rows, P, sources[i], f, H * N, m, N)
                    if t0 + m < hi:
                        _copy(W, q + m * P, P, sources[3], f + m * H * N, 0, 1, N)
                    for i in range(m * P):
                        W[b + i] *= W[q + i]
                    _copy(W, v, L, v_, f + first, H * N, m, lanes)
                    if save:
                        o = ((lo // C + s + c) * H + h) * N * N + first
                        _copy(checkpoint_, o, N, S, 0, L, N, lanes)
                    for i in range(L):
                        W[nt + i] = S[P * L + i]
                    for t in range(m):
                        T = t * P
                        # Lane vectors at fixed places: LLVM makes its overlap checks for a whole
                        # loop nest at once, and rows that move with t would fail them.
                        for i in range(L):
                            W[ut + i] = W[nt + i]
                            W[u + t * L + i] = W[nt + i]
                            W[vt + i] = W[v + t * L + i]
                            W[yt + i] = zero
                            W[nt + i] = zero
                        _advance(W, S, w + T, b + T, k + T, r + T, q + T + P, ut, vt, yt, nt, P, L)
                        for i in range(L):
                            W[y + t * L + i] = W[yt + i]
                    for i in range(L):
                        S[P * L + i] = W[nt + i]
                    _copy(y_, f + first, H * N, W, y, L, m, lanes)
                    if save:
                        _copy(u_, f + first, H * N, W, u, L, m, lanes)
            start = end

    return kernel(forward)


@cache
def backward_kernel(P: int, link: bool, dtype: type) -> Any:
    """Compile the backward pass for padded head size P; `link`: a later reader's gradients join in.

    Per chunk, last chunk first, with G = dL/dS in the first-level cache, transposed:
      sweep, last token first:  G += dy^T r (+ de^T x);  dv = k G^T;  du = -b G^T;  dk = v G;
                                db = -u G;  G = G diag(w) + du^T kappa
      reads:                    dr_t = dy_t S_t;  dq_t = du_t S_{t-1}
      decay, last token first:  X_j = sum_i G_ij S_ij gains r dr (+ the reader's own column
                                product cx), loses what token t wrote, dlog_w = X - b db - k dk;
                                X = dlog_w + kappa dq before the token
    so that S_t is never formed again. X (row t: before token t) is computed afresh from G and S at
    every chunk's end.
    Task = (sequence, head).
    """
    rows = (C + 1) * P  # one row apart: at C rows every array would fall on the same cache sets
    G, S, ST = 0, P * P, P * P * 2
    start_rows = P * P * 3
    r, w, k, q, v, u, dy, al, de, x, cx, b, du, dv, dk, db, dr, dq, X = (
        start_rows + rows * i for i in range(19)
    )
    wn, qn, dn, vt, ut, dyt, det, dut, dvt = (start_rows + rows * 19 + P * i for i in range(9))
    total = start_rows + rows * 19 + P * 9

    def backward(  # type: ignore[no-untyped-def]
        H, N, r_, w_, k_, v_, kappa_, a_, cu_, u_, checkpoint_, state_, de_, x_, cx_, dy_, dstate_,
        dr_, dlog_w_, dk_, dv_, dkappa_, da_, dstate0_, start, stop,
    ):  # fmt: skip
        scratch: Any = np.zeros(total + LINE, dtype)
        zero = dtype(0)
        W = pointer((scratch.ctypes.data + LINE - 1) // LINE * LINE, zero)
        sources = (
            pointer(r_, zero), pointer(w_, zero), pointer(k_, zero), pointer(kappa_, zero),
            pointer(v_, zero), pointer(u_, zero), pointer(dy_, zero), pointer(a_, zero),
        )  # fmt: skip
        link_sources = pointer(de_, zero), pointer(x_, zero), pointer(cx_, zero)
        checkpoint_, cu = pointer(checkpoint_, zero), pointer(cu_, H)
        dr_, dlog_w_, dk_ = pointer(dr_, zero), pointer(dlog_w_, zero), pointer(dk_, zero)
        dv_, dkappa_, da_ = pointer(dv_, zero), pointer(dkappa_, zero), pointer(da_, zero)
        state_, dstate_ = pointer(state_, zero), pointer(dstate_, zero)
        dstate0_ = pointer(dstate0_, zero)
        for task in range(start, stop):
            h = task % H
            s = task // H
            lo, hi = cu[s], cu[s + 1]
            scratch[:] = zero
            f = (s * H + h) * N * N
            last = (hi - lo - 1) % C + 1  # tokens of the last chunk
            _copy_transposed(W, G, P, dstate_, f, N, N, N)
            for i in range(N):
                for j in range(N):
                    W[X + last * P + j] += dstate_[f + i * N + j] * state_[f + i * N + j]
            for c in range((hi - lo + C - 1) // C - 1, -1, -1):
                t0 = lo + c * C
                m = min(C, hi - t0)
                f = (t0 * H + h) * N
                for i in range(8):
                    _copy(W, r + i * rows, P, sources[i], f, H * N, m, N)
                if link:
                    for i in range(3):
                        _copy(W, de + i * rows, P, link_sources[i], f, H * N, m, N)
                for i in range(m * P):
                    W[b + i] = W[al + i] * W[q + i]
                # The token after: its decay and removal are applied to G in the same pass.
                for i in range(P):
                    W[wn + i] = dtype(1)
                    W[qn + i] = zero
                    W[dn + i] = zero
                for past in range(m):
                    T = (m - 1 - past) * P
                    # Fixed places, so that LLVM knows they do not overlap the rows of G.
                    for i in range(P):
                        W[vt + i] = W[v + T + i]
                        W[ut + i] = W[u + T + i]
                        W[dyt + i] = W[dy + T + i]
                        if link:
                            W[det + i] = W[de + T + i]
                        W[dut + i] = zero
                        W[dvt + i] = zero
                    for j in range(0, P, 2):
                        w0, w1 = W[wn + j], W[wn + j + 1]
                        q0, q1 = W[qn + j], W[qn + j + 1]
                        r0, r1 = W[r + T + j], W[r + T + j + 1]
                        b0, b1 = W[b + T + j], W[b + T + j + 1]
                        k0, k1 = W[k + T + j], W[k + T + j + 1]
                        x0, x1 = W[x + T + j], W[x + T + j + 1]
                        dk0 = zero
                        dk1 = zero
                        db0 = zero
                        db1 = zero
                        o = G + j * P
                        for i in range(P):
                            dni = W[dn + i]
                            dyi = W[dyt + i]
                            g0 = W[o + i] * w0 + dni * q0 + dyi * r0
                            g1 = W[o + P + i] * w1 + dni * q1 + dyi * r1
                            if link:
                                dei = W[det + i]
                                g0 += dei * x0
                                g1 += dei * x1
                            W[o + i] = g0
                            W[o + P + i] = g1
                            W[dvt + i] += g0 * k0 + g1 * k1
                            W[dut + i] -= g0 * b0 + g1 * b1
                            vi = W[vt + i]
                            ui = W[ut + i]
                            dk0 += g0 * vi
                            dk1 += g1 * vi
                            db0 += g0 * ui
                            db1 += g1 * ui
                        W[dk + T + j] = dk0
                        W[dk + T + j + 1] = dk1
                        W[db + T + j] = -db0
                        W[db + T + j + 1] = -db1
                    for i in range(P):
                        W[wn + i] = W[w + T + i]
                        W[qn + i] = W[q + T + i]
                        W[dn + i] = W[dut + i]
                        W[du + T + i] = W[dut + i]
                        W[dv + T + i] = W[dvt + i]
                c0 = ((lo // C + s + c) * H + h) * N * N
                _copy(W, S, P, checkpoint_, c0, N, N, N)
                _copy_transposed(W, ST, P, W, S, P, P, P)
                _read_value(W, dr, m, dy, 1, ST, w, k, b, v, u, P, zero)
                _read_value(W, dq, m, du, 0, ST, w, k, b, v, u, P, zero)
                for past in range(m):
                    T = (m - 1 - past) * P
                    for j in range(P):
                        dbj = W[db + T + j]
                        qj = W[q + T + j]
                        dqj = W[dq + T + j]
                        written = W[b + T + j] * dbj + W[k + T + j] * W[dk + T + j]
                        read = W[r + T + j] * W[dr + T + j]
                        if link:
                            read += W[cx + T + j]
                        dlog_w = W[X + T + P + j] + read - written
                        W[X + T + j] = dlog_w + qj * dqj
                        W[w + T + j] = dlog_w
                        W[b + T + j] = dbj * qj  # da
                        W[q + T + j] = dqj + dbj * W[al + T + j]  # dkappa
                _copy(dr_, f, H * N, W, dr, P, m, N)
                _copy(dlog_w_, f, H * N, W, w, P, m, N)
                _copy(dk_, f, H * N, W, dk, P, m, N)
                _copy(dv_, f, H * N, W, dv, P, m, N)
                _copy(dkappa_, f, H * N, W, q, P, m, N)
                _copy(da_, f, H * N, W, b, P, m, N)
                for j in range(P):
                    wj = W[wn + j]
                    qj = W[qn + j]
                    Xj = zero
                    o = j * P
                    for i in range(P):
                        g = W[G + o + i] * wj + W[dn + i] * qj
                        W[G + o + i] = g
                        Xj += g * W[S + o + i]
                    W[X + C * P + j] = Xj
            f = (s * H + h) * N * N
            _copy_transposed(dstate0_, f, N, W, G, P, N, N)

    return kernel(backward)


@cache
def read_kernel(P: int, by_key: bool, dtype: type) -> Any:
    """Compile the read of a kept trajectory: e_t = x_t S_t^T (by key) or x_t S_t (by value).

    Chunks need nothing of each other: the state at a chunk's start is kept, what its tokens added
    since then is read from k, b, v, u directly. Task = (sequence, head).
    """
    rows = (C + 1) * P  # one row apart: at C rows every array would fall on the same cache sets
    S, ST = 0, P * P
    x, w, k, q, v, u, b, e = (P * P * 2 + rows * i for i in range(8))
    row = P * P * 2 + rows * 8
    total = row + P * 4

    def read(  # type: ignore[no-untyped-def]
        H, N, x_, w_, k_, v_, kappa_, a_, cu_, u_, checkpoint_, e_, start, stop
    ):
        scratch: Any = np.zeros(total + LINE, dtype)
        zero = dtype(0)
        W = pointer((scratch.ctypes.data + LINE - 1) // LINE * LINE, zero)
        sources = (
            pointer(x_, zero), pointer(w_, zero), pointer(k_, zero), pointer(kappa_, zero),
            pointer(v_, zero), pointer(u_, zero), pointer(a_, zero),
        )  # fmt: skip
        checkpoint_, cu, e_ = pointer(checkpoint_, zero), pointer(cu_, H), pointer(e_, zero)
        while start < stop:
            s = start // H
            end = min(stop, (s + 1) * H)
            lo, hi = cu[s], cu[s + 1]
            scratch[:] = zero
            for c in range((hi - lo + C - 1) // C):
                for task in range(start, end):
                    h = task % H
                    m = min(C, hi - lo - c * C)
                    f = ((lo + c * C) * H + h) * N
                    for i in range(7):
                        _copy(W, x + i * rows, P, sources[i], f, H * N, m, N)
                    for i in range(m * P):
                        W[b + i] *= W[q + i]
                    _copy(W, S, P, checkpoint_, ((lo // C + s + c) * H + h) * N * N, N, N, N)
                    if by_key:
                        _read_key(W, e, m, x, S, w, k, b, v, u, row, P, zero)
                    else:
                        _copy_transposed(W, ST, P, W, S, P, P, P)
                        _read_value(W, e, m, x, 1, ST, w, k, b, v, u, P, zero)
                    _copy(e_, f, H * N, W, e, P, m, N)
            start = end

    return kernel(read)
