"""Which tile makes a product in parts, and in how many pieces: a rule instead of an autotuner, which would make readers wait.

Its numbers were measured on one H200; ``layers/flash/NOTES.md`` holds the measurements. Launches: ``gpu_parts.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from layers.flash.launch import ceil_div, multiprocessors, remembered, shared_memory

STAGES = 3  # loads in flight
GAIN = 0.95  # of the time that another way takes: less is not worth another tile, or much memory
MUCH = 2**27  # bytes of a product


class Tile(NamedTuple):
    """A program's product: rows, columns, inner indices at a time; its warps, the registers a thread may use, how many programs
    a multiprocessor holds, and what they take, measured on one H200.

    That is the microseconds of an inner index of as many programs, the part of it that one alone takes, and of how many
    indices a program's start takes the time.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    registers: int | None
    together: int
    index: float
    alone: float
    start: int

    def width(self, columns: int) -> int:
        """Columns of a program where a product has so many."""
        return min(self.columns, 128 if columns > 64 else 64)

    def programs(self, rows: int, columns: int) -> int:
        return ceil_div(rows, self.rows) * ceil_div(columns, self.width(columns))

    def part(self, programs: int) -> float:
        """The time of so many programs of a multiprocessor, compared with as many as it holds."""
        return self.alone + (1 - self.alone) * (programs - 1) / max(self.together - 1, 1)

    def shared_memory(self) -> int:
        """Bytes: two parts of each of two blocks, for every load in flight."""
        return STAGES * 2 * 2 * (self.rows + self.columns) * self.inner


SMALL = Tile(64, 128, 32, 4, 168, 3, 0.038, 0.48, 48)  # runs everywhere
LARGE = Tile(128, 128, 64, 8, None, 1, 0.0218, 1.0, 128)  # reads a third less
NARROW = Tile(64, 64, 64, 4, 168, 2, 0.021, 0.6, 150)  # for up to 64 columns


def _microseconds(tile: Tile, sizes: tuple, pieces: tuple, processors: int) -> float:
    """What products of these sizes (rows, columns, inner indices) take on one H200, side by side and each in pieces.

    Programs are dealt out in rounds; the last one is faster where multiprocessors have fewer of them. Results of pieces have
    to be written and added. Of two products the first has the long programs, which have to end, too.
    """
    slots, length, idle, work, sums, longest = processors * tile.together, 0.0, 0, 0.0, 0.0, 0.0
    for (rows, columns, inner), cut in zip(sizes, pieces, strict=True):
        programs = tile.programs(rows, columns) * cut
        before, length = length, inner / cut + tile.start
        longest = max(longest, before)
        work += programs * length / slots
        idle = -max(0, programs - idle * int(before // length)) % slots  # some fit beside those before
        sums += 2e-6 * cut * rows * columns + 2 if cut > 1 else 0
    if idle > 0:
        last = slots - idle
        work += (tile.part(ceil_div(last, processors)) - last / slots) * length
    return tile.index * max(work, 0.6 * longest) + sums


class Plan(NamedTuple):
    """How one or two products are made: the tile, into how many pieces the inner indices of each are cut, and the
    microseconds that it is expected to take."""

    tile: Tile
    pieces: tuple[int, ...]
    time: float


def plan(sizes: tuple, processors: int, shared_memory: int) -> Plan:
    """For a GPU with so many multiprocessors, and bytes of shared memory for a program."""
    cuts = [[n for n in (1, 2, 3, 4, 6, 8, 12, 16) if n == 1 or inner // n >= 128] for _, _, inner in sizes]
    choices = [(n,) for n in cuts[0]] if len(cuts) == 1 else [(n, m) for n in cuts[0] for m in cuts[1]]
    tiles, widths = [SMALL], [columns for _, columns, _ in sizes]
    if min(widths) > 64 and LARGE.shared_memory() <= shared_memory:
        tiles.append(LARGE)
    elif max(widths) <= 64:
        tiles.append(NARROW)
    plans = [Plan(tile, cut, _microseconds(tile, sizes, cut, processors)) for tile in tiles for cut in choices]
    first, best = min((p for p in plans if p.tile is SMALL), key=lambda p: p.time), min(plans, key=lambda p: p.time)
    return best if best.time < GAIN * first.time else first


@remembered
def planned(sizes: tuple, device: torch.device) -> Plan:
    """How these products are made on this GPU."""
    return plan(sizes, multiprocessors(device), shared_memory(device))


@remembered
def side_by_side(first: tuple, second: tuple, device: torch.device) -> bool:
    """Whether two products take less time in one launch; their memory is then needed at the same time."""
    apart = planned((first,), device).time + planned((second,), device).time
    much = 4 * second[0] * second[1] > MUCH
    return planned((first, second), device).time < (GAIN if much else 1) * apart
