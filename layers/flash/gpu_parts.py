"""Launches the kernels of ``triton_parts.py``: products of float32 matrices on tensor cores, as exact as in float32."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from layers.flash import gpu_tiles, triton_parts
from layers.flash.launch import Launch, ceil_div, dtypes, power_of_2, remembered, tf32_allowed, unit

# A100 and H100, whose tensor cores are 16 times as fast in float16 as other units in float32. Not measured on others.
FASTER = {(8, 0), (9, 0)}
WIDTH = 16  # columns that divide those of every matrix, so that all loads are 16 bytes wide
WASTE = 1.3  # how much more work features and outputs that are not multiples of it may make


class Parts(NamedTuple):
    """A float32 matrix in two parts (2, rows, columns), float16, and the largest magnitudes by which it was scaled.

    ``largest`` are bits of float32 as int32, one for each row if the matrix is on the left of a product, for each column
    if it is on the right; see ``products`` for rows that share one.
    """

    numbers: Tensor
    largest: Tensor


@functools.cache
def _faster(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FASTER


def padded(n: int) -> int:
    """The next multiple of WIDTH."""
    return ceil_div(n, WIDTH) * WIDTH


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of a layer on a GPU go here: in float32, and not in TF32 anyway; sizes that suit."""
    features, _, outputs = weight.shape
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if padded(features) * padded(outputs) > WASTE * features * outputs:
        return False
    return not tf32_allowed() and _faster(x.device)


def empty(rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for a matrix in parts (2, rows, columns)."""
    return torch.empty(2, rows, columns, dtype=torch.float16, device=device)


@remembered
def _split_rows(kinds: tuple, bounds: tuple, columns: int, rows: int, across: int) -> Launch:
    block_columns = max(16, power_of_2(across))
    block = max(1, 1024 // block_columns)
    step = unit(columns)
    numbers, constants = (*bounds, columns // step, rows, across), {"UNIT": step, "BR": block, "BC": block_columns}
    warps = min(max(block_columns // 1024, 4), 16)
    return Launch(triton_parts.split_rows_kernel, (ceil_div(rows, block),), numbers, constants, warps)


def split_rows(left: Tensor, above: Tensor, below: Tensor | None, tall: int) -> tuple[Parts, Parts]:
    """A contiguous matrix in parts, and the transpose of one or of two with one under the other: ready for a product.

    The second of the two begins in row ``tall``; what is free before and behind it, up to a multiple of 16, holds zeros.
    """
    (end, columns), at_two = left.shape, left.shape[0]
    at_three, more = at_two + tall, 0 if below is None else below.shape[0]
    rows, across = at_three + padded(more), padded(columns)
    numbers = empty(rows, across, left.device)
    largest = torch.empty(rows, dtype=torch.int32, device=left.device)
    bounds = (end, at_two, at_two + above.shape[0], at_three, at_three + more)
    launch = _split_rows(dtypes(left), bounds, columns, rows, across)
    launch(left, above, above if below is None else below, numbers, largest)
    return Parts(numbers[:, :end], largest[:end]), Parts(numbers[:, end:].transpose(1, 2), largest[end:])


@remembered
def _products(device: torch.device, sizes: tuple, planes: tuple, turned: tuple, kept: tuple, each: int) -> tuple:
    """The launch of one or two products, and the pieces that are added of each."""
    tile, cuts, _ = gpu_tiles.planned(sizes, device)
    pieces, steps, whole, programs, widths = [], [], [], [], []
    for (rows, columns, inner), cut in zip(sizes, cuts, strict=True):
        steps.append(ceil_div(ceil_div(inner, cut), tile.inner) * tile.inner)
        pieces.append(ceil_div(inner, steps[-1]))
        widths.append(tile.width(columns))
        whole.append(rows % tile.rows == 0 and columns % widths[-1] == 0 and inner % tile.inner == 0)
        programs.append(tile.programs(rows, columns) * pieces[-1])
    upper, at_below, below, columns = kept
    step = unit(columns)
    numbers = (*sizes[0], *planes[:2], upper, at_below, at_below + below, columns // step, each, steps[0], programs[0])
    numbers += (*sizes[-1], *planes[-2:], steps[-1], 1.0)
    constants = {"TURN_A": turned[0], "TURN_B": turned[1], "WHOLE": whole[0], "UNIT": step, "BELOW": below > 0}
    constants |= {"BM": tile.rows, "BN": widths[0], "SECOND": len(sizes) > 1}
    constants |= {"TURN_C": turned[-2], "TURN_D": turned[-1], "WHOLE2": whole[-1], "BN2": widths[-1]}
    constants |= {"BK": tile.inner, "STAGES": gpu_tiles.STAGES}
    grid, kernel = (sum(programs),), triton_parts.products_kernel
    return Launch(kernel, grid, numbers, constants, tile.warps, gpu_tiles.STAGES, tile.registers), tuple(pieces)


def products(
    a: Parts,
    b: Parts,
    columns: int | None = None,
    upper: int | None = None,
    each: int = 1,
    below: tuple[int, int] = (0, 0),
    others: tuple[Parts, Parts] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The product of two matrices in parts, (2, M, K) and (2, K, N), in float32: its first ``upper`` rows, by default all;
    the rows from ``below[0]`` on, ``below[1]`` of them; and the product of two ``others``, side by side with it.

    Of the first product the first ``columns``, by default all, are kept. ``each`` of the first rows of ``a`` were scaled
    together. Every matrix is stored by rows or by columns.
    """
    pairs = [(a, b)] if others is None else [(a, b), others]
    factors = [factor for pair in pairs for factor in pair]
    sizes = tuple((left.numbers.shape[1], right.numbers.shape[2], left.numbers.shape[2]) for left, right in pairs)
    planes, turned = zip(*[(t.numbers.stride(0), t.numbers.stride(2) != 1) for t in factors], strict=True)
    upper = sizes[0][0] if upper is None else upper
    columns = sizes[0][1] if columns is None else columns
    launch, pieces = _products(a.numbers.device, sizes, planes, turned, (upper, *below, columns), each)
    above = a.numbers.new_empty(pieces[0], upper, columns, dtype=torch.float32)
    lower = above.new_empty(pieces[0], below[1], columns) if below[1] else None
    second = None if others is None else above.new_empty(pieces[1], *sizes[1][:2])
    first, last = ([t.numbers for t in pair] + [t.largest for t in pair] for pair in (pairs[0], pairs[-1]))
    launch(*first, above, above if lower is None else lower, *last, above if second is None else second)
    return tuple(None if t is None else t[0] if len(t) == 1 else t.sum(0) for t in (above, lower, second))
