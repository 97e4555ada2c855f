"""Runs the kernels of ``triton_few.py``, ``triton_sort.py`` and ``triton_many.py``: which kernel and tile for which shape.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_few, triton_many, triton_sort
from layers.flash.launch import launch, on_device_of
from layers.flash.reference import compute_dtype

MAX_ORDER = 5
MAX_DERIVATIVE = 2
FEW_OUTPUTS = 32  # up to which one program takes all outputs of a sample
FEW_ROWS = 32  # of the gradient, up to which all samples go through the products and nothing is sorted
SORT_ALONG = 256  # samples, up to which every program that needs a feature's samples in order sorts them itself
AT_ONCE = 2048  # samples; above, torch.sort is faster than one program that sorts
PIECE = 512  # samples that are worth a program of their own in the walk
ROWS_TILE = {"BM": 64, "BS": 32}  # few outputs, few rows: rows and samples of a product
BASE_TILE = {"BASE_BM": 16, "BASE_BS": 32}  # few outputs: features and samples of a product for the base gradient


def covers(weight: Tensor, order: int, d: int) -> bool:
    """Whether these kernels take a call: offsets inside one feature are 32 bits wide."""
    return order <= MAX_ORDER and d <= MAX_DERIVATIVE and weight.shape[1] * weight.shape[2] < 2**31


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; a number of today's where Triton's interpreter runs on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def common(x: Tensor, weight: Tensor, order: int, lo: float, hi: float):
    """G, the grid's numbers for a kernel, and the dtype of the sums for Triton."""
    size = weight.shape[1] - order
    wide = compute_dtype(x, weight) == torch.float64
    return size, (float(lo), float(hi), size / (hi - lo)), tl.float64 if wide else tl.float32


def _filled(x: Tensor, *results: Tensor | None) -> tuple[Tensor, ...]:
    """Results that were left out are empty; PyTorch forbids an op whose results are one another."""
    return tuple(x.new_empty(0) if t is None else t for t in results)


def _key(*tensors: Tensor | None) -> tuple:
    """What decides the launches of a call, apart from its numbers: shapes, dtypes and the device."""
    return tensors[1].device.index, *[None if t is None else (t.dtype, t.shape) for t in tensors]


def many_tile(samples: int, features: int, rows: int, outputs: int, processors: int) -> tuple[int, int, int, int]:
    """Many outputs: samples and outputs of a program's tile, its warps, and into how many parts features are split.

    Tall tiles read a row for more samples, low ones of one warp need no barriers. As many programs as run at once.
    """
    bb, warps = (64, 2) if rows > 64 else (32, 1)
    if rows > 256 and samples >= 512 and outputs > 64:
        bb, warps = 128, 4
    bo = min(power_of_2(outputs), 64)
    programs = ceil_div(samples, bb) * ceil_div(outputs, bo)
    split = 1
    while programs * split * 2 * warps <= 8 * processors and split * 16 <= features and split < 32:
        split *= 2
    return bb, bo, warps, split


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    size, numbers, wide = common(x, weight, order, lo, hi)
    (samples, features), outputs = x.shape, weight.shape[2]
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if samples == 0:
        return x.new_zeros(0, outputs, dtype=dtype)
    x, weight = x.contiguous(), weight.contiguous()
    sums, scaled, has_base = compute_dtype(x, weight), scale is not None, base is not None
    key = _key(None, x, weight, base, scale) + (order, d)
    scale = scale.contiguous() if scaled else x
    base = base.contiguous() if has_base else weight
    constants = {"ORDER": order, "D": d, "CT": wide, "SCALED": scaled, "BASE": has_base}
    with on_device_of(x):
        if outputs <= FEW_OUTPUTS:
            y = torch.empty(samples, outputs, dtype=dtype, device=x.device)
            windows = torch.empty(order + 3, samples * features, dtype=sums, device=x.device)
            width = max(power_of_2(outputs), 4)
            constants["BI"], constants["BO"] = min(2048 // width, power_of_2(features)), width
            constants["ALL"] = min(power_of_2(features), 1024)
            args = (x, scale, weight, base, windows, y, samples, features, outputs, size, *numbers)
            launch(triton_few.few_kernel, key, (samples,), args, constants, 8)
            return y
        first_rows = torch.empty(samples * features, dtype=torch.int32, device=x.device)
        values = torch.empty(order + 2, samples * features, dtype=sums, device=x.device)
        constants["BB"], constants["BI"] = 32, 32
        acts = values[order + 1]
        args = (x, scale, first_rows, values, acts, samples, features, size, *numbers)
        grid = (ceil_div(samples, 32), ceil_div(features, 32))
        launch(triton_many.prepare_kernel, key, grid, args, constants, 4)
        bb, bo, warps, split = many_tile(samples, features, weight.shape[1], outputs, multiprocessors(x.device))
        y = torch.empty(split, samples, outputs, dtype=dtype if split == 1 else sums, device=x.device)
        constants = {"ORDER": order, "CT": wide, "BASE": has_base, "WHOLE": outputs % bo == 0, "BB": bb, "BO": bo}
        args = (first_rows, values, acts, weight, base, y, samples, features, outputs, size, ceil_div(features, split))
        grid = (ceil_div(samples, bb), ceil_div(outputs, bo), split)
        launch(triton_many.many_kernel, key, grid, args, constants, warps)
    return y[0] if split == 1 else y.sum(0).to(dtype)


def column_shape(samples: int, features: int, rows: int, processors: int) -> tuple[int, int, int, int]:
    """Few outputs: rows of a tile, samples taken at a time, warps, and programs for the gradient of one feature."""
    if samples <= SORT_ALONG:
        frame, chunk, warps = 32 if rows > 256 else 16, 16, 1
    elif rows > 700:
        frame, chunk, warps = 64, 16, 2
    else:
        frame, chunk, warps = 32, 16 if samples < 16 * rows else 32, 1
    wanted = (8 if samples <= SORT_ALONG else 32) * processors
    return frame, chunk, warps, min(ceil_div(rows, frame), ceil_div(wanted, features))


class Walk(NamedTuple):
    """Many outputs: rows of a tile, outputs of a program of one warp, into how many pieces a tile's samples are cut,
    the registers a thread may use, and whether weights are read two rows ahead."""

    step: int
    block: int
    pieces: int
    registers: int | None
    far: bool


def walk_shape(samples: int, features: int, rows: int, outputs: int, order: int, wide: bool, processors: int) -> Walk:
    """As many programs as run at the same time, and no more: where registers are the limit, 8 a multiprocessor with 512
    outputs, 16 with 256. With many rows, waiting for weights takes longer than computing, and 16 wait better.
    """
    block = min(power_of_2(outputs), 128 if wide or order > 3 else 256 if rows > 512 else 512)
    together = processors * min(8 * (512 // block), 32)
    programs = features * ceil_div(outputs, block)
    parts = max(1, min(together // programs, rows // 10))
    pieces = max(1, min(together // (programs * parts), samples // PIECE))
    registers = 128 if block == 256 and order <= 3 and not wide else None
    return Walk(ceil_div(rows, parts), block, pieces, registers, block == 512)


def _precision(weight: Tensor) -> str:
    """How tensor cores multiply float32: as three TF32 products, which keep 22 bits, unless fewer are wanted."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16) or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if narrow else "tf32x3"


def adjoint(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (empty)."""
    samples = x.shape[0]
    if samples == 0:
        p = torch.empty_like(x) if dot_d >= 0 else x.new_empty(0)
        v = torch.zeros_like(weight) if scatter_d >= 0 else x.new_empty(0)
        return p, v, torch.zeros_like(base) if scatter_d >= 0 and base is not None else x.new_empty(0)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    base = None if base is None else base.contiguous()
    scale = None if scale is None else scale.contiguous()
    # Products on tensor cores: not in float64, not with basis functions that jump, as they do not look for cells.
    few = weight.shape[2] <= FEW_OUTPUTS and compute_dtype(x, weight) == torch.float32 and samples <= AT_ONCE
    few = few and order - scatter_d >= 1
    with on_device_of(x):
        run = _few if few else _many
        return run(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d)


def _few(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d) -> tuple[Tensor, Tensor, Tensor]:
    size, numbers, wide = common(x, weight, order, lo, hi)
    (samples, features), (_, rows, outputs), device = x.shape, weight.shape, x.device
    dots = v = b = windows = None
    scaled, has_base, precision = scale is not None, base is not None, _precision(weight)
    coarse = rows <= FEW_ROWS or scatter_d < 0
    frame, chunk, warps, groups = column_shape(samples, features, rows, multiprocessors(device))
    bases = gathers = 0
    width = {"BN": max(power_of_2(outputs), 16)}
    gather = {"BI": 64 if coarse else 32 * warps, "BO": max(power_of_2(outputs), 4)}
    if dot_d >= 0:
        dots = torch.empty_like(x)
        windows = torch.empty(order + 3, samples * features, dtype=torch.float32, device=device)
        gathers = samples * ceil_div(features, gather["BI"])
    if scatter_d >= 0:
        v = torch.empty_like(weight)
        if has_base:
            b = torch.empty_like(base)
            bases = ceil_div(features, ROWS_TILE["BM"] if coarse else BASE_TILE["BASE_BM"])
    key = _key(grad, x, weight, base, scale) + (order, dot_d, scatter_d, precision)
    arrays = (x, x if scale is None else scale, grad, weight, weight if base is None else base)
    results = tuple(x if t is None else t for t in (windows, dots, v, b))
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": wide, "SCALED": scaled, "BASE": has_base}
    constants["PRECISION"] = precision
    if coarse:
        row_programs = ceil_div(features * rows, ROWS_TILE["BM"]) if scatter_d >= 0 else 0
        args = (*arrays, *results, samples, features, outputs, size, bases, row_programs, *numbers)
        constants |= ROWS_TILE | width | gather
        launch(triton_few.rows_kernel, key, (bases + row_programs + gathers,), args, constants, 4)
        return _filled(x, dots, v, b)
    along, columns = samples <= SORT_ALONG, features * groups
    keys, bits = _keys(x, size, order, groups if along else 1)
    block = power_of_2(samples)
    if not along:
        sorting = {"ORDER": order, "CT": wide, "NB": block, "BITS": bits}
        args = (x, keys, samples, features, size, *numbers)
        launch(triton_sort.sort_kernel, key, (features,), args, sorting, sort_warps(block))
    args = (*arrays, keys, *results, samples, features, outputs, size)
    args += (ceil_div(rows, frame), groups, columns, bases, *numbers)
    constants |= {"SORT": along, "NB": block, "BITS": bits, "BM": frame, "BS": chunk} | width | gather | BASE_TILE
    launch(triton_few.columns_kernel, key, (columns + bases + gathers,), args, constants, warps)
    return _filled(x, dots, v, b)


def _keys(x: Tensor, size: int, order: int, copies: int = 1) -> tuple[Tensor, int]:
    """Room for the sorted keys (I * copies, B), and how many of a key's bits hold the sample."""
    bits = max(x.shape[0] - 1, 1).bit_length()
    dtype = torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64
    return torch.empty(x.shape[1] * copies, x.shape[0], dtype=dtype, device=x.device), bits


def sort_warps(block: int) -> int:
    """Warps of a program that sorts ``block`` samples."""
    return min(max(block // 64, 1), 16)


def _sorted(x, weight, scale, key, order, dot_d, scatter_d, has_base, size, numbers, wide, step):
    """Keys, places, slopes and bounds for the walk, SiLU's values (I, B) for the base gradient, and a key's bits."""
    samples, features = x.shape
    in_kernel = samples <= AT_ONCE
    tiles, sums = ceil_div(weight.shape[1], step), compute_dtype(x, weight)
    keys, bits = _keys(x, size, order)
    block = power_of_2(samples) if in_kernel else 1024
    slopes_too, acts_too = has_base and dot_d >= 0, has_base and scatter_d >= 0
    places = torch.empty(features, samples, dtype=sums, device=x.device)
    slopes = torch.empty_like(places) if slopes_too else places
    acts = torch.empty_like(places) if acts_too else places
    bounds = torch.empty(features, 2, tiles, dtype=torch.int32, device=x.device)
    scaled, scale = scale is not None, x if scale is None else scale
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": wide, "SCALED": scaled}
    constants |= {"SLOPES": slopes_too, "ACTS": acts_too, "SORT": in_kernel, "NB": block, "BITS": bits}
    grid = (features, ceil_div(samples, block))
    args = (x, scale, keys, places, slopes, acts, bounds, samples, features, size, step, tiles, *numbers)
    launch(triton_sort.arrange_kernel, (key, step), grid, args, constants, sort_warps(block) if in_kernel else 4)
    if not in_kernel:
        keys = keys.sort(dim=1).values
        cells = torch.arange(tiles, device=x.device, dtype=keys.dtype) * step
        reach = cells + (1 if scatter_d >= 0 else order + 1)
        beyond = cells + (step + order + 1)
        reach[:1].fill_(0)  # filled, not assigned: an assignment would copy from the CPU and wait
        beyond[-1:].fill_(size + 2 * order + 2)
        edges = (torch.stack([reach, beyond]) << bits).flatten().expand(features, -1).contiguous()
        bounds = torch.searchsorted(keys, edges, out_int32=True)
        constants = {"ORDER": order, "DOT_D": dot_d, "CT": wide, "SLOPES": slopes_too, "BITS": bits, "BN": 256}
        args = (x, keys, places, slopes, samples, features, numbers[0], numbers[2])
        launch(triton_sort.place_kernel, key, (features, ceil_div(samples, 256)), args, constants, 4)
    return keys, places, slopes, bounds, acts if acts_too else None, bits


def _many(grad, x, weight, base, scale, order, lo, hi, dot_d, scatter_d) -> tuple[Tensor, Tensor, Tensor]:
    size, numbers, wide = common(x, weight, order, lo, hi)
    (samples, features), (_, rows, outputs), sums = x.shape, weight.shape, compute_dtype(x, weight)
    has_base = base is not None
    processors = multiprocessors(x.device)
    shape = walk_shape(samples, features, rows, outputs, order, wide == tl.float64, processors)
    step, block, pieces = shape.step, shape.block, shape.pieces
    key = _key(grad, x, weight, base, scale) + (order, dot_d, scatter_d)
    keys, places, slopes, bounds, acts, bits = _sorted(
        x, weight, scale, key, order, dot_d, scatter_d, has_base, size, numbers, wide, step
    )
    blocks, tiles = ceil_div(outputs, block), ceil_div(rows, step)
    dots = v = b = None
    if dot_d >= 0:
        dots = torch.empty(blocks, samples, features, dtype=x.dtype if blocks == 1 else sums, device=x.device)
    if scatter_d >= 0:
        v = torch.empty_like(weight) if pieces == 1 else torch.empty(pieces, *weight.shape, dtype=sums, device=x.device)
    what = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": wide, "SCALED": scale is not None}
    what |= {"BASE": has_base, "BITS": bits, "BO": block, "WHOLE": outputs % block == 0, "FAR": shape.far}
    arrays = (grad, x if scale is None else scale, weight, base if has_base else weight)
    args = (*arrays, keys, places, slopes, bounds, *(places if t is None else t for t in (dots, v)))
    args += (samples, features, outputs, size, step, tiles, pieces, numbers[2])
    grid = (features, tiles * pieces, blocks)
    launch(triton_many.walk_kernel, key, grid, args, what, 1, registers=shape.registers)
    if dot_d >= 0:
        dots = dots[0] if blocks == 1 else dots.sum(0).to(x.dtype)
    if scatter_d >= 0 and pieces > 1:
        v = v.sum(0).to(weight.dtype)
    if acts is not None:
        b = (acts @ grad.to(sums)).to(base.dtype)
    return _filled(x, dots, v, b)
