"""The pictures of notebook 04: each function draws one figure from numbers that the notebook has computed.

Colours and style are those of :mod:`layers.tutorial.plots`: blue is this project, vermilion what it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from layers.tutorial.plots import BLUE, COLUMN, GREEN, GREY, INK, PALE, PURPLE, VERMILION, WASH, _beside, _figure

SIDE = 28
STEPS = (PALE, "#7FB2D6", BLUE, "#00395A")  # a sequence from few to many
EVIDENCE = "RdBu_r"
# For lines, which would vanish if what is near zero were white.
EVIDENCE_LINES = LinearSegmentedColormap.from_list("evidence", ("#1463C8", INK, "#D0281A"))


def drawings(images: Tensor, labels: Tensor, columns: int = 12) -> None:
    """Shows drawings (N, 28, 28) with their labels (N,) in rows of ``columns``, N a multiple of it."""
    rows = len(images) // columns
    axes = _figure(0.95 * rows * COLUMN / columns + 0.3, rows, columns, squeeze=False)
    for ax, image, label in zip(axes.flat, images, labels.tolist(), strict=True):
        ax.imshow(image.cpu().numpy(), cmap="gray_r")
        ax.set_title(label, loc="center", fontsize=10, color=GREY, pad=2)
        ax.set_axis_off()


def learning(title: str, loss: Sequence[float], train: Sequence[float], test: Sequence[float]) -> None:
    """Draws one training run: the loss (nats) and the accuracies (0 to 1) of its epochs."""
    left, right = _figure(2.9, 1, 2)
    epochs = range(1, len(loss) + 1)
    left.plot(epochs, loss, "o-", ms=4, color=BLUE)
    left.set_ylim(0)
    left.set_ylabel("training loss (nats)")
    left.set_title(title)
    for name, values, color in (("training", train, GREY), ("test", test, BLUE)):
        right.plot(epochs, values, "o-", ms=4, color=color)
        _beside(right, (epochs[-1], values[-1]), f"{name} {values[-1]:.1%}", (7, -4), color)
    right.set_ylabel("accuracy")
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.grid(axis="y", color=WASH)
    for ax in (left, right):
        ax.set_xlabel("epoch")
        ax.set_xticks(range(1, len(loss) + 1, 3))
    right.set_xlim(right=len(loss) * 1.38)


def agreement(flash: Tensor, dense: Tensor, gaps: dict[str, Tensor]) -> None:
    """Draws two loss curves on top of each other, and below them how far apart they are in each of ``gaps``.

    Steps in which the two are equal have no place on a logarithmic axis and are left out.
    """
    above, below = _figure(4.4, 2, 1, sharex=True, height_ratios=[3, 2])
    above.plot(dense, color=VERMILION, lw=6, alpha=0.45)
    above.plot(flash, color=BLUE, lw=1.6)
    for height, name, color in (
        (0.88, "KANLinear (the wide line)", VERMILION),
        (0.74, "FlashKAN (the narrow one)", BLUE),
    ):
        above.text(0.98, height, name, color=color, ha="right", transform=above.transAxes)
    above.set_ylabel("loss (nats)")
    above.set_ylim(0)
    for (name, gap), color in zip(gaps.items(), (GREY, INK), strict=True):
        below.semilogy(gap.where(gap > 0, torch.nan), ".-", ms=4, color=color, lw=1.4)
        _beside(below, (len(gap) - 1, gap[-20:].median()), name, (7, -4), color)
    below.set_ylabel("difference (nats)")
    below.set_xlabel("step (gaps: no difference at all)")
    below.set_xlim(-1, len(flash) * 1.14)
    below.set_xticks(range(0, len(flash) + 1, 20))
    below.grid(axis="y", color=WASH)


def careless(right: Tensor, wrong: Tensor, accuracy: tuple[float, float], window: int = 10) -> None:
    """Draws the losses of every step of two runs, smoothed over ``window`` steps, with their test accuracies."""
    ax = _figure(3.0)
    names = ("the right gradient: samples added up", "the wrong one: samples written over one another")
    places = ({"x": 0.99, "y": 0.76, "ha": "right"}, {"x": 0.99, "y": 0.88, "ha": "right"})  # above both lines
    for name, steps, color, value, place in zip(
        names, (right, wrong), (BLUE, VERMILION), accuracy, places, strict=True
    ):
        smooth = steps.unfold(0, window, 1).mean(-1)
        ax.plot(steps, color=color, alpha=0.18, lw=0.8)
        ax.plot(range(window, window + len(smooth)), smooth, color=color)
        ax.text(s=f"{name}; test {value:.1%}", color=color, transform=ax.transAxes, **place)
    ax.set_ylim(0)
    ax.set_xlim(0, len(right))
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (nats)")


def against_grid(
    sizes: Sequence[int], plain: Sequence[Sequence[float]], smooth: Sequence[Sequence[float]], linear: float
) -> None:
    """Draws accuracy against the grid size: ``plain`` and ``smooth`` each hold (train, test) values for all sizes."""
    left, right = _figure(3.5, 1, 2, sharex=True)
    for (train, test), color, name in ((plain, VERMILION, "no penalty"), (smooth, BLUE, "with penalty")):
        for ax, values in ((left, train), (right, test)):
            ax.semilogx(sizes, values, "o-", ms=5, color=color)
            _beside(ax, (sizes[-1], values[-1]), name, (7, -4), color)
    right.axhline(linear, color=GREY, ls=(0, (4, 2)), lw=1.4)
    right.text(sizes[0], linear, "linear layer", color=GREY, va="bottom")
    left.set_title("on the drawings it learned from")
    right.set_title("on new drawings")
    for ax in (left, right):
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set_xlim(sizes[0] * 0.8, sizes[-1] * 5)
        ax.set_xlabel("grid size G (intervals)")
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(axis="y", color=WASH)
    left.set_ylabel("accuracy")


def against_penalty(
    panels: dict[int, dict[int, tuple[Sequence[float], Sequence[float]]]], chosen: float | None = None
) -> None:
    """Draws test accuracy against the weight of the penalty: ``{order: {G: (lams, accuracies)}}``, a panel an order.

    ``chosen``: a weight to be marked in the first panel.
    """
    axes = _figure(3.4, 1, len(panels), sharey=True)
    for ax, (order, curves), which in zip(axes, panels.items(), ("first", "second"), strict=True):
        for (size, (lams, values)), color in zip(curves.items(), (GREEN, BLUE, PURPLE), strict=True):
            ax.semilogx(lams, values, "o-", ms=5, color=color, label=f"G = {size}")
        ax.set_title(f"{which} differences (order = {order})")
        ax.set_xlabel("weight λ of the penalty")
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        ax.grid(axis="y", color=WASH)
    if chosen is not None:
        axes[0].axvline(chosen, color=PALE, lw=8, alpha=0.5, zorder=0)
        axes[0].text(chosen, 0.02, f"λ = {chosen:g} ", color=GREY, ha="right", transform=axes[0].get_xaxis_transform())
    axes[0].set_ylabel("test accuracy")
    axes[1].legend(frameon=False, labelcolor="linecolor", handlelength=1.2)


def bars(values: dict[str, Sequence[float]], highlight: str, label: str, low: float) -> None:
    """Draws one dot for each value of each name, and a line at their mean; the name ``highlight`` in blue."""
    ax = _figure(0.42 * len(values) + 1.0)
    for place, (name, found) in enumerate(reversed(values.items())):
        color = BLUE if name == highlight else INK
        mean = sum(found) / len(found)
        ax.plot(found, [place] * len(found), "o", ms=6, color=color, alpha=0.35, mec="none")
        ax.plot([mean, mean], [place - 0.28, place + 0.28], color=color, lw=3)
        ax.annotate(f"{mean:.2%}", (max(found), place), (10, -4), textcoords="offset points", color=color)
    ax.set_yticks(range(len(values)), reversed(values))
    ax.set_ylim(-0.6, len(values) - 0.4)
    top = max(max(found) for found in values.values())
    ax.set_xlim(low, top + 0.12 * (top - low))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid(axis="x", color=WASH)
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label)


def curves_on_the_page(t: Tensor, curves: Tensor, used: Tensor, background: Tensor, title: str) -> None:
    """Draws the curve of every pixel at its place on the page: small multiples on the 28x28 plane.

    Args:
        t: (N,), positions along the grid from 0 (paper) to 1 (ink).
        curves: (784, N), what each pixel adds to one output; each is drawn relative to its value at ``t = 0``.
        used: (784,) bool, False for pixels that are left out (blank, or nearly, in the data).
        background: (28, 28), a picture drawn faintly beneath.
        title: of the figure.
    """
    ax = _figure(COLUMN * 0.94)
    ax.imshow(background.cpu().numpy(), cmap="gray_r", vmin=0, vmax=float(background.max()) * 2.6)
    curves = curves - curves[:, :1]
    scale = 0.46 / torch.quantile(curves[used].abs().amax(-1), 0.98)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], -1)  # Shape: (784, 2)
    across = places[:, :1] - 0.42 + 0.84 * t
    up = places[:, 1:] - (curves * scale).clamp(-0.49, 0.49)
    lines = torch.stack([across, up], -1)[used]  # Shape: (n, N, 2)
    gain = curves[used, -1] * scale
    colors = EVIDENCE_LINES((0.5 + 0.5 * (gain * 4).tanh()).numpy())
    zero = torch.stack([across[:, [0, -1]], places[:, 1:].expand(-1, 2)], -1)[used]
    ax.add_collection(LineCollection(zero.numpy(), colors=PALE, linewidths=0.5))
    ax.add_collection(LineCollection(lines.numpy(), colors=colors, linewidths=1.4))
    ax.set_axis_off()
    ax.set_title(title)


def two_kinds_of_curves(t: Tensor, rough: Tensor, smooth: Tensor, names: Sequence[str]) -> None:
    """Draws the same curves learned without and with the penalty, one above the other; both (n, N)."""
    axes = _figure(3.6, 2, len(names), sharex=True, sharey="row")
    for column, name in enumerate(names):
        axes[0, column].plot(t, rough[column], color=VERMILION, lw=1)
        axes[1, column].plot(t, smooth[column], color=BLUE)
        axes[0, column].set_title(name, fontsize=10)
        axes[1, column].set_xlabel("grey value")
    for row, said in ((0, "no penalty"), (1, "with penalty")):
        axes[row, 0].set_ylabel(f"{said}\n(logits)")
        for ax in axes[row]:
            ax.axhline(0, color=PALE, lw=1, zorder=0)


def energy(by_pixel: Tensor, in_data: Tensor) -> None:
    """Shows two pictures (28, 28): how much the curves of each pixel vary, and how much the pixel itself varies."""
    axes = _figure(3.7, 1, 2)
    titles = ("how strongly the layer uses a pixel", "how much the pixel varies in the data")
    units = ("standard deviation (logits)", "standard deviation (of ink, 0 to 1)")
    for ax, picture, title, unit in zip(axes, (by_pixel, in_data), titles, units, strict=True):
        image = ax.imshow(picture.cpu().numpy(), cmap="magma_r")
        ax.set_title(title)
        ax.set_axis_off()
        plt.colorbar(image, ax=ax, label=unit, fraction=0.05, aspect=22)


def evidence(pictures: Tensor) -> None:
    """Shows what ink at each pixel says for (red) and against (blue) each digit: pictures (10, 28, 28), in logits."""
    axes = _figure(3.9, 2, 5)
    most = float(torch.quantile(pictures.abs().flatten(), 0.995))
    for digit, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=True)):
        image = ax.imshow(picture.cpu().numpy(), cmap=EVIDENCE, vmin=-most, vmax=most)
        ax.set_title(f"for a {digit}", loc="center", fontsize=10)
        ax.set_axis_off()
    plt.colorbar(image, ax=axes, label="ink instead of paper adds (logits)", fraction=0.03, aspect=30)


def confusion(counts: Tensor) -> None:
    """Shows a confusion matrix (10, 10): rows the true digit, columns the answer; only mistakes are coloured."""
    ax = _figure(5.2)
    wrong = counts.clone().double()
    wrong.fill_diagonal_(0)
    image = ax.imshow(wrong.cpu().numpy(), cmap="Oranges", vmin=0)
    for true in range(10):
        for said in range(10):
            number = int(counts[true, said])
            dark = true != said and number > 0.6 * float(wrong.max())
            color = BLUE if true == said else "white" if dark else INK if number else PALE
            weight = "bold" if true == said else "normal"
            ax.text(said, true, number, ha="center", va="center", color=color, fontsize=9, fontweight=weight)
    ax.set_xticks(range(10))
    ax.set_yticks(range(10))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("the answer")
    ax.set_ylabel("the digit")
    plt.colorbar(image, ax=ax, label="mistakes", fraction=0.046, aspect=26)


def mistakes(images: Tensor, true: Tensor, said: Tensor, sure: Tensor, columns: int = 8) -> None:
    """Shows misread drawings (N, 28, 28) with the true digit, the answer and its probability (N,), N a multiple."""
    rows = len(images) // columns
    axes = _figure(1.18 * rows * COLUMN / columns, rows, columns, squeeze=False)
    for n, ax in enumerate(axes.flat):
        ax.imshow(images[n].cpu().numpy(), cmap="gray_r")
        ax.set_title(f"{int(true[n])}, read as {int(said[n])}", loc="center", fontsize=9, color=VERMILION, pad=3)
        ax.text(0.5, -0.04, f"{float(sure[n]):.0%} sure", fontsize=8, color=GREY, ha="center", va="top")
        ax.texts[-1].set_transform(ax.transAxes)
        ax.set_axis_off()
