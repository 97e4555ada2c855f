"""Stopwatches for the notebooks and the benchmark: warmed up, synchronised, medians with their 20 and 80 % marks."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

BUDGET = 0.5  # seconds that the repeats of one measurement may take; a slow call is repeated less often
PARTS = ("loader", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Times:
    """Median, 20 % and 80 % of the repeats, in microseconds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:,.0f} µs ({self.low:,.0f} to {self.high:,.0f})"


def summary(seconds: list[float]) -> Times:
    """The three marks of repeated measurements in seconds. Raises ``ValueError`` if there are none."""
    if len(seconds) == 0:
        raise ValueError("seconds must hold at least one measurement, got none")
    low, median, high = np.quantile(seconds, (0.2, 0.5, 0.8)) * 1e6
    return Times(float(median), float(low), float(high))


def wait(device: torch.device | str) -> None:
    """Waits until ``device`` has done all it was asked for: a GPU is asked first and works later."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def eager(
    call: Callable[[], object], device: torch.device | str, repeats: int = 30, warm_up: int = 3, budget: float = BUDGET
) -> Times:
    """Times ``call`` as a user calls it, one call after another, waiting for ``device`` each time.

    Args:
        call: what to time, without arguments.
        device: "cpu" or "cuda".
        repeats: how many measurements, at least 1; fewer, down to 3, if they would take longer than
            ``budget`` seconds. A call of more than four times the budget is its own only measurement.
        warm_up: calls before, not measured; a single one if it alone takes longer than ``budget``.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, Integral) or repeats < 1:
        raise ValueError(f"repeats must be an integer of at least 1, got {repeats!r}")
    for _ in range(max(warm_up, 1)):
        took = _seconds(call, device)
        if took > budget:
            break
    if took > 4 * budget:
        return summary([took])
    fits = max(int(budget / max(took, 1e-9)), 3)
    return summary([_seconds(call, device) for _ in range(min(repeats, fits))])


def _seconds(call: Callable[[], object], device: torch.device | str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def capture(call: Callable[[], object], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """Records the GPU work of ``call`` as a CUDA graph, which is replayed without any work in Python.

    ``call`` runs ``warm_up`` times before, on a stream of its own, as PyTorch asks for; it must not wait for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def replayed(call: Callable[[], object], repeats: int = 15, inner: int = 10, budget: float = BUDGET) -> Times:
    """Times ``call`` as a CUDA graph: ``repeats`` measurements of ``inner`` replays each, in µs per replay.

    Slow calls are repeated less often, to stay near ``budget`` seconds, but at least three times.
    """
    graph = capture(call)
    graph.replay()
    took = _seconds(graph.replay, "cuda")
    inner = max(1, min(inner, int(budget / repeats / max(took, 1e-9))))
    repeats = max(3, min(repeats, int(budget / inner / max(took, 1e-9))))
    return summary([_replay_seconds(graph, inner) for _ in range(repeats)])


def _replay_seconds(graph: torch.cuda.CUDAGraph, inner: int) -> float:
    """Of one replay, by the GPU's own clock: the mean of ``inner`` in a row."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(inner):
        graph.replay()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3 / inner


def timed(call: Callable[[], object], device: torch.device | str) -> Times:
    """The time of the work itself: a CUDA graph on a GPU, where launching would hide it; plain calls on a CPU."""
    return replayed(call) if torch.device(device).type == "cuda" else eager(call, device, repeats=9)


def in_turn(
    calls: dict[Hashable, Callable[[], object]],
    device: torch.device | str,
    rounds: int = 15,
    inner: int = 10,
    graphs: bool = True,
) -> dict[Hashable, Times]:
    """Times several calls round by round, so that what slows the machine for a while slows all of them.

    Args:
        calls: by any name, each without arguments.
        device: "cpu" or "cuda".
        rounds: measurements of each call, at least 1.
        inner: calls that follow each other on a GPU: replays of one measurement, or without ``graphs`` as many measurements.
        graphs: on a GPU each call is recorded as a CUDA graph first, as in :func:`timed`; else called as in :func:`eager`.

    Returns:
        Under the name of each call its three marks.
    """
    seconds = {name: [] for name in calls}
    cuda = torch.device(device).type == "cuda"
    recorded = {name: capture(call) for name, call in calls.items()} if cuda and graphs else {}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            if recorded:
                seconds[name].append(_replay_seconds(recorded[name], inner))
            else:
                seconds[name] += [_seconds(call, device) for _ in range(inner if cuda else 1)]
    return {name: summary(measured) for name, measured in seconds.items()}


def peak_mib(call: Callable[[], object]) -> float:
    """How many MiB of GPU memory one ``call`` needs on top of what is allocated before it, its results included."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: torch.device | str) -> tuple[float, float]:
    """What ``device`` can do: bytes a second (a copy, read and write counted) and float32 operations a second (matmul).

    Of two copies the faster one counts, by the driver or by a kernel, which changes the sign as well. TF32 is left as it is
    set. A GPU copies 512 MiB and multiplies 8192 x 8192 numbers, a CPU 64 MiB and 1024 x 1024.
    """
    cuda = torch.device(device).type == "cuda"
    numbers, side = (2**27, 8192) if cuda else (2**24, 1024)
    a, b = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    copied = min(timed(way, device).low for way in (lambda: b.copy_(a), lambda: torch.neg(a, out=b)))
    a, b = torch.ones(side, side, device=device), torch.ones(side, side, device=device)
    multiplied = timed(lambda: a @ b, device)
    return 8 * numbers / (copied * 1e-6), 2 * side**3 / (multiplied.low * 1e-6)


class Epoch:
    """Training steps of a model on images that lie on its device: step by step, or replayed as one CUDA graph.

    The order of the images is drawn on the device, and a counter there says which batch is next, so that a replay
    needs nothing from Python. Cross-entropy, and Adam with a learning rate of 1e-3 unless another optimiser is given.

    Args:
        model: maps (batch, I) to (batch, classes), on the device of the images.
        images: floating, (N, I). labels: int64, (N,).
        batch: samples of a step, default 200; what is left over at the end of an epoch is skipped.
        graph: on a GPU, record the batch's index, forward, loss, backward and optimiser once, and replay them.
        seed: of the order of the images.
        optimiser: makes one from a list of weights; one that can be captured, if ``graph``.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        batch: int = 200,
        graph: bool = False,
        seed: int = 0,
        optimiser: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    ) -> None:
        if graph and not images.is_cuda:
            raise ValueError(f"graph=True needs images on a CUDA device, got {images.device}")
        self.model, self.images, self.labels, self.batch = model, images, labels, batch
        self.weights = list(model.parameters())
        adam = functools.partial(torch.optim.Adam, lr=1e-3, fused=True, capturable=graph)
        self.optimiser = (optimiser or adam)(self.weights)
        self.steps = len(images) // batch
        self.generator = torch.Generator(images.device).manual_seed(seed)
        self.order = torch.arange(len(images), device=images.device)
        self.next = torch.arange(batch, device=images.device)  # places in ``order`` of the next batch
        self.loss = torch.zeros((), device=images.device)
        self.graph = self._captured() if graph else None

    def step(self) -> None:
        """One step on the next batch; ``loss`` keeps its loss, on the device."""
        index = self.order[self.next]
        loss = nn.functional.cross_entropy(self.model(self.images[index]), self.labels[index])
        for weight, slope in zip(self.weights, torch.autograd.grad(loss, self.weights), strict=True):
            weight.grad = slope
        self.optimiser.step()
        self.loss.copy_(loss.detach())
        self.next += self.batch

    def _captured(self) -> torch.cuda.CUDAGraph:
        before = copy.deepcopy([weight.detach() for weight in self.weights])
        graph = capture(self.step)
        # The warm-up trained: put the weights and the optimiser's memory back, in place, where the graph will find them.
        with torch.no_grad():
            for weight, old in zip(self.weights, before, strict=True):
                weight.copy_(old)
                for value in self.optimiser.state[weight].values():
                    value.zero_()
        return graph

    def run(self, steps: int | None = None, epochs: int = 1) -> float:
        """``epochs`` epochs (or only the first ``steps`` steps of each), each in a new random order; their seconds."""
        device = self.images.device
        wait(device)
        start = time.perf_counter()
        for _ in range(epochs):
            torch.randperm(len(self.images), generator=self.generator, out=self.order)
            torch.arange(self.batch, out=self.next)
            for _ in range(steps or self.steps):
                if self.graph is None:
                    self.step()
                else:
                    self.graph.replay()
        wait(device)
        return time.perf_counter() - start


def loader_epoch(model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch: int = 200) -> dict[str, float]:
    """``steps`` steps as most tutorials train: a DataLoader that prepares the images one by one, on the CPU.

    Args:
        model: maps (batch, I) to (batch, classes), on any device.
        images: uint8, (N, 28, 28), on the CPU. labels: int64, (N,), on the CPU.
        steps: at least 1, at most ``N // batch``.

    Returns:
        Seconds by part, in the order of :data:`PARTS`, with a wait for the device at each border.
    """
    if isinstance(steps, bool) or not isinstance(steps, Integral) or not 1 <= steps <= len(images) // batch:
        raise ValueError(f"steps must be an integer from 1 to {len(images) // batch}, got {steps!r}")
    from PIL import Image
    from torchvision import transforms

    device = next(model.parameters()).device
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    class Drawings(torch.utils.data.Dataset):
        """What torchvision.datasets.MNIST does for each image: a PIL image, then its transforms."""

        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, n: int):
            return prepare(Image.fromarray(images[n].numpy())), labels[n]

    loader = iter(torch.utils.data.DataLoader(Drawings(), batch_size=batch, shuffle=True))
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    parts = dict.fromkeys(PARTS, 0.0)
    last = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal last
        wait(device)
        now = time.perf_counter()
        parts[part] += now - last
        last = now

    for _ in range(steps):
        x, y = next(loader)
        x, y = x.to(device).flatten(1), y.to(device)
        lap("loader")
        loss = nn.functional.cross_entropy(model(x), y)
        lap("forward")
        adam.zero_grad()
        loss.backward()
        lap("backward")
        adam.step()
        lap("optimiser")
    return parts


def counted(layer: str, shape: tuple[int, int, int], size: int, order: int = 3) -> dict[str, tuple[int, int]]:
    """Bytes and floating-point operations that a pass cannot do without, counted on paper, float32.

    Args:
        layer: "FlashKAN" or "KANLinear". shape: (B, I, O). size: G. order: k.

    Returns:
        For "forward", "backward" and "Adam" the pair (bytes, operations). Every tensor counts once for each reading or
        writing of all of it, the rows of weights that no sample meets left out; basis values are not counted as
        operations. Backward makes the gradients of the input and of all weights, zeros included. ``KANLinear`` writes
        its basis (B, I, R) and reads it again. Adam reads weight, gradient and two moments and writes three of them.
    """
    if layer not in ("FlashKAN", "KANLinear"):
        raise ValueError(f'layer must be "FlashKAN" or "KANLinear", got {layer!r}')
    (samples, features, outputs), rows = shape, size + order
    x, y, weights = samples * features, samples * outputs, features * outputs * (rows + 1)
    met = weights if layer == "KANLinear" else features * outputs * (1 + min(rows, samples * (order + 1)))
    basis = 2 * x * rows if layer == "KANLinear" else 0
    products = 2 * x * outputs * ((rows if layer == "KANLinear" else order + 1) + 1)
    return {
        "forward": (4 * (x + met + y + basis), products),
        "backward": (4 * (2 * x + y + met + weights + 2 * basis), 2 * products),
        "Adam": (28 * weights, 12 * weights),
    }
