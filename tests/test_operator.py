"""The operator behind FlashKAN on every route and device, against float64 sums written with SciPy (reference64.py).

The rule for a tolerance: on the same numbers, a result may be off by twice what plain PyTorch makes in the same
precision (the dense formula of KANLinear, with autograd), plus a few roundings of its largest sum. Tests of a gradient
are worth what they reject: the last part builds wrong backward passes and requires the rule to turn each of them down.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import random
import shutil
import subprocess
import sys
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from layers import FlashKAN, KANLinear
from layers.bsplines import dense_basis, knots, local_basis, window_rows
from layers.flash import dispatch, flash_kan, reference
from layers.flash.operator import NOT_NEEDED, adjoint_op, apply_op
from tests import ROOT, snapshot
from tests.faults import replace
from tests.reference64 import Layer64, knot_positions, silu

ROUTES = ("local", "dense", "reference")
# A window has k + 1 values, each after k roundings; sums add one rounding a term, of either sign. Where plain PyTorch is
# exact by luck (one sample, one input), this many roundings of the largest sum of absolute terms are left.
ROUNDINGS = 3

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(params=ROUTES)
def route(request):
    return request.param


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# Cases, and the rule


@dataclass(frozen=True)
class Case:
    """One layer and one batch. ``x`` is one of random, crowd, one cell, knots, outside, ends; see :func:`positions`."""

    batch: int = 17
    features: int = 5
    outputs: int = 3
    grid_size: int = 12
    order: int = 3
    x: str = "random"
    grid_range: tuple[float, float] = (-1, 1)
    base: bool = True
    strided: bool = False
    second: bool = False  # the gradients of the gradients as well
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None  # None: dtype

    def __str__(self):
        words = [f"{self.batch}x{self.features}x{self.outputs}-G{self.grid_size}-k{self.order}-{self.x}"]
        words += [str(self.grid_range)] if self.grid_range != (-1, 1) else []
        words += [word for word in ("strided", "second") if getattr(self, word)] + ([] if self.base else ["no base"])
        return "-".join(words + [str(t).removeprefix("torch.") for t in (self.dtype, self.weight_dtype) if t])


def positions(case: Case, rng: np.random.Generator) -> np.ndarray:
    lo, hi = case.grid_range
    h = (hi - lo) / case.grid_size
    shape = (case.batch, case.features)
    if case.x in ("random", "crowd"):  # a quarter outside, more than a window away included
        x = rng.uniform(lo - (hi - lo) / 6, hi + (hi - lo) / 6, shape)
        # Pieces meet with jumps in the k-th derivative; the gradients of gradients need the second one.
        if case.order < 3:
            cell = np.floor((x - lo) / h)
            x = lo + (cell + ((x - lo) / h - cell).clip(0.01, 0.99)) * h
        if case.x == "crowd":  # four of five of a feature's samples in one cell, which may lie outside
            x = np.where(rng.random(shape) < 0.8, x[:1], x)
    elif case.x == "one cell":  # every sample of a feature adds to the same k + 1 rows
        x = lo + (case.grid_size // 2 + rng.uniform(0.05, 0.95, shape)) * h
    elif case.x == "knots":
        x = rng.choice(
            knot_positions(case.grid_size, -case.order - 1, case.grid_size + case.order + 1, (lo, hi)), shape
        )
    elif case.x == "outside":
        beyond = rng.uniform(0, case.order + 2, shape) * h + np.where(rng.random(shape) < 0.1, 50 * (hi - lo), 0)
        x = np.where(rng.random(shape) < 0.5, lo - beyond, hi + beyond)
    elif case.x == "ends":
        ends = np.float32([lo, hi])
        x = rng.choice(
            np.concatenate([ends, np.nextafter(ends, np.float32(9)), np.nextafter(ends, np.float32(-9))]), shape
        )
    return x.astype(np.float32).astype(np.float64)


@functools.cache
def data_of(case: Case) -> dict[str, torch.Tensor]:
    """float64 tensors on the CPU that hold float32 (or narrower) numbers, so that every precision sees the same ones."""
    rng = np.random.default_rng(zlib.crc32(repr(case).encode()))
    narrow = case.weight_dtype or torch.float32
    sizes = {"batch": case.batch, "features": case.features, "rows": case.grid_size + case.order, "out": case.outputs}

    def draw(*names, dtype=torch.float32):
        return torch.from_numpy(rng.standard_normal([sizes[n] for n in names])).to(dtype).double()

    data = {"x": torch.from_numpy(positions(case, rng)), "weight": draw("features", "rows", "out", dtype=narrow)}
    if case.base:
        data["base"] = draw("features", "out", dtype=narrow)
    data |= {"g": draw("batch", "out"), "a": draw("batch", "features"), "v": draw("features", "rows", "out")}
    return data | {"c": draw("features", "out")}


@functools.cache
def exact_and_unit(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every result in float64, and the sums of the absolute values of its terms."""
    data = {name: t.numpy() for name, t in data_of(case).items()}
    results = []
    for absolute in (False, True):
        layer = Layer64(data["x"], data["weight"], data.get("base"), case.order, case.grid_range, absolute=absolute)
        found = {"y": layer.value()} | {f"d/d{n}": t for n, t in layer.gradients(data["g"]).items()}
        if case.second:
            second = layer.second_gradients(*(np.abs(data[n]) if absolute else data[n] for n in "gavc"))
            found |= {f"second d/d{n}": t for n, t in second.items()}
        results.append(found)
    return tuple(results)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with a gap after each and the dimensions stored in the opposite order."""
    backward = t.permute(*reversed(range(t.ndim))).contiguous()
    gaps = torch.full((*backward.shape, 2), math.nan, dtype=t.dtype, device=t.device)
    gaps[..., 0] = backward
    return gaps[..., 0].permute(*reversed(range(t.ndim)))


def measure(function, case: Case, device: str) -> dict[str, torch.Tensor]:
    """The value and the gradients of ``function(x, weight, base, order, grid_range)``."""
    layout = strided if case.strided else torch.Tensor.contiguous
    dtypes = {"weight": case.weight_dtype or case.dtype, "base": case.weight_dtype or case.dtype}
    t = {n: layout(v.to(device, dtypes.get(n, case.dtype))) for n, v in data_of(case).items()}
    leaves = {n: t[n].requires_grad_() for n in ("x", "weight", "base") if n in t}
    y = function(t["x"], t["weight"], t.get("base"), case.order, case.grid_range)
    found = {"y": y}
    t["g"] = t["g"].to(y.dtype).requires_grad_(case.second)
    first = torch.autograd.grad(y, list(leaves.values()), t["g"], create_graph=case.second)
    found |= {f"d/d{n}": gradient for n, gradient in zip(leaves, first, strict=True)}
    for n, gradient in zip(leaves, first, strict=True):
        assert gradient.dtype == leaves[n].dtype and gradient.shape == leaves[n].shape, f"d/d{n}"
    if case.second:
        wanted = {"g": t["g"]} | leaves
        cotangents = [t[n] for n in "avc"][: len(first)]
        # At k = 0 nothing is left of some gradients, and autograd may say so.
        second = torch.autograd.grad(first, list(wanted.values()), cotangents, allow_unused=True)
        found |= {
            f"second d/d{n}": torch.zeros_like(wanted[n]) if gradient is None else gradient
            for n, gradient in zip(wanted, second, strict=True)
        }
    return {n: v.detach() for n, v in found.items()}


def plain(x, weight, base, order, grid_range):
    """The formula of KANLinear as a function: what people run today, and the yardstick for errors."""
    basis = dense_basis(x, weight.shape[1] - order, order, grid_range)
    y = basis.reshape(x.shape[0], weight.shape[0] * weight.shape[1]).to(weight.dtype) @ weight.flatten(0, 1)
    if base is not None:
        y = y + nn.functional.silu(x).to(weight.dtype) @ base
    return y.to(torch.promote_types(x.dtype, weight.dtype))


@functools.cache
def errors_of_plain(case: Case, device: str) -> dict[str, float]:
    exact, _ = exact_and_unit(case)
    return {n: largest(t.double().cpu().numpy() - exact[n]) for n, t in measure(plain, case, device).items()}


def largest(a: np.ndarray) -> float:
    return float(np.abs(a).max(initial=0))


def verify(function, case: Case, device: str) -> None:
    """Raises AssertionError that names the result unless each is as exact as plain PyTorch in the same precision."""
    exact, unit = exact_and_unit(case)
    allowed = errors_of_plain(case, device)
    for name, t in measure(function, case, device).items():
        assert t.shape == exact[name].shape, f"{name}: shape {tuple(t.shape)}, needed {exact[name].shape}"
        error = largest(t.double().cpu().numpy() - exact[name])
        limit = 2 * allowed[name] + ROUNDINGS * torch.finfo(t.dtype).eps * largest(unit[name])
        assert error <= limit, f"{name}: off by {error:.2e}, allowed {limit:.2e} (plain PyTorch {allowed[name]:.2e})"


def verify_repeats(function, case: Case, device: str, times: int) -> None:
    """Raises AssertionError unless ``times`` more runs give the same bits."""
    first = measure(function, case, device)
    for _ in range(times):
        for name, t in measure(function, case, device).items():
            assert torch.equal(t, first[name]), f"{name} differs from run to run"


def on(route):
    return functools.partial(flash_kan, route=route)


# Compiling a kernel for each degree, derivative and number of outputs takes a second or two on a CPU: the cases share.
SIZE_CASES = (
    Case(1, 1, 1, 5),
    Case(17, 3, 1, 2),
    Case(63, 1, 17, 500),
    Case(17, 63, 17, 5),
    Case(1, 63, 3, 1, second=True),
    Case(3, 17, 63, 50, second=True),
    Case(63, 17, 63, 5, second=True),
    Case(3, 3, 1023, 50, second=True),
    Case(3, 1023, 3, 5, second=True),
    Case(1023, 3, 3, 100, second=True),
    Case(63, 16, 48, 5, second=True),  # sizes of which 16 is a divisor: products in parts on some GPUs
    Case(256, 64, 128, 5),
    Case(130, 90, 70, 5, second=True),  # not of these, padded
    Case(1100, 17, 63, 100),
    Case(7000, 3, 63, 300),  # on a GPU, more samples than a program keeps while it sorts
    Case(12_000, 3, 63, 150),  # … than it sorts: cells in one byte, and in two
    Case(12_000, 2, 33, 300, second=True),
    Case(1100, 40, 13, 102),  # few outputs
    Case(2100, 520, 3, 5),  # … and sums in pieces
    Case(1100, 41, 3, 100),  # … and so few that they are summed up in shared memory
    Case(300, 5, 10, 1000),  # … by two programs for a feature
    Case(300, 41, 10, 100, x="one cell"),  # … by all warps, as one cell has all samples
    Case(1, 66, 13, 1, 5, "crowd", base=False),  # … near the middle of functions of degree 5
    Case(1100, 3, 63, 100, second=True),  # few features: on a GPU, blocks of samples
    Case(2500, 2, 5, 5, second=True),
    Case(3000, 2, 130, 20, x="one cell"),  # … in blocks of outputs
    Case(40_000, 1, 40, 5, 2, x="outside", base=False),  # … by one warp
    Case(1250, 1, 7, 9, x="knots", strided=True),
    Case(1250, 1, 7, 9, x="ends", dtype=torch.float64),
    Case(2100, 50, 9, 5),  # … forward a warp for each sample
)
ORDER_CASES = tuple(Case(order=k, second=k == 3, grid_range=(0, 1)) for k in range(6))
ORDER_CASES += tuple(Case(1250, 1, 3, order=k, second=k == 3, grid_range=(0, 1)) for k in range(6))
PLACE_CASES = (
    Case(63, x="one cell", second=True),
    Case(63, x="knots", second=True),
    Case(63, x="knots", order=2, grid_size=50),
    Case(63, x="outside", second=True),
    Case(63, x="ends", second=True, grid_size=50),
    Case(63, grid_range=(-3, 7), grid_size=500, second=True),
    Case(strided=True, second=True),
    Case(63, 17, 63, 5, strided=True),
    Case(base=False, second=True),
    Case(0, second=True),
    Case(63, dtype=torch.float64, second=True),
    Case(63, order=2, dtype=torch.float64, second=True),
)
NARROW_CASES = tuple(
    Case(63, 17, outputs, 100, weight_dtype=dtype, grid_range=ends)
    for dtype in (torch.bfloat16, torch.float16)
    for outputs, ends in ((63, (-1, 1)), (63, (0, 1)), (10, (-1, 1)))
)
# Eight divides all basis values of a sample: on a GPU the dense route shifts packed windows, a program for 256 inputs.
NARROW_CASES += tuple(Case(5, 272, 3, 20 - k, k, weight_dtype=torch.bfloat16, grid_range=(-1.5, 1)) for k in range(4))
NARROW_CASES += tuple(Case(150, 9, 63, 100, weight_dtype=dtype) for dtype in (torch.bfloat16, torch.float16))
CASES = SIZE_CASES + ORDER_CASES + PLACE_CASES


@pytest.mark.parametrize("case", CASES + NARROW_CASES, ids=str)
def test_values_and_gradients(case, route, device):
    verify(on(route), case, device)


@pytest.mark.parametrize("outputs", (10, 40))
def test_long_sums_are_nearly_as_exact_as_a_matrix_product(outputs, device, monkeypatch):
    """Which is off by 2e-7 to 7e-7 here; 24,000 numbers added up one after the other are off by 3e-6."""
    pytest.importorskip("triton" if device == "cuda" else "numba")
    if device == "cuda":
        from layers.flash import gpu_walk

        monkeypatch.setattr(gpu_walk, "multiprocessors", lambda _: 1)  # else a walk is cut up for the GPU's sake
    torch.manual_seed(0)
    x, grad = torch.rand(30_000, 24, device=device) * 2 - 1, torch.randn(30_000, outputs, device=device)
    x = torch.where(torch.rand_like(x) < 0.8, 0.05, x)
    weight, base = torch.zeros(24, 8, outputs, device=device), torch.zeros(24, outputs, device=device)
    _, *found = adjoint_op(grad, x, weight, base, None, 3, -1.0, 1.0, NOT_NEEDED, 0, "local")
    x, grad = x.double(), grad.double()
    exact = dense_basis(x, 5, 3, (-1, 1)).flatten(1).t() @ grad, nn.functional.silu(x).t() @ grad
    for ours, needed in zip(found, exact, strict=True):
        assert (ours.double().view_as(needed) - needed).norm() < 1.5e-6 * needed.norm()


@pytest.mark.parametrize(
    "case", (Case(63, 17, 63, 5), Case(63, 17, 63, 100), Case(300, 64, 64, 5), Case(300, 90, 70, 5)), ids=str
)
def test_the_automatic_route(case, device):
    verify(flash_kan, case, device)


@pytest.mark.parametrize(
    "case", (Case(3, 17, 63, 50, second=True), Case(130, 90, 70, 5), Case(strided=True, second=True), Case(0)), ids=str
)
def test_output_buffers_hold_rubbish_before(case, route, device):
    """Memory freed full of NaN comes back to whoever asks for the same size next: every number must be written."""
    sizes = {case.batch, case.features, case.outputs, case.features * (case.grid_size + case.order)}
    sizes = {a * b for a in sizes for b in sizes}

    def poisoned(*args):
        for _ in range(4):
            rubbish = [torch.full((n,), math.nan, device=device) for n in sizes for _ in range(4)]
            del rubbish
        return flash_kan(*args, route=route)

    verify(poisoned, case, device)


@pytest.mark.parametrize(
    "case",
    (
        Case(63, 17, 63, 50, second=True),
        Case(63, x="one cell", second=True),
        Case(1023, 3, 3, 100),
        Case(1100, 17, 63, 100),
        Case(63, grid_range=(-3, 7), grid_size=500, second=True),  # elsewhere by atomics
    ),
    ids=str,
)
def test_bit_identical_under_deterministic_algorithms(case, route, device, deterministic):
    """In this mode PyTorch also fills new memory with NaN, so a forgotten number shows too."""
    verify(on(route), case, device)
    verify_repeats(on(route), case, device, times=2)


def test_bit_identical_wherever_the_arrays_lie():
    """Compiled loops may take another way where small arrays lie close together, so the heap is stirred between calls."""
    order, shuffled = 1, random.Random(0)
    rng = np.random.default_rng(0)
    shapes = {"grad": (8, 8), "x": (8, 1), "weight": (1, 6, 8), "base": (1, 8), "scale": (8, 1)}
    tensors = [torch.from_numpy(rng.standard_normal(shape)) for shape in shapes.values()]
    stirred, first = [], None
    for n in range(2500):
        stirred += [np.empty(shuffled.randrange(1, 72)) for _ in range(10)]
        shuffled.shuffle(stirred)
        del stirred[300:]
        grad, x, weight, base, scale = (t.clone() for t in tensors)
        got = (
            apply_op(x, weight, base, scale, order, -1.0, 1.0, 1, "local"),
            *adjoint_op(grad, x, weight, base, None, order, -1.0, 1.0, 1, 0, "local"),
        )
        first = first or got
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True)), f"another result in call {n}"


@pytest.mark.parametrize("outputs", (1, 3, 17, 63, 65))
def test_an_infinite_weight_is_met_only_by_who_uses_it(outputs, route, device):
    """Kernels read whole vectors, beyond the last output into the next row: nothing of that may come through."""
    x = torch.linspace(-1.49, 1.53, 61, device=device).reshape(-1, 1).requires_grad_()  # none on a knot: 0 * inf is NaN
    weight, base = torch.ones(1, 11, outputs, device=device), torch.ones(1, outputs, device=device)
    weight[0, 5, 0] = torch.inf
    y = flash_kan(x, weight.requires_grad_(), base.requires_grad_(), route=route)
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert y[:, 1:].isfinite().all()
    meets = dense_basis(x.detach(), 8, 3)[:, 0, 5] != 0
    assert meets.any()
    if route != "dense":  # a product over all rows multiplies it by zero
        assert torch.equal(~y[:, 0].isfinite(), meets) and torch.equal(~grad[:, 0].isfinite(), meets)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("size, ends", ((3, (-1, 1)), (49, (0, 1)), (100, (-1, 1)), (500, (0.1, 0.7))))
def test_the_side_of_a_knot(size, ends, dtype, route):
    """Pieces of degree 0 and slopes of degree 1 jump at a knot: on it the right one counts, next to it its own.

    Not on a GPU, whose kernels leave a sample within a rounding of a knot to either side.
    """
    for order in (0, 1):
        on_knots = knots(size, order, ends, dtype=dtype)
        beside = [torch.nextafter(on_knots, torch.full_like(on_knots, side)) for side in (-9.0, 9.0)]
        x = torch.cat([on_knots, *beside]).unsqueeze(-1).requires_grad_()
        weight = torch.randn(1, size + order, 3, dtype=dtype)
        y = flash_kan(x, weight, None, order, ends, route=route)
        if order == 1:
            (y,) = torch.autograd.grad(y[:, 0].sum(), x)
        exact = dense_basis(x.detach(), size, order, ends, derivative=order)[:, 0] @ weight[0]
        exact = exact if order == 0 else exact[:, :1]
        assert torch.allclose(y, exact, rtol=1e-4, atol=1e-4), f"order {order}: off by {(y - exact).abs().max():.2e}"


def test_derivatives_of_silu_keep_their_digits_far_from_zero(route, device):
    """As polynomials in the logistic function they cancel where it is close to 1: off by 1.5e-5 and 7e-5 for d = 3 and 4."""
    x = torch.linspace(-30, 30, 2001, device=device).unsqueeze(-1)
    weight, base = torch.zeros(1, 8, 1, device=device), torch.ones(1, 1, device=device)
    for d in range(5):
        got = apply_op(x, weight, base, None, 3, -1.0, 1.0, d, route)
        assert largest(got.double().cpu().numpy() - silu(x.double().cpu().numpy(), d)) < 3e-6, d


def narrow_layer(dtype, device, ends=(-1, 1)):
    rng = torch.Generator().manual_seed(3)
    x = torch.linspace(*ends, 400).mul(0.999).reshape(100, 4).to(device)
    return (
        x,
        torch.randn(4, 203, 3, generator=rng).to(device, dtype),
        torch.randn(4, 3, generator=rng).to(device, dtype),
    )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_narrow_weights_leave_the_position_alone(dtype, route, device):
    """At G = 200 a position in bfloat16 would be off by half an interval; rounded basis values lose 3 digits at most."""
    x, weight, base = narrow_layer(dtype, device)
    y = flash_kan(x, weight, base, route=route)
    assert y.dtype == torch.float32
    exact = torch.from_numpy(Layer64(x.cpu(), weight.double().cpu(), base.double().cpu(), 3).value())
    assert (y.double().cpu() - exact).abs().max() <= 8 * torch.finfo(dtype).eps
    both = flash_kan(x.to(dtype), weight, base, route=route)
    assert both.dtype == dtype
    exact = torch.from_numpy(Layer64(x.to(dtype).double().cpu(), weight.double().cpu(), base.double().cpu(), 3).value())
    assert (both.double().cpu() - exact).abs().max() <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("weights", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("inputs", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_dtypes(inputs, weights, route, device):
    x = torch.rand(5, 4, device=device, dtype=inputs).requires_grad_()
    weight = torch.rand(4, 8, 3, device=device, dtype=weights).requires_grad_()
    base = torch.rand(4, 3, device=device, dtype=weights).requires_grad_()
    y = flash_kan(x, weight, base, route=route)
    assert y.dtype == torch.promote_types(inputs, weights)
    y.sum().backward()
    assert (x.grad.dtype, weight.grad.dtype, base.grad.dtype) == (inputs, weights, weights)


@pytest.mark.parametrize("inputs, weights, bases", ((64, 32, 32), (32, 32, 16), (32, 16, 32), (16, 32, 64)))
def test_dtypes_that_differ(inputs, weights, bases, route, device):
    """Sums are made in float64 if ``x`` has it, and no worse than the narrowest weights allow."""
    dtypes = {64: torch.float64, 32: torch.float32, 16: torch.bfloat16}
    rng = torch.Generator().manual_seed(1)
    shapes = ((300, 16), (16, 8, 64), (16, 64), (300, 64))
    x, weight, base, g = (torch.rand(shape, generator=rng, dtype=torch.float64) for shape in shapes)
    x, weight, base = (
        t.to(device, dtypes[n]) for t, n in zip((x, weight, base), (inputs, weights, bases), strict=True)
    )
    leaves = [t.requires_grad_() for t in (x, weight, base)]
    y = flash_kan(*leaves, route=route)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = flash_kan(*exact_leaves, route="reference")
    g = g.to(y)
    assert y.dtype == torch.promote_types(x.dtype, weight.dtype)
    limit = 1e-12 if inputs == 64 else 1e-5 if min(weights, bases) == 32 else 2e-2
    got = (y, *torch.autograd.grad(y, leaves, g))
    needed = (exact, *torch.autograd.grad(exact, exact_leaves, g.double()))
    for name, a, b, leaf in zip(("y", "x", "weight", "base"), got, needed, (y, *leaves), strict=True):
        error, own = (a.double() - b).norm() / b.norm(), torch.finfo(leaf.dtype).eps
        assert a.dtype == leaf.dtype and error <= limit + own, f"{name}: off by {error:.1e}"


def float16_layer(device):
    """Inputs in float32, weights in float16, a gradient that comes back to them, and what made these numbers."""
    rng = torch.Generator().manual_seed(1)
    x, weight, base, g = (torch.randn(s, generator=rng) for s in ((300, 20), (20, 8, 64), (20, 64), (300, 64)))
    return x.to(device), weight.to(device).half(), base.to(device).half(), g.to(device), rng


@pytest.mark.parametrize("size", (1e6, 1e-9))
def test_large_and_small_gradients_pass_weights_in_float16(size, route, device):
    """float16 itself ends at 65,504 and at 6e-8; a gradient in float32 on its way to ``x`` does not."""
    x, weight, base, g, _ = float16_layer(device)
    x.requires_grad_()
    y = flash_kan(x, weight, base, route=route)
    (got,) = torch.autograd.grad(y, x, size * g, retain_graph=True)
    (needed,) = torch.autograd.grad(y, x, g)
    assert (got / size - needed).norm() < 5e-3 * needed.norm()


def test_sums_of_gradients_for_weights_in_float16(route, device):
    x, weight, base, g, rng = float16_layer(device)
    weight.requires_grad_()
    g = 3e4 * torch.rand(g.shape, generator=rng).to(device)  # 300 of them are more than float16 holds, in parts less
    got, needed = (
        torch.autograd.grad(flash_kan(x, weight, base, route=r), weight, g * 1e-3)[0] for r in (route, "reference")
    )
    assert needed.isfinite().all() and (got.float() - needed).norm() < 5e-3 * needed.float().norm()


@pytest.mark.parametrize("size", (1, 1e5, 1e-7))
def test_gradients_of_all_sizes_for_weights_in_float16(size, route, device):
    """Their own gradients hold what float16 can: it is rounded once, not each part of a sum."""
    x, weight, base, g, _ = float16_layer(device)
    if size > 1:
        g[0] *= size  # more than float16 holds, but no basis value is above 2/3
    else:
        g *= size
    leaves = [t.requires_grad_() for t in (weight, base)]
    both = (torch.autograd.grad(flash_kan(x, *leaves, route=r), leaves, g) for r in (route, "reference"))
    for got, needed in zip(*both, strict=True):
        held = needed.isfinite()
        error = (got.double() - needed)[held].norm() / needed[held].double().norm()
        # ``needed`` is rounded once, to steps of 6e-8; a sum made in another order may be a step away.
        assert held.double().mean() > 0.9 and error < (5e-3 if size >= 1 else 2e-2), f"off by {error:.1e}"


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_bad_gradient_stays_with_its_sample(bad, route, device):
    x = (torch.rand(6, 4, device=device) * 2 - 1).requires_grad_()
    weight, base = torch.rand(4, 8, 3, device=device).half(), torch.rand(4, 3, device=device).half()
    y = flash_kan(x, weight, base, route=route)
    g = torch.rand_like(y)
    (needed,) = torch.autograd.grad(y, x, g, retain_graph=True)
    g[2] = bad
    (got,) = torch.autograd.grad(y, x, g)
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    assert not got[2].isfinite().any()
    assert torch.allclose(got[others], needed[others], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", ((4,), (0, 4), (2, 0, 4), (2, 3, 4), (1, 2, 1, 4)))
def test_leading_shapes(shape, route, device):
    x = (torch.rand(shape, device=device) * 2.4 - 1.2).requires_grad_()
    weight = torch.randn(4, 8, 3, device=device).requires_grad_()
    y = flash_kan(x, weight, route=route)
    assert y.shape == (*shape[:-1], 3)
    expected = plain(x.reshape(-1, 4), weight, None, 3, (-1, 1)).reshape(y.shape)
    assert torch.allclose(y, expected, atol=1e-5)
    g = torch.randn_like(y)
    for got, needed in zip(
        torch.autograd.grad(y, (x, weight), g), torch.autograd.grad(expected, (x, weight), g), strict=True
    ):
        assert got.shape == needed.shape and torch.allclose(got, needed, atol=2e-5)


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_nan_and_infinity_stay_in_their_row(bad, route, device):
    x = torch.rand(6, 4, device=device) * 2 - 1
    weight, base = torch.randn(4, 8, 3, device=device), torch.randn(4, 3, device=device)
    clean = x.clone().requires_grad_()
    x[2, 1] = bad
    x.requires_grad_()
    others = torch.tensor([0, 1, 3, 4, 5], device=device)
    for b in (base, None):
        y, needed = (flash_kan(t, weight, b, route=route) for t in (x, clean))
        assert torch.allclose(y[others], needed[others], atol=1e-5)
        if math.isnan(bad):
            assert y[2].isnan().all()
        elif b is None:
            assert y[2].isfinite().all()
        got, needed = (torch.autograd.grad(t.sum(), leaf)[0] for t, leaf in ((y, x), (needed, clean)))
        assert torch.allclose(got[others], needed[others], atol=1e-4)
        assert not math.isnan(bad) or got[2, 1].isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Differentiation to any order


def double_inputs(device, order=3, *, seed=0, batch=4):
    """Samples inside, outside and never next to a knot, where a difference quotient would mix two pieces."""
    rng = np.random.default_rng(seed)
    cell = rng.integers(-order, 5 + order, (batch, 2))
    x = torch.from_numpy(-1 + (cell + rng.uniform(0.1, 0.9, cell.shape)) * 0.4)
    tensors = (
        x,
        torch.from_numpy(rng.standard_normal((2, 5 + order, 3))),
        torch.from_numpy(rng.standard_normal((2, 3))),
    )
    return tuple(t.to(device).requires_grad_() for t in tensors)


@pytest.mark.parametrize("order", (2, 3))
def test_gradcheck(order, route, device):
    tensors = double_inputs(device, order)
    call = functools.partial(flash_kan, spline_order=order, route=route)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradcheck(lambda x, w: call(x, w), tensors[:2])
    # fast_mode compares random projections of the Jacobians: a wrong entry shows in them just as well.
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, w: call(x, w), tensors[:2], fast_mode=True)


def test_third_order(route, device):
    """The gradients of a gradient's gradient: what a loss with a second derivative in it needs to be trained."""
    tensors = double_inputs(device, batch=2)

    def slope(x, weight, base):
        y = flash_kan(x, weight, base, route=route)
        return torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(slope, tensors, fast_mode=True)


@pytest.mark.parametrize("only", ("x", "weight", "base"))
def test_one_gradient_alone(only, route, device):
    tensors = dict(zip(("x", "weight", "base"), double_inputs(device), strict=True))
    together = torch.autograd.grad(flash_kan(*tensors.values(), route=route).square().sum(), tensors.values())
    alone = {n: t.detach().requires_grad_(n == only) for n, t in tensors.items()}
    (got,) = torch.autograd.grad(flash_kan(*alone.values(), route=route).square().sum(), alone[only])
    assert torch.allclose(got, dict(zip(tensors, together, strict=True))[only], rtol=1e-12, atol=1e-12)
    assert not flash_kan(*(t.detach() for t in tensors.values()), route=route).requires_grad


def saved_bytes(call, *parameters) -> int:
    """The bytes that autograd keeps for the backward pass of ``call()``, tensors of ``parameters`` not counted."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result is not None
    return sum(kept.values())


def test_saved_for_backward_does_not_grow_with_the_grid_or_the_outputs(route, device):
    batch, features = 64, 32
    x = torch.rand(batch, features, device=device).requires_grad_()
    for base_activation in (nn.SiLU, None):
        kept, kept_by_dense = {}, {}
        for size in (5, 200):
            for outputs in (3, 50):
                layer = FlashKAN(features, outputs, size, base_activation=base_activation, device=device)
                weights = list(layer.parameters())
                call = functools.partial(flash_kan, x, layer.spline_weight, layer.base_weight, route=route)
                kept[size, outputs] = saved_bytes(call, *weights)
                assert saved_bytes(lambda layer=layer: layer(x), *weights) == kept[size, outputs]
                dense = KANLinear(features, outputs, size, base_activation=base_activation, device=device)
                kept_by_dense[size, outputs] = saved_bytes(lambda dense=dense: dense(x), *dense.parameters())
        assert set(kept.values()) == {x.nbytes}, kept
        assert kept_by_dense[200, 3] > 20 * kept_by_dense[5, 3] > 20 * x.nbytes  # the count sees what there is


def test_saved_by_the_backward_pass_does_not_grow_with_the_grid(route, device):
    """With create_graph the backward pass keeps tensors for its own: x, the gradients of y and what was asked for."""
    kept = set()
    for size in (5, 200):
        x = torch.rand(64, 32, device=device).requires_grad_()
        weight = torch.rand(32, size + 3, 3, device=device).requires_grad_()
        y = flash_kan(x, weight, route=route)
        g = torch.ones_like(y).requires_grad_()
        kept.add(saved_bytes(lambda y=y, x=x, g=g: torch.autograd.grad(y, x, g, create_graph=True), weight, x))
    assert len(kept) == 1 and kept.pop() <= 4 * 64 * 32 * 4


# ---------------------------------------------------------------------------------------------------------------------
# The operator as PyTorch sees it


def op_inputs(device, *, base=True, scale=False, layout=torch.Tensor.contiguous, grad=True):
    x, weight, b = (layout(t.detach()).requires_grad_(grad) for t in double_inputs(device))
    s = layout(torch.rand_like(x)).requires_grad_(grad) if scale else None
    return x, weight, b if base else None, s


# opcheck itself looks at .grad of tensors that are not leaves, and warns about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("layout", (torch.Tensor.contiguous, strided))
@pytest.mark.parametrize("base, scale", ((True, False), (False, True)))
def test_opcheck(base, scale, layout, route, device):
    x, weight, b, s = op_inputs(device, base=base, scale=scale, layout=layout)
    torch.library.opcheck(apply_op, (x, weight, b, s, 3, -1.0, 1.0, 0, route))
    grad = layout(torch.randn(4, 3, dtype=torch.float64, device=device)).requires_grad_()
    for dot_d, scatter_d in ((1, 0), (1, NOT_NEEDED), (NOT_NEEDED, 0)):
        torch.library.opcheck(adjoint_op, (grad, x, weight, b, s, 3, -1.0, 1.0, dot_d, scatter_d, route))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_fake_tensors_have_the_shapes_and_dtypes_of_real_ones(dtype, route):
    x, weight = torch.rand(2, 5, 4), torch.rand(4, 8, 3, dtype=dtype)
    real = flash_kan(x, weight, route=route)
    fake = flash_kan(x.to("meta"), weight.to("meta"), route=route)
    assert fake.device.type == "meta" and (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_compile(route, device):
    torch.compiler.reset()
    compiled = torch.compile(on(route), fullgraph=True, backend="aot_eager")
    for batch in (4, 6):  # another batch size compiles once more, with a symbol in place of the number
        x, weight, base = double_inputs(device, batch=batch)
        got, needed = compiled(x, weight, base), flash_kan(x, weight, base, route=route)
        assert torch.equal(got, needed)
        g = torch.randn_like(needed)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight, base), g) for y in (got, needed)), strict=True):
            assert torch.equal(a, b)


def test_compile_layer_and_optimizer_step(device):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = FlashKAN(4, 3, device=device)
    before = layer.spline_weight.detach().clone()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.rand(8, 4, device=device)
    compiled(x).square().mean().backward()
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert not torch.equal(before, layer.spline_weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # the compiler's own
@pytest.mark.parametrize("mode", ("default", pytest.param("reduce-overhead", marks=[pytest.mark.gpu, no_cuda])))
def test_compiled_by_the_default_compiler(mode):
    """As people call it: layers among other operations, another batch size, and inputs that are not contiguous."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not (shutil.which("c++") or shutil.which("g++")):
        pytest.skip("PyTorch's compiler needs a C++ compiler here")
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(FlashKAN(40, 24, 20), nn.Tanh(), FlashKAN(24, 7, 60)).to(device)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for x in (torch.rand(50, 40), torch.rand(50, 40), torch.rand(33, 40), torch.rand(40, 33).t(), torch.rand(2, 5, 40)):
        x = (2 * x.to(device) - 1).requires_grad_()
        leaves = [x, *model.parameters()]
        got, needed = (
            [t.clone() for t in (y, *torch.autograd.grad(y.square().sum(), leaves))]
            for y in (f(x) for f in (compiled, model))
        )
        for a, b in zip(got, needed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_trace(device):
    """``torch.jit.trace`` is going out of use, but people have it."""
    layer, x = FlashKAN(4, 3, device=device), torch.rand(8, 4, device=device)
    traced = torch.jit.trace(layer, x)
    for batch in (8, 5):
        x = torch.rand(batch, 4, device=device).requires_grad_()
        y = layer(x)
        assert torch.equal(traced(x), y)
        assert torch.equal(*(torch.autograd.grad(f(x).sum(), x)[0] for f in (traced, layer)))


def test_export(device):
    layer = nn.Sequential(FlashKAN(4, 3, device=device), FlashKAN(3, 2, base_activation=None, device=device))
    x = torch.rand(8, 4, device=device)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("flashkan.apply" in name for name in targets) == 2
    for batch in (8, 5):
        x = torch.rand(batch, 4, device=device)
        assert torch.equal(program.module()(x), layer(x))


def test_func_grad_and_jacrev(route, device):
    x, weight, base = (t.detach() for t in double_inputs(device))

    def loss(x, weight, base):
        return flash_kan(x, weight, base, route=route).sin().sum()

    leaves = [t.clone().requires_grad_() for t in (x, weight, base)]
    needed = torch.autograd.grad(loss(*leaves), leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1, 2))(x, weight, base), needed, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    for argnum in range(3):
        got = torch.func.jacrev(on(route), argnums=argnum)(x, weight, base)
        needed = torch.autograd.functional.jacobian(
            lambda t, n=argnum: on(route)(*(t if m == n else u for m, u in enumerate((x, weight, base)))),
            (x, weight, base)[argnum],
        )
        assert torch.allclose(got, needed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "in_dims", ((0, None, None), (2, None, None), (None, 0, None), (None, 0, 0), (0, 0, 0), (None, None, 0))
)
def test_vmap(in_dims, route, device):
    rng = torch.Generator().manual_seed(1)
    shapes = ((4, 2), (2, 8, 3), (2, 3))
    tensors = []
    for shape, dim in zip(shapes, in_dims, strict=True):
        full = list(shape)
        if dim is not None:
            full.insert(dim, 5)
        tensors.append(torch.randn(full, generator=rng, dtype=torch.float64).to(device))
    got = torch.func.vmap(on(route), in_dims=in_dims)(*tensors)
    for n in range(5):
        picked = [t if dim is None else t.select(dim, n) for t, dim in zip(tensors, in_dims, strict=True)]
        assert torch.allclose(got[n], flash_kan(*picked, route=route), rtol=1e-12, atol=1e-12)


def test_vmap_over_nothing(route, device):
    weight = torch.rand(4, 8, 3, device=device)
    got = torch.func.vmap(lambda x: flash_kan(x, weight, route=route))(torch.rand(0, 4, device=device))
    assert got.shape == (0, 3)


@pytest.mark.parametrize("function", (torch.autograd.functional.jacobian, torch.autograd.functional.hessian))
def test_batched_gradients(function, route, device):
    """``vectorize=True`` is ``torch.autograd.grad(..., is_grads_batched=True)``."""
    x, weight, base = (t.detach() for t in double_inputs(device))

    def of(x, weight):
        y = flash_kan(x, weight, base, route=route).sin()
        return y if function is torch.autograd.functional.jacobian else y.sum()

    got, needed = (function(of, (x, weight), vectorize=both) for both in (True, False))
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(needed), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def test_gradients_of_every_sample(route, device):
    """vmap over grad: how gradients of single samples are computed."""
    x, weight, base = (t.detach() for t in double_inputs(device))

    def loss(x, weight, base):
        return flash_kan(x, weight, base, route=route).sin().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)), in_dims=(0, None, None))(x, weight, base)
    for n in range(len(x)):
        needed = torch.func.grad(loss, argnums=(0, 1, 2))(x[n], weight, base)
        for a, b in zip(got, needed, strict=True):
            assert torch.allclose(a[n], b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_through_func(route, device):
    x, weight, base = (t.detach() for t in double_inputs(device))

    def loss(x):
        return flash_kan(x, weight, base, route=route).sin().sum()

    got = torch.func.jacrev(torch.func.grad(loss))(x)
    assert torch.allclose(got, torch.autograd.functional.hessian(loss, x), rtol=1e-12, atol=1e-12)


# Forward mode makes PyTorch load decompositions that it compiles with torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_forward_mode_is_right_or_refused(route, device):
    """A tangent of zeros would be the worst answer: silent and wrong."""
    x, weight, base = (t.detach() for t in double_inputs(device))
    tangent = torch.randn_like(x)
    call = functools.partial(flash_kan, spline_weight=weight, base_weight=base, route=route)

    def loss(x):
        return call(x).sin().sum()

    def dual():
        with torch.autograd.forward_ad.dual_level():
            return torch.autograd.forward_ad.unpack_dual(call(torch.autograd.forward_ad.make_dual(x, tangent))).tangent

    slope = torch.autograd.functional.jvp(call, x, tangent)[1]
    jacobian = torch.autograd.functional.jacobian(call, x)
    hessian = torch.autograd.functional.hessian(loss, x)
    assert min(t.abs().max() for t in (slope, jacobian, hessian)) > 0.1
    for name, attempt, needed in (
        ("jvp", lambda: torch.func.jvp(call, (x,), (tangent,))[1], slope),
        ("forward_ad", dual, slope),
        ("jacfwd", lambda: torch.func.jacfwd(call)(x), jacobian),
        ("hessian", lambda: torch.func.hessian(loss)(x), hessian),
    ):
        try:
            got = attempt()
        except (NotImplementedError, RuntimeError) as error:
            assert "jvp" in str(error) or "forward" in str(error).lower(), f"{name}: {error}"
        else:
            assert got is not None and torch.allclose(got, needed, rtol=1e-10), f"{name}: wrong, without an error"


@pytest.mark.parametrize("narrow", (torch.bfloat16, torch.float16))
def test_autocast_narrows_the_weights_and_not_the_position(narrow, route, device):
    x, weight, base = narrow_layer(torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, base)]
    with torch.autocast(device, narrow):
        y = flash_kan(*leaves, route=route)
    assert y.dtype == torch.float32
    g = torch.randn_like(y)
    got = (y, *torch.autograd.grad(y, leaves, g))
    y = flash_kan(x, weight.to(narrow), base.to(narrow), route=route)
    needed = (y, *torch.autograd.grad(y, leaves, g))
    for name, a, b in zip(("y", "d/dx", "d/dweight", "d/dbase"), got, needed, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b), f"{name}: off by {(a - b).abs().max():.1e} from the same call with narrow weights"
    layer = FlashKAN(4, 3, 200, device=device)
    with torch.autocast(device, narrow):
        y = layer(x)
    needed = flash_kan(x, layer.spline_weight.to(narrow), layer.base_weight.to(narrow))
    assert torch.equal(y, needed)


@pytest.mark.parametrize(
    "change, error, words",
    (
        ({"x": torch.ones(5, 4, dtype=torch.int64)}, TypeError, "x .*floating.* got torch.int64"),
        ({"spline_weight": torch.ones(4, 8, 3, dtype=torch.int32)}, TypeError, "spline_weight .*floating.*torch.int32"),
        ({"base_weight": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "base_weight .*floating.*torch.int64"),
        ({"x": torch.rand(5, 3)}, ValueError, r"x must have shape \(\*, 4\), got \(5, 3\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \(\*, 4\), got \(\)"),
        ({"spline_weight": torch.rand(4, 8)}, ValueError, r"spline_weight must have shape .* got \(4, 8\)"),
        (
            {"spline_weight": torch.rand(4, 3, 3)},
            ValueError,
            r"spline_weight must have shape .* k = 3, got \(4, 3, 3\)",
        ),
        ({"spline_weight": torch.rand(4, 8, 0)}, ValueError, r"O >= 1 .* got \(4, 8, 0\)"),
        (
            {"spline_weight": torch.rand(4, 8, 3, device="meta")},
            ValueError,
            "spline_weight .*where x is, on cpu, got meta",
        ),
        ({"base_weight": torch.rand(4, 3, device="meta")}, ValueError, "base_weight .*where x is, on cpu, got meta"),
        ({"base_weight": torch.rand(3, 4)}, ValueError, r"base_weight must have shape \(4, 3\), got \(3, 4\)"),
        ({"spline_order": -1}, ValueError, "spline_order must be at least 0, got -1"),
        ({"spline_order": 2.5}, TypeError, "spline_order must be an integer, got 2.5"),
        ({"spline_order": "3"}, TypeError, "spline_order must be an integer, got '3'"),
        ({"grid_range": (1, -1)}, ValueError, "grid_range must be two finite numbers"),
        ({"grid_range": (0, math.nan)}, ValueError, "grid_range must be two finite numbers"),
        ({"grid_range": 3}, TypeError, "grid_range must be two numbers"),
        ({"route": "fast"}, ValueError, "route must be one of .* got 'fast'"),
    ),
)
def test_bad_arguments(change, error, words):
    good = {"x": torch.rand(5, 4), "spline_weight": torch.rand(4, 8, 3), "base_weight": torch.rand(4, 3)}
    flash_kan(**good)
    with pytest.raises(error, match=words):
        flash_kan(**(good | change))


def test_the_function_is_documented():
    for argument in inspect.signature(flash_kan).parameters:
        assert f"{argument}:" in flash_kan.__doc__, f"the docstring of flash_kan does not explain {argument}"


def test_a_default_device_changes_nothing(route):
    x, weight, base = torch.rand(5, 4).requires_grad_(), torch.rand(4, 8, 3), torch.rand(4, 3)
    needed = flash_kan(x, weight, base, route=route)
    with torch.device("meta"):
        got = flash_kan(x, weight, base, route=route)
        (slope,) = torch.autograd.grad(got, x, torch.ones_like(got))
    assert torch.equal(got, needed) and slope.device.type == "cpu"


def test_other_devices_run_on_plain_pytorch():
    class Elsewhere(NamedTuple):
        """What the rule looks at of a tensor on a device without kernels of its own, an Apple GPU."""

        device: torch.device = torch.device("mps")
        is_cuda: bool = False

    assert dispatch.kernels(Elsewhere(), torch.rand(4, 8, 3), 3, 0, "auto") is reference


def keeping_kernels(folder, program: str, tree=ROOT) -> str:
    """What a program prints, run in ``tree`` by a process of its own that keeps its compiled kernels in ``folder``."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder)}
    run = [sys.executable, "-c", program]
    return subprocess.run(run, check=True, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_cpu_kernels_are_made_again_when_the_vectors_change(tmp_path):
    """Numba itself looks only at the file in which a kernel is written."""
    pytest.importorskip("numba")
    tree = snapshot(tmp_path / "tree")
    program = (
        "import torch; from layers.flash import flash_kan; x = torch.zeros(2, 1, requires_grad=True); "
        "flash_kan(x, torch.ones(1, 4, 2), route='local').sum().backward(); print(x.grad.sum().item())"
    )
    before = float(keeping_kernels(tmp_path / "kept", program, tree))
    replace("layers/flash/vectors.py", "-0.0", "1000.0")(tree)  # what a sum begins with
    after = float(keeping_kernels(tmp_path / "kept", program, tree))
    assert abs(before) < 1e-6 and after > 1000


def test_cpu_kernels_without_a_folder_to_keep_them(monkeypatch):
    cpu = dispatch.cpu_kernels()
    if cpu is None:
        pytest.skip("Numba is not installed")
    asked = []

    def njit(cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: function

    monkeypatch.setattr(cpu.numba, "njit", njit)
    assert cpu.compiled()(abs) is abs and asked == [True, False]


def test_cpu_kernels_are_compiled_once_and_found_again(tmp_path):
    """In every notebook and every run after the first, the compiled kernels come from the folder that keeps them."""
    pytest.importorskip("numba")
    program = (
        "import torch; from layers.flash import flash_kan; "
        "x = torch.rand(2, 3, requires_grad=True); flash_kan(x, torch.rand(3, 8, 2), route='local').sum().backward()"
    )
    kept = []
    for _ in range(2):
        keeping_kernels(tmp_path, program)
        kept.append(len(list(tmp_path.rglob("*.nbc"))))
    assert kept[0] == kept[1] > 0, f"{kept[0]} compiled kernels after one run, {kept[1]} after the same run again"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_cpu_kernels_run_in_a_forked_process():
    """As the workers of a DataLoader are made on Linux: the threads that helped in the parent are not there."""
    pytest.importorskip("numba")
    program = (
        "import os, torch; from layers import FlashKAN; torch.set_num_threads(2); "
        "layer, x = FlashKAN(40, 10), torch.rand(60, 40); y = layer(x); child = os.fork(); same = torch.equal(layer(x), y); "
        "os._exit(not same) if child == 0 else exit(os.waitpid(child, 0)[1])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment, timeout=120)


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU alone


@pytest.mark.gpu
@no_cuda
def test_no_synchronisation_and_cuda_graph_capture(route):
    layer = FlashKAN(17, 63, 20, device="cuda")
    x = torch.rand(64, 17, device="cuda").requires_grad_()
    leaves = [x, layer.spline_weight, layer.base_weight]

    def step():
        y = flash_kan(x, layer.spline_weight, layer.base_weight, route=route)
        return y, *torch.autograd.grad(y.square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.rand_like(x) * 2 - 1)
        graph.replay()
        for name, a, b in zip(("y", "d/dx", "d/dweight", "d/dbase"), captured, step(), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


@pytest.mark.gpu
@no_cuda
@pytest.mark.parametrize(
    "case",
    (
        Case(1536, 17, 128, 60),
        Case(1536, 17, 128, 60, order=2, base=False),
        Case(1536, 17, 128, 420, weight_dtype=torch.bfloat16),
        Case(1536, 17, 128, 420, weight_dtype=torch.float16),
    ),
    ids=str,
)
def test_tiles_with_few_registers(case, monkeypatch):
    """Large layers have them; a GPU of eight multiprocessors would have them for these, too."""
    from layers.flash import gpu_many

    monkeypatch.setattr(gpu_many, "multiprocessors", lambda _: 8)
    narrow = case.weight_dtype is not None
    shape = case.batch, case.features, case.grid_size + case.order, case.outputs, case.order
    assert gpu_many.fit(*shape, narrow, False, 8)[0].registers
    verify(on("local"), case, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("case", (Case(), Case(63, 17, 10, 100), Case(63, 17, 63, 50), Case(300, 17, 63, 12)))
def test_on_a_gpu_that_is_not_the_current_one(case, route):
    for device in ("cuda:0", "cuda:1", "cuda:0"):  # what is kept for one GPU must not be used on another
        verify(on(route), case, device)
        assert torch.cuda.current_device() == 0


# (B, I, O, G): beyond 2 ** 31 numbers in the coefficients, then in B * I * O. The small one shows that the test works.
@pytest.mark.parametrize(
    "sizes, route, device",
    (
        ((9, 5, 3, 8), "local", "cpu"),
        ((9, 5, 3, 8), "dense", "cpu"),
        pytest.param((16, 2048, 1056, 1000), "local", "cuda", marks=[pytest.mark.gpu, no_cuda]),
        pytest.param((8192, 520, 512, 8), "local", "cuda", marks=[pytest.mark.gpu, no_cuda]),
        pytest.param((8192, 520, 512, 8), "dense", "cuda", marks=[pytest.mark.gpu, no_cuda]),
        pytest.param((2**22, 4, 130, 8), "local", "cuda", marks=[pytest.mark.gpu, no_cuda]),
    ),
)
def test_offsets_beyond_32_bits(sizes, route, device):
    """The last samples, features and outputs are the ones whose offsets overflow: they are compared with float64."""
    batch, features, outputs, size = sizes
    torch.manual_seed(0)
    x = (torch.rand(batch, features, device=device) * 2 - 1).requires_grad_()
    weight = torch.randn(features, size + 3, outputs, device=device, dtype=torch.bfloat16).requires_grad_()
    y = flash_kan(x, weight, route=route)
    g = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), g)
    last = slice(batch - 2, None)
    basis = dense_basis(x[last].detach().double(), size, 3)
    needed = sum(basis[:, i] @ weight[i].double() for i in range(features))
    assert (y[last] - needed).abs().max() <= 0.02 * math.sqrt(features)
    slopes = dense_basis(x[last].detach().double(), size, 3, derivative=1)
    needed = torch.stack(
        [((slopes[:, i] @ weight[i].double()) * g[last].double()).sum(-1) for i in range(features)], -1
    )
    assert (dx[last] - needed).abs().max() <= 0.02 * math.sqrt(outputs) * size
    i = features - 1
    needed = dense_basis(x[:, i].detach().double(), size, 3).T @ g.double()
    assert (dw[i] - needed).abs().max() <= 0.02 * max(1, needed.abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# The rule turns down what is wrong


class Faulty(torch.autograd.Function):
    """A right value and a backward pass with one fault, written over windows, differentiable again."""

    @staticmethod
    def forward(ctx, x, weight, base, order, grid_range, fault):
        ctx.save_for_backward(x, weight, base)
        ctx.rest = order, grid_range, fault
        return plain(x, weight, base, order, grid_range)

    @staticmethod
    def backward(ctx, g):
        x, weight, base = ctx.saved_tensors
        order, (lo, hi), fault = ctx.rest
        batch, features = x.shape
        size, width = weight.shape[1] - order, order + 1
        cell, values = local_basis(x, size, order, (lo, hi))
        _, slopes = local_basis(x, size, order, (lo, hi), derivative=1)
        rows, exists = window_rows(cell, size, order)
        if fault == "the last interval one row too low":
            rows = torch.where((cell == size - 1).unsqueeze(-1), (rows - 1).clamp(min=0), rows)
        if fault == "the two terms of the slope added":
            lower = local_basis(x, size, order - 1, (lo, hi))[1] if order > 0 else x.new_empty(*x.shape, 0)
            none = x.new_zeros(*x.shape, 1)
            slopes = (torch.cat([none, lower], -1) + torch.cat([lower, none], -1)) * size / (hi - lo)
        if fault == "the sign of the slope":
            slopes = -slopes
        if fault == "the slope per interval, not per unit of x":
            slopes = slopes * (hi - lo) / size
        if fault == "rows that do not exist counted at the end":
            exists = torch.ones_like(exists)
        if fault == "no gradient outside the grid":
            exists = exists & ((cell >= 0) & (cell < size)).unsqueeze(-1)
        if fault == "the first row of the window forgotten":
            exists = exists & (torch.arange(width, device=x.device) > 0)
        if fault == "the last row of the window forgotten":
            exists = exists & (torch.arange(width, device=x.device) < order)
        if fault == "the gradient of y read as if it were contiguous" and g.numel() > 0:
            g = g.as_strided(g.shape, (g.shape[1], 1))
        if fault == "samples beyond the last whole block of 16 left out":
            exists = exists & (torch.arange(batch, device=x.device) < batch // 16 * 16).view(-1, 1, 1)
        if fault == "outputs beyond the last whole block of 16 left out":
            g = g * (torch.arange(g.shape[1], device=x.device) < g.shape[1] // 16 * 16)
        values, slopes = values * exists, slopes * exists
        held_weight = weight.detach() if fault == "second order: the slope does not depend on the weights" else weight
        if fault == "second order: the slope does not depend on x":
            slopes = slopes.detach()
        if fault == "second order: the weight gradient does not depend on x":
            values = values.detach()
        where = torch.arange(features, device=x.device).view(1, -1, 1).expand_as(rows), rows
        along = torch.einsum("biro,bo->bir", held_weight[where], g)
        for_x = (slopes * along).sum(-1)
        parts = values.unsqueeze(-1) * g[:, None, None]
        collide = fault != "samples that share a row not added up"
        for_weight = torch.zeros_like(weight).index_put(where, parts, accumulate=collide)
        if fault == "rows without samples not written":
            touched = torch.zeros_like(weight, dtype=torch.bool).index_put(
                where, torch.ones_like(parts, dtype=torch.bool)
            )
            for_weight = torch.where(touched, for_weight, torch.full_like(for_weight, math.nan))
        for_base = None
        if base is not None:
            s = torch.sigmoid(x)
            if fault != "the base branch has no slope":
                for_x = for_x + s * (1 + x * (1 - s)) * (g @ base.T)
            for_base = (x * s).T @ g
        return for_x, for_weight, for_base, None, None, None


FAULTS = (
    "samples that share a row not added up",
    "the sign of the slope",
    "the two terms of the slope added",
    "the last interval one row too low",
    "the first row of the window forgotten",
    "the last row of the window forgotten",
    "the slope per interval, not per unit of x",
    "rows that do not exist counted at the end",
    "no gradient outside the grid",
    "the gradient of y read as if it were contiguous",
    "samples beyond the last whole block of 16 left out",
    "outputs beyond the last whole block of 16 left out",
    "rows without samples not written",
    "the base branch has no slope",
    "second order: the slope does not depend on the weights",
    "second order: the slope does not depend on x",
    "second order: the weight gradient does not depend on x",
)


def with_fault(fault):
    return lambda x, weight, base, order, grid_range: Faulty.apply(x, weight, base, order, grid_range, fault)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_backward_pass_is_accepted(case):
    """Otherwise the next test would say nothing: this one rejects as little as it should."""
    verify(with_fault(None), case, "cpu")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_known_wrong_backward_pass_is_rejected(fault):
    for case in CASES:
        try:
            verify(with_fault(fault), case, "cpu")
        except AssertionError:
            return
    pytest.fail(f"no case notices: {fault}")


@pytest.mark.parametrize("fault", (None, *FAULTS[:4]))
def test_gradcheck_agrees_about_the_faults(fault):
    tensors = double_inputs("cpu", batch=8)
    last = (tensors[0] > 0.6) & (tensors[0] < 1)
    assert last.any()  # a sample in the last interval, and with 16 of them in 11 cells some share a row
    function = with_fault(fault)
    if fault is None:
        assert torch.autograd.gradcheck(lambda *t: function(*t, 3, (-1, 1)), tensors)
    else:
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(lambda *t: function(*t, 3, (-1, 1)), tensors)
