"""The long runs behind notebook 04, written to a CSV that the notebook plots.

    python -m layers.tutorial.sweep_mnist                   # everything; minutes on a GPU, under an hour on 2 cores
    python -m layers.tutorial.sweep_mnist --quick           # fewer grids, one seed of most; a quarter of that
    python -m layers.tutorial.sweep_mnist --parts network   # one part; the rows of the others stay in the file

Parts: ``grid`` (accuracy against G, without and with the penalty), ``lambda`` (accuracy against its weight),
``ceiling`` (what might lift one layer further), ``network`` (two layers and three MLPs). Each run is one row, written
as soon as it is done; a row whose part, name, G, order, lambda and seed come again replaces the old one. ``seconds`` is
wall time, whatever else the machine was doing: it says how long a run takes roughly, and is no comparison of layers.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data import load_mnist
from layers import FlashKAN
from layers.tutorial import training

RESULTS = Path(__file__).parents[2] / "data" / "results" / "mnist_sweep.csv"
KEY = ("part", "name", "grid_size", "order", "lam", "seed")
FIELDS = (
    *KEY,
    *("weights", "multiplications", "epochs", "batch", "lr", "train_loss", "train_accuracy"),
    *("test_loss", "test_accuracy", "seconds", "data", "device", "torch", "python", "date"),
)

GRIDS, QUICK_GRIDS = (5, 10, 20, 50, 100, 200, 500), (5, 20, 100, 500)
LAMBDA_GRIDS = (10, 100, 500)
LAMBDAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
QUICK_LAMBDAS = (0.001, 0.03, 0.3, 3.0)
CURVATURE_LAMBDAS, QUICK_CURVATURE_LAMBDAS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2), (1e-5, 1e-3)
SEEDS, QUICK_SEEDS = (1, 2, 3), (1,)


@dataclass
class Run:
    """One row: what it is called in the file, how the model is made, and how it is trained."""

    part: str
    name: str
    seed: int
    grid_size: int | None = None
    lam: float | None = None
    order: int = training.ORDER
    fit: dict = field(default_factory=dict)
    blank: float = 0.0
    edges: bool = False
    hidden: int | None = None


def plan(parts: list[str], quick: bool) -> Iterator[Run]:
    """All runs of the parts, the seeds innermost."""
    seeds = QUICK_SEEDS if quick else SEEDS
    if "grid" in parts:
        for size in QUICK_GRIDS if quick else GRIDS:
            for lam in (0.0, training.LAM):
                yield from (Run("grid", "FlashKAN", seed, size, lam) for seed in seeds)
        yield from (Run("grid", "linear", seed) for seed in seeds)
    if "lambda" in parts:
        for size in LAMBDA_GRIDS:
            for lam in QUICK_LAMBDAS if quick else LAMBDAS:
                yield Run("lambda", "FlashKAN", seeds[0], size, lam)
            for lam in QUICK_CURVATURE_LAMBDAS if quick else CURVATURE_LAMBDAS:
                yield Run("lambda", "FlashKAN", seeds[0], size, lam, order=2)
    if "ceiling" in parts:
        variants = {
            "as it is": {},
            "30 epochs": {"fit": {"epochs": 30}},
            "batch 100": {"fit": {"batch": 100}},
            "learning rate / 4": {"fit": {"lr": training.LR / 4}},
            "blanks 10 % of the pixels": {"blank": 0.1},
            "blanks 30 % of the pixels": {"blank": 0.3},
            "sees edges too": {"edges": True},
        }
        for name, how in variants.items():
            yield from (Run("ceiling", name, seed, 100, training.LAM, **how) for seed in seeds)
    if "network" in parts:
        for seed in SEEDS:  # the mean of three is what the notebook quotes
            for lam in (training.NETWORK_LAM, 0.0):
                yield Run("network", "KAN", seed, training.NETWORK_GRID, lam, training.NETWORK_ORDER, training.NETWORK)
            for hidden in training.mlp_widths().values():
                yield Run("network", "MLP", seed, fit=training.NETWORK, hidden=hidden)


def model_of(run: Run) -> tuple[nn.Module, FlashKAN | None]:
    """The model of a run, and the layer that the penalty goes to."""
    torch.manual_seed(run.seed)
    if run.name == "KAN":
        model = training.network()
        return model, model[0]
    if run.name == "MLP":
        return training.mlp(run.hidden), None
    if run.name == "linear":
        return nn.Linear(784, 10), None
    layer = FlashKAN(3 * 784 if run.edges else 784, 10, run.grid_size, grid_range=(0, 1))
    before = [training.Edges()] if run.edges else [training.Blank(run.blank)] if run.blank else []
    return (nn.Sequential(*before, layer) if before else layer), layer


def row_of(run: Run, data: training.Digits) -> dict:
    """Trains and measures one model."""
    device = data.train[0].device
    model, layer = model_of(run)
    model.to(device)
    penalty = (lambda: run.lam * layer.smoothness(run.order)) if run.lam else None
    start = time.perf_counter()
    log = training.fit(model, data, penalty=penalty, seed=run.seed, **run.fit)
    seconds = time.perf_counter() - start
    train_loss, train_accuracy = training.evaluate(model, *data.train)
    name = f"MLP {run.hidden}" if run.name == "MLP" else run.name
    return {
        "part": run.part,
        "name": name,
        "grid_size": "" if run.grid_size is None else run.grid_size,
        "order": run.order if run.lam else "",
        "lam": "" if run.lam is None else f"{run.lam:.3g}",
        "seed": run.seed,
        "weights": training.weights(model),
        "multiplications": training.multiplications(model),
        "epochs": len(log.loss),
        "batch": run.fit.get("batch", training.BATCH),
        "lr": run.fit.get("lr", training.LR),
        "train_loss": f"{train_loss:.5f}",
        "train_accuracy": f"{train_accuracy:.5f}",
        "test_loss": f"{log.test_loss[-1]:.5f}",
        "test_accuracy": f"{log.test_accuracy[-1]:.5f}",
        "seconds": f"{seconds:.1f}",
        "data": data.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def read(path: Path = RESULTS) -> list[dict]:
    """The rows of the file as strings, none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict], column: str = "test_accuracy", **wanted: str | float) -> list[float]:
    """One column of the rows that fit: ``numbers(rows, part="grid", name="FlashKAN", grid_size=100, lam=0)``.

    Numbers fit when they agree within 1 %. Raises ``ValueError`` if no row fits.
    """

    def fits(row: dict) -> bool:
        return all(
            row[name] == value
            if isinstance(value, str)
            else row[name] and math.isclose(float(row[name]), value, rel_tol=0.01)
            for name, value in wanted.items()
        )

    found = [float(row[column]) for row in rows if fits(row)]
    if not found:
        raise ValueError(f"no row of the sweep fits {wanted}")
    return found


def mean(rows: list[dict], column: str = "test_accuracy", **wanted: str | float) -> float:
    """The mean of :func:`numbers`, over the seeds."""
    found = numbers(rows, column, **wanted)
    return sum(found) / len(found)


def write(rows: list[dict], path: Path) -> None:
    """Writes all rows, one line each, after a heading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> None:
    """Does the runs and keeps the file up to date after each."""
    parts = ["grid", "lambda", "ceiling", "network"]
    parser = argparse.ArgumentParser(
        prog="python -m layers.tutorial.sweep_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer grids, one seed")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: data/results/mnist_sweep.csv")
    parser.add_argument("--fresh", action="store_true", help="begin with an empty file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = parser.parse_args(arguments)
    data = training.digits(load_mnist(), device=chosen.device)
    rows = {} if chosen.fresh else {tuple(str(row[name]) for name in KEY): row for row in read(chosen.out)}
    for run in plan(chosen.parts, chosen.quick):
        row = row_of(run, data)
        rows[tuple(str(row[name]) for name in KEY)] = row
        write(list(rows.values()), chosen.out)
        said = " ".join(f"{name}={row[name]}" for name in KEY)
        print(f"{said}: test {row['test_accuracy']} in {row['seconds']} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
