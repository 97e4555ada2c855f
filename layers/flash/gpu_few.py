"""Launches the kernels of ``triton_windows.py`` and ``triton_few.py``: few outputs; those of ``gpu_sums.py`` where they can.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import gpu_sort, gpu_sums, triton_few, triton_windows
from layers.flash.launch import Launch, ceil_div, divisor, dtypes, multiprocessors, power_of_2, remembered, tf32_allowed
from layers.flash.reference import compute_dtype

FEW_ROWS = 32  # of the gradient, up to which all samples go through the products and nothing is sorted
SORT_ALONG = 256  # samples, up to which every program that needs a feature's samples in order sorts them itself
ROWS_TILE = {"BM": 64, "BS": 32}  # coarse grid: rows and samples of a product
LONG, CHUNK = 2048, 1024  # longer sums over samples are made of pieces, as tensor cores cut them off
BASE_TILE = {"BASE_BM": 16, "BASE_BS": 32}  # fine grid: features and samples of a product for the base gradient
FEW_SAMPLES, WIDE_FEATURES = 256, 128  # fewer samples, as many features: one takes eight warps, so that the GPU is busy
MANY_SAMPLES, NARROW_FEATURES = 2048, 64  # as many, and no more features: one takes one warp, and needs no barriers
ADD_ROWS, ADD_OUTPUTS = 256, 16  # more rows, twice as many as samples, and no more outputs: atomics


def warps_of(samples: int, features: int) -> int:
    """Forward, of the program of one sample."""
    if samples < FEW_SAMPLES and features >= WIDE_FEATURES:
        return 8
    return 1 if samples >= MANY_SAMPLES and features <= NARROW_FEATURES else 4


@remembered
def _forward(kinds: tuple, shape: tuple, outputs: int, order: int, lo: float, hi: float, d: int) -> Launch:
    (samples, features), (_, x_dtype, weight_dtype, base, scale) = shape[:2], kinds
    size, width, step = shape[2] - order, max(power_of_2(outputs), 4), divisor(outputs, 4)
    wide, warps = torch.float64 in (x_dtype, weight_dtype), warps_of(samples, features)
    constants = {"ORDER": order, "D": d, "CT": tl.float64 if wide else tl.float32}
    constants |= {"SCALED": scale is not None, "BASE": base is not None, "UNIT": step}
    all_features = power_of_2(features)
    constants |= {"BI": min(256 * warps // width, all_features), "BO": width, "ALL": min(all_features, 1024)}
    numbers = (samples, features, outputs // step, size, lo, hi, size / (hi - lo))
    return Launch(triton_windows.few_kernel, (samples,), numbers, constants, warps)


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``. Contiguous tensors, at least one sample."""
    rows, outputs = weight.shape[1:]
    launch = _forward(dtypes(x, weight, base, scale), (*x.shape, rows), outputs, order, float(lo), float(hi), d)
    y = torch.empty(x.shape[0], outputs, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    windows = torch.empty(order + 3, x.numel(), dtype=compute_dtype(x, weight), device=x.device)
    launch(x, x if scale is None else scale, weight, weight if base is None else base, windows, y)
    return y


def column_shape(samples: int, features: int, rows: int, processors: int) -> tuple[int, int, int, int]:
    """Fine grid: rows of a tile, samples taken at a time, warps, and programs for the gradient of one feature."""
    if samples <= SORT_ALONG:
        frame, chunk, warps = 32 if rows > 256 else 16, 16, 1
    elif rows > 700:
        frame, chunk, warps = 64, 16, 2
    else:
        frame, chunk, warps = 32, 16 if samples < 16 * rows else 32, 1
    wanted = (8 if samples <= SORT_ALONG else 32) * processors
    return frame, chunk, warps, min(ceil_div(rows, frame), ceil_div(wanted, features))


def adds(samples: int, rows: int, outputs: int, order: int, weight_dtype: torch.dtype) -> bool:
    """Whether the gradient of the weights is made by atomics: where rows are many, samples few among them, and outputs few.

    Instead of products this was measured to take up to 40 % less time, and 4 % more at worst, however samples lie; with
    more samples it takes less only where they do not gather in one cell. Sums in shared memory are faster than both.
    """
    if rows <= ADD_ROWS or rows < 2 * samples or outputs > ADD_OUTPUTS or gpu_sums.shape(samples, rows, outputs, order):
        return False
    return weight_dtype == torch.float32 and not torch.are_deterministic_algorithms_enabled()


def precision(weight: Tensor) -> str:
    """How tensor cores multiply float32: as three TF32 products, which keep 22 bits, unless fewer are wanted."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16) or tf32_allowed()
    return "tf32" if narrow else "tf32x3"


class Plan(NamedTuple):
    """Of a backward pass: the launch; those that sort before, if it reads keys; shape and dtype of what else it works with,
    if anything."""

    launch: Launch
    sort: gpu_sort.Sort | None = None
    room: tuple[tuple[int, ...], torch.dtype] | None = None


@remembered
def _backward(
    kinds: tuple,
    shape: tuple,
    outputs: int,
    order: int,
    lo: float,
    hi: float,
    dot_d: int,
    scatter_d: int,
    precision: str,
    adding: bool,
    processors: int,
) -> Plan:
    samples, features, rows = shape
    _, _, _, _, base, scale = kinds
    size, step = rows - order, divisor(outputs, 4)
    coarse, along = rows <= FEW_ROWS or scatter_d < 0, samples <= SORT_ALONG
    frame, chunk, warps, groups = column_shape(samples, features, rows, processors)
    grid = (lo, hi, size / (hi - lo))
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": tl.float32, "SCALED": scale is not None}
    constants |= {"BASE": base is not None, "PRECISION": precision, "UNIT": step, "BN": max(power_of_2(outputs), 16)}
    constants |= {"BI": 64 if coarse or adding else 32 * warps, "BO": max(power_of_2(outputs), 4)}
    gathers = samples * ceil_div(features, constants["BI"]) if dot_d >= 0 else 0
    bases = ceil_div(features, ROWS_TILE["BM"] if coarse else BASE_TILE["BASE_BM"])
    bases = bases if scatter_d >= 0 and base is not None else 0
    numbers = (samples, features, outputs // step, size)
    if coarse:
        programs = ceil_div(features * rows, ROWS_TILE["BM"]) if scatter_d >= 0 else 0
        numbers = (*numbers, bases, programs, *grid)
        constants |= {"CHUNK": CHUNK if samples > LONG else 0} | ROWS_TILE
        launch = Launch(triton_few.rows_kernel, (bases + programs + gathers,), numbers, constants, 4)
        return Plan(launch)
    if adding:
        programs = bases + samples * ceil_div(features, constants["BI"])
        launch = Launch(triton_few.adds_kernel, (programs,), (*numbers, bases, *grid), constants | BASE_TILE, 4)
        return Plan(launch)
    sums = gpu_sums.shape(samples, rows, outputs, order)
    if sums is not None:
        values = dot_d, scatter_d, scale is not None, base is not None
        launch, room = gpu_sums.backward(sums, (samples, features, size), outputs, order, grid, *values)
        return Plan(launch, room=(room, torch.float32))
    columns = features * groups
    bits, key_dtype = gpu_sort.key_format(samples, size, order)
    sort = None if along else gpu_sort.sort((samples, features, size), order, grid, False)
    numbers = (*numbers, ceil_div(rows, frame), groups, columns, bases, *grid)
    constants |= {"SORT": along, "NB": power_of_2(samples), "BITS": bits, "BM": frame, "BS": chunk} | BASE_TILE
    launch = Launch(triton_few.columns_kernel, (columns + bases + gathers,), numbers, constants, warps)
    return Plan(launch, sort, ((columns, samples), key_dtype) if along else None)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dot`` and ``scatter``; see ``layers/flash/reference.py``. An order of -1 leaves a result out (``None``).

    Contiguous tensors, at least one sample, and on a fine grid at most LONG, or as many as ``gpu_sums.shape`` takes;
    ``order - scatter_d >= 1``; not in float64.
    """
    rows, outputs = weight.shape[1:]
    kinds, shape = dtypes(grad, x, weight, base, scale), (*x.shape, rows)
    adding = scatter_d >= 0 and adds(x.shape[0], rows, outputs, order, weight.dtype)
    processors, products = multiprocessors(x.device), precision(weight)
    plan = _backward(kinds, shape, outputs, order, float(lo), float(hi), dot_d, scatter_d, products, adding, processors)
    dots = v = b = windows = None
    if dot_d >= 0:
        dots = torch.empty_like(x)
    if dot_d >= 0 or adding:
        windows = torch.empty(order + 3, x.numel(), dtype=torch.float32, device=x.device)
    if scatter_d >= 0:
        v = torch.zeros_like(weight) if adding else torch.empty_like(weight)
        b = None if base is None else torch.empty_like(base)
    first = []
    if plan.sort is not None:
        first = [gpu_sort.run(plan.sort, x, rows - order, order)]
    elif plan.room is not None:
        size, dtype = plan.room
        first = [torch.empty(size, dtype=dtype, device=x.device) if size else None]
    scratch = [x if t is None else t for t in (*first, windows, dots, v, b)]
    plan.launch(x, x if scale is None else scale, grad, weight, weight if base is None else base, *scratch)
    return dots, v, b
