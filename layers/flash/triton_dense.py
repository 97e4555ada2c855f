"""The GPU kernels beside the matrix products of the dense route, in Triton; see ``layers/flash/dense.py``."""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, cardinal, locate, silu, spread, value
from layers.flash.triton_parts import magnitude, split, stacked, store_parts, up


@triton.jit(do_not_specialize=["upper", "rows", "samples", "blocks"])
def measure_kernel(
    above, below, x, scale, of_columns, of_inputs,
    upper, rows, units, samples, features, blocks,
    bound: "fp32",
    D: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr, BY_SAMPLE: tl.constexpr, UNIT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The largest magnitudes of the columns of a stacked matrix, and those that ``basis_kernel`` may make of the inputs.

    of_inputs (B) with BY_SAMPLE, else (2 * I): of each feature's basis values, then of its SiLU's. ``bound`` is that of
    basis values before the scale. Both arrays begin as 0. The matrix has ``units`` of UNIT columns. A program takes BR
    rows or samples and BC columns or features; the first ``blocks`` take the matrix.
    """
    columns = units * UNIT
    pid = tl.program_id(0)
    r, c = tl.arange(0, BR)[:, None], tl.arange(0, BC)
    if pid < blocks:
        across = tl.cdiv(columns, BC)
        row, column = (pid // across * BR + r).to(tl.int64), pid % across * BC + c
        v = stacked(above, below, below, row, column[None, :], upper, upper, rows, rows, rows, columns)
        most = tl.max(magnitude(v), 0)
        tl.atomic_max(of_columns + column, most, mask=column < columns, sem="relaxed")
    else:
        across = tl.cdiv(features, BC)
        b, i = (pid - blocks) // across * BR + r, (pid - blocks) % across * BC + c
        here = (b < samples) & (i < features)[None, :]
        at = b.to(tl.int64) * features + i[None, :]
        value, act = tl.where(here, bound, 0.0), tl.zeros([BR, BC], tl.float32)
        if BASE:
            act = tl.where(here, silu(tl.load(x + at, mask=here, other=0.0), D), 0.0)
        if SCALED:
            s = tl.load(scale + at, mask=here, other=0.0)
            act *= s
            value *= s
        if BY_SAMPLE:
            limit = tl.max(tl.maximum(magnitude(value), magnitude(act)), 1)[:, None]
            tl.atomic_max(of_inputs + b, limit, mask=b < samples, sem="relaxed")
        else:
            tl.atomic_max(of_inputs + i, tl.max(magnitude(value), 0), mask=i < features, sem="relaxed")
            tl.atomic_max(of_inputs + features + i, tl.max(magnitude(act), 0), mask=i < features, sem="relaxed")


@triton.jit
def _store(to, v, plane, mask, PARTS: tl.constexpr):
    if PARTS:
        store_parts(to, v, plane, mask)
    else:
        tl.store(to, v.to(to.dtype.element_ty), mask=mask)


@triton.jit
def _values(
    block, b, x, scale, largest, values, samples, features, columns, size, lead, plane, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    BY_SAMPLE: tl.constexpr, OFFSET: tl.constexpr, UNIT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BC columns of basis values, UNIT at a time, which belong to one input or to two that follow each other.

    Features that are missing have those of 0, and will be multiplied by 0.
    """
    rows = size + ORDER
    start = block.to(OFFSET) * BC
    first = start // rows
    unit = tl.arange(0, BC // UNIT) * UNIT
    at = (start - first * rows).to(tl.int32) + unit
    i, r = (first.to(tl.int32) + at // rows)[None, :], (at % rows)[None, :]
    rest = rows - r  # columns until the next input
    here, two = (b < samples) & (i < features), (b < samples) & (i + 1 < features) & (rest < UNIT)
    x0 = tl.load(x + i, mask=here, other=0.0).to(CT)
    x1 = tl.load(x + i + 1, mask=two, other=0.0).to(CT)
    n = tl.arange(0, UNIT)[None, None, :]
    second = n >= rest[:, :, None]
    if ORDER - D >= 1:  # for each place by itself: fewer steps than from one place to the next
        u0 = (x0 - lo) * inv_h - (r.to(CT) + 0.5 * (1 - ORDER))
        u1 = (x1 - lo) * inv_h + (rest.to(CT) - 0.5 * (1 - ORDER))
        out = cardinal(tl.where(second, u1[:, :, None], u0[:, :, None]) - n.to(CT), inv_h, ORDER, D)
    else:
        cell, f = locate(tl.where(second, x1[:, :, None], x0[:, :, None]), lo, hi, inv_h, size, ORDER)
        v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
        out = spread(tl.where(second, n - rest[:, :, None], n + r[:, :, None]) - cell, v0, v1, v2, v3, v4, v5, ORDER)
    if SCALED:
        s0 = tl.load(scale + i, mask=here, other=0.0).to(CT)
        s1 = tl.load(scale + i + 1, mask=two, other=0.0).to(CT)
        if PARTS and not BY_SAMPLE:
            s0 *= up(tl.load(largest + i, mask=i < features, other=0))
            s1 *= up(tl.load(largest + i + 1, mask=i + 1 < features, other=0))
        out *= tl.where(second, s1[:, :, None], s0[:, :, None])
    if PARTS and BY_SAMPLE:
        out *= up(tl.load(largest + b, mask=b < samples, other=0))[:, :, None]
    elif PARTS and not SCALED:
        out *= up(tl.load(largest))  # all features have the same
    column = (start + unit)[None, :, None] + n
    to = values + (b.to(tl.int64) * lead)[:, :, None] + column
    _store(to, out, plane, (b < samples)[:, :, None] & (column < columns), PARTS)


@triton.jit
def _silus(
    block, b, x, scale, largest, acts, samples, features, lead, plane,
    D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr, BY_SAMPLE: tl.constexpr,
    PADDED: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i = (block * BC + tl.arange(0, BC))[None, :]
    here = (b < samples) & (i < features)
    out = silu(tl.load(x + i, mask=here, other=0.0).to(CT), D)
    if SCALED:
        out *= tl.load(scale + i, mask=here, other=0.0).to(CT)
    if PARTS and BY_SAMPLE:
        out *= up(tl.load(largest + b, mask=b < samples, other=0))
    elif PARTS:
        out *= up(tl.load(largest + features + i, mask=i < features, other=0))
    if PADDED:  # a slope of SiLU at 0 might be too large for these parts
        out = tl.where(here, out, 0.0)
        here = (b < samples) & (i < tl.cdiv(features, PADDED) * PADDED)
    _store(acts + b.to(tl.int64) * lead + i, out, plane, here, PARTS)


@triton.jit(do_not_specialize=["samples", "size", "blocks", "act_blocks", "upper", "at_below", "end_below", "rows"])
def basis_kernel(
    x, scale, largest, values, acts, above, below, matrix, of_columns,
    samples, features, columns, size, blocks, act_blocks, lead, lead_acts, plane,
    upper, at_below, end_below, units, rows, across,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr,
    BY_SAMPLE: tl.constexpr, OFFSET: tl.constexpr, UNIT: tl.constexpr, PADDED: tl.constexpr, OUTPUTS: tl.constexpr,
    BB: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """values (B, columns = I * R), all ``G + k`` values of each input, and acts (B, I), SiLU's; times the scale.

    A program makes BC columns of BB samples; the first ``blocks`` columns of programs are those of ``values``. OFFSET:
    the integers that count columns. UNIT <= R. With PARTS all is stored in two parts, see ``triton_parts.py``, scaled by
    what ``measure_kernel`` found, for each sample or for each feature; further programs do so with the matrix by which
    this one will be multiplied, scaled by columns, see ``split``; it has ``units`` of OUTPUTS columns. PADDED: 0, or
    features are no multiple of it, those that are missing are there, and ``matrix`` is 0 for them.
    """
    tiles = tl.cdiv(samples, BB)
    pid = tl.program_id(0)
    block = pid // tiles
    b = (pid % tiles * BB + tl.arange(0, BB))[:, None]
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    x += b.to(tl.int64) * features
    scale += b.to(tl.int64) * features
    if block < blocks:
        _values(
            block, b, x, scale, largest, values, samples, features, columns, size, lead, plane, lo, hi, inv_h,
            ORDER, D, CT, SCALED, PARTS, BY_SAMPLE, OFFSET, UNIT, BC,
        )  # fmt: skip
    elif block < blocks + act_blocks:
        _silus(
            block - blocks, b, x, scale, largest, acts, samples, features, lead_acts, plane,
            D, CT, SCALED, PARTS, BY_SAMPLE, PADDED, BC,
        )  # fmt: skip
    elif PARTS:
        pid -= tiles * (blocks + act_blocks)
        high = tl.cdiv(rows, 4)
        split(
            pid % high, pid // high, above, below, below, matrix, of_columns,
            upper, at_below, end_below, rows, rows, units * OUTPUTS, rows, across, False, 4, 256,
        )  # fmt: skip


@triton.jit
def _pick(products, v, row, here, rows, CT: tl.constexpr):
    there = here & (row >= 0) & (row < rows)
    return tl.where(there, v, 0.0) * tl.load(products + row, mask=there, other=0.0).to(CT)


@triton.jit(do_not_specialize=["numbers", "features", "size", "lead", "lead_base"])
def contract_kernel(
    x, products, through_base, dots,
    numbers, features, size, lead, lead_base,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, OFFSET: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dots (B * I): the ``k + 1`` entries of products (B, I * R) inside each window, weighted by the basis.

    OFFSET: the integers that count inputs.
    """
    n = tl.program_id(0).to(OFFSET) * BN + tl.arange(0, BN)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = n < numbers
    xv = tl.load(x + n, mask=here, other=0.0).to(CT)
    cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
    rows = size + ORDER
    b = n // features
    i = n - b * features
    products += b.to(tl.int64) * lead + i * rows
    total = _pick(products, v0, cell, here, rows, CT)
    for r in tl.static_range(1, ORDER + 1):
        total += _pick(products, value(r, v0, v1, v2, v3, v4, v5), cell + r, here, rows, CT)
    if BASE:
        total += silu(xv, D) * tl.load(through_base + b.to(tl.int64) * lead_base + i, mask=here, other=0.0).to(CT)
    tl.store(dots + n, total.to(dots.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["count"])
def narrow_kernel(
    grad, largest, scaled, kept, factors,
    count, more: "fp32", least: "fp32", most: "fp32",
    BN: tl.constexpr,
):  # fmt: skip
    """grad (count) in float16, twice, each with the one of factors (2) that its results have to be multiplied by.

    ``scaled`` is divided by the largest magnitude (1), times ``more``; so is ``kept``, but not where that magnitude is
    between ``least`` and ``most``. Where it is no number, neither is divided.
    """
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    size = tl.load(largest)
    factor = size * more + 1e-30
    factor = tl.where(factor < float("inf"), factor, 1.0)
    other = tl.where((size >= least) & (size <= most), 1.0, factor)
    g = tl.load(grad + at, mask=at < count, other=0.0)
    tl.store(scaled + at, (g / factor).to(tl.float16), mask=at < count)
    tl.store(kept + at, (g / other).to(tl.float16), mask=at < count)
    if tl.program_id(0) == 0:
        tl.store(factors, factor)
        tl.store(factors + 1, other)


@triton.jit(do_not_specialize=["count"])
def multiply_kernel(numbers, factor, count, BN: tl.constexpr):
    """numbers (count) times factor (1), in place. Where that is 1 nothing is read."""
    by = tl.load(factor)
    if by != 1:
        # With 64 bits: a step beyond the last of nearly 2**31 numbers would be negative with 32, and never the last.
        for start in range(tl.program_id(0).to(tl.int64) * BN, count, tl.num_programs(0) * BN):
            at = start + tl.arange(0, BN)
            v = tl.load(numbers + at, mask=at < count, other=0.0).to(tl.float32) * by
            tl.store(numbers + at, v.to(numbers.dtype.element_ty), mask=at < count)
