"""Launches the kernel of ``triton_sums.py``: few outputs, backward, on a fine grid.

Shapes follow from short measured rules; ``layers/flash/NOTES.md`` holds the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from layers.flash import triton_sums
from layers.flash.launch import INTERPRETED, Launch, ceil_div, divisor, power_of_2, remembered

LISTED = 256  # samples of a feature that are looked at together
HELD = 24 * 1024  # bytes of sums, of the 48 KiB that a program has at most; with more, a feature takes several programs
GROUPS = 4  # and so many at most, as each of them looks at all samples
MOST = 4096  # samples: longer sums would be less exact


class Shape(NamedTuple):
    """Warps of a program, programs of a feature, samples looked at together, and bytes of shared memory."""

    warps: int
    groups: int
    listed: int
    bytes: int


@remembered
def shape(samples: int, rows: int, outputs: int, order: int) -> Shape | None:
    """None where this kernel is of no use: for too many sums or samples, or more sums in a window than a warp has threads."""
    pair, width = divisor(outputs, 2), order + 1
    groups = ceil_div(4 * rows * outputs, HELD)
    if torch.version.hip or width * (outputs // pair) > 32 or groups > GROUPS or samples > MOST:
        return None
    warps = 2 if samples <= 128 and rows <= 256 else 4
    listed = max(min(power_of_2(samples), LISTED), 32 * warps)
    together = 32 * warps * pair  # numbers that a program sets to zero or reads at once, some beyond the last
    sums = (ceil_div(rows, groups * warps) + 3 * width) * warps * outputs
    numbers = warps * (listed + 4) + listed * width + ceil_div(sums, together) * together + together
    return Shape(warps, groups, listed, ceil_div(4 * numbers, 4096) * 4096)


def backward(
    shape: Shape,
    sizes: tuple,
    outputs: int,
    order: int,
    grid: tuple,
    dot_d: int,
    scatter_d: int,
    scaled: bool,
    base: bool,
) -> tuple[Launch, tuple[int, ...]]:
    """The launch, and of what shape the numbers are that stand for shared memory. ``sizes``: (B, I, G); ``grid``: lo, hi,
    G / (hi - lo)."""
    samples, features, size = sizes
    step, pair = divisor(outputs, 4), divisor(outputs, 2)
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": tl.float32, "SCALED": scaled}
    constants |= {"BASE": base, "UNIT": step, "BI": 16 * shape.warps, "BO": max(power_of_2(outputs), 4)}
    constants |= {"PAIRS": pair == 2, "CB": shape.listed, "WARPS": shape.warps, "BYTES": shape.bytes}
    constants |= {"INTERPRETED": INTERPRETED}
    sums = features * shape.groups
    gathers = samples * ceil_div(features, constants["BI"]) if dot_d >= 0 else 0
    numbers = (samples, features, outputs // step, size, shape.groups, sums, *grid)
    launch = Launch(triton_sums.sums_kernel, (sums + gathers,), numbers, constants, shape.warps)
    return launch, (shape.bytes // 4,) if INTERPRETED else ()
