"""Runs the kernels of ``layers/flash/triton_kernels.py``: which tile for which shape, and nothing else.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import reference, triton_kernels
from layers.flash.launch import launch, on_device_of
from layers.flash.reference import compute_dtype

MAX_ORDER = 5
MAX_DERIVATIVE = 2
FEW_OUTPUTS = 32  # up to which one program takes all outputs of a sample
ROWS_BY_TILE = 128  # of the gradient, up to which few outputs go by small matrix products
SORTED_IN_KERNEL = 2048  # samples; above, torch.sort is faster than one program
BASE_IN_SORT = 64  # outputs up to which the gradient of base_weight is made while sorting
WARPS_WANTED = 1024  # about eight for each multiprocessor of the largest GPU measured


def covers(weight: Tensor, order: int, d: int) -> bool:
    """Whether these kernels take a call: offsets inside one feature are 32 bits wide."""
    return order <= MAX_ORDER and d <= MAX_DERIVATIVE and weight.shape[1] * weight.shape[2] < 2**31


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()


def common(x: Tensor, weight: Tensor, order: int, lo: float, hi: float):
    """G, the grid's numbers for a kernel, and the dtype of the sums for Triton."""
    size = weight.shape[1] - order
    wide = compute_dtype(x, weight) == torch.float64
    return size, (float(lo), float(hi), size / (hi - lo)), tl.float64 if wide else tl.float32


def few_tile(features: int, outputs: int) -> tuple[int, int, int]:
    """Few outputs: features and outputs of a program's tile, and its warps."""
    width = max(power_of_2(outputs), 4)
    return min(2048 // width, power_of_2(features)), width, 8


def many_tile(samples: int, features: int, outputs: int) -> tuple[int, int, int, int]:
    """Many outputs: samples and outputs of a program's tile, its warps, and into how many parts features are split."""
    bb, warps = (128, 4) if samples >= 512 and outputs > 64 else (64, 2)
    bo = min(power_of_2(outputs), 64)
    programs = ceil_div(samples, bb) * ceil_div(outputs, bo)
    split = 1
    while programs * split * warps < WARPS_WANTED and split * 32 <= features and split < 16:
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
    sums, few, scaled, has_base = compute_dtype(x, weight), outputs <= FEW_OUTPUTS, scale is not None, base is not None
    scale = scale.contiguous() if scaled else x
    base = base.contiguous() if has_base else weight
    with on_device_of(x):
        rows = torch.empty(features * samples, dtype=torch.int32, device=x.device)
        values = torch.empty(order + 2, features, samples, dtype=sums, device=x.device)
        acts = values[order + 1]
        constants = {"ORDER": order, "D": d, "CT": wide, "SCALED": scaled, "BASE": has_base}
        constants |= {"BY_SAMPLE": few, "BB": 32, "BI": 32}
        launch(
            triton_kernels.prepare_kernel,
            (ceil_div(samples, 32), ceil_div(features, 32), 1),
            (x, scale, rows, values, acts, samples, features, size, *numbers),
            constants,
            4,
            0,
        )
        arrays = (rows, values, acts, weight, base)
        if few:
            y = torch.empty(samples, outputs, dtype=dtype, device=x.device)
            bi, bo, warps = few_tile(features, outputs)
            constants = {"ORDER": order, "CT": wide, "BASE": has_base, "BI": bi, "BO": bo}
            sizes = (samples, features, outputs, size)
            launch(triton_kernels.few_kernel, (samples, 1, 1), (*arrays, y, *sizes), constants, warps, outputs)
            return y
        bb, bo, warps, split = many_tile(samples, features, outputs)
        y = torch.empty(split, samples, outputs, dtype=dtype if split == 1 else sums, device=x.device)
        constants = {"ORDER": order, "CT": wide, "BASE": has_base, "WHOLE": outputs % bo == 0, "BB": bb, "BO": bo}
        sizes = (samples, features, outputs, size, ceil_div(features, split))
        grid = (ceil_div(samples, bb), ceil_div(outputs, bo), split)
        launch(triton_kernels.many_kernel, grid, (*arrays, y, *sizes), constants, warps, outputs)
    return y[0] if split == 1 else y.sum(0).to(dtype)


def tile_shape(samples: int, rows: int, outputs: int) -> tuple[int, int, int, int]:
    """Few outputs: rows of a tile's frame, samples taken at a time, outputs of a program, its warps."""
    return 16, 32 if samples >= 16 * rows else 16, max(16, power_of_2(outputs)), 1


def walk_shape(features: int, rows: int, outputs: int, order: int, wide: bool) -> tuple[int, int, int]:
    """Many outputs: rows of a tile, outputs of a program, its warps."""
    block = min(power_of_2(outputs), 128 if wide or order > 3 else 512)
    programs = features * ceil_div(outputs, block)
    parts = min(ceil_div(3072 if block <= 64 else 1024, programs), max(1, rows // 12))
    return ceil_div(rows, parts), block, 1


def _precision(weight: Tensor) -> str:
    """How tensor cores multiply float32: as three TF32 products, which keep 22 bits, unless fewer are wanted."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16) or torch.backends.cuda.matmul.allow_tf32
    return "tf32" if narrow else "tf32x3"


def _sort(grad, x, weight, base, scale, order, dot_d, scatter_d, has_base, size, numbers, wide, step):
    """Sorted keys, what lies behind them, the tiles' bounds, the bits of a sample; maybe the base gradient."""
    (samples, features), outputs = x.shape, weight.shape[2]
    bits = max(samples - 1, 1).bit_length()
    key_dtype = torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64
    in_kernel = samples <= SORTED_IN_KERNEL
    with_gradient = base is not None and in_kernel and outputs <= BASE_IN_SORT
    block = power_of_2(samples) if in_kernel else 1024
    tiles = ceil_div(weight.shape[1], step)
    sums = compute_dtype(x, weight)
    keys = torch.empty(features, samples, dtype=key_dtype, device=x.device)
    behind = torch.empty(features, samples, 2 * (order + 1), dtype=sums, device=x.device)
    bounds = torch.empty(features, 2, tiles, dtype=torch.int32, device=x.device)
    base_gradient = torch.empty_like(base) if with_gradient else None
    what = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": wide, "SCALED": scale is not None}
    what["BASE"] = has_base
    constants = {"BASE_GRADIENT": with_gradient, "SORT": in_kernel, "NB": block, "BITS": bits}
    constants |= {"BC": 32, "BO": power_of_2(outputs) if with_gradient else 1}
    scale = x if scale is None else scale
    arrays = (x, scale, grad, keys, behind, bounds, base_gradient if with_gradient else keys)
    launch(
        triton_kernels.sort_kernel,
        (features, ceil_div(samples, block), 1),
        (*arrays, samples, features, outputs, size, step, tiles, *numbers),
        what | constants,
        4,
        outputs,
    )
    if not in_kernel:
        keys = keys.sort(dim=1).values
        cells = torch.arange(tiles, device=x.device, dtype=key_dtype) * step
        reach = cells + (1 if scatter_d >= 0 else order + 1)
        beyond = cells + (step + order + 1)
        reach[:1].fill_(0)  # filled, not assigned: an assignment would copy from the CPU and wait
        beyond[-1:].fill_(size + 2 * order + 2)
        edges = (torch.stack([reach, beyond]) << bits).flatten().expand(features, -1).contiguous()
        bounds = torch.searchsorted(keys, edges, out_int32=True)
        launch(
            triton_kernels.order_kernel,
            (features, ceil_div(samples, 256), 1),
            (x, scale, keys, behind, samples, features, numbers[0], numbers[2]),
            what | {"BITS": bits, "BN": 256},
            4,
            0,
        )
    return keys, behind, bounds, bits, base_gradient


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
    size, numbers, wide = common(x, weight, order, lo, hi)
    (samples, features), outputs, all_rows = x.shape, weight.shape[2], weight.shape[1]
    none = x.new_empty(0)
    if samples == 0:
        p = torch.empty_like(x) if dot_d >= 0 else none
        v = torch.zeros_like(weight) if scatter_d >= 0 else x.new_empty(0)
        return p, v, torch.zeros_like(base) if scatter_d >= 0 and base is not None else x.new_empty(0)
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    base = None if base is None else base.contiguous()
    scale = None if scale is None else scale.contiguous()
    by_tile = outputs <= FEW_OUTPUTS and all_rows <= ROWS_BY_TILE and wide == tl.float32
    if by_tile:
        frame, chunk, block, warps = tile_shape(samples, all_rows, outputs)
        step = frame - order
    else:
        step, block, warps = walk_shape(features, all_rows, outputs, order, wide == tl.float64)
    with on_device_of(x):
        keys, behind, bounds, bits, b = _sort(
            grad, x, weight, base if scatter_d >= 0 else None, scale, order, dot_d, scatter_d, base is not None,
            size, numbers, wide, step,
        )  # fmt: skip
        blocks, tiles = ceil_div(outputs, block), ceil_div(all_rows, step)
        kind = x.dtype if blocks == 1 else compute_dtype(x, weight)
        dots = torch.empty(blocks, samples, features, dtype=kind, device=x.device) if dot_d >= 0 else none
        v = torch.empty_like(weight) if scatter_d >= 0 else none
        arrays = (grad, weight, weight if base is None else base, keys, behind, bounds, dots, v)
        what = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": wide, "BASE": base is not None}
        what["BITS"] = bits
        if by_tile:
            kernel, sizes = triton_kernels.tile_kernel, (samples, features, outputs, size, tiles)
            what |= {"PRECISION": _precision(weight), "TR": frame, "BS": chunk, "BO": block}
        else:
            kernel, sizes = triton_kernels.walk_kernel, (samples, features, outputs, size, step, tiles)
            what["BO"] = block
        launch(kernel, (features, tiles, blocks), (*arrays, *sizes), what, warps, outputs)
    if dot_d >= 0:
        dots = dots[0] if blocks == 1 else dots.sum(0).to(x.dtype)
    if scatter_d >= 0 and base is not None and b is None:
        act = reference.silu(x.to(compute_dtype(x, weight)), scatter_d)
        act = act if scale is None else act * scale
        b = (act.t() @ grad.to(act.dtype)).to(base.dtype)
    return dots, v if scatter_d >= 0 else x.new_empty(0), x.new_empty(0) if b is None else b
