"""The backward kernels for many outputs, in Triton: a walk through the sorted samples of each feature (``triton_sort.py``).

A warp spreads over the outputs and holds ``k + 1`` rows of sums and of weights in registers: every row of the gradient is
written by one program, without atomics or a zero-fill. Walks are cut into stretches of equal length, wherever the samples
are; what one adds to rows of the next is added at the end, in order, so that nothing changes from run to run. A derivative
of -1 leaves that half out.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_walk.py``. ``CT`` is the dtype of all sums,
float64 or float32, whatever the dtype of the weights.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, value


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
def _first_row(t, each, cut, size, ORDER: tl.constexpr):
    """The row where stretch ``t`` begins, which is also the cell of its first window: steps without samples are cells."""
    return tl.minimum(t * each - cut - (ORDER + 1), size + ORDER)


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "stretches"])
def walk_kernel(
    grad, scale, weight, base, keys, places, slopes, cuts, dots, gradient, carries,
    samples, features, outputs, size, each, stretches,
    inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr, BO: tl.constexpr, WHOLE: tl.constexpr,
    FAR: tl.constexpr,
):  # fmt: skip
    """One feature, one stretch of its walk (see ``arrange_kernel``), one block of outputs: cell by cell, sample by sample.

    A stretch writes the rows from its first to the next one's; what its samples add to the ``k + 1`` rows behind these
    is its carry (stretches - 1, I, k + 1, O). ``dots`` has one for the blocks of outputs; WHOLE: BO divides the outputs.
    The loop over cells is unrolled ``k + 1`` times: then a window that moves on by a row is a matter of names, and no
    register is copied. FAR: weights are read two rows ahead, not one.
    """
    i = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    block = tl.program_id(2)
    inv_h = tl.full([], inv_h, CT)
    o = block * BO + tl.arange(0, BO)
    inside = (o >= 0) if WHOLE else (o < outputs)
    rows = size + ORDER
    cuts += i * (stretches + 1) + stretch
    j = tl.load(cuts)
    end = tl.load(cuts + 1)
    c = _first_row(stretch, each, j, size, ORDER)  # a0 and w0 belong to row c
    stop = _first_row(stretch + 1, each, end, size, ORDER)
    carried = (SCATTER_D >= 0) & (stretch + 1 < stretches)
    weight += i * rows * outputs
    gradient += i * rows * outputs
    carries += ((stretch.to(tl.int64) * features + i) * (ORDER + 1) - stop) * outputs
    keys += i * samples
    places += i * samples
    slopes += i * samples
    dots += block.to(tl.int64) * samples * features + i
    MASK: tl.constexpr = 2**BITS - 1
    NONE: tl.constexpr = 2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1  # a cell that does not exist
    SLOPES: tl.constexpr = BASE and DOT_D >= 0

    nil = tl.zeros((BO,), CT)
    a0, a1, a2, a3, a4, a5 = nil, nil, nil, nil, nil, nil
    w0, w1, w2, w3, w4, w5 = nil, nil, nil, nil, nil, nil
    ahead, far, wb = nil, nil, nil
    if SLOPES:
        wb = tl.load(base + i * outputs + o, mask=inside, other=0.0).to(CT)
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
        if FAR:
            far = _row(weight, c + ORDER + 2, o, inside, rows, outputs, CT)
    # One sample ahead, and of its key two: on their way while a sample is worked on.
    key = tl.load(keys + j, mask=j < end, other=NONE)
    key_next = tl.load(keys + j + 1, mask=j + 1 < end, other=NONE)
    f = tl.load(places + j, mask=j < end, other=0.0)
    slope = tl.load(slopes + j, mask=j < end, other=0.0) if SLOPES else f
    g = _grad(grad, tl.where(j < end, key, 0), o, inside, outputs, CT, BITS)
    beyond = stop + tl.where(carried, ORDER + 1, 0)  # of the rows that are written
    while (c <= stop) | (c < beyond):  # a sample's window begins at ``stop`` at the latest
        for _ in tl.static_range(ORDER + 1):
            while (key >> BITS).to(tl.int32) - (ORDER + 1) == c:
                more = j + 1 < end
                g_next = _grad(grad, tl.where(more, key_next, 0), o, inside, outputs, CT, BITS)
                f_next = tl.load(places + j + 1, mask=more, other=0.0)
                slope_next = tl.load(slopes + j + 1, mask=more, other=0.0) if SLOPES else f_next
                key_after = tl.load(keys + j + 2, mask=j + 2 < end, other=NONE)
                if DOT_D >= 0:
                    d0, d1, d2, d3, d4, d5 = basis(f, inv_h, ORDER, DOT_D)
                    mix = d0 * w0
                    for r in tl.static_range(1, ORDER + 1):
                        mix += value(r, d0, d1, d2, d3, d4, d5) * value(r, w0, w1, w2, w3, w4, w5)
                    if BASE:
                        mix += slope * wb
                    to = dots + (key & MASK).to(tl.int64) * features
                    tl.store(to, tl.sum(mix * g, axis=0).to(dots.dtype.element_ty))
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
                row = tl.where(c < stop, gradient, carries) + c * outputs + o
                there = inside & (c >= 0) & (c < beyond)
                tl.store(row, a0.to(gradient.dtype.element_ty), mask=there, eviction_policy="evict_first")
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
                if FAR:
                    ahead, far = far, _row(weight, c + ORDER + 2, o, inside, rows, outputs, CT)
                else:
                    ahead = _row(weight, c + ORDER + 1, o, inside, rows, outputs, CT)


@triton.jit(do_not_specialize=["features", "size", "each", "stretches"])
def carry_kernel(
    cuts, carries, gradient,
    features, outputs, size, each, stretches,
    ORDER: tl.constexpr, CT: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Adds the carries of a feature's stretches to its gradient, in their order."""
    i = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    rows = size + ORDER
    cuts += i * (stretches + 1)
    gradient += i * rows * outputs + o
    carries += i * (ORDER + 1) * outputs + o
    for stretch in range(1, stretches):
        first = _first_row(stretch, each, tl.load(cuts + stretch), size, ORDER)
        for r in tl.static_range(ORDER + 1):
            row = first + r
            there = (o < outputs) & (row >= 0) & (row < rows)
            more = tl.load(carries + r * outputs, mask=there, other=0.0)
            total = tl.load(gradient + row * outputs, mask=there, other=0.0).to(CT) + more.to(CT)
            tl.store(gradient + row * outputs, total.to(gradient.dtype.element_ty), mask=there)
        carries += tl.cast(features, tl.int64) * (ORDER + 1) * outputs
