"""GPU kernels of the recurrence, forward: geometry, chunk-start states, reads, one token.

A program holds a chunk of C tokens of one head (`slot` numbers the chunks of all sequences) or, in
the one pass that is sequential, a block of a state's rows: given the geometry, the rows of S need
nothing of each other. Letters are those of ops/chunked.py; `T` is (I - A)^-1. Everything is
computed in DTYPE, the states' dtype, whatever the inputs' is; PRECISION is that of the products.
A name that ends in `_` is an address.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What differs from batch to batch and from model to model: a kernel is compiled once for all.
COUNTS = ("num_sequences", "H")


@triton.jit
def chunk_at(offsets_, num_sequences, slot, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the first token of chunk `slot` and its number of tokens, 0 or less in a free slot.

    Sequence s has the slots from offsets[s] // C + s on, which leaves room for its last chunk.
    """
    low = slot * 0
    high = low + num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(offsets_ + middle) // C + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    first = tl.load(offsets_ + low)
    start = first + (slot - first // C - low) * C
    return start, tl.load(offsets_ + low + 1) - start


@triton.jit
def _token_tile(  # type: ignore[no-untyped-def]
    start, count, head, column, H, N: tl.constexpr, C: tl.constexpr, BN: tl.constexpr
):
    """Return offsets into [B * T, H, N] of C tokens and BN columns, and which of them exist."""
    row = tl.arange(0, C)[:, None]
    col = column + tl.arange(0, BN)[None, :]
    offset = ((start + row).to(tl.int64) * H + head) * N + col
    return offset, (row < count) & (col < N)


@triton.jit
def load_tokens(  # type: ignore[no-untyped-def]
    x_,
    start,
    count,
    head,
    column,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Return a tile [C, BN] of x [B * T, H, N]; zeros past the chunk's and the head's end."""
    offset, exists = _token_tile(start, count, head, column, H, N, C, BN)
    return tl.load(x_ + offset, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def store_tokens(  # type: ignore[no-untyped-def]
    x_,
    tile,
    start,
    count,
    head,
    column,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
):
    """Write a tile [C, BN] of x [B * T, H, N]."""
    offset, exists = _token_tile(start, count, head, column, H, N, C, BN)
    tl.store(x_ + offset, tile, mask=exists)


@triton.jit
def _state_tile(  # type: ignore[no-untyped-def]
    index, row, column, N: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr
):
    """Return offsets of rows and columns of state `index` of [.., N, N], and which exist."""
    v = row + tl.arange(0, BV)[:, None]
    k = column + tl.arange(0, BK)[None, :]
    return (tl.full([1, 1], 0, tl.int64) + index) * N * N + v * N + k, (v < N) & (k < N)


@triton.jit
def load_state(  # type: ignore[no-untyped-def]
    S_, index, row, column, N: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, DTYPE: tl.constexpr
):
    """Return a tile [BV, BK] of state `index`; zeros past its end."""
    offset, exists = _state_tile(index, row, column, N, BV, BK)
    return tl.load(S_ + offset, mask=exists, other=0.0).to(DTYPE)


@triton.jit
def store_state(  # type: ignore[no-untyped-def]
    S_, tile, index, row, column, N: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr
):
    """Write a tile [BV, BK] of state `index`."""
    offset, exists = _state_tile(index, row, column, N, BV, BK)
    tl.store(S_ + offset, tile, mask=exists)


@triton.jit
def load_square(x_, index, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return matrix `index` of [.., C, C]."""
    i = tl.arange(0, C)
    return tl.load(x_ + index.to(tl.int64) * C * C + i[:, None] * C + i[None, :])


@triton.jit
def lower(x, C: tl.constexpr, STRICT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x [C, C] with zeros above the diagonal, and on it where STRICT."""
    i = tl.arange(0, C)
    keep = i[:, None] > i[None, :] if STRICT else i[:, None] >= i[None, :]
    return tl.where(keep, x, 0.0)


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return x @ y in their own dtype."""
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=x.dtype)


@triton.jit(do_not_specialize=COUNTS)
def geometry_kernel(  # type: ignore[no-untyped-def]
    log_w_,
    kappa_,
    a_,
    T_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """Write T = (I - A)^-1, A = strict_lower(alpha beta^T), of every chunk and head.

    Diagonal blocks double in size: the inverse of one of 2s is that of its halves, and T_2 A_21 T_1
    below the diagonal, so T += T A' T with A' the blocks A_21. Like forward substitution, unlike
    powers of A, it never makes a number much larger than those of T. SOLVE is its precision.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        A = tl.zeros([C, C], DTYPE)
        for column in range(0, N, BK):
            l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            a = load_tokens(a_, start, count, head, column, H, N, C, BK, DTYPE)
            L = tl.cumsum(l, 0)
            A += dot(-kappa * tl.exp(L - l), tl.trans(kappa * a * tl.exp(-L)), PRECISION)
        i = tl.arange(0, C)
        row, col = i[:, None], i[None, :]
        A = tl.where(row > col, A, 0.0)
        T = tl.where(row == col, 1.0, tl.where(row // 2 == col // 2, A, 0.0)).to(DTYPE)
        for level in tl.static_range(1, LEVELS):
            size = 1 << level
            below = (row // (2 * size) == col // (2 * size)) & (row // size != col // size)
            T += dot(dot(T, tl.where(below, A, 0.0), SOLVE), T, SOLVE)
        place = (slot * H + head).to(tl.int64) * C * C + row * C + col
        tl.store(T_ + place, T)


@triton.jit(do_not_specialize=COUNTS)
def correction_kernel(  # type: ignore[no-untyped-def]
    log_w_,
    k_,
    v_,
    kappa_,
    T_,
    P_,
    U_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write P = T alpha and the correction rows that S_0 = 0 has, U_0 = T B V.

    B = strict_lower(alpha (k/W)^T); U = P S_0^T + U_0 once S_0 is known.
    """
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        T = load_square(T_, slot * H + head, C)
        B = tl.zeros([C, C], DTYPE)
        for column in range(0, N, BK):
            l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
            L = tl.cumsum(l, 0)
            alpha = -kappa * tl.exp(L - l)
            B += dot(alpha, tl.trans(k * tl.exp(-L)), PRECISION)
            P = dot(T, alpha, PRECISION)
            store_tokens(P_, P, start, count, head, column, H, N, C, BK)
        TB = dot(T, lower(B, C, True), PRECISION)
        for column in range(0, N, BK):
            v = load_tokens(v_, start, count, head, column, H, N, C, BK, DTYPE)
            U = dot(TB, v, PRECISION)
            store_tokens(U_, U, start, count, head, column, H, N, C, BK)


@triton.jit(do_not_specialize=COUNTS)
def state_kernel(  # type: ignore[no-untyped-def]
    log_w_,
    k_,
    v_,
    kappa_,
    a_,
    state_,
    P_,
    U_,
    starts_,
    final_,
    offsets_,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run BV rows of a state through the chunks of its sequence; complete U, write every S_0.

    S_C = S_0 diag(W_C) + V^T (k W_C/W) + U^T (kappa a W_C/W); the factors W_C/W are at most 1.
    """
    index, row = tl.program_id(0), tl.program_id(1) * BV
    sequence, head = index // H, index % H
    first, end = tl.load(offsets_ + sequence), tl.load(offsets_ + sequence + 1)
    slot = first // C + sequence
    S = load_state(state_, index, row, 0, N, BV, BK, DTYPE)
    for start in range(first, end, C):
        count = end - start
        store_state(starts_, S, slot * H + head, row, 0, N, BV, BK)
        l = load_tokens(log_w_, start, count, head, 0, H, N, C, BK, DTYPE)
        k = load_tokens(k_, start, count, head, 0, H, N, C, BK, DTYPE)
        kappa = load_tokens(kappa_, start, count, head, 0, H, N, C, BK, DTYPE)
        a = load_tokens(a_, start, count, head, 0, H, N, C, BK, DTYPE)
        P = load_tokens(P_, start, count, head, 0, H, N, C, BK, DTYPE)
        v = load_tokens(v_, start, count, head, row, H, N, C, BV, DTYPE)
        U = load_tokens(U_, start, count, head, row, H, N, C, BV, DTYPE)
        U += dot(P, tl.trans(S), PRECISION)
        store_tokens(U_, U, start, count, head, row, H, N, C, BV)
        whole = tl.sum(l, 0)[None, :]  # log W_C
        rest = tl.exp(whole - tl.cumsum(l, 0))  # W_C / W
        S = S * tl.exp(whole) + dot(tl.trans(v), k * rest, PRECISION)
        S += dot(tl.trans(U), kappa * a * rest, PRECISION)
        slot += 1
    store_state(final_, S, index, row, 0, N, BV, BK)


@triton.jit(do_not_specialize=COUNTS)
def read_by_key_kernel(  # type: ignore[no-untyped-def]
    x_,
    log_w_,
    k_,
    v_,
    kappa_,
    a_,
    U_,
    starts_,
    e_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write e_t = x_t S_t^T = q S_0^T + lower(q (k/W)^T) V + lower(q beta^T) U, q = x W."""
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        by_v = tl.zeros([C, C], DTYPE)
        by_u = tl.zeros([C, C], DTYPE)
        for column in range(0, N, BK):
            L = tl.cumsum(load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE), 0)
            q = load_tokens(x_, start, count, head, column, H, N, C, BK, DTYPE) * tl.exp(L)
            k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            a = load_tokens(a_, start, count, head, column, H, N, C, BK, DTYPE)
            by_v += dot(q, tl.trans(k * tl.exp(-L)), PRECISION)
            by_u += dot(q, tl.trans(kappa * a * tl.exp(-L)), PRECISION)
        by_v, by_u = lower(by_v, C, False), lower(by_u, C, False)
        for row in range(0, N, BK):
            v = load_tokens(v_, start, count, head, row, H, N, C, BK, DTYPE)
            U = load_tokens(U_, start, count, head, row, H, N, C, BK, DTYPE)
            e = dot(by_v, v, PRECISION) + dot(by_u, U, PRECISION)
            for column in range(0, N, BK):
                l = load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE)
                x = load_tokens(x_, start, count, head, column, H, N, C, BK, DTYPE)
                S = load_state(starts_, slot * H + head, row, column, N, BK, BK, DTYPE)
                e += dot(x * tl.exp(tl.cumsum(l, 0)), tl.trans(S), PRECISION)
            store_tokens(e_, e, start, count, head, row, H, N, C, BK)


@triton.jit(do_not_specialize=COUNTS)
def read_by_value_kernel(  # type: ignore[no-untyped-def]
    x_,
    log_w_,
    k_,
    v_,
    kappa_,
    a_,
    U_,
    starts_,
    e_,
    offsets_,
    num_sequences,
    H,
    N: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write e_t = x_t S_t = (x S_0 + lower(x V^T) (k/W) + lower(x U^T) beta) W."""
    slot, head = tl.program_id(0), tl.program_id(1)
    start, count = chunk_at(offsets_, num_sequences, slot, C)
    if count > 0:
        by_k = tl.zeros([C, C], DTYPE)
        by_beta = tl.zeros([C, C], DTYPE)
        for row in range(0, N, BK):
            x = load_tokens(x_, start, count, head, row, H, N, C, BK, DTYPE)
            v = load_tokens(v_, start, count, head, row, H, N, C, BK, DTYPE)
            U = load_tokens(U_, start, count, head, row, H, N, C, BK, DTYPE)
            by_k += dot(x, tl.trans(v), PRECISION)
            by_beta += dot(x, tl.trans(U), PRECISION)
        by_k, by_beta = lower(by_k, C, False), lower(by_beta, C, False)
        for column in range(0, N, BK):
            L = tl.cumsum(load_tokens(log_w_, start, count, head, column, H, N, C, BK, DTYPE), 0)
            k = load_tokens(k_, start, count, head, column, H, N, C, BK, DTYPE)
            kappa = load_tokens(kappa_, start, count, head, column, H, N, C, BK, DTYPE)
            a = load_tokens(a_, start, count, head, column, H, N, C, BK, DTYPE)
            e = dot(by_k, k * tl.exp(-L), PRECISION)
            e += dot(by_beta, kappa * a * tl.exp(-L), PRECISION)
            for row in range(0, N, BK):
                x = load_tokens(x_, start, count, head, row, H, N, C, BK, DTYPE)
                S = load_state(starts_, slot * H + head, row, column, N, BK, BK, DTYPE)
                e += dot(x, S, PRECISION)
            store_tokens(e_, e * tl.exp(L), start, count, head, column, H, N, C, BK)


@triton.jit
def step_kernel(  # type: ignore[no-untyped-def]
    r_,
    log_w_,
    k_,
    v_,
    kappa_,
    a_,
    state_,
    y_,
    final_,
    N: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Move BV rows of a state on by one token and read them with r."""
    index, row = tl.program_id(0), tl.program_id(1) * BV
    column = tl.arange(0, BK)
    place = index.to(tl.int64) * N + column
    r = tl.load(r_ + place, mask=column < N, other=0.0).to(DTYPE)
    log_w = tl.load(log_w_ + place, mask=column < N, other=0.0).to(DTYPE)
    k = tl.load(k_ + place, mask=column < N, other=0.0).to(DTYPE)
    kappa = tl.load(kappa_ + place, mask=column < N, other=0.0).to(DTYPE)
    a = tl.load(a_ + place, mask=column < N, other=0.0).to(DTYPE)
    rows = row + tl.arange(0, BV)
    v = tl.load(v_ + index.to(tl.int64) * N + rows, mask=rows < N, other=0.0).to(DTYPE)
    S = load_state(state_, index, row, 0, N, BV, BK, DTYPE)
    u = tl.sum(S * kappa[None, :], 1)
    S = S * tl.exp(log_w)[None, :] - u[:, None] * (a * kappa)[None, :] + v[:, None] * k[None, :]
    store_state(final_, S, index, row, 0, N, BV, BK)
    y = tl.sum(S * r[None, :], 1)
    tl.store(y_ + index.to(tl.int64) * N + rows, y, mask=rows < N)
