"""Launches the kernels of ``triton_parts.py``: products of float32 matrices on tensor cores, as exact as in float32."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.flash import triton_parts
from layers.flash.launch import INTERPRETED, Launch, ceil_div, dtypes, multiprocessors, remembered, tf32_allowed


@dataclass(frozen=True)
class Tile:
    """Rows, columns and inner indices of a program's product, and how many programs a multiprocessor holds."""

    rows: int
    columns: int
    inner: int
    together: int
    work: int  # of those programs, relative to others: rows * columns * together where all run equally fast


TILES = (Tile(64, 128, 32, 2, 16384), Tile(64, 64, 32, 3, 13400))
STAGES = 3  # loads in flight
# A100 and H100, whose tensor cores are 16 times as fast in bfloat16 as other units in float32. Not Blackwell: the sums of the
# larger tile do not fit into its tensor memory.
FASTER = {(8, 0), (9, 0)}
WIDTH = 16  # columns that divide those of every matrix, so that all loads are 16 bytes wide
PART = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter's is wrong


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
    """Room for a matrix in three parts (3, rows, columns)."""
    return torch.empty(3, rows, columns, dtype=PART, device=device)


@remembered
def _split(kinds: tuple, upper: int, lower: int, columns: int) -> Launch:
    grid = (ceil_div(upper + lower, 4), ceil_div(columns, 256))
    return Launch(triton_parts.split_kernel, grid, (upper, upper + lower, columns), {"BR": 4, "BC": 256}, 4)


def split(above: Tensor, below: Tensor | None = None) -> Tensor:
    """The three parts (3, rows, columns) of a contiguous matrix, or of two with one under the other."""
    (upper, columns), lower = above.shape, 0 if below is None else below.shape[0]
    parts = empty(upper + lower, columns, above.device)
    _split(dtypes(above), upper, lower, columns)(above, above if below is None else below, parts)
    return parts


def turn(parts: Tensor) -> Tensor:
    """The transpose of a matrix in parts."""
    return parts.transpose(1, 2)


def tile_of(rows: int, columns: int, inner: int, processors: int) -> tuple[Tile, int]:
    """The tile, and into how many pieces the inner indices are split: the last round of programs should be a full one.

    Costs are numbers of multiplications that a multiprocessor does; results of pieces have to be written and added.
    """

    def cost(tile: Tile, pieces: int) -> float:
        programs = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns) * pieces
        rounds = ceil_div(programs, processors * tile.together)
        return rounds * tile.work * inner / pieces + (0.84 * pieces * rows * columns + 1e6 if pieces > 1 else 0)

    choices = [(tile, pieces) for tile in TILES for pieces in range(1, min(16, max(1, inner // 128)) + 1)]
    return min(choices, key=lambda choice: cost(*choice))


@remembered
def _product(device: torch.device, turns: tuple, rows: int, columns: int, inner: int, upper: int) -> tuple[Launch, int]:
    tile, pieces = tile_of(rows, columns, inner, multiprocessors(device))
    step = ceil_div(ceil_div(inner, pieces), tile.inner) * tile.inner
    whole = rows % tile.rows == 0 and columns % tile.columns == 0 and inner % tile.inner == 0
    constants = {"TURN_A": turns[0], "TURN_B": turns[1], "WHOLE": whole, "BELOW": upper < rows}
    constants |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.inner, "STAGES": STAGES}
    grid = (ceil_div(rows, tile.rows), ceil_div(columns, tile.columns), ceil_div(inner, step))
    numbers = (rows, columns, inner, upper, step, 1.0)
    return Launch(triton_parts.product_kernel, grid, numbers, constants, 4, STAGES), grid[2]


def product(a: Tensor, b: Tensor, upper: int | None = None) -> tuple[Tensor, Tensor | None]:
    """The product of two matrices in parts, (3, M, K) and (3, K, N), in float32: its first ``upper`` rows, the others."""
    (_, rows, inner), columns, device = a.shape, b.shape[2], a.device
    upper, turns = rows if upper is None else upper, tuple(not t.is_contiguous() for t in (a, b))
    launch, pieces = _product(device, turns, rows, columns, inner, upper)
    above = torch.empty(pieces, upper, columns, dtype=torch.float32, device=device)
    below = above.new_empty(pieces, rows - upper, columns) if upper < rows else None
    launch(a, b, above, above if below is None else below)
    return tuple(None if t is None else t[0] if pieces == 1 else t.sum(0) for t in (above, below))
