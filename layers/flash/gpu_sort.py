"""Launches the kernels of ``triton_rank.py`` and ``triton_sort.py``: the samples of each feature in order of their cells.

One program sorts those of a feature if its shared memory holds them. More are sorted by PyTorch, cell numbers alone, in as
few bytes as hold them: a radix sort goes through all samples once for each byte.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_rank, triton_sort
from layers.flash.launch import INTERPRETED, Launch, block, ceil_div, power_of_2

FAST = 1024  # samples, for which even one warp counts; fewer than four were not timed, and PyTorch sorts by several launches
HELD = 44 * 1024  # bytes of shared memory, of the 48 KiB that a program has at most: Triton takes some for itself
STEP = 4096  # of these bytes, which a kernel knows: not every number of samples shall be another one to compile


class Ranking(NamedTuple):
    """Warps of a program that sorts the samples of a feature; whether it keeps their inputs, else these are brought together
    first; and bytes of shared memory."""

    warps: int
    kept: bool
    bytes: int


class Sort(NamedTuple):
    """The launches that sort: one that turns ``x`` around or finds cells, if there is one; then one that ranks, or else
    PyTorch, and for a walk one that looks up places. And how many bits of a key hold the sample, and the dtype of keys."""

    before: Launch | None
    rank: Launch | None
    place: Launch | None
    bits: int
    dtype: torch.dtype


def key_format(samples: int, size: int, order: int) -> tuple[int, torch.dtype]:
    """How many of a key's bits hold the sample, and the dtype of the keys."""
    bits = max(samples - 1, 1).bit_length()
    return bits, torch.int32 if (size + 2 * order + 3).bit_length() + bits < 31 else torch.int64


def _cells(size: int, order: int) -> int:
    """How many there are, with those that samples outside belong to."""
    return size + 2 * order + 2


def _cell_dtype(size: int, order: int) -> torch.dtype:
    last = _cells(size, order)
    return torch.uint8 if last < 2**8 else torch.int16 if last < 2**15 else torch.int32


def ranking(samples: int, size: int, order: int, wide: bool) -> Ranking | None:
    """None where shared memory does not hold what a program needs, or cannot be used. ``wide``: inputs in float64."""
    if torch.version.hip or key_format(samples, size, order)[1] != torch.int32:
        return None
    most = min(4 if samples <= 1024 else 8 if samples <= 2048 else 16, power_of_2(ceil_div(samples, 32)))
    for kept, fewest in ((True, max(most // 2, 1)), (False, 1 if samples <= FAST else 4)):
        warps = most
        while warps >= fewest and not (kept and wide):
            used = ceil_div(4 * (warps * (_cells(size, order) | 1) + samples * (1 + kept)), STEP) * STEP
            if used <= HELD:
                return Ranking(warps, kept, used)
            warps //= 2
    return None


def sort(
    shape: tuple,
    order: int,
    grid: tuple,
    wide: bool,
    cut: tuple = (0, 0),
    dot_d: int = 0,
    scatter_d: int = 0,
    scaled: bool = False,
    places: bool = False,
    slopes: bool = False,
    acts: bool = False,
) -> Sort:
    """The launches that sort. ``shape``: (B, I, G); ``grid``: lo, hi, G / (hi - lo); ``wide``: sums in float64.

    With ``places`` for a walk, which is cut into ``cut[1]`` stretches of ``cut[0]`` steps; the rest as in ``rank_kernel``.
    """
    (samples, features, size), (lo, _, inv_h) = shape, grid
    bits, dtype = key_format(samples, size, order)
    how = ranking(samples, size, order, wide)
    turns = places if how is None else not how.kept
    before = place = rank = None
    values = {"SCATTER_D": scatter_d, "CT": tl.float64 if wide else tl.float32, "SCALED": scaled}
    if how is None or turns:
        constants = {"ORDER": order} | values | {"ACTS": acts, "TURN": turns, "CELLS": how is None}
        constants |= {"BB": 32, "BI": block(features, 32)}
        programs = ceil_div(samples, constants["BB"]), ceil_div(features, constants["BI"])
        before = Launch(triton_sort.cells_kernel, programs, (*shape, *grid), constants, 4)
    if how is not None:
        cells = _cells(size, order)
        constants = {"ORDER": order, "DOT_D": dot_d} | values | {"PLACES": places, "SLOPES": slopes}
        constants |= {"ACTS": acts and not turns, "BITS": bits, "KEPT": how.kept}
        constants |= {"CELLS": max(power_of_2(cells), 32 * how.warps), "WARPS": how.warps, "BYTES": how.bytes}
        constants |= {"INTERPRETED": INTERPRETED}
        numbers = (*shape, *cut, cells, 1 if turns else features, *grid)
        rank = Launch(triton_rank.rank_kernel, (features,), numbers, constants, how.warps)
    elif places:
        constants = {"ORDER": order, "DOT_D": dot_d, "CT": values["CT"], "SLOPES": slopes, "BITS": bits}
        constants |= {"BN": block(samples, 256)}
        programs = features, ceil_div(samples, constants["BN"])
        place = Launch(triton_sort.place_kernel, programs, (samples, *cut, lo, inv_h), constants, 4)
    return Sort(before, rank, place, bits, dtype)


def run(
    launches: Sort,
    x: Tensor,
    size: int,
    order: int,
    scale: Tensor | None = None,
    places: Tensor | None = None,
    slopes: Tensor | None = None,
    acts: Tensor | None = None,
    cuts: Tensor | None = None,
) -> Tensor:
    """The sorted keys (I, B); fills what a walk needs, see ``rank_kernel``."""
    samples, features = x.shape
    keys = torch.empty(features, samples, dtype=launches.dtype, device=x.device)
    scale, places, slopes, acts, cuts = (keys if t is None else t for t in (scale, places, slopes, acts, cuts))
    turned, cells = x, keys
    if launches.before is not None:
        if launches.rank is None:
            cells = torch.empty(features, samples, dtype=_cell_dtype(size, order), device=x.device)
        if launches.rank is not None or launches.place is not None:
            turned = torch.empty(features, samples, dtype=x.dtype, device=x.device)
        launches.before(x, scale, cells, turned, acts)
    if launches.rank is not None:
        spare = torch.empty(HELD // 4, dtype=torch.int32) if INTERPRETED else keys
        launches.rank(turned, scale, keys, places, slopes, acts, cuts, spare)
        return keys
    cells, ranked = cells.sort(dim=1, stable=True)
    if launches.place is None:
        return cells.to(keys.dtype).bitwise_left_shift_(launches.bits).bitwise_or_(ranked.to(keys.dtype))
    launches.place(turned, cells, ranked, keys, places, slopes, cuts)
    return keys
