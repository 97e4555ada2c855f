"""The GPU kernels beside the matrix products of the dense route, in Triton; see ``layers/flash/dense.py``."""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, cardinal, locate, silu, spread


@triton.jit(do_not_specialize=["numbers", "size"])
def basis_kernel(
    x, scale, values, acts, numbers, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, ACTS: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """values[n, r], all ``G + k`` values for each of the B * I inputs, and acts[n], SiLU's; times the scale."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = n < numbers
    xv = tl.load(x + n, mask=here, other=0.0).to(CT)
    if SCALED:
        s = tl.load(scale + n, mask=here, other=0.0).to(CT)
    if ACTS:
        act = silu(xv, D)
        if SCALED:
            act *= s
        tl.store(acts + n, act.to(acts.dtype.element_ty), mask=here)
    rows = size + ORDER
    if ORDER - D >= 1:
        u = (xv - lo) * inv_h - 0.5 * (1 - ORDER)
    else:
        cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
        v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
    for first in range(0, rows, BR):
        at = first + r
        if ORDER - D >= 1:  # for each place by itself: fewer steps than from one place to the next
            out = cardinal(u[:, None] - at.to(CT)[None, :], inv_h, ORDER, D)
        else:
            behind = at[None, :] - cell[:, None]
            out = spread(behind, v0[:, None], v1[:, None], v2[:, None], v3[:, None], v4[:, None], v5[:, None], ORDER)
        if SCALED:
            out *= s[:, None]
        to = n[:, None] * rows + at[None, :]
        tl.store(values + to, out.to(values.dtype.element_ty), mask=here[:, None] & (at < rows)[None, :])


@triton.jit(do_not_specialize=["samples", "features", "rows"])
def dot_kernel(
    x, grad, weight, base, dots,
    samples, features, outputs, rows,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, BASE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """dots[b, i] for BM samples and BN / RP features, RP >= R a power of 2: products that are never stored.

    (samples, outputs) times (outputs, rows) on tensor cores, then weighted by the basis and added up, in float32.
    """
    b = tl.program_id(0) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * (BN // RP)
    i = first + tl.arange(0, BN) // RP
    r = tl.arange(0, BN) % RP
    f = first + tl.arange(0, BN // RP)
    lo, inv_h = tl.full([], lo, tl.float32), tl.full([], inv_h, tl.float32)
    here, ok = b < samples, (i < features) & (r < rows)
    row_of = weight + (i.to(tl.int64) * rows + r) * outputs
    acc = tl.zeros((BM, BN), tl.float32)
    through_base = tl.zeros((BM, BN // RP), tl.float32)
    for start in range(0, outputs, BK):
        o = start + tl.arange(0, BK)
        inside = o < outputs
        at = b.to(tl.int64)[:, None] * outputs + o[None, :]
        g = tl.load(grad + at, mask=here[:, None] & inside[None, :], other=0.0)
        w = tl.load(row_of[None, :] + o[:, None], mask=ok[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=PRECISION)
        if BASE:
            at = f.to(tl.int64)[None, :] * outputs + o[:, None]
            w = tl.load(base + at, mask=(f < features)[None, :] & inside[:, None], other=0.0)
            through_base = tl.dot(g, w, through_base, input_precision=PRECISION)
    at = b.to(tl.int64)[:, None] * features + i[None, :]
    u = (tl.load(x + at, mask=here[:, None] & (i < features)[None, :], other=0.0).to(tl.float32) - lo) * inv_h
    slopes = cardinal(u - (r.to(tl.float32) + 0.5 * (1 - ORDER))[None, :], inv_h, ORDER, D)
    # Rows that do not exist have met no weight; a NaN in x stays one.
    total = tl.sum(tl.reshape(acc * slopes, (BM, BN // RP, RP)), axis=2)
    at = b.to(tl.int64)[:, None] * features + f[None, :]
    there = here[:, None] & (f < features)[None, :]
    if BASE:
        total += silu(tl.load(x + at, mask=there, other=0.0).to(tl.float32), D) * through_base
    tl.store(dots + at, total.to(dots.dtype.element_ty), mask=there)


@triton.jit
def _pick(products, v, row, here, rows, CT: tl.constexpr):
    there = here & (row >= 0) & (row < rows)
    return tl.where(there, v, 0.0) * tl.load(products + row, mask=there, other=0.0).to(CT)


@triton.jit(do_not_specialize=["numbers", "size"])
def contract_kernel(
    x, products, through_base, dots, numbers, size,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dots[n]: the ``k + 1`` entries of products[n, :] (B * I, R) inside the window, weighted by the basis."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    here = n < numbers
    xv = tl.load(x + n, mask=here, other=0.0).to(CT)
    cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
    rows = size + ORDER
    products += n * rows
    total = _pick(products, v0, cell, here, rows, CT)
    if ORDER >= 1:
        total += _pick(products, v1, cell + 1, here, rows, CT)
    if ORDER >= 2:
        total += _pick(products, v2, cell + 2, here, rows, CT)
    if ORDER >= 3:
        total += _pick(products, v3, cell + 3, here, rows, CT)
    if ORDER >= 4:
        total += _pick(products, v4, cell + 4, here, rows, CT)
    if ORDER >= 5:
        total += _pick(products, v5, cell + 5, here, rows, CT)
    if BASE:
        total += silu(xv, D) * tl.load(through_base + n, mask=here, other=0.0).to(CT)
    tl.store(dots + n, total.to(dots.dtype.element_ty), mask=here)
