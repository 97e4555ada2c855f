"""Training and measuring on MNIST as the notebooks do it: one loop, one log, nothing hidden.

The data lie on the device of the model as four tensors; a batch is an index into them. Adam follows a cosine down to a
learning rate of zero (I. Loshchilov and F. Hutter, *SGDR*, arXiv 1608.03983, without restarts), so that the last
steps settle instead of jumping about. Everything random (the order of the images, what dropout blanks) comes from
``seed``: the same seed gives every model the same batches.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Images, inputs
from layers import FlashKAN

# The recipe of notebook 04, one layer: found with seed 0, reported with seeds 1 to 3.
BATCH, LR, ORDER, LAM = 500, 4e-3, 1, 0.3
# And that of its two-layer network. The hidden values have unit variance; six standard deviations hold nearly all.
HIDDEN, NETWORK_GRID, HIDDEN_GRID, HIDDEN_RANGE = 64, 2, 5, (-3, 3)
NETWORK_ORDER, NETWORK_LAM, NETWORK = 2, 1.0, {"batch": 100, "lr": 2e-3}

EVALUATE_AT_ONCE = 2000  # images in one forward pass of a measurement, which bounds the memory of the dense layers


@dataclass
class Digits:
    """A data set as the layers want it: float32 pixels in ``grid_range`` and int64 labels, on one device.

    Attributes:
        name: of the data set, for titles ("MNIST", or the stand-in's name).
        train: images (N, 784) and labels (N,).
        test: images (M, 784) and labels (M,).
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(
    mnist: Images,
    grid_range: tuple[float, float] = (0, 1),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Digits:
    """Puts a data set on ``device`` (default: where it is) with its pixels mapped onto ``grid_range``.

    About 220 MB for MNIST in float32. Raises as :func:`data.inputs` does.
    """
    mnist = mnist.to(mnist.device if device is None else device)
    train, test = (inputs(images, grid_range).to(dtype) for images in (mnist.train_images, mnist.test_images))
    return Digits(mnist.name, (train, mnist.train_labels), (test, mnist.test_labels))


def batches(count: int, batch: int, seed: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Yields the indices of batch after batch, epoch after epoch, without end: int64, shape (batch,), on ``device``.

    Each epoch is a new permutation of ``range(count)``; what is left over at its end, fewer than ``batch``, is skipped.
    Permutations are drawn on the CPU, so that one ``seed`` gives one order on every device.

    Raises ``ValueError`` unless ``1 <= batch <= count``.
    """
    if isinstance(batch, bool) or not isinstance(batch, Integral) or not 1 <= batch <= count:
        raise ValueError(f"batch must be an integer from 1 to the number of images, {count}, got {batch!r}")
    generator = torch.Generator().manual_seed(seed)
    return _epochs(count, int(batch), generator, device)


def _epochs(count: int, batch: int, generator: torch.Generator, device) -> Iterator[Tensor]:
    while True:
        order = torch.randperm(count, generator=generator).to(device)
        yield from order[: count // batch * batch].split(batch)


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs of ``model`` for all of ``x`` (N, I), a part at a time, without dropout; shape (N, O)."""
    was = model.training
    model.eval()
    out = torch.cat([model(part) for part in x.split(EVALUATE_AT_ONCE)])
    model.train(was)
    return out


def evaluate(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy (0 to 1) of ``model`` on images ``x`` (N, I) with ``labels`` (N,)."""
    out = logits(model, x)
    return F.cross_entropy(out, labels).item(), (out.argmax(-1) == labels).double().mean().item()


@dataclass
class Log:
    """What :func:`fit` writes down, one entry for each epoch; losses in nats, accuracies from 0 to 1.

    ``loss`` and ``train_accuracy`` are means over the batches of the epoch, seen *while* the weights were changing;
    ``test_loss`` and ``test_accuracy`` are measured after it; ``seconds`` is the time spent training in it (measuring
    is not counted). ``steps``: the loss of every single step, on the CPU.
    """

    loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: Tensor = field(default_factory=lambda: torch.empty(0))

    HEAD = "epoch    loss   train    test   seconds"

    def line(self, epoch: int = -1) -> str:
        """One epoch (counted from 0) as a line of a table."""
        number = range(1, len(self.loss) + 1)[epoch]
        accuracies = f"{self.train_accuracy[epoch]:6.4f}  {self.test_accuracy[epoch]:6.4f}"
        return f"{number:5}  {self.loss[epoch]:6.4f}  {accuracies}  {self.seconds[epoch]:8.2f}"


def fit(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int = 10,
    batch: int = BATCH,
    lr: float = LR,
    penalty: Callable[[], Tensor] | None = None,
    seed: int = 0,
    title: str | None = None,
) -> Log:
    """Trains ``model`` on cross-entropy with Adam and a cosine from ``lr`` to zero, and measures it after each epoch.

    Args:
        model: maps (B, 784) to (B, 10), on the device of ``data``.
        data: from :func:`digits`.
        epochs: how often every image is seen, at least 1.
        batch: images in one step.
        lr: the learning rate at the start, above 0.
        penalty: added to the loss in every step, such as ``lambda: 0.3 * layer.smoothness(order=1)``; not in the log.
        seed: of the batches and of dropout, any integer.
        title: with one, a progress bar of that name and a line for each epoch are shown on standard output.

    Returns:
        :class:`Log`.

    Raises:
        ValueError: epochs, batch or lr is out of range; a loss that is not finite, with its step.
    """
    if isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1, got {epochs!r}")
    if not lr > 0:
        raise ValueError(f"lr must be above 0, got {lr!r}")
    (x, labels), log = data.train, Log()
    order = batches(len(x), batch, seed, x.device)
    steps = len(x) // batch
    torch.manual_seed(seed)
    # A memory of 100 steps for the squares, not 1000: they must be able to follow the learning rate down.
    optimiser = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.99), fused=True)
    losses = torch.empty(epochs * steps, dtype=torch.float64, device=x.device)
    model.train()
    # One stream for bar and lines: in a notebook two would end up in two boxes.
    with tqdm(total=epochs * steps, desc=title, file=sys.stdout, disable=title is None, unit="step", ncols=80) as bar:
        if title is not None:
            bar.write(Log.HEAD)
        for epoch in range(epochs):
            start, right = time.perf_counter(), torch.zeros((), dtype=torch.int64, device=x.device)
            for step in range(epoch * steps, (epoch + 1) * steps):
                for group in optimiser.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
                index = next(order)
                out, wanted = model(x[index]), labels[index]
                loss = F.cross_entropy(out, wanted)
                # Kept on the device: asking for the number would stop a GPU in every step.
                losses[step], right = loss.detach(), right + (out.detach().argmax(-1) == wanted).sum()
                optimiser.zero_grad()
                (loss if penalty is None else loss + penalty()).backward()
                optimiser.step()
                bar.update()
            log.train_accuracy.append(right.item() / (steps * batch))  # .item() waits for the device
            log.seconds.append(time.perf_counter() - start)
            log.loss.append(losses[epoch * steps : (epoch + 1) * steps].mean().item())
            if not math.isfinite(log.loss[-1]):
                first = int((~losses[: (epoch + 1) * steps].isfinite()).nonzero()[0])
                raise ValueError(f"the loss is not finite any more in step {first + 1}; lr={lr} may be too high")
            test_loss, test_accuracy = evaluate(model, *data.test)
            log.test_loss.append(test_loss)
            log.test_accuracy.append(test_accuracy)
            if title is not None:
                bar.write(log.line())
    log.steps = losses.cpu()
    return log


def weights(model: nn.Module) -> int:
    """How many learnable numbers ``model`` has."""
    return sum(p.numel() for p in model.parameters())


class Blank(nn.Module):
    """Dropout for inks: in training every input is set to ``paper`` with probability ``p``; nothing is rescaled.

    Where :class:`torch.nn.Dropout` scales what is left, grey values would leave their place on the grid.

    Args:
        p: from 0 (nothing happens) to below 1.
        paper: the value of a blank pixel, the low end of the grid; default 0.

    Shape: any. Raises ``ValueError`` unless ``0 <= p < 1``.
    """

    def __init__(self, p: float, paper: float = 0.0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p!r}")
        self.p, self.paper = p, paper

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x.masked_fill(torch.rand_like(x) < self.p, self.paper)

    def extra_repr(self) -> str:
        return f"p={self.p:g}, paper={self.paper:g}"


class Edges(nn.Module):
    """Adds to every pixel how it differs from its right and from its lower neighbour: inputs that see two pixels.

    Shape: ``(*, 784) -> (*, 3 * 784)``: the pixels, then the differences to the right, then downwards, all from 0 to 1
    (0.5: no difference) for pixels from 0 to 1. Beyond the edge of the page lies paper. Nothing is learned.
    """

    def forward(self, x: Tensor) -> Tensor:
        page = x.unflatten(-1, (28, 28))
        right, below = F.pad(page, (0, 1))[..., 1:], F.pad(page, (0, 0, 0, 1))[..., 1:, :]
        parts = [page, (1 + page - right) / 2, (1 + page - below) / 2]
        return torch.cat([part.flatten(-2) for part in parts], -1)


def network(device: torch.device | str | None = None) -> nn.Sequential:
    """The network of notebook 04: 784 pixels in (0, 1), 64 hidden values, 10 digits; curves all the way.

    Between the layers every hidden value is shifted and scaled to mean 0 and variance 1 over the batch (S. Ioffe and
    C. Szegedy, arXiv 1502.03167, without learnable scales), which keeps it on the grid of the second layer.
    """
    return nn.Sequential(
        FlashKAN(784, HIDDEN, NETWORK_GRID, grid_range=(0, 1), device=device),
        nn.BatchNorm1d(HIDDEN, affine=False, device=device),
        FlashKAN(HIDDEN, 10, HIDDEN_GRID, grid_range=HIDDEN_RANGE, device=device),
    )


def mlp(hidden: int, device: torch.device | str | None = None) -> nn.Sequential:
    """An ordinary network of one hidden layer: 784 pixels, ``hidden`` units with SiLU, 10 digits."""
    return nn.Sequential(nn.Linear(784, hidden, device=device), nn.SiLU(), nn.Linear(hidden, 10, device=device))


def multiplications(model: nn.Module) -> int:
    """Multiplications by a weight for one drawing: 1 for each weight of ``nn.Linear``, ``k + 2`` for each curve.

    A curve multiplies ``k + 1`` weights with basis values and one with its base function. The basis values themselves,
    a few for each input, are shared by all outputs and not counted.
    """
    total = 0
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            total += layer.weight.numel()
        if isinstance(layer, FlashKAN):
            total += (layer.spline_order + 1 + (layer.base_weight is not None)) * layer.in_features * layer.out_features
    return total


def mlp_widths() -> dict[str, int]:
    """Hidden units of the MLPs beside the network: as many units, multiplications and weights (to within one unit)."""
    # Each hidden unit has 784 + 10 weights and a bias; the ten outputs have a bias each.
    kan = network("meta")
    return {
        "as many hidden units": HIDDEN,
        "as many multiplications": round(multiplications(kan) / 794),
        "as many weights": round((weights(kan) - 10) / 795),
    }
