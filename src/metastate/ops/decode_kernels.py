"""One token of a recurrent model for a batch of rows, all layers in one native call.

Decoding reads every weight once a token; what else it does must not cost time beside that. So all
threads enter one kernel, which goes through the phases of every layer and meets after each:

    MIX_TIME      surprise memory, where it stands before this block;   a piece is a row
                  ln1, token shift and its six mixes
    PROJECT       r, k, v and the first low-rank factors                some outputs
    HEADS         the second factors, the WKV step, norm, bonus, gate   a head
    OUTPUT        x += att W_o                                          some outputs
    MIX_CHANNELS  ln2, token shift                                      a row
    EXPAND        channel mixing's hidden layer; Meta-State's query     some outputs
    READ          Meta-State: read S, move M, norms, modulation         a head
    REDUCE        x += hidden W_v + y W_o                               some outputs

A layer without time mixing begins at MIX_CHANNELS: the feed-forward layer after a Meta-State layer,
with a norm of its own. At the end come

    NORM          ln_out                                                a row
    CORRECT       surprise memory, where it stands before the head      a row
    PREDICT       the head                                              some outputs

Threads draw pieces from a shared counter and wait only for pieces that another thread has drawn, so
any number of threads, one included, finishes. States are changed in place. Every row's arithmetic
is the same in any batch (see dot_kernels). float32 throughout but for the matrices, float32 or
bfloat16.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from metastate.ops.dot_kernels import multiply
from metastate.ops.fused_kernels import (
    DECAY_SCALE,
    ONE,
    ZERO,
    _exp,
    _inline,
    _sigmoid,
)
from metastate.ops.jit import INNER, kernel, pointer
from metastate.ops.row_kernels import (
    NONE,
    RELU2,
    SIGMOID,
    TANH,
    activate,
    advance,
    head_norm,
    layer_norm,
    mix,
    unit,
    vector,
    widened,
)

TWO = np.float32(2)
SPAN = 32  # outputs of a piece
LINE = 16  # int64 between counters, so that no two share a cache line
SPINS = 2000  # looks at a counter before the processor is offered to others

# Where a layer's addresses stand in its row of the table.
LAYER_FIELDS = (
    *("ln1_weight", "ln1_bias", "mu", "receptance", "key", "value"),
    *("decay_A", "icl_rate_A", "value_mix_A", "gate_A"),
    *("decay_B", "icl_rate_B", "value_mix_B", "gate_B", "w0", "a0", "v0"),
    *("k_k", "k_a", "r_k", "norm_weight", "norm_bias", "output"),
    *("ln2_weight", "ln2_bias", "mu2", "hidden_key", "hidden_value"),
    *("encoding_weight", "encoding_bias", "meta_weight", "meta_bias", "meta_output"),
    *("S", "time_shift", "M", "channel_shift"),
)
(
    LN1_WEIGHT, LN1_BIAS, MU, RECEPTANCE, KEY, VALUE,
    A_W, A_A, A_V, A_G, B_W, B_A, B_V, B_G, W0, A0, V0,
    K_K, K_A, R_K, NORM_WEIGHT, NORM_BIAS, ATT_OUTPUT,
    LN2_WEIGHT, LN2_BIAS, MU2, HIDDEN_KEY, HIDDEN_VALUE,
    ENC_WEIGHT, ENC_BIAS, META_WEIGHT, META_BIAS, META_OUTPUT,
    STATE, TIME_SHIFT, META, CHANNEL_SHIFT,
) = range(len(LAYER_FIELDS))  # fmt: skip
# Buffers of the batch, and how many values a row of each has; see `buffer_sizes`.
BUFFERS = (
    *("x", "mix", "low_w", "low_a", "low_v", "low_g", "hidden", "logits"),
    *("r", "k", "v", "v_first", "w", "rate", "value_mix", "g", "kappa", "removal", "y", "att"),
    *("z", "query"),
)
(
    X, MIX, LOW_W, LOW_A, LOW_V, LOW_G, HIDDEN, LOGITS,
    R, K, V, V_FIRST, W, RATE, VALUE_MIX, G, KAPPA, REMOVAL, Y, ATT, Z, QUERY,
) = range(len(BUFFERS))  # fmt: skip
# What comes after the blocks; without a surprise memory the fields of one are zero. It has a norm
# of its own before a block.
ENDS = (
    *("ln_out_weight", "ln_out_bias", "head", "norm_weight", "norm_bias"),
    *("center", "scale", "decay", "rate", "gain", "M", "key", "tokens"),
    *("features", "logit", "place", "token", "bias"),
)
(
    LN_OUT_WEIGHT, LN_OUT_BIAS, HEAD, OWN_WEIGHT, OWN_BIAS,
    CENTER, SCALE, DECAY, MEMORY_RATE, GAIN, MEMORY_M, MEMORY_KEY, TOKENS,
    FEATURES, LOGIT, PLACE, TOKEN, BIAS,
) = range(len(ENDS))  # fmt: skip
NORM, CORRECT, PREDICT, NUM_ENDS = range(4)
MIX_TIME, PROJECT, HEADS, OUTPUT, MIX_CHANNELS, EXPAND, READ, REDUCE, NUM_PHASES = range(9)
META_STATE, BY_RECEPTANCE, READS_ENCODING, HAS_M = 1, 2, 4, 8  # flags of a model

_njit: Any = nb.njit(**INNER)
_yield: Any = types.ExternalFunction("sched_yield", types.int32())


def buffer_sizes(D: int, A: int, F: int, vocab_size: int, ranks: list[int]) -> list[int]:
    """Return how many float32 values a row of each of BUFFERS has; A = H N."""
    return [D, 6 * D, *ranks, F, vocab_size, *[A] * 12, D, A]


def _add_one(typing_context, address):  # type: ignore[no-untyped-def]
    """Add 1 to the int64 at `address`, atomically; return what it was."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        here = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", here, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(types.int64), build


def _load(typing_context, address):  # type: ignore[no-untyped-def]
    """Return the int64 at `address`, with all that was written before it."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        here = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(here, "acquire", 8)

    return types.int64(types.int64), build


_draw: Any = intrinsic(_add_one)
_look: Any = intrinsic(_load)


@_njit
def _mix_time(at, buf, layer, h, b, A, N):  # type: ignore[no-untyped-def]
    """What time mixing does to one head of one row, from its projections to what W_o takes."""
    c, o = h * N, b * A + h * N  # the head's place among channels and in the batch's buffers
    r, k, v, g = vector(buf[R], o), vector(buf[K], o), vector(buf[V], o), vector(buf[G], o)
    w, a, out = vector(buf[W], o), vector(buf[RATE], o), vector(buf[ATT], o)
    kappa, removal, y = vector(buf[KAPPA], o), vector(buf[REMOVAL], o), vector(buf[Y], o)
    w0, a0, k_k, k_a = vector(at[W0], c), vector(at[A0], c), vector(at[K_K], c), vector(at[K_A], c)
    r_k, v_first = vector(at[R_K], c), vector(buf[V_FIRST], o)
    for j in range(N):
        w[j] = _exp(DECAY_SCALE * _sigmoid(w[j] + w0[j]))
    for j in range(N):
        a[j] = _sigmoid(a[j] + a0[j])
    for j in range(N):
        removal[j] = k[j] * k_k[j]
    unit(removal, kappa, N)
    for j in range(N):
        removal[j] = a[j] * kappa[j]
    for j in range(N):
        k[j] = k[j] * (ONE + (a[j] - ONE) * k_a[j])
    if layer == 0:
        for j in range(N):
            v_first[j] = v[j]
    else:
        m, v0 = vector(buf[VALUE_MIX], o), vector(at[V0], c)
        for j in range(N):
            v[j] = v[j] + (v_first[j] - v[j]) * _sigmoid(m[j] + v0[j])
    advance(at[STATE] + o * N * 4, w, kappa, removal, k, v, r, y, N)
    bonus = ZERO
    for j in range(N):
        bonus += r[j] * k[j] * r_k[j]
    for j in range(N):
        out[j] = bonus * v[j]
    head_norm(y, vector(at[NORM_WEIGHT], c), vector(at[NORM_BIAS], c), out, N)
    for j in range(N):
        out[j] *= g[j]


@_njit
def _meta_state(at, buf, h, b, A, N, flags):  # type: ignore[no-untyped-def]
    """What the Meta-State layer does to one head of one row, up to what its W_o takes."""
    c, o = h * N, b * A + h * N
    z, out, e, y = vector(buf[Z], o), vector(buf[ATT], o), vector(buf[V], o), vector(buf[Y], o)
    q = vector(buf[QUERY], o) if flags & BY_RECEPTANCE else z
    for i in range(N):
        row = vector(at[STATE], (o + i) * N)
        total = ZERO
        for j in range(N):
            total += row[j] * q[j]
        e[i] = total
    for j in range(N):
        out[j] = ZERO
    if flags & HAS_M:
        w, a, written = vector(buf[W], o), vector(buf[RATE], o), vector(buf[R], o)
        key, removal = vector(buf[KAPPA], o), vector(buf[REMOVAL], o)
        unit(e, written, N)
        unit(z, key, N)
        for j in range(N):
            removal[j] = a[j] * key[j]
        advance(at[META] + o * N * 4, w, key, removal, removal, written, key, y, N)
        head_norm(y, vector(at[META_WEIGHT], c), vector(at[META_BIAS], c), out, N)
    if flags & READS_ENCODING:
        head_norm(e, vector(at[ENC_WEIGHT], c), vector(at[ENC_BIAS], c), out, N)
    for j in range(N):
        out[j] *= z[j]


@_njit
def _span(x, K, w, size, n, y, i, rows, add, act):  # type: ignore[no-untyped-def]
    """Piece i of y (+)= x w^T, w [n, K], and of the activation."""
    first, last = i * SPAN, min((i + 1) * SPAN, n)
    multiply(x, w, size, K, first, last, y, n * 4, rows, add)
    for b in range(rows):
        activate(act, vector(y, b * n + first), last - first)


@_inline
def _project(at, buf, i, size, D, A, ranks, rows):  # type: ignore[no-untyped-def]
    jobs = (
        (0, at[RECEPTANCE], A, buf[R], NONE), (2, at[KEY], A, buf[K], NONE),
        (3, at[VALUE], A, buf[V], NONE), (1, at[A_W], ranks[0], buf[LOW_W], TANH),
        (4, at[A_A], ranks[1], buf[LOW_A], NONE), (5, at[A_G], ranks[3], buf[LOW_G], SIGMOID),
        (3, at[A_V], ranks[2], buf[LOW_V], NONE),
    )  # fmt: skip
    for source, w, n, y, act in jobs:
        pieces = (n + SPAN - 1) // SPAN
        if i < pieces:
            _span(buf[MIX] + source * rows * D * 4, D, w, size, n, y, i, rows, 0, act)
            return
        i -= pieces


@_inline
def _heads(at, buf, layer, h, size, A, N, ranks, rows):  # type: ignore[no-untyped-def]
    jobs = (
        (buf[LOW_W], ranks[0], at[B_W], buf[W]), (buf[LOW_A], ranks[1], at[B_A], buf[RATE]),
        (buf[LOW_G], ranks[3], at[B_G], buf[G]), (buf[LOW_V], ranks[2], at[B_V], buf[VALUE_MIX]),
    )  # fmt: skip
    for x, rank, w, y in jobs:
        if w != 0:
            multiply(x, w, size, rank, h * N, (h + 1) * N, y, A * 4, rows, 0)
    for b in range(rows):
        _mix_time(at, buf, layer, h, b, A, N)


@_inline
def _count(phase, layer, D, H, A, F, ranks, rows, flags):  # type: ignore[no-untyped-def]
    """Return the number of a phase's pieces."""
    of_A, of_D, of_F = (A + SPAN - 1) // SPAN, (D + SPAN - 1) // SPAN, (F + SPAN - 1) // SPAN
    if phase in (MIX_TIME, MIX_CHANNELS):
        return rows
    if phase == PROJECT:
        pieces = 3 * of_A
        for i in range(4):
            if i != 2 or layer > 0:
                pieces += (ranks[i] + SPAN - 1) // SPAN
        return pieces
    if phase == HEADS:
        return H
    if phase == EXPAND:
        return of_F + (of_A if flags & BY_RECEPTANCE else 0)
    if phase == READ:
        return H if flags & META_STATE else 0
    return of_D


@_inline
def _work(at, buf, phase, layer, i, size, D, H, N, F, ranks, rows, flags):  # type: ignore[no-untyped-def]
    """Do piece i of a phase."""
    A = H * N
    if phase == MIX_TIME:
        x = vector(buf[Z], i * D)
        layer_norm(vector(buf[X], i * D), vector(at[LN1_WEIGHT], 0), vector(at[LN1_BIAS], 0), x, D)
        mix(x, vector(at[TIME_SHIFT], i * D), at[MU], 6, buf[MIX], rows, i, D)
    elif phase == PROJECT:
        _project(at, buf, i, size, D, A, ranks, rows)
    elif phase == HEADS:
        _heads(at, buf, layer, i, size, A, N, ranks, rows)
    elif phase == OUTPUT:
        _span(buf[ATT], A, at[ATT_OUTPUT], size, D, buf[X], i, rows, 1, NONE)
    elif phase == MIX_CHANNELS:
        x = vector(buf[Z], i * D)
        layer_norm(vector(buf[X], i * D), vector(at[LN2_WEIGHT], 0), vector(at[LN2_BIAS], 0), x, D)
        if F:
            mix(x, vector(at[CHANNEL_SHIFT], i * D), at[MU2], 1, buf[MIX], rows, i, D)
    elif phase == EXPAND:
        pieces = (F + SPAN - 1) // SPAN
        if i < pieces:
            _span(buf[MIX], D, at[HIDDEN_KEY], size, F, buf[HIDDEN], i, rows, 0, RELU2)
        else:
            _span(buf[Z], D, at[RECEPTANCE], size, A, buf[QUERY], i - pieces, rows, 0, NONE)
    elif phase == READ:
        for b in range(rows):
            _meta_state(at, buf, i, b, A, N, flags)
    else:
        if flags & META_STATE:
            _span(buf[ATT], A, at[META_OUTPUT], size, D, buf[X], i, rows, 1, NONE)
        if F:
            _span(buf[HIDDEN], F, at[HIDDEN_VALUE], size, D, buf[X], i, rows, 1, NONE)


@_njit
def _surprise(ends, h, row, i, D):  # type: ignore[no-untyped-def]
    """How far head i takes the row of what came for unexpected after features h, from 0 to 2."""
    logit, total = ZERO, vector(ends[BIAS], i)[0]
    place, token = vector(ends[PLACE], i * D), vector(ends[TOKEN], i * D)
    for j in range(D):
        logit += h[j] * row[j]
        total += place[j] * h[j] + token[j] * row[j]
    return TWO * _sigmoid(total + vector(ends[LOGIT], i)[0] * logit)


@_njit
def _correct(ends, buf, b, h, out, size, D, A, heads):  # type: ignore[no-untyped-def]
    """Write what came by its surprise, add to `out`, h or what it is the norm of, what is read."""
    row, key, removal = (
        vector(buf[V], b * A),
        vector(buf[KAPPA], b * A),
        vector(buf[REMOVAL], b * A),
    )
    before = vector(ends[MEMORY_KEY], b * D)
    center, scale, a = vector(ends[CENTER], 0), vector(ends[SCALE], 0), vector(ends[MEMORY_RATE], 0)
    came = pointer(ends[TOKENS], np.int64(0))[b]
    widened(ends[HEAD] + came * D * size, size, D, row)
    N = D // heads
    features = vector(ends[FEATURES], b * D)
    for i in range(heads):
        s = _surprise(ends, features, row, i, D)
        for j in range(i * N, (i + 1) * N):
            removal[j] = s
    for j in range(D):
        row[j] *= removal[j]
        features[j] = h[j]
        removal[j] = a[j] * before[j]
        key[j] = (h[j] + center[j]) * scale[j]
    for i in range(heads):
        c, o = i * N, b * A + i * N
        own, last, gain = (
            vector(buf[KAPPA], o),
            vector(ends[MEMORY_KEY], b * D + c),
            vector(ends[GAIN], c),
        )
        unit(own, own, N)
        M, w, y = ends[MEMORY_M] + (b * D + c) * N * 4, vector(ends[DECAY], c), vector(buf[Y], o)
        advance(M, w, last, vector(buf[REMOVAL], o), last, vector(buf[V], o), own, y, N)
        for j in range(N):
            out[c + j] += y[j] * gain[j]
    for j in range(D):
        before[j] = key[j]


@kernel
def token(  # type: ignore[no-untyped-def]
    table,
    ends,
    buf,
    counters,
    ranks,
    L,
    D,
    H,
    N,
    F,
    vocab_size,
    size,
    flags,
    memory_heads,
    place,
    rows,
):
    """Run one token of `rows` rows; every thread calls it with the same arguments.

    table [L, LAYER_FIELDS], ends [ENDS] and buf [BUFFERS] hold addresses, `ranks` the four low-rank
    sizes; `counters` is zero before. x of every row lies in its buffer, the logits afterwards in
    theirs. `size` is the bytes of a matrix's value, 4 float32 and 2 bfloat16; `memory_heads` is 0
    without a surprise memory, which stands before row `place` of the table, L: before the head;
    `tokens` of `ends` is int64.
    """
    last = L * NUM_PHASES
    own_F, own = 0, 0
    for p in range(last + NUM_ENDS):
        layer, phase = p // NUM_PHASES, p % NUM_PHASES
        if p >= last:
            end = p - last
            if end == PREDICT:
                pieces = (vocab_size + SPAN - 1) // SPAN
            else:
                pieces = rows if end == NORM or (memory_heads and place == L) else 0
        else:
            # What a block has: some may have no feed-forward layer, some no Meta-State layer.
            own_F = F if table[layer, HIDDEN_KEY] else 0
            own = flags if table[layer, META_OUTPUT] else 0
            pieces = _count(phase, layer, D, H, H * N, own_F, ranks, rows, own)
            if phase < MIX_CHANNELS and not table[layer, ATT_OUTPUT]:
                pieces = 0
        drawn = counters.ctypes.data + p * 2 * LINE * 8
        finished = drawn + LINE * 8
        i = _draw(drawn)
        while i < pieces:
            if p == last + NORM:
                weight, bias = vector(ends[LN_OUT_WEIGHT], 0), vector(ends[LN_OUT_BIAS], 0)
                layer_norm(vector(buf[X], i * D), weight, bias, vector(buf[Z], i * D), D)
            elif p == last + CORRECT:
                z = vector(buf[Z], i * D)
                _correct(ends, buf, i, z, z, size, D, H * N, memory_heads)
            elif p == last + PREDICT:
                _span(buf[Z], D, ends[HEAD], size, vocab_size, buf[LOGITS], i, rows, 0, NONE)
            else:
                at = table[layer]
                if phase == MIX_TIME and layer == place and memory_heads:
                    z = vector(buf[Z], i * D)
                    weight, bias = vector(ends[OWN_WEIGHT], 0), vector(ends[OWN_BIAS], 0)
                    layer_norm(vector(buf[X], i * D), weight, bias, z, D)
                    _correct(ends, buf, i, z, vector(buf[X], i * D), size, D, H * N, memory_heads)
                _work(at, buf, phase, layer, i, size, D, H, N, own_F, ranks, rows, own)
            _draw(finished)
            i = _draw(drawn)
        spins = 0
        while _look(finished) < pieces:
            spins += 1
            if spins > SPINS:
                _yield()
