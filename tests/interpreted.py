"""The GPU kernels against float64, without a GPU: ``TRITON_INTERPRET=1 python -m tests.interpreted``.

``python -m tests.interpreted 0 2`` and ``1 2`` check half of the cases each, for two processes side by side.
Triton reads the variable when it is imported, so this runs in a process of its own. Cases: every degree, odd sizes,
collisions, samples outside, a scale, higher derivatives, both ways to sort, all backward kernels, those of the dense
route, LazyAdam.
"""

import itertools
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
import triton
import triton.language as tl
from scipy.interpolate import BSpline

from layers.bsplines import dense_basis
from layers.flash import (
    gpu,
    gpu_dense,
    gpu_few,
    gpu_parts,
    gpu_samples,
    gpu_sort,
    gpu_sums,
    gpu_tiles,
    gpu_walk,
    reference,
    triton_adam,
)
from layers.flash.triton_basis import cardinal

CASES = [  # B, I, O, G, k
    (17, 3, 10, 5, 3),
    (3, 2, 1, 1, 0),
    (9, 2, 33, 6, 1),
    (12, 2, 4, 7, 5),
    (7, 2, 3, 9, 4),
    (33, 2, 7, 260, 2),  # cells do not fit into a byte
    (40, 2, 130, 32, 3),
]
WIDE = (20, 2, 520, 9, 3)
PAIRS = [(41, 2, 64, 9, 3), (70, 2, 100, 6, 2), (30, 3, 20, 5, 1), (33, 1, 128, 1, 0)]
WAYS = [(False, 0), (True, 1), (True, 2)]  # with a scale, order of differentiation
SOME = CASES[:1] + CASES[-2:]
FEW = [case for case in CASES if case[2] <= 32] + [(150, 2, 4, 12, 3)]
PRODUCTS = [(gpu_sums, "GROUPS", 0), (gpu_few, "FEW_ROWS", 4)]  # few outputs, and no sums in shared memory
SORTED = [*PRODUCTS, (gpu_few, "SORT_ALONG", 8)]
BLOCKS = [(gpu_samples, "FEWEST", 1), (gpu_samples, "EACH", 0), (gpu_samples, "SHORT", 1)]
DENSE_CASES = [  # the same, and an order of differentiation
    ((40, 19, 72, 4, 3), 1),
    ((7, 3, 33, 6, 1), 0),
    ((9, 4, 20, 3, 5), 2),
    ((9, 4, 20, 4, 0), 0),
    ((65, 16, 144, 5, 2), 0),
    ((64, 16, 64, 5, 3), 0),  # whole tiles, but for the inner indices
    ((9, 5, 20, 40, 3), 1),
]
PLANS = [  # of products: a program's tile, pieces of the sum, two of them side by side
    (gpu_tiles.SMALL, 3, False),
    (gpu_tiles.LARGE, 2, True),
    (gpu_tiles.NARROW, 1, False),
]
ORDER_CASES = [  # B, I, G, k
    (1, 2, 1, 0),
    (70, 3, 5, 3),
    (300, 2, 260, 2),
    (1025, 2, 20, 3),
    (2500, 1, 9, 3),
    (7000, 2, 40, 5),  # inputs are not kept
]
PACKED_CASES = [  # I, G, k, with a scale, order of differentiation
    (8, 9, 3, False, 0),
    (24, 70, 3, True, 1),
    (16, 20, 2, False, 2),
    (40, 12, 1, True, 0),
    (16, 13, 0, False, 0),
    (272, 21, 3, False, 0),  # several programs
    (136, 62, 3, True, 0),
]
SETTINGS = [  # numbers that decide which kernel runs: with other ones small cases meet every kernel
    ([], CASES, WAYS),
    ([(gpu_sort, "HELD", 0)], SOME, WAYS[:1]),  # keys sorted by torch
    ([(gpu_few, "FEW_ROWS", 1)], FEW, WAYS),  # few outputs: sums in shared memory
    ([(gpu_few, "FEW_ROWS", 1), (gpu_sums, "HELD", 100)], FEW, WAYS[:2]),  # … of a feature by several programs
    (SORTED, SOME, WAYS[:2]),  # … sorted by a kernel before
    ([*SORTED, (gpu_sort, "HELD", 0)], SOME, WAYS[:2]),  # … by torch
    ([(gpu_few, "LONG", 8), (gpu_few, "CHUNK", 16), (gpu, "FEW_WORK", 0)], CASES[:4], WAYS),  # … sums in pieces
    ([*PRODUCTS, (gpu_few, "multiprocessors", lambda _: 1)], SOME, WAYS[:1]),  # … a program, many tiles
    ([(gpu_few, "adds", lambda *_: True), (gpu_few, "FEW_ROWS", 1)], CASES[:6:3], WAYS),  # few outputs: atomics
    ([(gpu_walk, "STEPS", 8), (gpu, "FEW_OUTPUTS", 0)], [*CASES, WIDE], WAYS),  # the walk, cut into many stretches
    ([(gpu_walk, "STEPS", 8), (gpu, "FEW_OUTPUTS", 0)], PAIRS, WAYS),  # … samples of a cell two at a time
    ([(gpu, "FEW_OUTPUTS", 0)], PAIRS[:2], WAYS[:2]),  # … not cut
    ([(gpu_walk, "STEPS", 8), (gpu_sort, "HELD", 0)], SOME, WAYS[:1]),  # many stretches, keys sorted by torch
    (BLOCKS, [*CASES, WIDE, *PAIRS[:2]], WAYS),  # few features: blocks of samples
    ([*BLOCKS, (gpu_samples, "PRODUCTS", 1), (gpu_samples, "OUTPUTS", 32)], SOME, WAYS[:2]),  # … and of outputs
]


def largest(errors: Iterable) -> float:
    """NaN if one of them is, which ``max`` would pass over."""
    return torch.tensor([float(error) for error in errors]).max().item()


def largest_error(case: tuple, scaled: bool, d: int, dtype: torch.dtype) -> float:
    samples, features, outputs, size, order = case
    torch.manual_seed(samples)
    x = torch.randn(samples, features, dtype=torch.float64) * 0.8
    x[0], x[samples // 2 :, 0] = 0.5, 0.25  # collisions
    weight = torch.randn(features, size + order, outputs, dtype=torch.float64)
    base, grad = torch.randn(features, outputs, dtype=torch.float64), torch.randn(samples, outputs, dtype=torch.float64)
    scale = torch.rand(samples, features, dtype=torch.float64) if scaled else None
    narrow = [None if t is None else t.to(dtype) for t in (x, weight, base, scale, grad)]
    exact = [None if t is None else t.double() for t in narrow]
    results = []
    for module, (x, weight, base, scale, grad) in ((gpu, narrow), (reference, exact)):
        y = module.apply(x, weight, base, scale, order, -1.0, 1.0, d)
        slopes = d if scaled else d + 1
        results.append((y, *module.adjoint(grad, x, weight, base, scale, order, -1.0, 1.0, slopes, d)))
    assert len({id(t) for t in results[0]}) == len(results[0]), "PyTorch forbids an op whose results are one another"
    pairs = zip(*results, strict=True)
    return largest((a.double() - b).norm() / b.norm().clamp(min=1e-9) for a, b in pairs)


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def dense_errors(case: tuple, d: int) -> tuple[float, ...]:
    """Of all basis values, of SiLU's, and of what the dense route makes of products in parts."""
    samples, features, outputs, size, order = case
    torch.manual_seed(samples)
    x, weight = torch.randn(samples, features), torch.randn(features, size + order, outputs)
    base, grad, scale = torch.randn(features, outputs), torch.randn(samples, outputs), torch.rand(samples, features)
    ends = -1.0, 1.0
    values, acts = gpu_dense.basis(x, weight, base, scale, order, *ends, d)
    exact = [t.double() for t in (x, weight, base, scale)]
    wanted = dense_basis(exact[0], size, order, ends, derivative=d) * exact[3].unsqueeze(-1)
    errors = [relative(values, wanted.flatten(1)), relative(acts, reference.silu(exact[0], d) * exact[3])]
    for b in (None, base):
        got = (gpu_dense.apply_in_parts(x, weight, b, scale, order, *ends, d),)
        got += gpu_dense.adjoint_in_parts(grad, x, weight, b, scale, order, *ends, d, d)
        exact[2] = None if b is None else exact[2]
        needed = reference.apply(*exact, order, *ends, d), *reference.adjoint(grad.double(), *exact, order, *ends, d, d)
        errors += [relative(a, e) for a, e in zip(got, needed, strict=True) if e.numel() > 0]
        exact[2] = base.double()
    return tuple(errors)


def packed_error(features: int, size: int, order: int, scaled: bool, d: int) -> float:
    """Of all basis values in float16, made by shifting windows, and of SiLU's; relative to the largest in exact numbers."""
    torch.manual_seed(features)
    x = torch.randn(3, features) * 1.2
    x[0, :6] = torch.tensor([-1.0, 1.0, -1.3, 1.3, 9.0, torch.inf])
    weight, base = torch.empty(features, size + order, 1, dtype=torch.float16), torch.empty(features, 1)
    factor = torch.rand(3, features) if scaled else torch.ones(3, features)
    values, acts = gpu_dense.basis(x, weight, base, factor if scaled else None, order, -1.0, 1.0, d)
    exact, factor = x.double(), factor.double()
    wanted = dense_basis(exact, size, order, (-1.0, 1.0), derivative=d) * factor.unsqueeze(-1)
    got = values.double().view_as(wanted)
    assert got.ne(0).sum(-1).le(order + 1).all(), "a window holds k + 1 values"
    here, silu = x.isfinite(), reference.silu(exact, d) * factor
    pairs = (got, wanted), (acts.double()[here], silu[here])
    return largest((a - b).abs().max() / b.abs().max().clamp(min=1e-9) for a, b in pairs)


def error_of_all_sizes(device: str = "cpu") -> float:
    """Of products in parts, relative to the sums of absolute terms: of numbers that span 8 digits on every line of a
    matrix, of lines that span 36, and with samples so far outside that SiLU's value is 1e20. Samples of the last cell meet
    small numbers alone.
    """
    torch.manual_seed(0)
    samples, features, outputs, size, order, ends = 48, 16, 32, 4, 3, (-1.0, 1.0)

    x = torch.rand(samples, features, device=device) * 1.5 - 1
    x[:16], x[23, 5], x[27, 2] = x[:16] / 3 + 5 / 6, 1e20, -1e20
    weight = torch.randn(features, size + order, outputs, device=device)
    base, grad = torch.randn(features, outputs, device=device), torch.randn(samples, outputs, device=device)
    weight[:, 3:], base, grad[:16] = weight[:, 3:] * 1e-8, base * 1e-8, grad[:16] * 1e-8
    columns, rows = (10 ** (torch.rand(n, device=device) * 36 - 20) for n in (outputs, samples))
    rows = rows.unsqueeze(1)

    def all_three(module, x, weight, base, grad):
        apply, adjoint = module
        y = apply(x, weight * columns, base * columns, None, order, *ends, 0)
        p = adjoint(grad * rows, x, weight, base, None, order, *ends, 1, -1)[0]
        return y, p, *adjoint(grad * columns, x, weight, base, None, order, *ends, -1, 0)[1:]

    def sums(x, weight, base, grad):
        weight, base, grad = weight.abs(), base.abs(), grad.abs()
        (values, slopes), (act, act_slope) = (
            [f(d).abs() for d in (0, 1)]
            for f in (lambda d: dense_basis(x, size, order, ends, derivative=d), lambda d: reference.silu(x, d))
        )
        y = torch.einsum("bir,iro->bo", values, weight) + act @ base
        p = torch.einsum("bir,iro,bo->bi", slopes, weight, grad) + act_slope * (grad @ base.t())
        return y * columns, p * rows, torch.einsum("bir,bo->iro", values, grad) * columns, act.t() @ grad * columns

    numbers = x, weight, base, grad
    got = all_three((gpu_dense.apply_in_parts, gpu_dense.adjoint_in_parts), *numbers)
    columns, rows, numbers = columns.double(), rows.double(), [t.double() for t in numbers]
    exact = all_three((reference.apply, reference.adjoint), *numbers)
    errors = ((a.double() - e).abs() / s.clamp(min=1e-99) for a, e, s in zip(got, exact, sums(*numbers), strict=True))
    return largest(error.max() for error in errors)


def padding_error() -> float:
    """Where SiLU's slopes are 1e-15, that of a feature which only fills up a multiple of 16 must not be 0.5."""
    torch.manual_seed(0)
    x, weight, base = torch.rand(8, 18) * 50 + 40, torch.randn(18, 8, 20), torch.randn(18, 20)
    y = gpu_dense.apply_in_parts(x, weight, base, None, 3, -500.0, 500.0, 2)
    return relative(y, reference.apply(x.double(), weight.double(), base.double(), None, 3, -500.0, 500.0, 2))


@triton.jit
def cardinal_kernel(t, out, ORDER: tl.constexpr, D: tl.constexpr, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    tl.store(out + n, cardinal(tl.load(t + n), 1.0, ORDER, D))


def cardinal_error(order: int, d: int) -> float:
    """Of a basis function by the distance from its centre, in float32: in roundings of its largest value."""
    t = torch.linspace(-order / 2 - 1, order / 2 + 1, 4096)
    got = torch.empty_like(t)
    cardinal_kernel[(1,)](t, got, order, d, len(t))
    function = BSpline.basis_element(np.arange(order + 2) - (order + 1) / 2, extrapolate=False)
    exact = np.nan_to_num((function.derivative(d) if d else function)(t.double().numpy()))
    return np.abs(got.double().numpy() - exact).max() / np.abs(exact).max() / torch.finfo(torch.float32).eps


def adam_error() -> float:
    """Of a step of LazyAdam on rows of which two have no gradient."""
    weight, grad, m, v = torch.rand(4, 7, 33)
    grad[2], grad[5] = 0, -0.0
    exact = [t.double() for t in (weight, grad, m, v)]
    t, (beta1, beta2), lr, eps = 3.0, (0.9, 0.999), 0.1, 1e-3
    triton_adam.update(weight, grad, m, v, torch.tensor(t, dtype=torch.float64), lr, (beta1, beta2), eps)
    w, g, m_exact, v_exact = exact
    rows = g.ne(0).any(1, keepdim=True)
    m_exact = torch.where(rows, beta1 * m_exact + (1 - beta1) * g, m_exact)
    v_exact = torch.where(rows, beta2 * v_exact + (1 - beta2) * g * g, v_exact)
    step = lr * m_exact / (1 - beta1**t) / ((v_exact / (1 - beta2**t)).sqrt() + eps)
    return largest(map(relative, (weight, m, v), (torch.where(rows, w - step, w), m_exact, v_exact)))


def narrow_error() -> float:
    """Of gradients of all sizes in float16, multiplied by their factors again; what suits float16 is kept as it is."""
    errors = []
    for size in (1e-30, 1e-9, 1e-2, 1e3, 1e30):
        grad = torch.randn(70, 131) * size
        for narrow, factor in gpu_dense.narrowed(grad):
            errors.append(relative(narrow.double() * factor, grad.double()))
            wide = narrow.float()
            errors.append(relative(gpu_dense.multiply(wide.clone(), factor), wide.double() * factor))
        assert (factor == 1) == (1e-2 <= size <= 1e3)
        if factor == 1:
            assert torch.equal(narrow, grad.half()), "numbers that are multiplied by 1 stay as they are"
    grad[3, 4] = torch.nan
    assert all(factor == 1 for _, factor in gpu_dense.narrowed(grad))
    return largest(errors)


def carry_error() -> float:
    """Of a gradient of a few steps of float16, to which many stretches of a walk add: only their sum is rounded."""
    torch.manual_seed(0)
    x, grad = torch.rand(60, 2) * 2 - 1, torch.randn(60, 40) * 1e-7
    layer = x, torch.randn(2, 7, 40).half(), None, None, 3, -1.0, 1.0, -1, 0
    return relative(gpu_walk.adjoint(grad, *layer)[1], reference.adjoint(grad, *layer)[1].double())


def check_order(case: tuple, dtype: torch.dtype, scaled: bool) -> None:
    """Ranked by counting, samples are in the order of PyTorch's stable sort, and all that a walk needs is the same."""
    samples, features, size, order = case
    torch.manual_seed(samples)
    x, scale = torch.randn(samples, features, dtype=dtype), torch.rand(samples, features, dtype=dtype)
    x[samples // 5 :, 0], x[0] = 0.25, torch.inf  # a crowd
    cut, results, held = (20, (samples + size + order + 2) // 20 + 1), [], gpu_sort.HELD
    for gpu_sort.HELD in (held, 0):
        grid, wide = (-1.0, 1.0, size / 2), dtype == torch.float64
        launches = gpu_sort.sort((samples, features, size), order, grid, wide, cut, 1, 0, scaled, True, True, True)
        assert (launches.rank is None) == (gpu_sort.HELD == 0), case
        to = [torch.full((features, samples), torch.nan, dtype=dtype) for _ in range(3)]
        cuts = torch.full((features, cut[1] + 1), -1, dtype=torch.int32)
        results.append((gpu_sort.run(launches, x, size, order, scale, *to, cuts), *to, cuts))
        keys = gpu_sort.run(gpu_sort.sort((samples, features, size), order, grid, wide), x, size, order)
        assert torch.equal(keys, results[0][0]), case
    gpu_sort.HELD = held
    for name, one, other in zip(("keys", "places", "slopes", "acts", "cuts"), *results, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), (case, dtype, name)


def always(tile: gpu_tiles.Tile, pieces: int, together: bool) -> tuple[Callable, Callable]:
    """In place of ``planned`` and ``side_by_side``, whatever the products are."""
    return lambda sizes, _: gpu_tiles.Plan(tile, (pieces,) * len(sizes), 0.0), lambda *_: together


def change(setting: list) -> None:
    """Sets numbers of modules; launches that were built with others are forgotten."""
    for module, name, value in setting:
        setattr(module, name, value)
    for built in (gpu_sums.shape, gpu_few._backward, gpu_walk._backward, gpu_samples._forward, gpu_samples._backward):
        built.cache_clear()


def main(part: int = 0, parts: int = 1) -> None:
    """Checks every case, or of each ``parts`` cases the one with the number ``part``."""
    number, checked = itertools.count(), 0
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote holds NaN
    for plan in PLANS:
        gpu_tiles.planned, gpu_tiles.side_by_side = always(*plan)
        gpu_parts._products.cache_clear()
        for case, d in DENSE_CASES:
            if next(number) % parts != part:
                continue
            assert largest(dense_errors(case, d)) < (1e-6 if case[3] < 10 else 1e-5), (plan, case, d)
            checked += 1
        if next(number) % parts == part:
            assert error_of_all_sizes() < 2e-5, plan
    if next(number) % parts == part:
        assert adam_error() < 1e-6 and padding_error() < 1e-4 and narrow_error() < 1e-3
    for case in PACKED_CASES:
        if next(number) % parts == part:
            assert packed_error(*case) < 1e-3, case
            checked += 1
    for order in range(1, 6):
        for d in range(min(order, 3)):
            if next(number) % parts == part:
                assert cardinal_error(order, d) < 5, (order, d)
                checked += 1
    torch.use_deterministic_algorithms(False)
    for case in ORDER_CASES:
        if next(number) % parts == part:
            for dtype, scaled in ((torch.float32, False), (torch.float32, True), (torch.float64, True)):
                check_order(case, dtype, scaled)
            checked += 1
    gpu_samples.FEWEST = 10**9  # only where a setting says so
    for setting, cases, ways in SETTINGS:
        before = [(module, name, getattr(module, name)) for module, name, _ in setting]
        change(setting)
        tried = [(torch.float32, way) for way in ways]
        if not any(module is gpu_few for module, _, _ in setting):  # its backward kernels are for float32
            tried += [(torch.float64, way) for way in ways]
        for case, (dtype, (scaled, d)) in itertools.product(cases, tried):
            if next(number) % parts != part:
                continue
            error = largest_error(case, scaled, d, dtype)
            allowed = 1e-12 if dtype == torch.float64 else max(1e-6, 1e-6 * case[3] * 10**d)
            assert error < allowed, (setting, case, scaled, d, dtype, error)
            checked += 1
        if (gpu_walk, "STEPS", 8) in setting and next(number) % parts == part:
            assert carry_error() < 2e-2, setting
        change(before)
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
