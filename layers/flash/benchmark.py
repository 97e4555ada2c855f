"""Measures the layers over grid sizes, one row a line: ``python -m layers.flash.benchmark --out data/timings/NAME.csv``.

Every row is gated: before a layer is timed, its output and its gradients at this very shape are compared with float64
(``layers/flash/reference.py``), for all samples of 784→10 and for as many of a wide layer that they share weights there,
too; ``error`` is the largest relative error found. Rows are written as they come, the most important first, so a run
that is stopped keeps what it measured. Times are medians in microseconds with their 20 and 80 % marks. On a GPU layers of
other projects are measured, too, where they are installed: ``peers.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import datetime
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from layers import FlashKAN, KANLinear, Regular_KAN
from layers.flash import flash_kan, peers, reference
from layers.kan_layer import KANLayer
from layers.tutorial import timing

FIELDS = (
    *("device", "torch", "triton", "date", "layer", "B", "I", "O", "G", "k", "dtype", "tf32", "pass", "mode"),
    *("median_us", "p20_us", "p80_us", "peak_mib", "checked", "error"),
)
GRIDS = (5, 10, 20, 50, 100, 200, 500, 1000)
CPU_GRIDS = (5, 10, 100, 500)
PEER_GRIDS = {"784-10": (5, 10, 100, 500), "512-512": (5, 20, 100, 500), "2-32": (5, 100)}  # layers of other projects
SHAPES = {
    "784-10": (200, 784, 10),
    "512-512": (1024, 512, 512),
    "2-32": (10_000, 2, 32),
    "784-64": (1024, 784, 64),
    "1024-1024": (4096, 1024, 1024),
    "256-256": (8192, 256, 256),
    "8-4": (64, 8, 4),
}
PASSES = ("forward", "forward+backward", "+Adam")
BASIS_BYTES = 8 * 2**30  # above which the basis (B, I, R) of the dense layer is not tried; autograd keeps several
BASES_KEPT = 10  # how many tensors of that size the dense layer holds at its peak, roughly
CHECKED = 2**27  # samples times features times outputs in the comparison with float64


@dataclass(frozen=True)
class Job:
    """One layer at one shape: its name in the file, the key of its shape, G, the weights' format, TF32 allowed."""

    layer: str
    shape: str
    size: int
    dtype: torch.dtype = torch.float32
    tf32: bool = False

    @property
    def peer(self) -> str:
        """The name of a layer of another project, without what is done to it; empty if it is ours."""
        name = self.layer.removesuffix(" compiled")
        return name if name in peers.NAMES else ""

    def __str__(self) -> str:
        kind = "bfloat16" if self.dtype == torch.bfloat16 else "TF32" if self.tf32 else "float32"
        return f"{self.layer:18} {self.shape:9} G={self.size:<4} {kind:8}"


@dataclass(frozen=True)
class InTurn:
    """Layers called from Python in turn, forward and backward: what slows the host for a while slows all of them."""

    jobs: tuple[Job, ...]
    rounds: int

    def __str__(self) -> str:
        return f"{'in turn':18} {self.jobs[0].shape:9} {len(self.jobs)} layers  "


def jobs(device: str, quick: bool = False) -> Iterator[Job | InTurn]:
    """What is measured on "cpu" or "cuda", the most important first. ``quick`` leaves out the wide shapes."""
    main = ("FlashKAN", "KANLinear")
    if device == "cpu":
        yield Job("nn.Linear", "784-10", 5)
        for name in (*main, "MLP"):
            yield from (Job(name, "784-10", G) for G in CPU_GRIDS)
        yield from (Job(name, "8-4", 5) for name in (*main, "Regular_KAN"))
        return
    some = (5, 20, 100, 500)
    yield InTurn((Job("nn.Linear", "784-10", 5), *(Job("FlashKAN", "784-10", G) for G in GRIDS)), rounds=30)
    for shape in ("784-10", "512-512"):
        yield Job("nn.Linear", shape, 5)
        for name in main:
            yield from (Job(name, shape, G) for G in GRIDS)
    for G in (5, 20, 50, 100):
        yield from (Job(f"FlashKAN {route}", "512-512", G) for route in ("local", "dense"))
    for dtype, tf32 in ((torch.float32, True), (torch.bfloat16, False)):
        yield Job("nn.Linear", "512-512", 5, dtype, tf32)
        yield from (Job("FlashKAN", "512-512", G, dtype, tf32) for G in (*some, 1000))
        yield from (Job("KANLinear", "512-512", G, dtype, tf32) for G in some)
    yield from (Job("KANLinear compiled", "784-10", G) for G in some)
    yield from (Job("KANLinear compiled", "512-512", G) for G in some)
    yield Job("nn.Linear", "2-32", 5)
    yield from (Job(name, "2-32", G) for name in main for G in some)
    yield from (Job("KANLinear compiled", "2-32", G) for G in PEER_GRIDS["2-32"])
    yield from (Job("MLP", "784-10", G) for G in GRIDS)
    yield from (Job("MLP", "512-512", G) for G in (5, 20, 100))
    yield from (Job(name, "8-4", 5) for name in (*main, "Regular_KAN"))
    more = ("784-64", GRIDS, some), ("1024-1024", some, some[:3]), ("256-256", some, some[:2])
    for shape, grids, dense_grids in () if quick else more:
        yield Job("nn.Linear", shape, 5)
        yield from (Job("FlashKAN", shape, G) for G in grids)
        yield from (Job("KANLinear", shape, G) for G in dense_grids)
    others = *peers.NAMES, *(f"{name} compiled" for name in peers.COMPILED)
    for shape, grids in PEER_GRIDS.items():
        yield from (Job(name, shape, G) for name in others for G in grids)


class Routed(FlashKAN):
    """FlashKAN that is told its route: "local" or "dense"."""

    route = "local"

    def forward(self, x: Tensor) -> Tensor:
        return flash_kan(x, self.spline_weight, self.base_weight, self.spline_order, self.grid_range, route=self.route)


def hidden_units(features: int, outputs: int, size: int, order: int = 3) -> int:
    """Hidden units that give an MLP of one hidden layer about as many weights as a KAN layer of this shape."""
    return max(1, round(features * outputs * (size + order + 1) / (features + outputs)))


def build(name: str, features: int, outputs: int, size: int, device: str = "cpu") -> nn.Module:
    """A layer by its name in the file, with float32 weights on ``device``; ``size`` is G."""
    if name == "nn.Linear":
        return nn.Linear(features, outputs, device=device)
    if name == "MLP":
        hidden = hidden_units(features, outputs, size)
        parts = nn.Linear(features, hidden, device=device), nn.SiLU(), nn.Linear(hidden, outputs, device=device)
        return nn.Sequential(*parts)
    plain = name.removesuffix(" compiled")
    if plain in peers.NAMES:
        layer = peers.build(plain, features, outputs, size, device)
    else:
        kinds = {"FlashKAN": FlashKAN, "KANLinear": KANLinear, "Regular_KAN": Regular_KAN}
        kind, _, route = plain.partition(" ")
        layer = (Routed if route else kinds[kind])(features, outputs, size, device=device)
        if route:
            layer.route = route
    # Each size by itself: a program for any size would be slower.
    return layer if plain == name else torch.compile(layer, dynamic=False)


def reason_to_skip(job: Job | InTurn, device: str) -> str:
    """Why a job does not fit this device, or an empty string."""
    if isinstance(job, InTurn):
        return next((reason for one in job.jobs if (reason := reason_to_skip(one, device))), "")
    if job.peer and (package := peers.missing(job.peer)):
        return f"{package} is not installed, see layers/flash/peers.py"
    samples, features, outputs = SHAPES[job.shape]
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else 2**33
    rows = job.size + 3
    # Weights, gradient, two moments of Adam; and while checking, weights and gradient in float64 with their parts.
    weights = 4 * features * outputs * rows * 12
    basis = 4 * samples * features * rows
    dense = job.layer.startswith("KANLinear") or job.layer.endswith("dense")
    if dense and (basis > BASIS_BYTES or BASES_KEPT * basis + weights > free):
        return f"its basis takes {basis / 2**30:.1f} GiB, several times over"
    if weights > free:
        return f"it needs about {weights / 2**30:.0f} GiB"
    return ""


def tolerance(name: str, size: int, dtype: torch.dtype = torch.float32, tf32: bool = False) -> float:
    """The relative error (of the norm) that rounding explains in "y", "x" (its gradient) or a weight's gradient.

    In float32 the rounding of ``u = (x - lo) / h`` grows with G. In a narrow format the operands of the products are
    rounded, and the slope of a curve is G times a small difference of such products.
    """
    if dtype == torch.float32 and not tf32:
        return 1e-5 + 4 * 2.0**-24 * size
    step = 2.0**-11 if tf32 else 2.0**-8
    return 8 * step + (min(step * size / 4, 0.5) if name == "x" else 0)


def check(layer: nn.Module, x: Tensor, tf32: bool = False) -> float:
    """The largest relative error of output and gradients against float64; ``AssertionError`` beyond the tolerance.

    ``x`` (B, I) requires a gradient. The tolerance is that of the weights' dtype, and of TF32 if it is allowed. All of
    ``x`` goes through the layer, so that the kernels of this shape run; where that would take the reference too long,
    the gradient that comes back is zero but for the first samples, so that it needs only these.
    """
    plain = getattr(layer, "_orig_mod", layer)  # torch.compile wraps
    names = ["x", *trained(plain)]
    y = layer(x)
    few = max(1, CHECKED // (x.shape[1] * y.shape[1]))
    grad = torch.zeros_like(y)
    grad[:few] = torch.randn(y[:few].shape, device=y.device).to(y.dtype)
    slopes = torch.autograd.grad(y, (x, *trained(plain).values()), grad)
    if slopes[0][few:].any():
        raise AssertionError("the gradient of x: samples that were not asked for have one")
    size, dtype = getattr(plain, "grid_size", 1), next(plain.parameters()).dtype
    got = dict(zip(["y", *names], (y[:few], slopes[0][:few], *slopes[1:]), strict=True))
    with torch.autocast(x.device.type, enabled=False):
        exact = in_float64(plain, x[:few].detach().double(), grad[:few].double())
    worst = 0.0
    for (name, value), wanted in zip(got.items(), exact, strict=True):
        error, allowed = ((value.double() - wanted).norm() / wanted.norm()).item(), tolerance(name, size, dtype, tf32)
        if not error <= allowed:  # a NaN fails too
            raise AssertionError(f"{name} is off by {error:.1e} (relative norm), at most {allowed:.1e} is allowed")
        worst = max(worst, error)
    return worst


def in_float64(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, gradient of ``x`` and gradients of the weights, from the reference formulas for a KAN layer."""
    if isinstance(layer, KANLayer):
        weight, base = layer.spline_weight.detach().double(), layer.base_weight.detach().double()
        grid = (layer.spline_order, *layer.grid_range)
        y = reference.apply(x, weight, base, None, *grid, 0)
        return [y, *reference.adjoint(grad, x, weight, base, None, *grid, 1, 0)]
    model, x = copy.deepcopy(layer).double(), x.requires_grad_()
    with torch.compiler.set_stance("force_eager"):  # what a layer compiles inside would be compiled once more
        y = model(x)
        return [y, *torch.autograd.grad(y, (x, *trained(model).values()), grad)]


def trained(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: weight for name, weight in layer.named_parameters() if weight.requires_grad}


def calls(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The three passes as calls without arguments: ``x`` (B, I) requires a gradient, as inside a network.

    ``+Adam`` moves the weights: measure it last.
    """
    weights = list(trained(layer).values())
    grad = torch.randn_like(layer(x).detach())
    adam = torch.optim.Adam(weights, lr=1e-3, fused=True, capturable=x.is_cuda)

    def forward():
        with torch.no_grad():
            return layer(x)

    def both():
        return torch.autograd.grad(layer(x), (x, *weights), grad)

    def step():
        for weight, slope in zip(weights, both()[1:], strict=True):
            weight.grad = slope.contiguous()  # as autograd does; a compiled layer may return a slice of padded columns
        adam.step()

    return dict(zip(PASSES, (forward, both, step), strict=True))


def measure(
    layer: nn.Module, x: Tensor, passes: tuple[str, ...] = PASSES
) -> Iterator[tuple[str, str, timing.Times, float | None]]:
    """Yields pass, mode ("graph", "eager"), times, and the peak memory in MiB (GPU; with what the pass returns)."""
    for name, call in calls(layer, x).items():
        if name not in passes:
            continue
        if not x.is_cuda:
            yield name, "eager", timing.eager(call, "cpu", repeats=15, budget=1.0), None
            continue
        peak = None if name == "+Adam" else timing.peak_mib(call)
        yield name, "eager", timing.eager(call, "cuda"), peak
        yield name, "graph", timing.replayed(call), peak


@contextlib.contextmanager
def number_format(job: Job, device: str):
    """TF32 allowed or not, autocast for bfloat16; without its cache, which a CUDA graph must not meet."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = job.tf32
    narrow = job.dtype == torch.bfloat16
    try:
        with torch.autocast(device, torch.bfloat16, enabled=narrow, cache_enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def prepared(job: Job, device: str) -> tuple[nn.Module, Tensor, float]:
    """The layer of a job, its inputs (B, I), and the largest error of the two, see :func:`check`."""
    samples, features, outputs = SHAPES[job.shape]
    torch.manual_seed(0)
    layer = build(job.layer, features, outputs, job.size, device).to(job.dtype)
    x = (torch.rand(samples, features, device=device) * 2 - 1).requires_grad_()
    return layer, x, check(layer, x, job.tf32)


def row(job: Job, name: str, mode: str, times: timing.Times, peak: float | None, error: float) -> dict:
    """A row of the file but for what is the same in all; ``name``: the pass."""
    samples, features, outputs = SHAPES[job.shape]
    degree = peers.DEGREES.get(job.peer, 3)
    marks = {"median_us": times.median, "p20_us": times.low, "p80_us": times.high, "peak_mib": peak}
    return {
        **{"layer": job.layer, "B": samples, "I": features, "O": outputs, "G": job.size, "k": degree},
        **{"dtype": str(job.dtype)[6:], "tf32": job.tf32, "pass": name, "mode": mode},
        **{"checked": True, "error": f"{error:.1e}"},
        **{key: "" if value is None else f"{value:.2f}" for key, value in marks.items()},
    }


def rows(job: Job | InTurn, device: str) -> Iterator[dict]:
    """Checks one job, or those that take turns, and yields their rows, without what is the same in all of them."""
    if isinstance(job, InTurn):
        both, layers = PASSES[1], {one: prepared(one, device) for one in job.jobs}
        turns = {one: calls(layer, x)[both] for one, (layer, x, _) in layers.items()}
        for one, times in timing.in_turn(turns, device, job.rounds, graphs=False).items():
            yield row(one, both, "in turn", times, None, layers[one][2])
        return
    with number_format(job, device):
        layer, x, error = prepared(job, device)
        # Without gradients a compiled layer would be compiled once more. Of other projects' layers, where compiling takes
        # most of the time, only what is compared.
        passes = PASSES[1:2] if job.peer else PASSES[1:] if job.layer.endswith("compiled") else PASSES
        for name, mode, times, peak in measure(layer, x, passes):
            yield row(job, name, mode, times, peak, error)


def device_name(device: str) -> str:
    """The name in the file: that of the GPU, or the CPU's number of threads."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def run(out: Path, device: str, quick: bool = False, minutes: float = 30) -> None:
    """Measures into the file ``out`` (replaced) until all is done or ``minutes`` are over; prints its progress."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    same = {"device": device_name(device), "torch": torch.__version__, "triton": triton}
    same["date"] = datetime.date.today().isoformat()
    start, plan = time.monotonic(), list(jobs(device, quick))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        for number, job in enumerate(plan, 1):
            seconds = time.monotonic() - start
            head = f"[{number}/{len(plan)} {seconds:4.0f} s] {job}"
            if seconds > 60 * minutes:
                print(f"stopped after {minutes:g} minutes, before job {number} of {len(plan)}", flush=True)
                return
            if skip := reason_to_skip(job, device):
                print(f"{head} left out: {skip}", flush=True)
                continue
            shown = []
            try:
                for measured in rows(job, device):
                    writer.writerow(same | measured)
                    file.flush()
                    if measured["pass"] == "forward+backward":
                        shown.append(f"{measured['mode']} {float(measured['median_us']):,.0f}")
                print(f"{head} forward+backward {', '.join(shown)} µs", flush=True)
            except AssertionError as error:
                # No row without its check; the others are still worth having.
                print(f"{head} WRONG, not timed: {error}", flush=True)
            except Exception as error:
                # Out of memory, no compiler for torch.compile, whatever another project's layer raises: other rows count.
                if not isinstance(error, RuntimeError) and not getattr(job, "peer", ""):
                    raise
                print(
                    f"{head} left out: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}", flush=True
                )
            torch._dynamo.reset()
            if device == "cuda":
                torch.cuda.empty_cache()
    print(f"done in {time.monotonic() - start:.0f} s: {out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="the CSV to write (replaced); default DEVICE.csv in data/timings, if it is there"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="leave out the shapes 784-64, 1024-1024 and 256-256")
    parser.add_argument("--minutes", type=float, default=30, help="stop after this time, keeping the rows so far")
    options = parser.parse_args()
    name = "".join(c if c.isalnum() else "_" for c in device_name(options.device).lower()).replace("__", "_")
    folder = Path(__file__).parents[2] / "data" / "timings"
    folder = folder if folder.is_dir() else Path.cwd()  # installed, there is no repository around
    run(options.out or folder / f"{name}.csv", options.device, options.quick, options.minutes)


if __name__ == "__main__":
    main()
