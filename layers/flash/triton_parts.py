"""Products of float32 matrices on tensor cores, in Triton: each number is the sum of three in bfloat16.

A float32 has 24 significant bits, a bfloat16 8: three hold it exactly, and so does a float32 the product of two of them.
Of the nine products of parts, six matter to float32 (Henry, Tang and Heinecke 2019, arXiv 1904.06376). On GPUs whose
tensor cores multiply bfloat16 sixteen times as fast as their other units multiply float32 that is more than twice as
fast, and as exact. Launches: ``gpu_parts.py``.
"""

import triton
import triton.language as tl


@triton.jit
def _leading(v):
    """``v`` cut down to what bfloat16 can hold."""
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def store_parts(to, v, plane, mask):
    """Stores ``v``, float32, as its three parts, from large to small, each ``plane`` numbers behind the one before."""
    first = _leading(v)
    second = _leading(v - first)
    tl.store(to, first.to(to.dtype.element_ty), mask=mask)
    tl.store(to + plane, second.to(to.dtype.element_ty), mask=mask)
    tl.store(to + 2 * plane, (v - first - second).to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["upper", "rows"])
def split_kernel(
    above, below, parts,
    upper, rows, columns,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """parts (3, rows, columns): the ``upper`` rows of ``above`` and, under them, those of ``below``."""
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BC + tl.arange(0, BC))[None, :]
    is_above = (row < upper) & (column < columns)
    is_below = (row >= upper) & (row < rows) & (column < columns)
    v = tl.load(above + row * columns + column, mask=is_above, other=0.0)
    v += tl.load(below + (row - upper) * columns + column, mask=is_below, other=0.0)
    store_parts(parts + row * columns + column, v, tl.cast(rows, tl.int64) * columns, is_above | is_below)


@triton.jit
def _tile(part, row, column, lead, rows, columns, TURNED: tl.constexpr, WHOLE: tl.constexpr):
    """A block of a matrix, of which ``part`` holds rows of ``lead`` numbers, or columns if TURNED."""
    row, column = row[:, None], column[None, :]
    at = column.to(tl.int64) * lead + row if TURNED else row.to(tl.int64) * lead + column
    if WHOLE:
        tile = tl.load(part + at)
    else:
        tile = tl.load(part + at, mask=(row < rows) & (column < columns), other=0.0)
    return tile


@triton.jit(do_not_specialize=["upper", "one"])
def product_kernel(
    a, b, above, below,
    rows, columns, inner, upper, step,
    one: "fp32",
    TURN_A: tl.constexpr, TURN_B: tl.constexpr, WHOLE: tl.constexpr, BELOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The product of ``a`` and ``b``, both in parts, summed over ``step`` inner indices in each part of the sum.

    Its first ``upper`` rows go to ``above`` (parts of the sum, upper, columns), the others to ``below``.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    start = tl.program_id(2) * step
    stop = tl.minimum(start + step, inner)
    lead_a = rows if TURN_A else inner
    lead_b = inner if TURN_B else columns
    plane_a = tl.cast(rows, tl.int64) * inner
    plane_b = tl.cast(columns, tl.int64) * inner
    large, small = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for k in tl.range(start, stop, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        a0 = _tile(a, row, at, lead_a, rows, stop, TURN_A, WHOLE)
        a1 = _tile(a + plane_a, row, at, lead_a, rows, stop, TURN_A, WHOLE)
        a2 = _tile(a + 2 * plane_a, row, at, lead_a, rows, stop, TURN_A, WHOLE)
        b0 = _tile(b, at, column, lead_b, stop, columns, TURN_B, WHOLE)
        b1 = _tile(b + plane_b, at, column, lead_b, stop, columns, TURN_B, WHOLE)
        b2 = _tile(b + 2 * plane_b, at, column, lead_b, stop, columns, TURN_B, WHOLE)
        small = tl.dot(a2, b0, small)
        small = tl.dot(a1, b1, small)
        small = tl.dot(a0, b2, small)
        small = tl.dot(a1, b0, small)
        small = tl.dot(a0, b1, small)
        # Tensor cores cut sums off where float32 rounds, which adds up: long sums are made outside. Times ``one``, or the
        # compiler would move the sum inside.
        large += tl.dot(a0, b0) * one
    row, column = row.to(tl.int64)[:, None], column[None, :]
    total = large + small
    part = tl.program_id(2).to(tl.int64)
    tl.store(above + (part * upper + row) * columns + column, total, mask=(row < upper) & (column < columns))
    if BELOW:
        at = (part * (rows - upper) + row - upper) * columns + column
        tl.store(below + at, total, mask=(row >= upper) & (row < rows) & (column < columns))
