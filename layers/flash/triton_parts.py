"""Products of float32 matrices on tensor cores, in Triton: each number is the sum of two in float16.

A float32 has 24 significant bits, a float16 11: two hold it but for its last bit, and of the four products of parts the
smallest does not matter to float32. A float16 has a small range, so the second part is stored 2**11 times as large, and each
row of the left and each column of the right matrix is multiplied by a power of two of its own, which is taken back at the
end (Ootomo and Yokota 2022, arXiv 2203.03341). On GPUs whose tensor cores multiply float16 sixteen times as fast as their
other units multiply float32 that is more than three times as fast, and as exact. Launches: ``gpu_parts.py``.
"""

import triton
import triton.language as tl


@triton.jit
def magnitude(v):
    """Nonnegative integers in the order of ``abs(v)``, float32; those of what is not a number are the largest."""
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def up(largest):
    """The power of two that brings a line of numbers near to the end of float16's range: 2**14 to 2**15.

    ``largest`` is the largest magnitude on the line. Not above 2**126, so that ``down`` is no less than 2**-126.
    """
    return (tl.minimum(268 - (largest >> 23), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def down(largest):
    """What undoes ``up``."""
    return (254 - tl.minimum(268 - (largest >> 23), 253) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_parts(to, v, plane, mask):
    """Stores ``v``, float32 times ``up``, as its two parts, the second ``plane`` numbers behind the first."""
    first = v.to(tl.float16)
    tl.store(to, first, mask=mask)
    tl.store(to + plane, ((v - first.to(tl.float32)) * 2048).to(tl.float16), mask=mask)


@triton.jit
def stacked(one, two, three, row, column, end, at_two, end_two, at_three, end_three, columns):
    """A block of a matrix whose rows 0 to ``end`` are those of ``one``, and from ``at_two`` to ``end_two`` those of ``two``,
    and so on; 0 elsewhere. Each is ``columns`` wide.
    """
    inside = column < columns
    v = tl.load(one + row * columns + column, mask=inside & (row < end), other=0.0)
    here = inside & (row >= at_two) & (row < end_two)
    v += tl.load(two + (row - at_two) * columns + column, mask=here, other=0.0)
    here = inside & (row >= at_three) & (row < end_three)
    return v + tl.load(three + (row - at_three) * columns + column, mask=here, other=0.0)


@triton.jit
def split(
    at_row, at_column, one, two, three, parts, largest, end, at_two, end_two, at_three, end_three, columns, rows, across,
    BY_ROW: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A block of parts (2, rows, across) of a stacked matrix, and with BY_ROW the ``largest`` (rows) of each row.

    BC >= across with BY_ROW; else there is a ``largest`` (columns) to read.
    """
    row = (at_row * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    column = (at_column * BC + tl.arange(0, BC))[None, :]
    v = stacked(one, two, three, row, column, end, at_two, end_two, at_three, end_three, columns)
    if BY_ROW:
        most = tl.max(magnitude(v), 1)[:, None]
        tl.store(largest + row, most, mask=row < rows)
    else:
        most = tl.load(largest + column, mask=column < columns, other=0)
    mask = (row < rows) & (column < across)
    store_parts(parts + row * across + column, v * up(most), tl.cast(rows, tl.int64) * across, mask)


@triton.jit(do_not_specialize=["end", "at_two", "end_two", "at_three", "end_three", "rows"])
def split_rows_kernel(
    one, two, three, parts, largest,
    end, at_two, end_two, at_three, end_three, units, rows, across,
    UNIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A stacked matrix in parts, ``units`` of UNIT columns, scaled by rows: see ``split``."""
    split(
        tl.program_id(0), 0, one, two, three, parts, largest,
        end, at_two, end_two, at_three, end_three, units * UNIT, rows, across, True, BR, BC,
    )  # fmt: skip


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


@triton.jit
def _product(
    pid, a, b, of_rows, of_columns, above, below,
    rows, columns, inner, plane_a, plane_b, upper, at_below, end_below, kept, each, step, one,
    TURN_A: tl.constexpr, TURN_B: tl.constexpr, WHOLE: tl.constexpr, BELOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tall, wide = tl.cdiv(rows, BM), tl.cdiv(columns, BN)  # in programs
    high, flat = pid % tall, pid // tall % wide
    if rows > columns:  # the larger matrix is read once, while the smaller one stays in the cache
        high, flat = pid // wide % tall, pid % wide
    row = high * BM + tl.arange(0, BM)
    column = flat * BN + tl.arange(0, BN)
    piece = pid // (tall * wide)
    stop = tl.minimum(piece * step + step, inner)
    lead_a = rows if TURN_A else inner
    lead_b = inner if TURN_B else columns
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(piece * step, stop, BK, num_stages=STAGES):
        at = k + tl.arange(0, BK)
        a0 = _tile(a, row, at, lead_a, rows, stop, TURN_A, WHOLE)
        a1 = _tile(a + plane_a, row, at, lead_a, rows, stop, TURN_A, WHOLE)
        b0 = _tile(b, at, column, lead_b, stop, columns, TURN_B, WHOLE)
        b1 = _tile(b + plane_b, at, column, lead_b, stop, columns, TURN_B, WHOLE)
        sums = tl.dot(a1, b0)
        sums = tl.dot(a0, b1, sums) * (one * 0.00048828125)  # 2**-11
        # Tensor cores cut sums off where float32 rounds, which adds up: long sums are made outside. Times ``one``, or the
        # compiler would move the sum inside.
        total += tl.dot(a0, b0, sums) * one
    group = tl.where(row < upper, row // each, row - at_below + upper // each)
    here, lower = row < upper, (row >= at_below) & (row < end_below)
    total *= down(tl.load(of_rows + group, mask=here | lower, other=0))[:, None]
    total *= down(tl.load(of_columns + column, mask=column < kept, other=0))[None, :]
    row, column, piece = row.to(tl.int64)[:, None], column[None, :], piece.to(tl.int64)
    tl.store(above + (piece * upper + row) * kept + column, total, mask=here[:, None] & (column < kept))
    if BELOW:
        at = (piece * (end_below - at_below) + row - at_below) * kept + column
        tl.store(below + at, total, mask=lower[:, None] & (column < kept))


@triton.jit(do_not_specialize=["upper", "at_below", "end_below", "each", "programs", "one"])
def products_kernel(
    a, b, of_rows, of_columns, above, below, c, d, of_rows2, of_columns2, other,
    rows, columns, inner, plane_a, plane_b, upper, at_below, end_below, units, each, step, programs,
    rows2, columns2, inner2, plane_c, plane_d, step2,
    one: "fp32",
    TURN_A: tl.constexpr, TURN_B: tl.constexpr, WHOLE: tl.constexpr, UNIT: tl.constexpr, BELOW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SECOND: tl.constexpr, TURN_C: tl.constexpr, TURN_D: tl.constexpr, WHOLE2: tl.constexpr,
    BN2: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The product of ``a`` and ``b``, both in parts, summed over ``step`` inner indices in each piece of the sum; and with
    SECOND that of ``c`` and ``d``, side by side with it. A turned matrix is stored by columns.

    The first columns are kept, ``units`` of UNIT: of the first ``upper`` rows in ``above`` (pieces of the sum, upper,
    columns kept), of rows ``at_below`` to ``end_below`` in ``below``; all of the second product in ``other``.
    ``of_columns`` is the largest magnitude of each column of ``b`` that is kept; ``of_rows`` that of every ``each`` of
    the upper rows of ``a`` and then that of each row for ``below``. The first ``programs`` make the first product.
    """
    pid = tl.program_id(0)
    if pid < programs:
        _product(
            pid, a, b, of_rows, of_columns, above, below,
            rows, columns, inner, plane_a, plane_b, upper, at_below, end_below, units * UNIT, each, step, one,
            TURN_A, TURN_B, WHOLE, BELOW, BM, BN, BK, STAGES,
        )  # fmt: skip
    elif SECOND:
        _product(
            pid - programs, c, d, of_rows2, of_columns2, other, other,
            rows2, columns2, inner2, plane_c, plane_d, rows2, rows2, rows2, columns2, 1, step2, one,
            TURN_C, TURN_D, WHOLE2, False, BM, BN2, BK, STAGES,
        )  # fmt: skip
