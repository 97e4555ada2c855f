"""The GPU kernel for few outputs and few samples, backward: a feature's gradient is summed up in shared memory.

Nothing is sorted, set to zero or added by atomics in the GPU's memory, where each row is written once. A program takes one
feature or, of many rows, a part of it; each of its warps owns a piece of the rows and goes through the samples whose window
reaches it, one after the other: the threads of a warp hold the ``k + 1`` rows of the window, one or two outputs each. The
samples of one cell, which may be most of them, are dealt out to all warps: each has a window more, for this cell. Every sum
has one owner and one order, so that results are bit-identical from run to run.

Formulas and shapes: ``layers/flash/reference.py``. Launches: ``gpu_few.py``. Sums are in float32.
"""

import triton
import triton.language as tl

from layers.flash.triton_basis import basis, locate, silu, value
from layers.flash.triton_shared import get, get_pair, memory, put, put_pair, threads
from layers.flash.triton_windows import gather


@triton.jit
def _entry(
    room, at, to, values, grad, outputs,
    K: tl.constexpr, PAIRS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Of a sample in a warp's list: where each thread adds, and what."""
    entry = get(room, at, None, tl.int32, INTERPRETED)
    n = entry >> 20
    v = get(room, values + n * (4 * K), None, tl.float32, INTERPRETED)
    to += entry & 0xFFFFF
    if PAIRS:
        both = tl.load(grad[:, None] + (n * outputs)[:, None] + tl.arange(0, 2)[None, :])
        g, h = tl.split(both.to(tl.float32))
        return to, v * g, v * h
    else:
        return to, v * tl.load(grad + n * outputs).to(tl.float32), v


@triton.jit
def _add(room, to, v, w, active, PAIRS: tl.constexpr, INTERPRETED: tl.constexpr):
    if PAIRS:
        a, b = get_pair(room, to, active, INTERPRETED)
        put_pair(room, to, a + v, b + w, active, INTERPRETED)
    else:
        put(room, to, get(room, to, active, tl.float32, INTERPRETED) + v, active, INTERPRETED)


@triton.jit
def _add_list(
    room, at, end, to, values, grad, outputs, active,
    K: tl.constexpr, PAIRS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the samples of each warp's list; four are fetched at a time, as sums have to wait for each other."""
    for _ in range(0, end, 4):
        to0, v0, w0 = _entry(room, at, to, values, grad, outputs, K, PAIRS, INTERPRETED)
        to1, v1, w1 = _entry(room, at + 4, to, values, grad, outputs, K, PAIRS, INTERPRETED)
        to2, v2, w2 = _entry(room, at + 8, to, values, grad, outputs, K, PAIRS, INTERPRETED)
        to3, v3, w3 = _entry(room, at + 12, to, values, grad, outputs, K, PAIRS, INTERPRETED)
        _add(room, to0, v0, w0, active, PAIRS, INTERPRETED)
        _add(room, to1, v1, w1, active, PAIRS, INTERPRETED)
        _add(room, to2, v2, w2, active, PAIRS, INTERPRETED)
        _add(room, to3, v3, w3, active, PAIRS, INTERPRETED)
        at += 16


@triton.jit
def _crowd(x, samples, features, size, lo, hi, inv_h, ORDER: tl.constexpr):
    """The cell of which two of three samples tell that it may hold more than others, else that of the first."""
    one = tl.load(x).to(tl.float32)
    two = tl.load(x + (samples // 2).to(tl.int64) * features).to(tl.float32)
    three = tl.load(x + (samples - 1).to(tl.int64) * features).to(tl.float32)
    cell, _ = locate(tl.where(two == three, two, one), lo, hi, inv_h, size, ORDER)
    return cell


@triton.jit
def _count(counts, number):
    return ((counts >> (number * 12)) & 0xFFF).to(tl.int32)


@triton.jit
def _length(totals, warp, WARPS: tl.constexpr):
    """Of a warp's list: the samples that reach its rows, and its part of the crowd, whose number comes last."""
    return _count(totals, warp) + (_count(totals, WARPS) + WARPS - 1 - warp) // WARPS


@triton.jit
def _reaches(first, crowd, here, warp, height, K: tl.constexpr):
    """Whether a window that is not of the crowd, from row ``first`` on, has one of a warp's rows."""
    return here & (first != crowd) & (first + K > warp * height) & (first < (warp + 1) * height)


@triton.jit
def _piece(height, outputs, K: tl.constexpr):
    """How many numbers a warp has, and where among them the crowd's window lies.

    Before and behind its rows lie K more, for what of a window belongs to others, or to nobody; then the crowd's.
    """
    return (height + 3 * K) * outputs, (height + 2 * K) * outputs


@triton.jit
def _fill_lists(
    room, first, here, crowd, height, outputs, t,
    K: tl.constexpr, CB: tl.constexpr, WARPS: tl.constexpr, SUMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Each warp's list: of the samples whose window, from row ``first`` on, reaches its rows, and of its part of the
    crowd. An entry is the sample's number, and where the first row of its window lies. Returns their length.
    """
    SLOTS: tl.constexpr = CB + 4
    n = tl.arange(0, CB)
    piece, crowds = _piece(height, outputs, K)
    joins = here & (first == crowd) & (crowd + K > 0) & (crowd < WARPS * height)
    # Up to five counts, of 12 bits each, in one running sum.
    reached = joins.to(tl.int64) << 12 * WARPS
    for w in tl.static_range(WARPS):
        reached += _reaches(first, crowd, here, w, height, K).to(tl.int64) << 12 * w
    before, totals = tl.cumsum(reached, axis=0) - reached, tl.sum(reached, axis=0)
    for w in tl.static_range(WARPS):
        entry = (n << 20) + SUMS + 4 * (w * piece + (first - w * height + K) * outputs)
        slot, reaches = w * SLOTS + _count(before, w), _reaches(first, crowd, here, w, height, K)
        put(room, 4 * slot, entry, reaches, INTERPRETED)
    turn = _count(before, WARPS)
    w = turn % WARPS
    entry = (n << 20) + SUMS + 4 * (w * piece + crowds)
    slot = w * SLOTS + _count(totals, w) + turn // WARPS
    put(room, 4 * slot, entry, joins, INTERPRETED)
    end = 0
    for w in tl.static_range(WARPS):
        end = tl.maximum(end, _length(totals, w, WARPS))
    end = tl.cdiv(end, 4) * 4
    # Shorter lists are filled up: the first sample, added where nobody reads.
    warp = t // 32
    length = _length(totals, warp, WARPS)
    entry = SUMS + 4 * warp * piece
    for at in range(0, end, 32):
        place = at + t % 32
        free = (place >= length) & (place < end)
        put(room, 4 * (warp * SLOTS + place), entry, free, INTERPRETED)
    return end


@triton.jit
def _add_crowd(
    room, crowd, height, outputs, t,
    K: tl.constexpr, WARPS: tl.constexpr, SUMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the crowd's windows of all warps to the rows they stand for; one thread does so for each number of a window."""
    piece, crowds = _piece(height, outputs, K)
    row = crowd + t // outputs
    there = (t < K * outputs) & (row >= 0) & (row < WARPS * height)
    owner = row // height
    to = SUMS + 4 * (owner * piece + (row - owner * height + K) * outputs + t % outputs)
    total = get(room, to, there, tl.float32, INTERPRETED)
    for w in tl.static_range(WARPS):
        total += get(room, SUMS + 4 * (w * piece + crowds + t), there, tl.float32, INTERPRETED)
    put(room, to, total, there, INTERPRETED)


@triton.jit
def _write(room, at, gradient, begin, stop, numbers, lane, PAIRS: tl.constexpr, INTERPRETED: tl.constexpr):
    """What a warp holds, from ``begin`` on; nobody reads it here: it leaves the cache before the weights do."""
    EACH: tl.constexpr = 2 if PAIRS else 1
    for start in range(0, numbers, 32 * EACH):
        q = start + EACH * lane
        to, here = begin + q, begin + q < stop
        if PAIRS:
            both = tl.join(*get_pair(room, at + 4 * q, here, INTERPRETED)).to(gradient.dtype.element_ty)
            pairs = gradient + (to[:, None] + tl.arange(0, 2)[None, :])
            tl.store(pairs, both, mask=here[:, None], eviction_policy="evict_first")
        else:
            one = get(room, at + 4 * q, here, tl.float32, INTERPRETED).to(gradient.dtype.element_ty)
            tl.store(gradient + to, one, mask=here, eviction_policy="evict_first")


@triton.jit
def _sums(
    pid, x, scale, grad, spare, gradient, base_gradient, samples, features, outputs, size, groups, lo, hi, inv_h,
    ORDER: tl.constexpr, D: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr, BO: tl.constexpr,
    PAIRS: tl.constexpr, CB: tl.constexpr, WARPS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradient of one of the ``groups`` of a feature's rows, and in the first that of the base weights."""
    K: tl.constexpr = ORDER + 1
    EACH: tl.constexpr = 2 if PAIRS else 1
    VALUES: tl.constexpr = 4 * WARPS * (CB + 4)  # bytes: first the lists, then basis values, then sums
    SUMS: tl.constexpr = VALUES + 4 * CB * K
    i = (pid // groups).to(tl.int64)
    rows = size + ORDER
    height = tl.cdiv(rows, groups * WARPS)
    low = pid % groups * (WARPS * height)
    piece, _ = _piece(height, outputs, K)
    room = memory(spare, BYTES, INTERPRETED)
    t = threads(WARPS, INTERPRETED)
    warp, lane = t // 32, t % 32
    n = tl.arange(0, CB)
    o = tl.arange(0, BO)
    xv = tl.load(x + n.to(tl.int64) * features + i, mask=n < samples, other=0.0).to(tl.float32)
    crowd = _crowd(x + i, samples, features, size, lo, hi, inv_h, ORDER) - low
    for at in range(0, WARPS * piece, 32 * WARPS * EACH):
        if PAIRS:
            put_pair(room, SUMS + 4 * (at + 2 * t), t * 0.0, t * 0.0, t >= 0, INTERPRETED)
        else:
            put(room, SUMS + 4 * (at + t), t * 0.0, t >= 0, INTERPRETED)
    # Threads too many do what others do, but for the sums.
    active = lane < K * (outputs // EACH)
    column = lane % (K * (outputs // EACH)) * EACH
    row, column = column // outputs, column % outputs
    to = 4 * (row * outputs + column)
    values = VALUES + 4 * row
    base_sum = tl.zeros((BO,), tl.float32)
    for start in range(0, samples, CB):
        b = start + n
        here = b < samples
        cell, f = locate(xv, lo, hi, inv_h, size, ORDER)
        v0, v1, v2, v3, v4, v5 = basis(f, inv_h, ORDER, D)
        act = silu(xv, D)
        if SCALED:
            s = tl.load(scale + b.to(tl.int64) * features + i, mask=here, other=0.0).to(tl.float32)
            v0, v1, v2, v3, v4, v5, act = v0 * s, v1 * s, v2 * s, v3 * s, v4 * s, v5 * s, act * s
        for r in tl.static_range(K):
            put(room, VALUES + n * (4 * K) + 4 * r, value(r, v0, v1, v2, v3, v4, v5), here, INTERPRETED)
        end = _fill_lists(room, cell - low, here, crowd, height, outputs, t, K, CB, WARPS, SUMS, INTERPRETED)
        if BASE and pid % groups == 0:
            mask = here[:, None] & (o < outputs)[None, :]
            g = tl.load(grad + b[:, None] * outputs + o[None, :], mask=mask, other=0.0).to(tl.float32)
            base_sum += tl.sum(act[:, None] * g, axis=0)
        b += CB
        xv = tl.load(x + b.to(tl.int64) * features + i, mask=b < samples, other=0.0).to(tl.float32)
        tl.debug_barrier()
        source = grad + (start * outputs + column)
        _add_list(room, 4 * warp * (CB + 4), end, to, values, source, outputs, active, K, PAIRS, INTERPRETED)
        tl.debug_barrier()
    _add_crowd(room, crowd, height, outputs, t, K, WARPS, SUMS, INTERPRETED)
    tl.debug_barrier()
    begin = (low + warp * height) * outputs
    stop = tl.minimum(begin + height * outputs, rows * outputs)
    at = SUMS + 4 * (warp * piece + K * outputs)
    _write(room, at, gradient + i * rows * outputs, begin, stop, height * outputs, lane, PAIRS, INTERPRETED)
    if BASE and pid % groups == 0:
        tl.store(base_gradient + i * outputs + o, base_sum.to(base_gradient.dtype.element_ty), mask=o < outputs)


@triton.jit(do_not_specialize=["samples", "features", "size", "groups", "sums"])
def sums_kernel(
    x, scale, grad, weight, base, spare, windows, dots, gradient, base_gradient,
    samples, features, units, size, groups, sums,
    lo: "fp64", hi: "fp64", inv_h: "fp64",
    ORDER: tl.constexpr, DOT_D: tl.constexpr, SCATTER_D: tl.constexpr, CT: tl.constexpr, SCALED: tl.constexpr,
    BASE: tl.constexpr, UNIT: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr, PAIRS: tl.constexpr,
    CB: tl.constexpr, WARPS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """``sums`` programs of ``_sums``, then ``gather``."""
    pid = tl.program_id(0)
    outputs = units * UNIT
    lo, hi, inv_h = tl.full([], lo, CT), tl.full([], hi, CT), tl.full([], inv_h, CT)
    if pid < sums:
        _sums(
            pid, x, scale, grad, spare, gradient, base_gradient, samples, features, outputs, size, groups, lo, hi, inv_h,
            ORDER, SCATTER_D, SCALED, BASE, BO, PAIRS, CB, WARPS, BYTES, INTERPRETED,
        )  # fmt: skip
    elif DOT_D >= 0:
        gather(
            pid - sums, x, grad, weight, base, dots, windows,
            samples, features, outputs, size, lo, hi, inv_h, ORDER, DOT_D, CT, BASE, BI, BO,
        )  # fmt: skip
