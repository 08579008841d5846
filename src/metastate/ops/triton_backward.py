"""GPU kernels of the recurrence, backward; conventions as in triton_kernels.py.

Every reader of the states is a rank-one gradient of each of them, dL/dS_t += g_t^T h_t: g = de, h =
x where e_t = x_t S_t^T, the other way round where e_t = x_t S_t. So one or two pairs (g, h) are all
that a pass must know of its readers, and what a reader's own input gets is a read of the other
kind. With D = dS_C diag(W_C), dS_C the gradient of the state that a chunk ends with:

    dU = sum lower(h W beta^T)^T g + beta D^T           dS_0 = D + dU^T P + sum g^T (h W)
    X = T^T dU                                           gradient of (I - A) U, so dA = X U^T
    dV = sum lower(h W (k/W)^T)^T g + (k/W) D^T + B^T X
    dalpha  = X S_0 + A_V (k/W) + A_U beta               A_Y = strict_lower(X Y^T)
    d(k/W)  = sum lower(g V^T)^T (h W) + V D + A_V^T alpha
    dbeta   = sum lower(g U^T)^T (h W) + U D + A_U^T alpha
"""

from __future__ import annotations

import triton
import triton.language as tl

from metastate.ops.triton_kernels import (
    COUNTS,
    chunk_at,
    dot,
    load_square,
    load_state,
    load_tokens,
    lower,
    store_state,
    store_tokens,
)


@triton.jit(do_not_specialize=COUNTS)
def local_gradient_kernel(  # type: ignore[no-untyped-def]
    g_,
    h_,
    g2_,
    h2_,
    log_w_,
    kappa_,
    a_,
    T_,
    P_,
    dU_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write P = T alpha and the part of dU that comes from the chunk's own readers."""
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        T = load_square(T_, slot * H + head, C)
        by_u = tl.zeros([C, C], DTYPE)
        by_u2 = tl.zeros([C, C], DTYPE)
        for column in range(0, N, BK):
            l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            a = load_tokens(a_, start, count, head, column, H, N, C, BK, DTYPE)
            h = load_tokens(h_, start, count, head, column, H, N, C, BK, DTYPE)
            L = tl.cumsum(l, 0)
            P = dot(T, -kappa * tl.exp(L - l), PRECISION)
            store_tokens(P_, P, start, count, head, column, H, N, C, BK)
            beta = tl.trans(kappa * a * tl.exp(-L))
            by_u += dot(h * tl.exp(L), beta, PRECISION)
            if TWO:
                h2 = load_tokens(h2_, start, count, head, column, H, N, C, BK, DTYPE)
                by_u2 += dot(h2 * tl.exp(L), beta, PRECISION)
        by_u = tl.trans(lower(by_u, C, False))
        by_u2 = tl.trans(lower(by_u2, C, False))
        for row in range(0, N, BK):
            g = load_tokens(g_, start, count, head, row, H, N, C, BK, DTYPE)
            dU = dot(by_u, g, PRECISION)
            if TWO:
                g2 = load_tokens(g2_, start, count, head, row, H, N, C, BK, DTYPE)
                dU += dot(by_u2, g2, PRECISION)
            store_tokens(dU_, dU, start, count, head, row, H, N, C, BK)


@triton.jit(do_not_specialize=COUNTS)
def state_gradient_kernel(  # type: ignore[no-untyped-def]
    g_,
    h_,
    g2_,
    h2_,
    log_w_,
    kappa_,
    a_,
    dfinal_,
    P_,
    dU_,
    ends_,
    dstate_,
    offsets_,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run BV rows of the state's gradient back through the chunks; complete dU, write dS_C."""
    index, row = tl.program_id(0), tl.program_id(1) * BV
    sequence, head = index // H, index % H
    first, end = tl.load(offsets_ + sequence), tl.load(offsets_ + sequence + 1)
    chunks = (end - first + C - 1) // C
    dS = load_state(dfinal_, index, row, 0, N, BV, BK, DTYPE)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        start = first + chunk * C
        count = end - start
        slot = first // C + sequence + chunk
        store_state(ends_, dS, slot * H + head, row, 0, N, BV, BK)
        l = load_tokens(log_w_, start, count, head, 0, H, N, C, BK, DTYPE)
        kappa = load_tokens(kappa_, start, count, head, 0, H, N, C, BK, DTYPE)
        a = load_tokens(a_, start, count, head, 0, H, N, C, BK, DTYPE)
        h = load_tokens(h_, start, count, head, 0, H, N, C, BK, DTYPE)
        P = load_tokens(P_, start, count, head, 0, H, N, C, BK, DTYPE)
        g = load_tokens(g_, start, count, head, row, H, N, C, BV, DTYPE)
        dU = load_tokens(dU_, start, count, head, row, H, N, C, BV, DTYPE)
        whole, L = tl.sum(l, 0)[None, :], tl.cumsum(l, 0)
        dU += dot(kappa * a * tl.exp(whole - L), tl.trans(dS), PRECISION)
        store_tokens(dU_, dU, start, count, head, row, H, N, C, BV)
        dS = dS * tl.exp(whole) + dot(tl.trans(dU), P, PRECISION)
        dS += dot(tl.trans(g), h * tl.exp(L), PRECISION)
        if TWO:
            h2 = load_tokens(h2_, start, count, head, 0, H, N, C, BK, DTYPE)
            g2 = load_tokens(g2_, start, count, head, row, H, N, C, BV, DTYPE)
            dS += dot(tl.trans(g2), h2 * tl.exp(L), PRECISION)
    store_state(dstate_, dS, index, row, 0, N, BV, BK)


@triton.jit(do_not_specialize=COUNTS)
def value_gradient_kernel(  # type: ignore[no-untyped-def]
    g_,
    h_,
    g2_,
    h2_,
    log_w_,
    k_,
    kappa_,
    T_,
    dU_,
    ends_,
    dv_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dV, and X = T^T dU over dU."""
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        T = load_square(T_, slot * H + head, C)
        B = tl.zeros([C, C], DTYPE)
        by_v = tl.zeros([C, C], DTYPE)
        by_v2 = tl.zeros([C, C], DTYPE)
        for column in range(0, N, BK):
            l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
            k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            h = load_tokens(h_, start, count, head, column, H, N, C, BK, DTYPE)
            L = tl.cumsum(l, 0)
            k_W = tl.trans(k * tl.exp(-L))
            B += dot(-kappa * tl.exp(L - l), k_W, PRECISION)
            by_v += dot(h * tl.exp(L), k_W, PRECISION)
            if TWO:
                h2 = load_tokens(h2_, start, count, head, column, H, N, C, BK, DTYPE)
                by_v2 += dot(h2 * tl.exp(L), k_W, PRECISION)
        B = tl.trans(lower(B, C, True))
        by_v = tl.trans(lower(by_v, C, False))
        by_v2 = tl.trans(lower(by_v2, C, False))
        for row in range(0, N, BK):
            dU = load_tokens(dU_, start, count, head, row, H, N, C, BK, DTYPE)
            g = load_tokens(g_, start, count, head, row, H, N, C, BK, DTYPE)
            X = dot(tl.trans(T), dU, PRECISION)
            dv = dot(by_v, g, PRECISION) + dot(B, X, PRECISION)
            if TWO:
                g2 = load_tokens(g2_, start, count, head, row, H, N, C, BK, DTYPE)
                dv += dot(by_v2, g2, PRECISION)
            for column in range(0, N, BK):
                l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
                k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
                dS = load_state(ends_, slot * H + head, row, column, N, BK, BK, DTYPE)
                rest = tl.exp(tl.sum(l, 0)[None, :] - tl.cumsum(l, 0))
                dv += dot(k * rest, tl.trans(dS), PRECISION)
            store_tokens(dU_, X, start, count, head, row, H, N, C, BK)
            store_tokens(dv_, dv, start, count, head, row, H, N, C, BK)


@triton.jit(do_not_specialize=COUNTS)
def key_gradient_kernel(  # type: ignore[no-untyped-def]
    g_,
    h_,
    g2_,
    h2_,
    product_,
    log_w_,
    k_,
    v_,
    kappa_,
    a_,
    U_,
    X_,
    starts_,
    ends_,
    dlog_w_,
    dk_,
    dkappa_,
    da_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    TWO: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write the gradients of k and of what moves the state: log w, kappa, a.

    The gradient of a cumulative log decay L_i is h (g S_i) - (k/W) d(k/W) - beta dbeta at token i
    (`product` is the first term of all readers), alpha dalpha at i - 1, and sum_v dS_C S_C at the
    chunk's end; that of log w_j is its sum over i >= j.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        A_V = tl.zeros([C, C], DTYPE)
        A_U = tl.zeros([C, C], DTYPE)
        G_V = tl.zeros([C, C], DTYPE)
        G_U = tl.zeros([C, C], DTYPE)
        G_V2 = tl.zeros([C, C], DTYPE)
        G_U2 = tl.zeros([C, C], DTYPE)
        for row in range(0, N, BK):
            v = tl.trans(load_tokens(v_, start, count, head, row, H, N, C, BK, DTYPE))
            U = tl.trans(load_tokens(U_, start, count, head, row, H, N, C, BK, DTYPE))
            X = load_tokens(X_, start, count, head, row, H, N, C, BK, DTYPE)
            g = load_tokens(g_, start, count, head, row, H, N, C, BK, DTYPE)
            A_V += dot(X, v, PRECISION)
            A_U += dot(X, U, PRECISION)
            G_V += dot(g, v, PRECISION)
            G_U += dot(g, U, PRECISION)
            if TWO:
                g2 = load_tokens(g2_, start, count, head, row, H, N, C, BK, DTYPE)
                G_V2 += dot(g2, v, PRECISION)
                G_U2 += dot(g2, U, PRECISION)
        A_V, A_U = lower(A_V, C, True), lower(A_U, C, True)
        G_V, G_U = tl.trans(lower(G_V, C, False)), tl.trans(lower(G_U, C, False))
        G_V2, G_U2 = tl.trans(lower(G_V2, C, False)), tl.trans(lower(G_U2, C, False))
        for column in range(0, N, BK):
            l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
            k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            a = load_tokens(a_, start, count, head, column, H, N, C, BK, DTYPE)
            whole, L = tl.sum(l, 0)[None, :], tl.cumsum(l, 0)
            W, over_W, rest = tl.exp(L), tl.exp(-L), tl.exp(whole - L)
            alpha = -kappa * tl.exp(L - l)
            k_W, beta = k * over_W, kappa * a * over_W
            # The parts from the chunk's end, already times 1/W (V dS and U dS times W_C/W), apart.
            dk = tl.zeros([C, BK], DTYPE)
            dbeta = tl.zeros([C, BK], DTYPE)
            dalpha = dot(A_V, k_W, PRECISION) + dot(A_U, beta, PRECISION)
            at_end = tl.zeros([BK], DTYPE)
            for row in range(0, N, BK):
                v = load_tokens(v_, start, count, head, row, H, N, C, BK, DTYPE)
                U = load_tokens(U_, start, count, head, row, H, N, C, BK, DTYPE)
                X = load_tokens(X_, start, count, head, row, H, N, C, BK, DTYPE)
                S = load_state(starts_, slot * H + head, row, column, N, BK, BK, DTYPE)
                dS = load_state(ends_, slot * H + head, row, column, N, BK, BK, DTYPE)
                dk += dot(v, dS, PRECISION)
                dbeta += dot(U, dS, PRECISION)
                dalpha += dot(X, S, PRECISION)
                at_end += tl.sum(S * dS, 0)
            dk *= rest
            dbeta *= rest
            at_end = at_end[None, :] * tl.exp(whole)
            at_end += tl.sum(k * dk + kappa * a * dbeta, 0)[None, :]
            q = load_tokens(h_, start, count, head, column, H, N, C, BK, DTYPE) * W
            inside = dot(tl.trans(A_V), alpha, PRECISION) + dot(G_V, q, PRECISION)
            inside_beta = dot(tl.trans(A_U), alpha, PRECISION) + dot(G_U, q, PRECISION)
            if TWO:
                q2 = load_tokens(h2_, start, count, head, column, H, N, C, BK, DTYPE) * W
                inside += dot(G_V2, q2, PRECISION)
                inside_beta += dot(G_U2, q2, PRECISION)
            dk += inside * over_W
            dbeta += inside_beta * over_W  # of beta W = kappa a
            store_tokens(dk_, dk, start, count, head, column, H, N, C, BK)
            store_tokens(da_, dbeta * kappa, start, count, head, column, H, N, C, BK)
            dkappa = dbeta * a - dalpha * tl.exp(L - l)
            store_tokens(dkappa_, dkappa, start, count, head, column, H, N, C, BK)
            product = load_tokens(product_, start, count, head, column, H, N, C, BK, DTYPE)
            before = alpha * dalpha
            dL = product - k * dk - kappa * a * dbeta + before
            dlog_w = tl.cumsum(dL, 0, reverse=True) - before + at_end
            store_tokens(dlog_w_, dlog_w, start, count, head, column, H, N, C, BK)
