"""The GPU kernels for few outputs, backward, in Triton: one program takes all outputs. (And ``triton_sums.py``.)

The gradient of the weights comes from small matrix products, basis values (rows, samples) times gradients (samples,
outputs): with all samples on a coarse grid (``rows_kernel``), and on a fine one with those that reach a tile of rows, found
by sorting (``columns_kernel``). In both every row of the gradient is written once, by one program: no atomics, no
zero-fill, nothing that changes from run to run. Where rows are many and samples few, most tiles are nearly empty, and atomics
are faster (``adds_kernel``); under ``torch.use_deterministic_algorithms(True)`` they are not used. Programs of different
kinds, those of the gradient of ``x`` among them, share a launch, so that they run side by side.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_few.py``. A derivative of -1 leaves that half
out. ``CT`` is the dtype of all sums, float32, whatever that of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import cardinal, silu
from layers.flash.triton_sort import sorted_keys
from layers.flash.triton_windows import add, dot, gather


@triton.jit
def _transposed(x, b, i, here, ok, features):
    at = b.to(tl.int64)[None, :] * features + i[:, None]
    return tl.load(x + at, mask=ok[:, None] & here[None, :], other=0.0).to(tl.float32)


@triton.jit
def _grads(grad, b, o, here, outputs):
    """grad[b, o] as float32; few samples and few outputs, so that offsets fit into 32 bits."""
    at = b[:, None] * outputs + o[None, :]
    return tl.load(grad + at, mask=here[:, None] & (o < outputs)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _piece(
    start, stop, x, scale, grad, i, o, ok, centre, features, outputs, lo, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum over some samples of values (BM, BS) times gradients (BS, BN): of basis functions with their centres, in
    spacings, or with ORDER = -1 of SiLU."""
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(start, stop, BS):
        b = first + tl.arange(0, BS)
        here = b < stop
        a = _transposed(x, b, i, here, ok, features)
        if ORDER < 0:
            a = silu(a, D)
        else:
            a = cardinal((a - lo) * inv_h - centre, inv_h, ORDER, D)
        if SCALED:
            a *= _transposed(scale, b, i, here, ok, features)
        acc = tl.dot(a, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product(
    x, scale, grad, i, o, ok, centre, samples, features, outputs, lo, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """See ``_piece``: over all samples. CHUNK: 0, or of how many tensor cores, which cut sums off, make one sum."""
    if CHUNK:
        acc = tl.zeros((BM, BN), tl.float32)
        for first in range(0, samples, CHUNK):
            acc += _piece(
                first, tl.minimum(first + CHUNK, samples), x, scale, grad, i, o, ok, centre, features, outputs,
                lo, inv_h, ORDER, D, SCALED, PRECISION, BM, BS, BN,
            )  # fmt: skip
    else:
        acc = _piece(
            0, samples, x, scale, grad, i, o, ok, centre, features, outputs,
            lo, inv_h, ORDER, D, SCALED, PRECISION, BM, BS, BN,
        )  # fmt: skip
    return acc


@triton.jit
def _base(
    pid, x, scale, grad, base_gradient, samples, features, outputs,
    D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """base_gradient[i, o] for BM features and all outputs: the sum over samples of ``silu(x) * grad``."""
    i = pid * BM + tl.arange(0, BM)
    o = tl.arange(0, BN)
    ok = i < features
    acc = _product(
        x, scale, grad, i, o, ok, 0.0, samples, features, outputs, 0.0, 0.0, -1, D, SCALED, PRECISION, CHUNK, BM, BS, BN
    )
    to = i.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(base_gradient + to, acc.to(base_gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])


@triton.jit(do_not_specialize=["samples", "features", "size", "bases", "row_programs"])
def rows_kernel(
    x, scale, grad, weight, base, windows, dots, gradient, base_gradient,
    samples, features, units, size, bases, row_programs,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, CHUNK: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """A coarse grid: ``bases`` programs of ``_base``, then BM of all I * R rows each, then ``gather``."""
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if SCATTER_D >= 0 and pid < bases:
        _base(
            pid, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, CHUNK, BM, BS, BN,
        )  # fmt: skip
    elif SCATTER_D >= 0 and pid < bases + row_programs:
        row = (pid - bases) * BM + tl.arange(0, BM)
        i = row // (size + ORDER)
        ok = i < features
        o = tl.arange(0, BN)
        centre = (row - i * (size + ORDER)).to(tl.float32)[:, None] + 0.5 * (1 - ORDER)
        acc = _product(
            x, scale, grad, i, o, ok, centre, samples, features, outputs, lo, inv_h,
            ORDER, SCATTER_D, SCALED, PRECISION, CHUNK, BM, BS, BN,
        )  # fmt: skip
        to = row.to(tl.int64)[:, None] * outputs + o[None, :]
        tl.store(gradient + to, acc.to(gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])
    elif DOT_D >= 0:
        gather(
            pid - (bases + row_programs), x, grad, weight, base, dots, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip


@triton.jit
def _bounds(
    key, keys, tile, samples,
    ORDER: tl.constexpr, KT: tl.constexpr, SORT: tl.constexpr, CB: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The first of a feature's sorted samples that reaches a tile, and the first beyond.

    Those in cells from k below the tile to its last row reach it: counted in ``key``, which holds them all, or CB at a
    time in ``keys``. Two counts, below 2 ** 16, in one sum.
    """
    reach = tl.full([], tile * BM + 1, KT) << BITS
    beyond = tl.full([], tile * BM + BM + ORDER + 1, KT) << BITS
    if SORT:
        counts = (key < reach).to(tl.int32) + ((key < beyond).to(tl.int32) << 16)
    else:
        counts = tl.zeros((CB,), tl.int32)
        for part in range(0, samples, CB):
            at = part + tl.arange(0, CB)
            some = tl.load(keys + at, mask=at < samples, other=2 ** (KT.primitive_bitwidth - 1) - 1)
            counts += (some < reach).to(tl.int32) + ((some < beyond).to(tl.int32) << 16)
    both = tl.sum(counts, axis=0)
    return both & 0xFFFF, both >> 16


@triton.jit
def _fetch(one, found, x, scale, grad, i, o, features, outputs, SCALED: tl.constexpr, BITS: tl.constexpr):
    """Position, scale and gradients of the samples behind some keys."""
    b = (one & (2**BITS - 1)).to(tl.int32)
    at = b.to(tl.int64) * features + i
    xv = tl.load(x + at, mask=found, other=0.0).to(tl.float32)
    factor = xv
    if SCALED:
        factor = tl.load(scale + at, mask=found, other=0.0).to(tl.float32)
    return xv, factor, _grads(grad, b, o, found, outputs)


@triton.jit
def _values(
    one, xv, factor, row, lo, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Basis values (rows, samples), times the scale."""
    cell = (one >> BITS).to(tl.int32) - (ORDER + 1)
    f = (xv - lo) * inv_h - cell.to(tl.float32)
    f = tl.where(tl.abs(f) > 2, 0.0, f)
    # The difference of whole numbers first: it is exact, whatever G is.
    t = (cell[None, :] - row[:, None]).to(tl.float32) + (f - 0.5 * (1 - ORDER))[None, :]
    a = cardinal(t, inv_h, ORDER, D)
    return a * factor[None, :] if SCALED else a


@triton.jit
def _column(
    pid, x, scale, grad, keys, gradient, samples, features, outputs, size, tiles, groups, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr, SORT: tl.constexpr,
    NB: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of one feature: one of the ``groups`` into which its tiles of BM rows are divided, all outputs.

    With SORT each program sorts the feature's samples, into keys[pid]; without, keys[i] are sorted already.
    """
    KT: tl.constexpr = keys.dtype.element_ty
    CB: tl.constexpr = min(NB, 256)
    i = (pid // groups).to(tl.int64)
    each = tl.cdiv(tiles, groups)
    start = (pid % groups) * each
    key = 0
    if SORT:
        n = tl.arange(0, NB)
        here = n < samples
        keys += pid.to(tl.int64) * samples
        key = sorted_keys(x, i, n, here, features, size, lo, hi, inv_h, ORDER, CT, KT, BITS)
        tl.store(keys + n, key, mask=here)
        tl.debug_barrier()
    else:
        keys += i * samples
    r = tl.arange(0, BM)
    o = tl.arange(0, BN)
    s = tl.arange(0, BS)
    rows = size + ORDER
    gradient += i * rows * outputs
    # The first samples of a tile are fetched while the tile before is worked on: many tiles have no others.
    first, end = _bounds(key, keys, start, samples, ORDER, KT, SORT, CB, BITS, BM)
    one = tl.load(keys + first + s, mask=first + s < end, other=0)
    xv, factor, g = _fetch(one, first + s < end, x, scale, grad, i, o, features, outputs, SCALED, BITS)
    for tile in range(start, tl.minimum(start + each, tiles)):
        row = tile * BM + r
        next_first, next_end = _bounds(key, keys, tile + 1, samples, ORDER, KT, SORT, CB, BITS, BM)
        next_one = tl.load(keys + next_first + s, mask=next_first + s < next_end, other=0)
        a = _values(one, xv, factor, row, lo, inv_h, ORDER, D, SCALED, BITS)
        acc = tl.dot(a, g, input_precision=PRECISION)
        for j in range(first + BS, end, BS):
            found = j + s < end
            one = tl.load(keys + j + s, mask=found, other=0)
            xv, factor, g = _fetch(one, found, x, scale, grad, i, o, features, outputs, SCALED, BITS)
            a = _values(one, xv, factor, row, lo, inv_h, ORDER, D, SCALED, BITS)
            acc = tl.dot(a, g, acc, input_precision=PRECISION)
        first, end, one = next_first, next_end, next_one
        xv, factor, g = _fetch(one, first + s < end, x, scale, grad, i, o, features, outputs, SCALED, BITS)
        to = gradient + tile * BM * outputs + (r[:, None] * outputs + o[None, :])
        mask = (row < rows)[:, None] & (o < outputs)[None, :]
        # Nobody reads it here: it leaves the cache before the weights do.
        tl.store(to, acc.to(gradient.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["samples", "features", "size", "tiles", "groups", "columns", "bases"])
def columns_kernel(
    x, scale, grad, weight, base, keys, windows, dots, gradient, base_gradient,
    samples, features, units, size, tiles, groups, columns, bases,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BASE_BM: tl.constexpr, BASE_BS: tl.constexpr,
):  # fmt: skip
    """A fine grid: ``columns`` programs of ``_column``, then ``bases`` of ``_base``, then ``gather``."""
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if pid < columns:
        _column(
            pid, x, scale, grad, keys, gradient, samples, features, outputs, size, tiles, groups, lo, hi, inv_h,
            ORDER, SCATTER_D, CT, SCALED, SORT, NB, BITS, PRECISION, BM, BS, BN,
        )  # fmt: skip
    elif BASE and pid < columns + bases:
        _base(
            pid - columns, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, 0, BASE_BM, BASE_BS, BN,
        )  # fmt: skip
    elif DOT_D >= 0:
        gather(
            pid - (columns + bases), x, grad, weight, base, dots, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "features", "size", "bases"])
def adds_kernel(
    x, scale, grad, weight, base, windows, dots, gradient, base_gradient,
    samples, features, units, size, bases,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    BO: tl.constexpr, BASE_BM: tl.constexpr, BASE_BS: tl.constexpr,
):  # fmt: skip
    """A very fine grid: ``bases`` programs of ``_base``, then for each sample and block of features ``add`` and ``dot``.

    ``gradient`` begins as 0. What was set to 0 last is the first to be met, while it lies in the cache, and then all
    samples meet the same features one after the other.
    """
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if BASE and pid < bases:
        _base(
            pid, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, 0, BASE_BM, BASE_BS, BN,
        )  # fmt: skip
    else:
        pid -= bases
        b = pid % samples
        block = tl.cdiv(features, BI) - 1 - pid // samples
        add(
            b, block, x, scale, grad, gradient, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, SCATTER_D, CT, SCALED, BI, BO,
        )  # fmt: skip
        if DOT_D >= 0:
            tl.debug_barrier()  # its windows take the places of the others
            dot(
                b, block, x, grad, weight, base, dots, windows,
                samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
            )  # fmt: skip
