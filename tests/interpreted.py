"""The GPU kernels against float64, without a GPU: ``TRITON_INTERPRET=1 python -m tests.interpreted``.

Triton reads the variable when it is imported, so this runs in a process of its own. Cases: every degree, odd sizes,
collisions, samples outside, a scale, higher derivatives, both ways to sort, both backward kernels.
"""

import torch

from layers.flash import gpu, reference

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


def main() -> None:
    checked = 0
    for in_kernel in (2048, 8):
        gpu.AT_ONCE = in_kernel  # 8: the keys are sorted by torch instead
        for case in CASES if in_kernel == 2048 else CASES[:1] + CASES[-2:]:
            for scaled, d in WAYS if in_kernel == 2048 else WAYS[:1]:
                for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6 * case[3] * 10**d)):
                    error = largest_error(case, scaled, d, dtype)
                    assert error < max(tolerance, 1e-6 if dtype == torch.float32 else 0), (
                        case,
                        scaled,
                        d,
                        dtype,
                        error,
                    )
                    checked += 1
    print(f"{checked} cases agree")


if __name__ == "__main__":
    main()
