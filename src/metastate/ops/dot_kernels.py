"""Products of a few rows with a weight matrix, y = x W^T, whose bits no other row can change.

A library's matrix product picks its blocking, and with it the order of every sum, by the number of
rows: a row alone and the same row in a batch differ in their last bits. Here one sum is always made
in the same order, whatever block it is in: 16 lanes over k with fused multiply-adds, a fixed tree
over the lanes, then the k that do not fill a vector. The blocks are written as LLVM instructions,
since nothing else keeps that order and still fills the registers. Weights are float32 or bfloat16,
which is widened on the way in; everything else is float32.
"""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from metastate.ops.jit import INNER
from metastate.ops.row_kernels import widened

LANES = 16
ROWS, OUTPUTS = 4, 4  # a block: 16 sums stay in registers
FLOAT, INT = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
BYTES = {"float32": 4, "bfloat16": 2}
_inner: Any = nb.njit(**(INNER | {"fastmath": False}))  # sums keep their order


def _load(builder: Any, address: Any, kind: str, lanes: int) -> Any:
    """Load `lanes` values of dtype `kind`, 1 or LANES, as float32."""

    def shape(scalar: Any) -> Any:
        return scalar if lanes == 1 else ir.VectorType(scalar, lanes)

    def load(scalar: Any) -> Any:
        kind = shape(scalar)
        place = builder.inttoptr(address, kind.as_pointer())
        return builder.load(place, align=scalar_bytes)

    scalar_bytes = BYTES[kind]
    if kind == "float32":
        return load(FLOAT)
    word = ir.IntType(32)
    sixteen = ir.Constant(word, 16)
    shift = sixteen if lanes == 1 else ir.Constant(shape(word), [sixteen] * lanes)
    wide = builder.zext(load(ir.IntType(16)), shape(word))
    return builder.bitcast(builder.shl(wide, shift), shape(FLOAT))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    name = "llvm.fma.f32" if a.type == FLOAT else f"llvm.fma.v{LANES}f32"
    kind = ir.FunctionType(a.type, [a.type] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _sum_lanes(builder: Any, vector: Any) -> Any:
    """Add the lanes of a vector, halves first."""
    n = LANES
    while n > 1:
        n //= 2
        index = ir.VectorType(ir.IntType(32), n)
        low, high = (
            builder.shuffle_vector(vector, vector, ir.Constant(index, list(range(i, i + n))))
            for i in (0, n)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))


def _loop(builder: Any, first: Any, last: Any, step: int, sums: list[Any], body: Any) -> list[Any]:
    """Emit `for k in range(first, last, step): sums = body(k, sums)`; return the last sums."""
    function, before = builder.function, builder.block
    head, inside, after = (function.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(INT)
    carried = [builder.phi(x.type) for x in sums]
    builder.cbranch(builder.icmp_signed("<", k, last), inside, after)
    builder.position_at_end(inside)
    new = body(k, carried)
    for phi, start, end in zip(
        (k, *carried),
        (first, *sums),
        (builder.add(k, ir.Constant(INT, step)), *new),
        strict=True,
    ):
        phi.add_incoming(start, before)
        phi.add_incoming(end, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return carried


def _block(rows: int, outputs: int, kind: str) -> Any:
    """Return `block(x, x_step, w, w_step, K, y, y_step, add)`, all int64, addresses and bytes.

    y[r, o] (+)= sum_k x[r, k] w[o, k] for r < rows, o < outputs; `add` is 1 or 0.
    """

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x, x_step, w, w_step, K, y, y_step, add = args

        def at(base: Any, step: Any, row: int, k: Any, size: int) -> Any:
            row_start = builder.add(base, builder.mul(step, ir.Constant(INT, row)))
            return builder.add(row_start, builder.mul(k, ir.Constant(INT, size)))

        def body(lanes: int) -> Any:
            def multiply(k: Any, sums: list[Any]) -> list[Any]:
                ws = [
                    _load(builder, at(w, w_step, o, k, BYTES[kind]), kind, lanes)
                    for o in range(outputs)
                ]
                xs = [_load(builder, at(x, x_step, r, k, 4), "float32", lanes) for r in range(rows)]
                pairs = [(a, b) for a in xs for b in ws]
                return [_fma(builder, a, b, s) for (a, b), s in zip(pairs, sums, strict=True)]

            return multiply

        whole = builder.and_(K, ir.Constant(INT, -LANES))
        zeros = [ir.Constant(VECTOR, [0.0] * LANES)] * (rows * outputs)
        sums = _loop(builder, ir.Constant(INT, 0), whole, LANES, zeros, body(LANES))
        sums = [_sum_lanes(builder, s) for s in sums]
        sums = _loop(builder, whole, K, 1, sums, body(1))
        adds = builder.icmp_signed("!=", add, ir.Constant(INT, 0))
        for i, value in enumerate(sums):
            place = at(y, y_step, i // outputs, ir.Constant(INT, i % outputs), 4)
            here = builder.inttoptr(place, FLOAT.as_pointer())
            total = builder.fadd(builder.load(here, align=4), value)
            builder.store(builder.select(adds, total, value), here, align=4)
        return context.get_dummy_value()

    def typed(typing_context, x, x_step, w, w_step, K, y, y_step, add):  # type: ignore[no-untyped-def]
        return types.void(*[types.int64] * 8), build

    return intrinsic(typed)


_block_float32, _column_float32, _row_float32, _single_float32 = (
    _block(*shape, "float32") for shape in ((ROWS, OUTPUTS), (ROWS, 1), (1, OUTPUTS), (1, 1))
)
_column_bfloat16, _single_bfloat16 = (_block(*shape, "bfloat16") for shape in ((ROWS, 1), (1, 1)))


@_inner
def _stream(x, w, size, K, y, y_step, rows, add):  # type: ignore[no-untyped-def]
    """One output of up to ROWS rows."""
    if rows == ROWS:
        if size == 4:
            _column_float32(x, K * 4, w, 0, K, y, y_step, add)
        else:
            _column_bfloat16(x, K * 4, w, 0, K, y, y_step, add)
        return
    for r in range(rows):
        if size == 4:
            _single_float32(x + r * K * 4, 0, w, 0, K, y + r * y_step, 0, add)
        else:
            _single_bfloat16(x + r * K * 4, 0, w, 0, K, y + r * y_step, 0, add)


@_inner
def multiply(x, w, size, K, first, last, y, y_step, rows, add):  # type: ignore[no-untyped-def]
    """y[r, o] (+)= sum_k x[r, k] w[o, k] for r < rows, first <= o < last; `add` is 1 or 0.

    x [rows, K] and y float32, y's rows y_step bytes apart; w [..., K] float32 or bfloat16, `size`
    is 4 or 2 bytes. All by address.

    The weights come from memory in its own order, one output after the other, which is faster than
    several at a time (measured on one core: 19 against 15 GB/s, in bfloat16 23 against 11). Further
    rows then find them in the cache, in bfloat16 widened once.
    """
    x_step = K * 4
    wide = np.empty(OUTPUTS * K if size == 2 and rows > ROWS else 0, np.float32)
    o = first
    while o < last:
        n = min(OUTPUTS, last - o)
        ws, ys = w + o * K * size, y + o * 4
        r = 0
        if wide.size:
            widened(ws, 2, n * K, wide)
            ws = wide.ctypes.data
        else:
            r = min(rows, ROWS)
            for i in range(n):
                _stream(x, ws + i * K * size, size, K, ys + i * 4, y_step, r, add)
        while n == OUTPUTS and r + ROWS <= rows:
            _block_float32(x + r * x_step, x_step, ws, x_step, K, ys + r * y_step, y_step, add)
            r += ROWS
        while r < rows:
            if n == OUTPUTS:
                _row_float32(x + r * x_step, x_step, ws, x_step, K, ys + r * y_step, y_step, add)
            else:
                for i in range(n):
                    _stream(
                        x + r * x_step,
                        ws + i * K * 4,
                        4,
                        K,
                        ys + r * y_step + i * 4,
                        y_step,
                        1,
                        add,
                    )
            r += 1
        o += OUTPUTS
