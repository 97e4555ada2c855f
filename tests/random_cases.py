"""Cases that nobody thought of: ``python -m tests.random_cases 5 --device cuda --seed 1`` looks for wrong ones for 5 minutes.

Sizes, grids, formats and places of the samples are drawn at random; each case is held to the rule of ``test_operator.py`` on the
automatic route and on one more. Half of them under ``torch.use_deterministic_algorithms``, and measured again: the same
numbers have to come. Not part of the tests: most of the time goes into compiling kernels for sizes never seen before.
"""

import argparse
import os
import random
import sys
import time

import torch

from tests.test_operator import ROUTES, Case, on, verify, verify_repeats

NUMBERS = 2e7  # of the basis (B, I, R), which the exact results are made of
WORK = 4e9  # its numbers times outputs


def draw(rng: random.Random) -> Case:
    """A case that is small enough; few outputs and degree 3, which most layers have, come more often."""
    while True:
        order = rng.choice((3, 3, 3, 3, 0, 1, 2, 4, 5))
        smooth = order >= 3
        narrow = rng.choice((None, None, None, torch.bfloat16, torch.float16))
        case = Case(
            batch=rng.choice(
                (1, rng.randint(1, 40), rng.randint(1, 300), rng.randint(300, 1100), rng.randint(1100, 9000))
            ),
            features=rng.choice((1, rng.randint(1, 8), rng.randint(1, 70), rng.randint(70, 1100))),
            outputs=rng.choice((1, rng.randint(1, 16), rng.randint(1, 16), rng.randint(16, 70), rng.randint(70, 600))),
            grid_size=int(2 ** rng.uniform(0, 11)),
            order=order,
            x=rng.choice(("random", "random", "crowd", "one cell", "outside") + (("knots", "ends") if smooth else ())),
            grid_range=rng.choice(((-1, 1), (-1, 1), (0, 1), (-3, 7), (0.1, 0.7))),
            base=rng.random() < 0.8,
            strided=rng.random() < 0.2,
            second=smooth and narrow is None and rng.random() < 0.2,
            dtype=torch.float64 if narrow is None and rng.random() < 0.1 else torch.float32,
            weight_dtype=narrow,
        )
        if narrow and (case.batch < 20 or case.features < 5):
            continue  # of a few numbers plain PyTorch may get all nearly right by luck
        numbers = case.batch * case.features * (case.grid_size + order)
        if numbers <= NUMBERS and numbers * case.outputs <= WORK:
            return case


def wrong(case: Case, route: str | None, device: str, deterministic: bool) -> str:
    """What is wrong with a case, or an empty string."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        verify(on(route), case, device)
        if deterministic:
            verify_repeats(on(route), case, device, times=1)
    except (AssertionError, RuntimeError) as error:
        return repr(error).splitlines()[0]  # never empty
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", type=float)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU
    rng, stop, seen, found = random.Random(options.seed), time.monotonic() + 60 * options.minutes, 0, 0
    while time.monotonic() < stop:
        case, deterministic = draw(rng), rng.random() < 0.5
        for route in (None, rng.choice(ROUTES)):
            seen += 1
            if said := wrong(case, route, options.device, deterministic):
                found += 1
                print(f"{case!r}, route {route}, deterministic {deterministic}: {said}", flush=True)
    print(f"seed {options.seed}: {found} of {seen} wrong")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
