"""The GPU kernels against float64, without a GPU: ``TRITON_INTERPRET=1 python -m tests.interpreted``.

Triton reads the variable when it is imported, so this runs in a process of its own. Cases: every degree, odd sizes,
collisions, samples outside, a scale, higher derivatives, both ways to sort, all backward kernels, those of the dense
route, LazyAdam.
"""

import torch
import triton.language as tl

from layers.bsplines import dense_basis
from layers.flash import dense, gpu, reference, triton_adam, triton_dense

CASES = [  # B, I, O, G, k
    (17, 3, 10, 5, 3),
    (3, 2, 1, 1, 0),
    (9, 2, 33, 6, 1),
    (12, 2, 4, 7, 5),
    (7, 2, 3, 9, 4),
    (33, 2, 7, 200, 2),
    (40, 2, 130, 32, 3),
]
WAYS = [(False, 0), (True, 1), (True, 2)]  # with a scale, order of differentiation
SOME = CASES[:1] + CASES[-2:]
SETTINGS = [  # numbers of gpu.py that decide which kernel runs, with small ones so that small cases meet every kernel
    ({}, CASES, WAYS),
    ({"AT_ONCE": 8}, SOME, WAYS[:1]),  # keys sorted by torch
    ({"SORT_ALONG": 8, "FEW_ROWS": 4}, SOME, WAYS[:2]),  # few outputs: sorted by a kernel before
    ({"FEW_ROWS": 4, "multiprocessors": lambda _: 1}, SOME, WAYS[:1]),  # few programs, each with several tiles
    ({"PIECE": 8, "FEW_OUTPUTS": 0}, SOME, WAYS[:1]),  # the walk: a tile's samples in pieces, each with its gradient
]


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
    return max(((a.double() - b).norm() / b.norm().clamp(min=1e-9)).item() for a, b in pairs)


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def dense_errors(case: tuple, d: int) -> tuple[float, float]:
    """Of all basis values, and of ``dot`` by products on tensor cores."""
    samples, features, outputs, size, order = case
    torch.manual_seed(samples)
    x, weight = torch.randn(samples, features), torch.randn(features, size + order, outputs)
    base, grad = torch.randn(features, outputs), torch.randn(samples, outputs)
    values = torch.empty(samples * features, size + order)
    triton_dense.basis_kernel[(samples * features // 16 + 1,)](
        x, x, values, x.numel(), size, -1.0, 1.0, size / 2, ORDER=order, D=d, CT=tl.float32, SCALED=False, BN=16, BR=8
    )
    exact = [t.double() for t in (grad, x, weight, base)]
    wanted = dense_basis(exact[1], size, order, (-1.0, 1.0), derivative=d).flatten(0, 1)
    if order == d:  # jumps: no product
        return relative(values, wanted), 0.0
    p = dense._dot(grad, x, weight, base, order, -1.0, 1.0, d)
    return relative(values, wanted), relative(p, reference.dot(*exact, order, -1.0, 1.0, d))


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
    return max(map(relative, (weight, m, v), (torch.where(rows, w - step, w), m_exact, v_exact)))


def main() -> None:
    checked = 0
    for case, d in (((40, 19, 40, 5, 3), 1), ((7, 3, 33, 6, 1), 0), ((9, 4, 20, 3, 5), 2), ((9, 4, 20, 4, 0), 0)):
        assert max(dense_errors(case, d)) < 1e-6, (case, d)
        checked += 1
    assert adam_error() < 1e-6
    for setting, cases, ways in SETTINGS:
        before = {name: getattr(gpu, name) for name in setting}
        for name, value in setting.items():
            setattr(gpu, name, value)
        for case in cases:
            for scaled, d in ways:
                for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, max(1e-6, 1e-6 * case[3] * 10**d))):
                    error = largest_error(case, scaled, d, dtype)
                    assert error < tolerance, (setting, case, scaled, d, dtype, error)
                    checked += 1
        for name, value in before.items():
            setattr(gpu, name, value)
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main()
