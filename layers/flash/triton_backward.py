"""The GPU kernels of the backward pass, in Triton: every row of the gradient is written once, by one program.

``dot`` and ``scatter`` of ``layers/flash/reference.py``. The samples of one feature are sorted by cell
(``sort_kernel``), and the rows of the gradient are cut into tiles: the samples that reach a tile lie next to each other.

With many outputs, ``walk_kernel`` goes through the sorted samples with ``k + 1`` rows of sums and of weights in
registers. With few, ``tile_kernel`` makes a tile from a short sum of small matrix products, basis values (rows, samples)
times gradients (samples, outputs); on a coarse grid, ``rows_kernel`` does the same with all samples and nothing is
sorted. ``dot`` is then a gather, as in the forward pass. Programs of different kinds share a launch, so that they run
side by side: those of the tiles with those that gather.

No atomics, no zero-fill, nothing that changes from run to run. A derivative of -1 leaves that half out.
Launches: ``layers/flash/gpu.py``. ``CT`` is the dtype of all sums, float64 or float32, whatever that of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, cardinal, locate, silu, spread


@triton.jit
def _few_dot(
    pid, x, grad, weight, base, dots, first_rows, values,
    samples, features, outputs, size, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """dots[b, i] for one sample and BI features, by way of first_rows (B, I) and values (k + 2, B, I)."""
    parts = tl.cdiv(features, BI)
    b = (pid // parts).to(tl.int64)
    i = (pid % parts) * BI + tl.arange(0, BI)
    here = i < features
    at = b * features + i
    plane = tl.cast(features, tl.int64) * samples
    xv = tl.load(x + at, mask=here, other=0.0).to(CT)
    cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
    d0, d1, d2, d3, d4, d5 = basis(f, inv_h, ORDER, D)
    first = tl.minimum(tl.maximum(cell, 0), size - 1)
    tl.store(first_rows + at, first, mask=here)
    for r in tl.static_range(ORDER + 1):
        tl.store(values + r * plane + at, spread(first + r - cell, d0, d1, d2, d3, d4, d5, ORDER), mask=here)
    if BASE:
        tl.store(values + (ORDER + 1) * plane + at, silu(xv, D), mask=here)
    tl.debug_barrier()
    o = tl.arange(0, BO)
    mask = (o < outputs)[None, :] & here[:, None]
    g = tl.load(grad + b * outputs + o, mask=o < outputs, other=0.0).to(CT)
    one_feature = (size + ORDER) * outputs
    rows = weight + i.to(tl.int64) * one_feature + tl.load(first_rows + at, mask=here, other=0) * outputs
    rows = rows[:, None] + o[None, :]
    mix = tl.zeros((BI, BO), CT)
    for r in tl.static_range(ORDER + 1):
        d = tl.load(values + r * plane + at, mask=here, other=0.0)
        mix += d[:, None] * tl.load(rows + r * outputs, mask=mask, other=0.0).to(CT)
    if BASE:
        act = tl.load(values + (ORDER + 1) * plane + at, mask=here, other=0.0)
        mix += act[:, None] * tl.load(base + i[:, None] * outputs + o[None, :], mask=mask, other=0.0).to(CT)
    tl.store(dots + at, tl.sum(mix * g[None, :], axis=1).to(dots.dtype.element_ty), mask=here)


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
def _few_base(
    pid, x, scale, grad, base_gradient, samples, features, outputs,
    D: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """base_gradient[i, o] for BM features and all outputs: the sum over samples of ``silu(x) * grad``."""
    i = pid * BM + tl.arange(0, BM)
    o = tl.arange(0, BN)
    ok = i < features
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, samples, BS):
        b = first + tl.arange(0, BS)
        here = b < samples
        act = silu(_transposed(x, b, i, here, ok, features), D)
        if SCALED:
            act *= _transposed(scale, b, i, here, ok, features)
        acc = tl.dot(act, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
    to = i.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(base_gradient + to, acc.to(base_gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])


@triton.jit(do_not_specialize=["samples", "features", "size", "bases", "row_programs"])
def rows_kernel(
    x, scale, grad, weight, base, first_rows, values, dots, gradient, base_gradient,
    samples, features, outputs, size, bases, row_programs,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Few outputs, few rows: ``bases`` programs of ``_few_base``, then BM of all I * R rows each, then ``_few_dot``."""
    pid = tl.program_id(0)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if SCATTER_D >= 0 and pid < bases:
        _few_base(
            pid, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, BM, BS, BN,
        )  # fmt: skip
    elif SCATTER_D >= 0 and pid < bases + row_programs:
        row = (pid - bases) * BM + tl.arange(0, BM)
        i = row // (size + ORDER)
        ok = i < features
        o = tl.arange(0, BN)
        centre = (row - i * (size + ORDER)).to(tl.float32)[:, None] + 0.5 * (1 - ORDER)
        acc = tl.zeros((BM, BN), tl.float32)
        for first in range(0, samples, BS):
            b = first + tl.arange(0, BS)
            here = b < samples
            u = (_transposed(x, b, i, here, ok, features) - lo) * inv_h
            a = cardinal(u - centre, inv_h, ORDER, SCATTER_D)
            if SCALED:
                a *= _transposed(scale, b, i, here, ok, features)
            acc = tl.dot(a, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
        to = row.to(tl.int64)[:, None] * outputs + o[None, :]
        tl.store(gradient + to, acc.to(gradient.dtype.element_ty), mask=ok[:, None] & (o < outputs)[None, :])
    elif DOT_D >= 0:
        _few_dot(
            pid - bases - row_programs, x, grad, weight, base, dots, first_rows, values,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip


@triton.jit
def _place(
    key, here, at, x, places, slopes, samples, features, i, lo, inv_h,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """places[i, at]: where in their cells the samples behind sorted keys lie; slopes[i, at]: SiLU's derivative."""
    n = (key & (2**BITS - 1)).to(tl.int64)
    xv = tl.load(x + n * features + i, mask=here, other=0.0).to(CT)
    f = (xv - lo) * inv_h - ((key >> BITS).to(tl.int32) - (ORDER + 1)).to(CT)
    tl.store(places + i * samples + at, tl.where(tl.abs(f) > 2, 0.0, f), mask=here)
    if SLOPES:
        tl.store(slopes + i * samples + at, silu(xv, DOT_D), mask=here)


@triton.jit(do_not_specialize=["samples", "features", "size", "step", "tiles", "sorters"])
def sort_kernel(
    x, scale, grad, keys, places, slopes, acts, bounds, base_gradient,
    samples, features, outputs, size, step, tiles, sorters,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, FEW: tl.constexpr, ACTS: tl.constexpr, SORT: tl.constexpr, NB: tl.constexpr,
    BITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """keys[i]: the samples of feature ``i`` in order of their cells, as ``(cell + k + 1) << BITS | sample``.

    Behind them places and slopes (see ``_place``) and bounds[i]: for each tile of ``step`` rows the first key whose
    cell reaches it (or owns it) and the first beyond. Without SORT only the keys are made, in the order of the samples.
    With ACTS also acts[i, b], SiLU's value times the scale. With FEW the first ``sorters`` programs do all this, the
    others are those of ``_few_base``, and slopes are left out.
    """
    pid = tl.program_id(0)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if pid < sorters:
        blocks = tl.cdiv(samples, NB)
        i = (pid // blocks).to(tl.int64)
        n = (pid % blocks) * NB + tl.arange(0, NB)
        here = n < samples
        at = n.to(tl.int64) * features + i
        xv = tl.load(x + at, mask=here, other=0.0).to(CT)
        cell, _ = locate(xv, lo, hi, inv_h, size, ORDER)
        if ACTS:
            act = silu(xv, SCATTER_D)
            if SCALED:
                act *= tl.load(scale + at, mask=here, other=0.0).to(CT)
            tl.store(acts + i * samples + n, act, mask=here)
        key = ((cell + ORDER + 1).to(keys.dtype.element_ty) << BITS) | n
        if SORT:
            key = tl.sort(tl.where(here, key, key * 0 + (2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1)))
            _place(
                key, here, n, x, places, slopes, samples, features, i, lo, inv_h,
                ORDER, DOT_D, CT, BASE and DOT_D >= 0 and not FEW, BITS,
            )  # fmt: skip
            cell = tl.where(here, cell, size + ORDER + 1)
            for first in range(0, tiles, 16):
                t = first + tl.arange(0, 16)
                reach = tl.where(t == 0, -ORDER - 1, t * step - (ORDER if SCATTER_D >= 0 else 0))
                beyond = tl.where(t == tiles - 1, size + ORDER + 1, (t + 1) * step)
                before = tl.sum((cell[:, None] < reach[None, :]).to(tl.int32), axis=0)
                until = tl.sum((cell[:, None] < beyond[None, :]).to(tl.int32), axis=0)
                tl.store(bounds + i * 2 * tiles + t, before, mask=t < tiles)
                tl.store(bounds + i * 2 * tiles + tiles + t, until, mask=t < tiles)
        tl.store(keys + i * samples + n, key, mask=here)
    elif FEW:
        _few_base(
            pid - sorters, x, scale, grad, base_gradient, samples, features, outputs,
            SCATTER_D, SCALED, PRECISION, BM, BS, BN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "features"])
def place_kernel(
    x, keys, places, slopes,
    samples, features,
    lo: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, SLOPES: tl.constexpr, BITS: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """``places`` and ``slopes`` for keys that were sorted elsewhere."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BN + tl.arange(0, BN)
    here = at < samples
    key = tl.load(keys + i * samples + at, mask=here, other=0)
    _place(
        key, here, at, x, places, slopes, samples, features, i, tl.full([], lo, CT), tl.full([], inv_h, CT),
        ORDER, DOT_D, CT, SLOPES, BITS,
    )  # fmt: skip


@triton.jit
def _tile(
    pid, grad, scale, keys, places, bounds, gradient,
    samples, features, outputs, size, tiles, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One feature, one tile of BM rows of its gradient, all outputs; float32."""
    i = (pid // tiles).to(tl.int64)
    tile = pid % tiles
    r = tl.arange(0, BM)
    o = tl.arange(0, BN)
    start = tl.load(bounds + i * 2 * tiles + tile)
    end = tl.load(bounds + i * 2 * tiles + tiles + tile)
    keys += i * samples
    places += i * samples
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(start, end, BS):
        j = first + tl.arange(0, BS)
        here = j < end
        key = tl.load(keys + j, mask=here, other=0)
        f = tl.load(places + j, mask=here, other=0.0)
        b = (key & (2**BITS - 1)).to(tl.int32)
        # The difference of whole numbers first: it is exact, whatever G is.
        behind = (key >> BITS).to(tl.int32) - (ORDER + 1 + tile * BM)
        t = (behind[None, :] - r[:, None]).to(tl.float32) + (f - 0.5 * (1 - ORDER))[None, :]
        a = cardinal(t, inv_h, ORDER, D)
        if SCALED:
            s = tl.load(scale + b.to(tl.int64) * features + i, mask=here, other=0.0).to(tl.float32)
            a *= s[None, :]
        acc = tl.dot(a, _grads(grad, b, o, here, outputs), acc, input_precision=PRECISION)
    rows = size + ORDER
    gradient += (i * rows + tile * BM) * outputs
    there = (r < rows - tile * BM)[:, None] & (o < outputs)[None, :]
    tl.store(gradient + (r[:, None] * outputs + o[None, :]), acc.to(gradient.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["samples", "features", "size", "tiles", "tile_programs"])
def tile_kernel(
    x, scale, grad, weight, base, keys, places, bounds, first_rows, values, dots, gradient,
    samples, features, outputs, size, tiles, tile_programs,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Few outputs, many rows: ``tile_programs`` programs of ``_tile``, then those of ``_few_dot``."""
    pid = tl.program_id(0)
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if pid < tile_programs:
        _tile(
            pid, grad, scale, keys, places, bounds, gradient, samples, features, outputs, size, tiles, inv_h,
            ORDER, SCATTER_D, SCALED, BITS, PRECISION, BM, BS, BN,
        )  # fmt: skip
    elif DOT_D >= 0:
        _few_dot(
            pid - tile_programs, x, grad, weight, base, dots, first_rows, values,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip


@triton.jit
def _row(weight, row, o, inside, rows, outputs, CT: tl.constexpr):
    there = inside & (row >= 0) & (row < rows)
    # Read once, as gradients are written once: the cache is for grad, which every feature reads again.
    return tl.load(weight + row * outputs + o, mask=there, other=0.0, eviction_policy="evict_first").to(CT)


@triton.jit
def _grad(grad, key, o, inside, outputs, CT: tl.constexpr, BITS: tl.constexpr):
    n = (key & (2**BITS - 1)).to(tl.int64)
    return tl.load(grad + n * outputs + o, mask=inside, other=0.0).to(CT)


@triton.jit
def _outside(
    j, end, before, keys, slopes, grad, wb, dots, o, inside, features, outputs,
    ORDER: tl.constexpr, DOT_D: tl.constexpr, CT: tl.constexpr, BASE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Samples that meet no row, from ``j`` on, of cells below ``before``: only the base answers. The next ``j``."""
    key = tl.load(keys + j, mask=j < end, other=0)
    while (j < end) & ((key >> BITS).to(tl.int32) - (ORDER + 1) < before):
        if DOT_D >= 0:
            total = tl.full([], 0.0, CT)
            if BASE:
                total += tl.load(slopes + j) * tl.sum(wb * _grad(grad, key, o, inside, outputs, CT, BITS), axis=0)
            tl.store(dots + (key & (2**BITS - 1)).to(tl.int64) * features, total.to(dots.dtype.element_ty))
        j += 1
        key = tl.load(keys + j, mask=j < end, other=0)
    return j


@triton.jit(do_not_specialize=["samples", "features", "size", "step", "tiles"])
def walk_kernel(
    grad, scale, weight, base, keys, places, slopes, bounds, dots, gradient,
    samples, features, outputs, size, step, tiles,
    inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr, BO: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One feature, one tile of ``step`` rows of its gradient, one block of outputs: cell by cell, sample by sample.

    ``dots`` has a leading dimension for the blocks of outputs; WHOLE: BO divides the outputs. The loop over cells is
    unrolled ``k + 1`` times: then a window that moves on by a row is a matter of names, and no register is copied.
    """
    i = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    block = tl.program_id(2)
    inv_h = tl.full([], inv_h, CT)
    o = block * BO + tl.arange(0, BO)
    inside = (o >= 0) if WHOLE else (o < outputs)
    rows = size + ORDER
    first = tile * step
    stop = tl.minimum(first + step, rows)
    weight += i * rows * outputs
    gradient += i * rows * outputs
    keys += i * samples
    places += i * samples
    slopes += i * samples
    dots += block.to(tl.int64) * samples * features + i
    j = tl.load(bounds + i * 2 * tiles + tile)
    end = tl.load(bounds + i * 2 * tiles + tiles + tile)
    MASK: tl.constexpr = 2**BITS - 1
    NONE: tl.constexpr = 2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1  # a cell that does not exist
    SLOPES: tl.constexpr = BASE and DOT_D >= 0

    nil = tl.zeros((BO,), CT)
    a0, a1, a2, a3, a4, a5 = nil, nil, nil, nil, nil, nil
    w0, w1, w2, w3, w4, w5 = nil, nil, nil, nil, nil, nil
    ahead, wb = nil, nil
    c = first - ORDER  # a0 and w0 belong to row c
    if SLOPES:
        wb = tl.load(base + i * outputs + o, mask=inside, other=0.0).to(CT)
    if tile == 0:
        j = _outside(
            j, end, -ORDER, keys, slopes, grad, wb, dots, o, inside, features, outputs, ORDER, DOT_D, CT, BASE, BITS
        )
    if DOT_D >= 0:
        w0 = _row(weight, c, o, inside, rows, outputs, CT)
        if ORDER >= 1:
            w1 = _row(weight, c + 1, o, inside, rows, outputs, CT)
        if ORDER >= 2:
            w2 = _row(weight, c + 2, o, inside, rows, outputs, CT)
        if ORDER >= 3:
            w3 = _row(weight, c + 3, o, inside, rows, outputs, CT)
        if ORDER >= 4:
            w4 = _row(weight, c + 4, o, inside, rows, outputs, CT)
        if ORDER >= 5:
            w5 = _row(weight, c + 5, o, inside, rows, outputs, CT)
        ahead = _row(weight, c + ORDER + 1, o, inside, rows, outputs, CT)
    # One sample ahead, and of its key two: on their way while a sample is worked on.
    key = tl.load(keys + j, mask=j < end, other=NONE)
    key_next = tl.load(keys + j + 1, mask=j + 1 < end, other=NONE)
    f = tl.load(places + j, mask=j < end, other=0.0)
    slope = tl.load(slopes + j, mask=j < end, other=0.0) if SLOPES else f
    g = _grad(grad, tl.where(j < end, key, 0), o, inside, outputs, CT, BITS)
    while c < stop:
        for _ in tl.static_range(ORDER + 1):
            own = (c >= first) | (tile == 0)
            while (key >> BITS).to(tl.int32) - (ORDER + 1) == c:
                more = j + 1 < end
                g_next = _grad(grad, tl.where(more, key_next, 0), o, inside, outputs, CT, BITS)
                f_next = tl.load(places + j + 1, mask=more, other=0.0)
                slope_next = tl.load(slopes + j + 1, mask=more, other=0.0) if SLOPES else f_next
                key_after = tl.load(keys + j + 2, mask=j + 2 < end, other=NONE)
                if DOT_D >= 0:
                    d0, d1, d2, d3, d4, d5 = basis(f, inv_h, ORDER, DOT_D)
                    mix = d0 * w0
                    if ORDER >= 1:
                        mix += d1 * w1
                    if ORDER >= 2:
                        mix += d2 * w2
                    if ORDER >= 3:
                        mix += d3 * w3
                    if ORDER >= 4:
                        mix += d4 * w4
                    if ORDER >= 5:
                        mix += d5 * w5
                    if BASE:
                        mix += slope * wb
                    to = dots + (key & MASK).to(tl.int64) * features
                    tl.store(to, tl.sum(mix * g, axis=0).to(dots.dtype.element_ty), mask=own)
                if SCATTER_D >= 0:
                    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, SCATTER_D)
                    if SCALED:
                        g *= tl.load(scale + (key & MASK).to(tl.int64) * features + i).to(CT)
                    a0 += v0 * g
                    if ORDER >= 1:
                        a1 += v1 * g
                    if ORDER >= 2:
                        a2 += v2 * g
                    if ORDER >= 3:
                        a3 += v3 * g
                    if ORDER >= 4:
                        a4 += v4 * g
                    if ORDER >= 5:
                        a5 += v5 * g
                j += 1
                g, f, slope, key, key_next = g_next, f_next, slope_next, key_next, key_after
            if SCATTER_D >= 0:
                there = inside & (c >= first) & (c < stop)
                row = a0.to(gradient.dtype.element_ty)
                tl.store(gradient + c * outputs + o, row, mask=there, eviction_policy="evict_first")
                a0, a1, a2, a3, a4, a5 = (
                    a1 if ORDER >= 1 else nil,
                    a2 if ORDER >= 2 else nil,
                    a3 if ORDER >= 3 else nil,
                    a4 if ORDER >= 4 else nil,
                    a5 if ORDER >= 5 else nil,
                    nil,
                )
            c += 1
            if DOT_D >= 0:
                w0, w1, w2, w3, w4, w5 = (
                    w1 if ORDER >= 1 else ahead,
                    w2 if ORDER >= 2 else ahead,
                    w3 if ORDER >= 3 else ahead,
                    w4 if ORDER >= 4 else ahead,
                    w5 if ORDER >= 5 else ahead,
                    ahead,
                )
                ahead = _row(weight, c + ORDER + 1, o, inside, rows, outputs, CT)
    if DOT_D >= 0:
        if tile == tiles - 1:
            _outside(
                j, end, size + 2 * ORDER + 2, keys, slopes, grad, wb, dots, o, inside, features, outputs,
                ORDER, DOT_D, CT, BASE, BITS,
            )  # fmt: skip
