"""Launches the kernels of ``triton_dense.py``: the steps of the dense route that a library does not have."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from layers.flash import gpu_parts, gpu_tiles, triton_dense, triton_packed
from layers.flash.launch import Launch, ceil_div, dtypes, multiprocessors, on_device_of, remembered, unit

FEWEST_ROWS, MOST_ROWS = 12, 2048  # of features whose windows are shifted: faster from, and exact products up to
SUITS = 2**-8, 2**15  # the largest number of a gradient whose others float16 holds well enough
CACHE = 2**26  # bytes of basis values that no cache keeps until they are read


def _wide(*kinds: torch.dtype):
    return tl.float64 if torch.float64 in kinds else tl.float32


def _offset(count: int):
    """The integers that count so many: narrow ones are divided much faster."""
    return tl.int32 if count < 2**31 - 2**16 else tl.int64


@remembered
def _basis(
    kinds: tuple,
    shape: tuple,
    order: int,
    lo: float,
    hi: float,
    d: int,
    leads: tuple,
    base: bool,
    by: str | None = None,
    matrix: tuple = (0, 0, 0, 1, 0, 0),
) -> Launch:
    (samples, features, rows), (_, x_dtype, weight_dtype, scale) = shape, kinds
    wide = gpu_parts.padded(features) if by else features
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype)}
    constants |= {"SCALED": scale is not None, "PARTS": by is not None, "BY_SAMPLE": by == "sample"}
    narrow = weight_dtype.itemsize == 2
    places = next(n for n in (8 if by or narrow else 4, 4, 2, 1) if n <= rows)  # 16 bytes
    tile = {"BB": 8 if narrow else 4, "BC": 512 if by else 256}
    constants |= {"OFFSET": _offset(wide * rows), "UNIT": places, "PADDED": gpu_parts.WIDTH if wide > features else 0}
    upper, at_below, end_below, columns, height, across = matrix
    step = unit(columns)
    constants |= {"OUTPUTS": step} | tile
    blocks, act_blocks = ceil_div(wide * rows, tile["BC"]), ceil_div(wide, tile["BC"]) if base else 0
    programs = ceil_div(samples, tile["BB"]) * (blocks + act_blocks)
    programs += ceil_div(height, 4) * ceil_div(across, 256)
    numbers = (samples, features, wide * rows, rows - order, blocks, act_blocks, *leads)
    numbers += (upper, at_below, end_below, columns // step, height, across)
    numbers += (lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.basis_kernel, (programs,), numbers, constants, 4)


@remembered
def _packed(kinds: tuple, shape: tuple, order: int, lo: float, hi: float, d: int) -> Launch | None:
    """The launch for weights of two bytes, whose windows are shifted; None where ``_basis`` is faster, or alone fits."""
    (samples, features, rows), (_, x_dtype, weight_dtype, base, scale) = shape, kinds
    if weight_dtype.itemsize != 2 or order > 3 or features * rows % 8 or not FEWEST_ROWS <= rows <= MOST_ROWS:
        return None
    inputs = 256 if rows < 64 else 128
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype), "SCALED": scale is not None}
    constants |= {"BASE": base is not None, "INPUTS": inputs}
    constants |= {"LEAVES": ".cs" if 2 * samples * features * rows > CACHE else ""}
    size = rows - order
    numbers = (samples, features, size, ceil_div(2**32, rows), lo, hi, size / (hi - lo))
    return Launch(triton_packed.packed_kernel, (samples * ceil_div(features, inputs),), numbers, constants, 4)


def basis(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> tuple[Tensor, Tensor | None]:
    """All basis values (B, I * R) in the dtype of the weights, SiLU's values (B, I) in that of ``base``; scaled."""
    (samples, features), rows = x.shape, weight.shape[1]
    values = torch.empty(samples, features * rows, dtype=weight.dtype, device=x.device)
    acts = None if base is None else torch.empty(x.shape, dtype=base.dtype, device=x.device)
    shape, grid = (samples, features, rows), (order, float(lo), float(hi), d)
    scaling, to = x if scale is None else scale.contiguous(), values if acts is None else acts
    with on_device_of(x):
        if launch := _packed(dtypes(x, weight, base, scale), shape, *grid):
            launch(x, scaling, values, to, x.new_empty(3 * x.numel(), dtype=torch.int32))
        else:
            launch = _basis(dtypes(x, weight, scale), shape, *grid, (features * rows, features, 0), base is not None)
            launch(x, scaling, x, values, to, x, x, x, x)
    return values, acts


@remembered
def _measure(kinds: tuple, shape: tuple, matrix: tuple, bound: float, d: int, base: bool, by: str) -> Launch:
    (samples, features), (upper, rows, columns), (_, _, scale) = shape, matrix, kinds
    constants = {"D": d, "SCALED": scale is not None, "BASE": base, "BY_SAMPLE": by == "sample"}
    step = unit(columns)
    constants |= {"UNIT": step, "BR": 32, "BC": 64}
    blocks = ceil_div(rows, 32) * ceil_div(columns, 64)
    programs = blocks + ceil_div(samples, 32) * ceil_div(features, 64)
    numbers = (upper, rows, columns // step, samples, features, blocks, bound)
    return Launch(triton_dense.measure_kernel, (programs,), numbers, constants, 4)


def measure(
    above: Tensor, below: Tensor | None, x: Tensor, scale: Tensor | None, bound: float, d: int, base: bool, by: str
) -> tuple[Tensor, Tensor]:
    """The largest magnitudes of the columns of a matrix, or of two with one under the other, and those that values may
    have: of each sample (B), or of each feature's basis values and of its SiLU's (2 * I); see ``gpu_parts.Parts``.
    """
    (upper, columns), rows = above.shape, above.shape[0] + (0 if below is None else below.shape[0])
    launch = _measure(dtypes(x, scale), tuple(x.shape), (upper, rows, columns), bound, d, base, by)
    inputs = x.shape[0] if by == "sample" else 2 * x.shape[1]
    # Each begins at a multiple of 16 bytes.
    largest = torch.zeros(ceil_div(columns, 4) * 4 + inputs, dtype=torch.int32, device=x.device)
    of_columns, of_inputs = largest[:columns], largest[-inputs:]
    launch(above, above if below is None else below, x, x if scale is None else scale, of_columns, of_inputs)
    return of_columns, of_inputs


def _bound(weight: Tensor, order: int, lo: float, hi: float, d: int) -> float:
    """No basis value, or d-th derivative of one, is larger: each derivative is a difference of two, over a cell's width."""
    return (2 * (weight.shape[1] - order) / (hi - lo)) ** d


def _lengths(features: int, rows: int, base: Tensor | None) -> tuple[int, int]:
    """Of a sample's padded basis values, and with SiLU's behind them, if there is a base."""
    wide = gpu_parts.padded(features)
    return wide * rows, wide * (rows if base is None else rows + 1)


def factors(
    x: Tensor,
    weight: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    order: int,
    lo: float,
    hi: float,
    d: int,
    grad: Tensor | None,
) -> tuple[gpu_parts.Parts, gpu_parts.Parts]:
    """Both factors of a product, in parts: all basis values and, behind them, SiLU's, if there is a base, and what they
    are multiplied by, scaled by columns.

    That is the weights, with those of the base under them, and the values are scaled by samples, (2, B, I * R + I); or it
    is ``grad``, and the values are the transpose, scaled by features. ``I`` and the columns are padded with zeros.
    """
    (samples, features), rows, has_base = x.shape, weight.shape[1], base is not None
    by, above, below = ("sample", weight.flatten(0, 1), base) if grad is None else ("feature", grad, None)
    (upper, outputs), (columns, lead) = above.shape, _lengths(features, rows, base)
    largest = measure(above, below, x, scale, _bound(weight, order, lo, hi, d), d, has_base, by)
    values = gpu_parts.empty(samples, lead, x.device)
    at_below, height = (columns, lead) if grad is None else (upper, upper)
    matrix = gpu_parts.empty(height, gpu_parts.padded(outputs), x.device)
    kinds, shape = dtypes(x, weight, scale), (samples, features, rows)
    end_below = at_below if below is None else at_below + features
    leads, size = (lead, lead, values.stride(0)), (upper, at_below, end_below, outputs, *matrix.shape[1:])
    launch = _basis(kinds, shape, order, float(lo), float(hi), d, leads, has_base, by, size)
    scale, acts = x if scale is None else scale, values[:, :, columns:] if has_base else values
    launch(x, scale, largest[1], values, acts, above, above if below is None else below, matrix, largest[0])
    values = values.transpose(1, 2) if by == "feature" else values
    return gpu_parts.Parts(values, largest[1]), gpu_parts.Parts(matrix, largest[0])


@remembered
def _contract(
    kinds: tuple, shape: tuple, order: int, lo: float, hi: float, d: int, leads: tuple, through_base: bool
) -> Launch:
    (samples, features, rows), (_, x_dtype, weight_dtype) = shape, kinds
    constants = {"ORDER": order, "D": d, "CT": _wide(x_dtype, weight_dtype), "BASE": through_base}
    block = 128
    constants |= {"OFFSET": _offset(samples * features), "BN": block}
    numbers = (samples * features, features, rows - order, *leads, lo, hi, (rows - order) / (hi - lo))
    return Launch(triton_dense.contract_kernel, (ceil_div(samples * features, block),), numbers, constants, 4)


def contract(x: Tensor, products: Tensor, through_base: Tensor | None, weight: Tensor, order, lo, hi, d) -> Tensor:
    """The entries of ``products`` (B, I * R) inside each window, weighted by the basis and added up: (B, I)."""
    leads = (products.stride(0), 0 if through_base is None else through_base.stride(0))
    launch = _contract(
        dtypes(x, weight), (*x.shape, weight.shape[1]), order, float(lo), float(hi), d, leads, through_base is not None
    )
    p = torch.empty_like(x)
    with on_device_of(x):
        launch(x, products, products if through_base is None else through_base, p)
    return p


@remembered
def _narrowed(kinds: tuple, samples: int, outputs: int) -> Launch:
    count, block = samples * outputs, 2048
    numbers = (count, max(1.0, samples / 2**15), *SUITS)
    return Launch(triton_dense.narrow_kernel, (ceil_div(count, block),), numbers, {"BN": block}, 4)


def narrowed(grad: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """``grad`` (B, O), contiguous, in float16, and what has to be multiplied by the results (1,): for those of products
    with the weights, which may shrink it further, and for sums over samples. The latter is 1 where it can be.
    """
    largest = torch.linalg.vector_norm(grad, torch.inf)
    scaled, kept = (torch.empty_like(grad, dtype=torch.float16) for _ in range(2))
    factors = torch.empty(2, device=grad.device)
    with on_device_of(grad):
        _narrowed(dtypes(grad), *grad.shape)(grad, largest, scaled, kept, factors)
    return (scaled, factors[:1]), (kept, factors[1:])


@remembered
def _multiply(kinds: tuple, count: int, processors: int) -> Launch:
    block = 4096
    programs = min(ceil_div(count, block), 8 * processors)
    return Launch(triton_dense.multiply_kernel, (programs,), (count,), {"BN": block}, 4)


def multiply(numbers: Tensor, factor: Tensor) -> Tensor:
    """``numbers``, contiguous, times ``factor`` (1), in place; where that is 1 the launch costs all that there is to pay."""
    if numbers.numel():
        with on_device_of(numbers):
            _multiply(dtypes(numbers, factor), numbers.numel(), multiprocessors(numbers.device))(numbers, factor)
    return numbers


def apply_in_parts(
    x: Tensor, weight: Tensor, base: Tensor | None, scale: Tensor | None, order: int, lo: float, hi: float, d: int
) -> Tensor:
    """``y`` (B, O); see ``layers/flash/reference.py``."""
    weight, base, scale = (None if t is None else t.contiguous() for t in (weight, base, scale))
    with on_device_of(x):
        return gpu_parts.products(*factors(x, weight, base, scale, order, lo, hi, d, None), columns=weight.shape[2])[0]


def adjoint_in_parts(
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
    grad, weight, base, scale = (None if t is None else t.contiguous() for t in (grad, weight, base, scale))
    (samples, features), (_, rows, outputs) = x.shape, weight.shape
    columns, lead = _lengths(features, rows, base)
    p = v = b = pair = products = None

    def dot(products: Tensor) -> Tensor:
        through_base = None if base is None else products[:, columns:]
        return contract(x, products, through_base, weight, order, lo, hi, dot_d)

    with on_device_of(x):
        if dot_d >= 0:
            pair = gpu_parts.split_rows(grad, weight.flatten(0, 1), base, columns)
            across = gpu_parts.padded(outputs)
            sizes = (lead, across, samples), (samples, lead, across)
            if scatter_d < 0 or not gpu_tiles.side_by_side(*sizes, x.device):
                p, pair = dot(gpu_parts.products(*pair)[0]), None
        if scatter_d >= 0:
            values, right = factors(x, weight, base, scale, order, lo, hi, scatter_d, grad)
            below = (columns, 0 if base is None else features)
            v, b, products = gpu_parts.products(values, right, outputs, features * rows, rows, below, pair)
            v = v.view(weight.shape)
        if products is not None:
            p = dot(products)
    return tuple(x.new_empty(0) if t is None else t for t in (p, v, b))
