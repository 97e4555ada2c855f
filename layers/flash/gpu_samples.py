"""Launches the kernels of ``triton_samples.py``: few features and many samples.

The shapes are fixed by short measured rules, so that no reader waits for an autotuner; ``layers/flash/NOTES.md`` holds
the measurements.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import triton_samples
from layers.flash.gpu_few import FEW_ROWS, precision
from layers.flash.launch import Launch, ceil_div, divisor, dtypes, multiprocessors, power_of_2, remembered

FEWEST = 100  # samples: with fewer, other kernels are as fast
FEATURES = 16  # at most, as they are taken one after the other; backward more, where outputs are few
FEW_OUTPUTS = 32  # up to which the other kernels have a program for each sample
EACH = 1200  # samples for each feature, from which these are faster than those
NUMBERS = 2**20  # of y, up to which, with more outputs, more than four features pay forward
# Backward: how many multiplications products of all rows may make, or those of one sample, however many samples there are;
# rows on a fine grid, features on a coarse one. With more outputs fewer, and so many samples times features times outputs.
WORK, WORK_EACH, ROWS, MANY_FEATURES = 550e6, 2**13, 2**12, 256
WIDE_WORK, WIDE_WORK_EACH, WIDE_NUMBERS = 320e6, 2**12, 13e6
OUTPUTS = 128  # of a program
PRODUCTS = 4  # programs of a multiprocessor that make products, unless their sums get shorter than SHORT
SHORT, LONG = 64, 1024  # samples of a piece; tensor cores cut longer sums off
TOGETHER = 2  # features of a program, for the gradient of x


def takes_forward(samples: int, features: int, outputs: int) -> bool:
    """Whether these kernels were measured to be the fastest forward."""
    if samples < FEWEST or features > FEATURES:
        return False
    if outputs <= FEW_OUTPUTS:
        return samples >= EACH * features
    return features <= 4 or samples * outputs <= NUMBERS


def takes_backward(samples: int, features: int, rows: int, outputs: int) -> bool:
    """… backward, in float32, where nothing jumps at a knot: products do not look for cells."""
    height = features * (rows + 1)
    each = height * max(power_of_2(outputs), 16)
    if samples < FEWEST:
        return False
    if outputs > FEW_OUTPUTS:
        fits = samples * features * outputs <= WIDE_NUMBERS and samples * each <= WIDE_WORK
        return features <= FEATURES and (fits or each <= WIDE_WORK_EACH)
    fits = features <= MANY_FEATURES if rows <= FEW_ROWS else height <= ROWS
    return fits and (samples * each <= WORK or each <= WORK_EACH)


class Block(NamedTuple):
    """Of a program that makes no product: its samples, its outputs, its warps."""

    samples: int
    outputs: int
    warps: int


def block(samples: int, outputs: int, wide: bool) -> Block:
    """Forward. One warp needs no barriers, where its registers hold the sums. ``wide``: in float64."""
    width = min(max(power_of_2(outputs), 4), OUTPUTS)
    if width == OUTPUTS:
        return Block(16, width, 8)
    if not wide and (width == 32 or (width == 64 and samples >= 2**15)):
        return Block(32, width, 1)
    return Block(1024 // width, width, 4)


@remembered
def _forward(kinds: tuple, shape: tuple, outputs: int, order: int, lo: float, hi: float, d: int) -> Launch:
    (samples, features, rows), (_, x_dtype, weight_dtype, base, scale) = shape, kinds
    wide, size, step = torch.float64 in (x_dtype, weight_dtype), rows - order, divisor(outputs, 4)
    tile = block(samples, outputs, wide)
    constants = {"ORDER": order, "D": d, "CT": tl.float64 if wide else tl.float32}
    constants |= {"SCALED": scale is not None, "BASE": base is not None, "UNIT": step}
    constants |= {"BB": tile.samples, "BO": tile.outputs}
    grid = (ceil_div(samples, tile.samples), ceil_div(outputs, tile.outputs))
    numbers = (samples, features, outputs // step, size, lo, hi, size / (hi - lo))
    return Launch(triton_samples.samples_kernel, grid, numbers, constants, tile.warps)


def apply(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``. Contiguous tensors, at least one sample."""
    rows, outputs = weight.shape[1:]
    launch = _forward(dtypes(x, weight, base, scale), (*x.shape, rows), outputs, order, float(lo), float(hi), d)
    y = torch.empty(x.shape[0], outputs, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    launch(x, x if scale is None else scale, weight, weight if base is None else base, y)
    return y


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
    processors: int,
) -> tuple[Launch, Launch | None, tuple[int, ...]]:
    """The launch of products and dots, the one that adds pieces, and the shape of these."""
    (samples, features, rows), (_, _, _, _, base, scale) = shape, kinds
    size, step = rows - order, divisor(outputs, 4)
    height = features * (rows if base is None else rows + 1)
    tile = {"BM": min(max(power_of_2(height), 16), 64), "BS": 32, "BN": min(max(power_of_2(outputs), 16), OUTPUTS)}
    tiles, blocks = ceil_div(height, tile["BM"]), ceil_div(outputs, tile["BN"])
    wanted = ceil_div(PRODUCTS * processors, tiles * blocks)
    each = ceil_div(min(max(ceil_div(samples, wanted), SHORT), LONG), tile["BS"]) * tile["BS"]
    pieces = ceil_div(samples, each)
    products = tiles * blocks * pieces if scatter_d >= 0 else 0
    width = min(max(power_of_2(outputs), 4), OUTPUTS)
    rest = {"BB": (1024 if width < 32 else 2048) // width, "BI": TOGETHER, "BO": width}
    dots = ceil_div(samples, rest["BB"]) * ceil_div(features, TOGETHER) if dot_d >= 0 else 0
    constants = {"ORDER": order, "DOT_D": dot_d, "SCATTER_D": scatter_d, "CT": tl.float32, "SCALED": scale is not None}
    constants |= {"BASE": base is not None, "PRECISION": precision, "UNIT": step} | tile | rest
    numbers = (samples, features, outputs // step, size, each, tiles, products, lo, hi, size / (hi - lo))
    launch = Launch(triton_samples.pieces_kernel, (products + dots,), numbers, constants, 4)
    add, count = None, features * rows * outputs
    if scatter_d >= 0:
        base_count = 0 if base is None else features * outputs
        constants = {"BP": min(power_of_2(pieces), 32), "BN": 64}
        grid = (ceil_div(count + base_count, constants["BN"]),)
        add = Launch(triton_samples.add_pieces_kernel, grid, (count, base_count, pieces), constants, 4)
    return launch, add, (pieces, height, outputs)


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

    Contiguous tensors, at least one sample; ``order - scatter_d >= 1``; not in float64.
    """
    rows, outputs = weight.shape[1:]
    kinds, shape = dtypes(grad, x, weight, base, scale), (*x.shape, rows)
    processors = multiprocessors(x.device)
    products = precision(weight)
    made = _backward(kinds, shape, outputs, order, float(lo), float(hi), dot_d, scatter_d, products, processors)
    launch, add, size = made
    dots = torch.empty_like(x) if dot_d >= 0 else None
    v = b = pieces = None
    if scatter_d >= 0:
        v = torch.empty_like(weight)
        b = None if base is None else torch.empty_like(base)
        pieces = torch.empty(size, dtype=torch.float32, device=x.device)
    given = x, x if scale is None else scale, grad, weight, weight if base is None else base
    launch(*given, *[x if t is None else t for t in (dots, pieces)])
    if add is not None:
        add(pieces, v, v if b is None else b)
    return dots, v, b
