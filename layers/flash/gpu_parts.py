"""Launches the kernels of ``triton_parts.py``: products of float32 matrices on tensor cores, as exact as in float32."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from layers.flash import triton_parts
from layers.flash.launch import Launch, ceil_div, dtypes, multiprocessors, power_of_2, remembered, tf32_allowed

ROWS, INNER = 64, 32  # of a program's product, and inner indices at a time
TOGETHER, REGISTERS = 3, 168  # programs that a multiprocessor holds, with so many registers a thread
STAGES = 3  # loads in flight
# A100 and H100, whose tensor cores are 16 times as fast in float16 as other units in float32. Not measured on others.
FASTER = {(8, 0), (9, 0)}
WIDTH = 16  # columns that divide those of every matrix, so that all loads are 16 bytes wide


class Parts(NamedTuple):
    """A float32 matrix in two parts (2, rows, columns), float16, and the largest magnitudes by which it was scaled.

    ``largest`` are bits of float32 as int32, one for each row if the matrix is on the left of a product, for each column
    if it is on the right; see ``product`` for rows that share one.
    """

    numbers: Tensor
    largest: Tensor


@functools.cache
def _faster(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in FASTER


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of a layer on a GPU go here: in float32, and not in TF32 anyway; sizes that suit."""
    features, _, outputs = weight.shape
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or features % WIDTH or outputs % WIDTH:
        return False
    return not tf32_allowed() and _faster(x.device)


def empty(rows: int, columns: int, device: torch.device) -> Tensor:
    """Room for a matrix in parts (2, rows, columns)."""
    return torch.empty(2, rows, columns, dtype=torch.float16, device=device)


@remembered
def _split(kinds: tuple, upper: int, lower: int, columns: int, by_row: bool) -> Launch:
    across = max(16, power_of_2(columns)) if by_row else 256
    block = max(1, 1024 // across)
    constants = {"BY_ROW": by_row, "BR": block, "BC": across}
    grid = (ceil_div(upper + lower, block), ceil_div(columns, across))
    warps = min(max(across // 1024, 4), 16)
    return Launch(triton_parts.split_kernel, grid, (upper, upper + lower, columns), constants, warps)


def split(above: Tensor, below: Tensor | None = None, of_columns: Tensor | None = None) -> Parts:
    """A contiguous matrix, or two with one under the other, in parts: scaled by rows, or by columns of given size."""
    (upper, columns), lower = above.shape, 0 if below is None else below.shape[0]
    numbers = empty(upper + lower, columns, above.device)
    largest = numbers.new_empty(upper + lower, dtype=torch.int32) if of_columns is None else of_columns
    launch = _split(dtypes(above), upper, lower, columns, of_columns is None)
    launch(above, above if below is None else below, numbers, largest)
    return Parts(numbers, largest)


def turn(parts: Parts) -> Parts:
    """The transpose of a matrix in parts."""
    return Parts(parts.numbers.transpose(1, 2), parts.largest)


def width_of(columns: int) -> int:
    """Columns of a program's product."""
    return 128 if columns > 64 else 64


def pieces_of(rows: int, columns: int, inner: int, processors: int) -> int:
    """Into how many pieces the inner indices are split: the last round of programs should be a full one.

    Costs are microseconds on one H200; results of pieces have to be written and added. Programs that have a multiprocessor
    to themselves, or share it with one other, are faster than three.
    """

    def cost(pieces: int) -> float:
        programs = ceil_div(rows, ROWS) * ceil_div(columns, width_of(columns)) * pieces
        rounds, others = divmod(ceil_div(programs, processors), TOGETHER)
        time = (rounds + (0, 0.53, 0.77)[others]) * inner / pieces * 0.036
        return time + (2e-6 * pieces * rows * columns + 2 if pieces > 1 else 0)

    return min(range(1, min(16, max(1, inner // 128)) + 1), key=cost)


@remembered
def _product(
    device: torch.device, turns: tuple, rows: int, columns: int, inner: int, upper: int, each: int
) -> tuple[Launch, int]:
    pieces = pieces_of(rows, columns, inner, multiprocessors(device))
    step, width = ceil_div(ceil_div(inner, pieces), INNER) * INNER, width_of(columns)
    whole = rows % ROWS == 0 and columns % width == 0 and inner % INNER == 0
    constants = {"TURN_A": turns[0], "TURN_B": turns[1], "WHOLE": whole, "BELOW": upper < rows}
    constants |= {"BM": ROWS, "BN": width, "BK": INNER, "STAGES": STAGES}
    grid = (ceil_div(rows, ROWS), ceil_div(columns, width), ceil_div(inner, step))
    numbers = (rows, columns, inner, upper, each, step, 1.0)
    return Launch(triton_parts.product_kernel, grid, numbers, constants, 4, STAGES, REGISTERS), grid[2]


def product(a: Parts, b: Parts, upper: int | None = None, each: int = 1) -> tuple[Tensor, Tensor | None]:
    """The product of two matrices in parts, (2, M, K) and (2, K, N), in float32: its first ``upper`` rows, the others.

    ``each`` of the first rows of ``a`` were scaled together.
    """
    (_, rows, inner), columns, device = a.numbers.shape, b.numbers.shape[2], a.numbers.device
    upper, turns = rows if upper is None else upper, tuple(not t.numbers.is_contiguous() for t in (a, b))
    launch, pieces = _product(device, turns, rows, columns, inner, upper, each)
    above = torch.empty(pieces, upper, columns, dtype=torch.float32, device=device)
    below = above.new_empty(pieces, rows - upper, columns) if upper < rows else None
    launch(a.numbers, b.numbers, a.largest, b.largest, above, above if below is None else below)
    return tuple(None if t is None else t[0] if pieces == 1 else t.sum(0) for t in (above, below))
