"""The backward kernels for many outputs, in Triton: a walk through the sorted samples of each feature (``triton_sort.py``).

A warp spreads over the outputs, or each half of it does with a sample of its own, and holds ``k + 1`` rows of sums and of
weights in registers: every row of the gradient is written by one program, without atomics or a zero-fill. Walks are cut into
stretches of equal length, wherever the samples are; what one adds to rows of the next is added at the end, in order, so that
nothing changes from run to run. A derivative of -1 leaves that half out.

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
def _fetch(weight, row, o, outputs):
    """Asks for numbers of a row, one for every 32 bytes, to be brought from memory to the cache; needs no registers."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [weight + row * outputs + tl.minimum(o, outputs - 1)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _share(w, g, FOLD: tl.constexpr):
    """What each of 32 threads adds to the product of ``w`` and ``g``; with FOLD 0, ``w`` itself.

    FOLD: how many neighbours a thread holds; a wrong number is as right, but they would have to be passed around.
    """
    if FOLD:
        units = tl.permute(tl.reshape(w * g, [w.shape[0] // (32 * FOLD), 32, FOLD]), (1, 0, 2))
        w = tl.sum(tl.reshape(units, [32, w.shape[0] // 32]), axis=1)
    return w


@triton.jit
def _halves(v):
    """Of two samples, in two halves of a warp, the numbers (parts of the outputs, 2, PART)."""
    return tl.reshape(v, [v.shape[0] // 2, 2, v.shape[1]])


@triton.jit
def _finish(dots, to, share, TWO: tl.constexpr):
    if TWO:
        total = tl.sum(tl.sum(_halves(share), axis=0, keep_dims=True), axis=2, keep_dims=True)
        total = tl.reshape(tl.broadcast_to(total, [share.shape[0] // 2, 2, 1]), [share.shape[0], 1])
    else:
        total = tl.sum(share, axis=0)
    tl.store(dots + to, total.to(dots.dtype.element_ty), mask=to >= 0)


@triton.jit
def _both(v):
    """The sum over two samples, in both halves of a warp."""
    halves = _halves(v)
    return tl.reshape(tl.broadcast_to(tl.sum(halves, axis=1, keep_dims=True), halves.shape), v.shape)


@triton.jit
def _moved(a0, a1, a2, a3, a4, a5, new, N: tl.constexpr):
    """A window of N rows that moves on by one: the first leaves, ``new`` comes in at the end."""
    return (
        a1 if N >= 2 else new,
        a2 if N >= 3 else new,
        a3 if N >= 4 else new,
        a4 if N >= 5 else new,
        a5 if N >= 6 else new,
        new,
    )


@triton.jit
def _grad(grad, key, o, inside, outputs, CT: tl.constexpr, BITS: tl.constexpr):
    n = (key & (2**BITS - 1)).to(tl.int64)
    return tl.load(grad + n * outputs + o, mask=inside, other=0.0).to(CT)


@triton.jit
def _each(half, first, second, TWO: tl.constexpr):
    """With TWO what belongs to the sample that a thread works on, the first or the second; else to the only one."""
    return tl.where(half == 0, first, second) if TWO else first


@triton.jit
def _of_two(numbers, j, end, TWO: tl.constexpr):
    """The numbers of the samples j and j + 1; without TWO the latter is not looked up."""
    first = tl.load(numbers + j, mask=j < end, other=0.0)
    return first, tl.load(numbers + j + 1, mask=j + 1 < end, other=0.0) if TWO else first


@triton.jit
def _first_row(t, each, cut, size, ORDER: tl.constexpr):
    """The row where stretch ``t`` begins, which is also the cell of its first window: steps without samples are cells."""
    return tl.minimum(t * each - cut - (ORDER + 1), size + ORDER)


@triton.jit(do_not_specialize=["samples", "features", "size", "each", "stretches"])
def walk_kernel(
    grad, scale, weight, base, keys, places, slopes, cuts, dots, gradient, carries,
    samples, features, units, size, each, stretches,
    inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, BO: tl.constexpr, WHOLE: tl.constexpr,
    APART: tl.constexpr, FAR: tl.constexpr, FETCH: tl.constexpr, FOLD: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    """One feature, one stretch of its walk (see ``rank_kernel``), one block of outputs: cell by cell, sample by sample.
    There are ``units`` of UNIT outputs.

    A stretch writes the rows from its first to the next one's; what its samples add to the ``k + 1`` rows behind these
    is its carry (stretches - 1, I, k + 1, O). APART: ``carries`` are wider than ``gradient``, and behind them lie as many
    rows more: the first ``k + 1`` of each stretch but the first, which carries are added to before they are rounded.
    ``dots`` has one for the blocks of outputs. WHOLE: BO divides the outputs. The loop over cells is unrolled ``k + 1``
    times: then a window that moves on by a row is a matter of names, and no register is copied. FAR: weights are read two
    rows ahead, not one; FETCH: into the cache, as many rows ahead (or 0); FOLD: see ``_share``.

    TWO: two samples of a cell are worked on at a time, each by half of the threads, which hold twice as many outputs; tensors
    are (2 BO / PART, PART), halves before parts, and sums of both halves are added when a row leaves.
    """
    outputs = units * UNIT
    i = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1)
    block = tl.program_id(2)
    inv_h = tl.full([], inv_h, CT)
    PART: tl.constexpr = BO if BO < 64 else 64
    half, part, o = 0, 0, block * BO + tl.arange(0, BO)
    if TWO:
        half, part = tl.arange(0, 2 * BO // PART)[:, None] % 2, tl.arange(0, 2 * BO // PART)[:, None] // 2
        o = block * BO + part * PART + tl.arange(0, PART)[None, :]
    inside = (o >= 0) if WHOLE else (o < outputs)
    SECTOR: tl.constexpr = 256 // weight.dtype.element_ty.primitive_bitwidth  # numbers in 32 bytes
    lines = block * BO + tl.arange(0, BO // SECTOR if BO > SECTOR else 1) * SECTOR
    rows = size + ORDER
    cuts += i * (stretches + 1) + stretch
    j = tl.load(cuts)
    end = tl.load(cuts + 1)
    c = _first_row(stretch, each, j, size, ORDER)  # a0 and w0 belong to row c
    stop = _first_row(stretch + 1, each, end, size, ORDER)
    carried = (SCATTER_D >= 0) & (stretch + 1 < stretches)
    weight += i * rows * outputs
    gradient += i * rows * outputs
    if APART:
        opened = tl.where(stretch > 0, c + ORDER + 1, c)
        before = (stretches - 2 + stretch).to(tl.int64)  # carries, and what stretches before leave behind them
        heads = carries + ((before * features + i) * (ORDER + 1) - c) * outputs
    carries += ((stretch.to(tl.int64) * features + i) * (ORDER + 1) - stop) * outputs
    keys += i * samples
    places += i * samples
    slopes += i * samples
    dots += block.to(tl.int64) * samples * features + i
    MASK: tl.constexpr = 2**BITS - 1
    NONE: tl.constexpr = 2 ** (keys.dtype.element_ty.primitive_bitwidth - 1) - 1  # a cell that does not exist
    SLOPES: tl.constexpr = BASE and DOT_D >= 0

    # A derivative: values of one degree less times differences of rows (de Boor 1978, X.(12)), a row less to hold.
    DIFFER: tl.constexpr = DOT_D >= 1 and ORDER >= 1
    HELD: tl.constexpr = ORDER if DIFFER else ORDER + 1

    nil = tl.zeros((2 * BO // PART, PART) if TWO else (BO,), CT)
    a0, a1, a2, a3, a4, a5 = nil, nil, nil, nil, nil, nil
    w0, w1, w2, w3, w4, w5 = nil, nil, nil, nil, nil, nil
    last, ahead, far, wb = nil, nil, nil, nil
    if SLOPES:
        wb = tl.load(base + i * outputs + o, mask=inside, other=0.0).to(CT)
    if DOT_D >= 0:
        for r in tl.static_range(ORDER + 1):
            ahead = _row(weight, c + r, o, inside, rows, outputs, CT)
            w0, w1, w2, w3, w4, w5 = _moved(w0, w1, w2, w3, w4, w5, ahead - last if DIFFER else ahead, HELD)
            last = ahead
        ahead = _row(weight, c + ORDER + 1, o, inside, rows, outputs, CT)
        if FAR:
            far = _row(weight, c + ORDER + 2, o, inside, rows, outputs, CT)
    # One sample ahead, or two, and of their keys as many more: on their way while those before are worked on.
    key, key1 = tl.load(keys + j, mask=j < end, other=NONE), tl.load(keys + j + 1, mask=j + 1 < end, other=NONE)
    key2, key3 = key1, key1
    if TWO:
        key2 = tl.load(keys + j + 2, mask=j + 2 < end, other=NONE)
        key3 = tl.load(keys + j + 3, mask=j + 3 < end, other=NONE)
    f0, f1 = _of_two(places, j, end, TWO)
    slope0, slope1 = _of_two(slopes, j, end, TWO) if SLOPES else (f0, f1)
    g = _grad(grad, tl.where(j + half < end, _each(half, key, key1, TWO), 0), o, inside, outputs, CT, BITS)
    # Of the sample before: its sum over the threads waits for all of them, best while there is something else to do.
    share, to = _share(nil, nil, FOLD), tl.full([2 * BO // PART, 1] if TWO else [], -1, tl.int64)
    beyond = stop + tl.where(carried, ORDER + 1, 0)  # of the rows that are written
    while (c <= stop) | (c < beyond):  # a sample's window begins at ``stop`` at the latest
        for _ in tl.static_range(ORDER + 1):
            while (key >> BITS).to(tl.int32) - (ORDER + 1) == c:
                n = (_each(half, key, key1, TWO) & MASK).to(tl.int64)
                f, slope = _each(half, f0, f1, TWO), _each(half, slope0, slope1, TWO)
                after, next0, next1, there = j + 1, key1, key1, tl.full([], True, tl.int1)
                if TWO:  # or one, where the next one is in another cell: then that will be the first of two
                    both = key1 >> BITS == key >> BITS
                    after = tl.where(both, j + 2, after)
                    next0, next1 = tl.where(both, key2, key1), tl.where(both, key3, key2)
                    there = (half == 0) | both
                    g = tl.where(there, g, 0.0)
                next_keys = tl.where(after + half < end, _each(half, next0, next1, TWO), 0)
                g_next = _grad(grad, next_keys, o, inside, outputs, CT, BITS)
                f0, f1 = _of_two(places, after, end, TWO)
                if SLOPES:
                    slope0, slope1 = _of_two(slopes, after, end, TWO)
                if TWO:
                    key2 = tl.load(keys + after + 2, mask=after + 2 < end, other=NONE)
                    key3 = tl.load(keys + after + 3, mask=after + 3 < end, other=NONE)
                else:
                    next1 = tl.load(keys + after + 1, mask=after + 1 < end, other=NONE)
                if DOT_D >= 0:
                    if FOLD:
                        _finish(dots, to, share, TWO)
                    d0, d1, d2, d3, d4, d5 = basis(f, inv_h, HELD - 1, DOT_D - 1 if DIFFER else DOT_D)
                    mix = (d0 * inv_h if DIFFER else d0) * _share(w0, g, FOLD)
                    for r in tl.static_range(1, HELD):
                        d = value(r, d0, d1, d2, d3, d4, d5)
                        mix += (d * inv_h if DIFFER else d) * _share(value(r, w0, w1, w2, w3, w4, w5), g, FOLD)
                    if BASE:
                        mix += slope * _share(wb, g, FOLD)
                    share = mix if FOLD else mix * g
                    to = tl.where(there & (part == 0), n * features, -1)
                    if not FOLD:
                        _finish(dots, to, share, TWO)
                if SCATTER_D >= 0:
                    v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, SCATTER_D)
                    if SCALED:
                        g *= tl.load(scale + n * features + i, mask=there, other=0.0).to(CT)
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
                j, g, key, key1 = after, g_next, next0, next1
            if SCATTER_D >= 0:
                row, written = c * outputs + o, inside & (c >= 0) & (c < beyond)
                if TWO:
                    a0, written = _both(a0), written & (half == 0)
                sums = a0.to(gradient.dtype.element_ty)
                if APART:
                    if (c >= opened) & (c < stop):
                        tl.store(gradient + row, sums, mask=written, eviction_policy="evict_first")
                    else:
                        tl.store(tl.where(c < stop, heads, carries) + row, a0, mask=written)
                else:
                    row = tl.where(c < stop, gradient, carries) + row
                    tl.store(row, sums, mask=written, eviction_policy="evict_first")
                a0, a1, a2, a3, a4, a5 = _moved(a0, a1, a2, a3, a4, a5, nil, ORDER + 1)
            c += 1
            if DOT_D >= 0:
                w0, w1, w2, w3, w4, w5 = _moved(w0, w1, w2, w3, w4, w5, ahead - last if DIFFER else ahead, HELD)
                last = ahead
                if FAR:
                    ahead, far = far, _row(weight, c + ORDER + 2, o, inside, rows, outputs, CT)
                else:
                    ahead = _row(weight, c + ORDER + 1, o, inside, rows, outputs, CT)
                if FETCH:
                    row = tl.minimum(c + ORDER + 1 + FETCH, tl.minimum(stop + ORDER, rows - 1))
                    _fetch(weight, tl.maximum(row, 0), lines, outputs)
    if DOT_D >= 0 and FOLD:
        _finish(dots, to, share, TWO)


@triton.jit(do_not_specialize=["features", "size", "each", "stretches"])
def carry_kernel(
    cuts, carries, gradient,
    features, units, size, each, stretches,
    ORDER: tl.constexpr, CT: tl.constexpr, UNIT: tl.constexpr, APART: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """Adds the carries of a feature's stretches to its gradient: a program one row of a carry, and all that meet it there.

    Where several meet in a row, the program of the last one adds them all, in their order backwards. APART: see
    ``walk_kernel``.
    """
    outputs = units * UNIT
    i = tl.program_id(0).to(tl.int64)
    stretch = tl.program_id(1) + 1
    r = tl.program_id(2) % (ORDER + 1)
    o = tl.program_id(2) // (ORDER + 1) * BO + tl.arange(0, BO)
    rows = size + ORDER
    cuts += i * (stretches + 1)
    gradient += i * rows * outputs + o
    carries += i * (ORDER + 1) * outputs + o
    first = _first_row(stretch, each, tl.load(cuts + stretch), size, ORDER)
    after = _first_row(stretch + 1, each, tl.load(cuts + stretch + 1), size, ORDER)
    row = first + r
    mine = (row >= 0) & (row < rows) & ((stretch + 1 == stretches) | (row < after))
    there = mine & (o < outputs)
    if APART:
        head = ((stretches - 2 + stretch).to(tl.int64) * features * (ORDER + 1) + r) * outputs
        total = tl.load(carries + head, mask=there, other=0.0).to(CT)
    else:
        total = tl.load(gradient + row * outputs, mask=there, other=0.0).to(CT)
    while mine & (stretch > 0) & (row <= first + ORDER):
        of = ((stretch - 1).to(tl.int64) * features * (ORDER + 1) + (row - first)) * outputs
        total += tl.load(carries + of, mask=there, other=0.0).to(CT)
        stretch -= 1
        first = _first_row(stretch, each, tl.load(cuts + stretch), size, ORDER)
    tl.store(gradient + row * outputs, total.to(gradient.dtype.element_ty), mask=there)
