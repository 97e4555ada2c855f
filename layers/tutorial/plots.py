"""The pictures of notebooks 01 and 02: each function draws one figure from numbers that the notebook has computed.

Tensors are plotted as they come, in the units of their axis labels. Colours are those of Okabe and Ito (2008), which
stay apart for every common kind of colour vision; blue is what this project does, vermilion what it is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#B4548F"
INK, GREY, PALE, WASH = "#222222", "#8A8A8A", "#C9C9C9", "#F1F3F5"
LOCAL, DENSE = BLUE, VERMILION
ROWS = (BLUE, GREEN, VERMILION, PURPLE)  # the rows of one window, left to right
GROUND = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # behind text that crosses lines
COLUMN = 8.4  # inches: the width of a figure


def style() -> None:
    """Sets Matplotlib's defaults for all pictures of a notebook; call it once, before the first."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10.5,
            "axes.edgecolor": GREY,
            "axes.labelcolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 11.5,
            "axes.titlecolor": INK,
            "text.color": INK,
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "lines.linewidth": 2,
            "lines.solid_capstyle": "round",
        }
    )


def _figure(height: float, *shape: int, **how):
    """A figure of the notebook's width and a height in inches, and its axes: one, or an array of ``shape``."""
    return plt.subplots(*shape, figsize=(COLUMN, height), **how)[1]


def _beside(ax: Axes, at: tuple[float, float], text: str, shift: tuple[float, float], color: str, **how) -> None:
    """Writes text near the data point ``at``, moved by ``shift`` in points."""
    ax.annotate(text, tuple(map(float, at)), shift, textcoords="offset points", color=color, **how)


def _bump(ax: Axes, line: Tensor, values: Tensor, color: str, **how) -> None:
    """Draws a function only where it is not zero, so that its tails do not run over the axis."""
    ax.plot(line, torch.where(values == 0, torch.nan, values), color=color, **how)


def _grid_ground(ax: Axes, t: Tensor, k: int) -> None:
    """Shades the grid itself and marks all knots: strong inside the grid, faint among the k extra ones at each end."""
    inner = t[k : len(t) - k]
    ax.axvspan(float(inner[0]), float(inner[-1]), color=WASH, zorder=0)
    ax.vlines(t, 0, 0.03, color=PALE, lw=1.2, transform=ax.get_xaxis_transform(), zorder=1)
    ax.vlines(inner, 0, 0.03, color=INK, lw=1.2, transform=ax.get_xaxis_transform(), zorder=1)
    ax.set_xlim(float(t[0]), float(t[-1]))
    ax.set_xlabel("x")


def bumps(bump: Callable[[Tensor, int], Tensor], degrees: int = 4) -> None:
    """Draws the bumps of degree 0 to ``degrees - 1``, each with the two ramped copies of the bump before it.

    ``bump(u, degree)`` gives the bump at positions ``u`` counted in intervals from its left end.
    """
    axes = _figure(2.5, 1, degrees, sharey=True)
    for degree, ax in enumerate(axes):
        u = torch.linspace(-0.4, degree + 1.4, 1201, dtype=torch.float64)
        if degree:
            rising = u / degree * bump(u, degree - 1)
            falling = (degree + 1 - u) / degree * bump(u - 1, degree - 1)
            ax.fill_between(u, rising, color=GREEN, alpha=0.3, lw=0)
            ax.fill_between(u, falling, color=PURPLE, alpha=0.3, lw=0)
        ax.plot(u, bump(u, degree), color=BLUE, lw=2.4)
        ax.set_title(f"degree {degree}")
        ax.set_xticks(range(degree + 2))
        ax.set_xlabel("u (intervals)")
    axes[1].text(0.62, 0.12, "ramp\nup", color=GREEN, ha="center", fontsize=9)
    axes[1].text(1.4, 0.12, "ramp\ndown", color=PURPLE, ha="center", fontsize=9)
    axes[0].set_ylim(0, 1.08)
    axes[0].set_ylabel("value")


def window(line: Tensor, values: Tensor, t: Tensor, k: int, x: float, at_x: Tensor) -> None:
    """Draws all basis functions in grey and, in colour, those that are not zero at ``x``.

    ``line`` (N,) and ``values`` (N, G + k): the functions along the axis; ``t`` (G + 2k + 1,): the knots;
    ``at_x`` (G + k,): their values at ``x``.
    """
    ax = _figure(3.3)
    _grid_ground(ax, t, k)
    ax.plot(line, values, color=PALE, lw=1.4)
    ax.axvline(x, 0, 0.9, color=INK, lw=1)
    for r, j in enumerate(at_x.nonzero().flatten().tolist()):
        color, value = ROWS[r % len(ROWS)], float(at_x[j])
        _bump(ax, line, values[:, j], color, lw=2.4)
        ax.plot(x, value, "o", color=color, ms=7, mec="white", zorder=5, clip_on=False)
        peak = int(values[:, j].argmax())
        ax.text(float(line[peak]), float(values[peak, j]) + 0.03, f"$j = {j}$", color=color, ha="center")
    ax.text(x, 0.86, f"x = {x:g}", ha="center", va="top")
    inner = t[k : len(t) - k]
    ax.text(float(inner[0]) + 0.02, 0.86, f"the grid: G = {len(inner) - 1} intervals", va="top", color=GREY)
    ax.text(float(t[0]) + 0.02, 0.86, f"{k} extra", va="top", color=GREY)
    ax.text(float(t[-1]) - 0.02, 0.86, f"{k} extra", va="top", ha="right", color=GREY)
    ax.set_ylim(0, 0.88)
    ax.set_ylabel("basis value")


def band(dense: Tensor, local: Tensor) -> None:
    """Shows basis values as two images with one scale: ``dense`` (N, G + k) and ``local`` (N, k + 1), inputs sorted."""
    widths = [dense.shape[1], max(local.shape[1], 4)]
    left, right = _figure(3.4, 1, 2, sharey=True, width_ratios=widths)
    for ax, values, title in ((left, dense, "dense"), (right, local, "local")):
        image = ax.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=0.7, aspect="auto", interpolation="nearest")
        ax.set_title(f"{title}: {values.numel()} numbers", loc="left" if ax is left else "right")
        for side in ("top", "right"):
            ax.spines[side].set_visible(True)
    left.set_ylabel("inputs, sorted")
    left.set_xlabel("basis function j")
    right.set_xlabel("row r")
    right.set_xticks(range(local.shape[1]))
    plt.colorbar(image, ax=right, label="basis value", fraction=0.3, aspect=25)


def weighted_sum(line: Tensor, parts: Tensor, t: Tensor, k: int, x: float) -> None:
    """Draws a curve and the weighted bumps that it is the sum of; those that share in its value at ``x`` in colour.

    ``line`` (N,), ``parts`` (N, G + k): each basis function times its weight; ``t`` (G + 2k + 1,): the knots.
    """
    ax = _figure(3.3)
    _grid_ground(ax, t, k)
    total, here = parts.sum(1), int((line - x).abs().argmin())
    ax.axhline(0, color=PALE, lw=1)
    ax.plot(line, parts, color=PALE, lw=1.2)
    for r, j in enumerate(parts[here].nonzero().flatten().tolist()):
        _bump(ax, line, parts[:, j], ROWS[r % len(ROWS)])
        ax.plot(x, float(parts[here, j]), "o", color=ROWS[r % len(ROWS)], ms=6, mec="white", zorder=5)
    ax.plot(line, total, color=INK, lw=2.6)
    ax.axvline(x, color=INK, lw=1)
    ax.plot(x, float(total[here]), "o", color=INK, ms=9, mec="white", zorder=6)
    top = int(total.argmax())
    _beside(ax, (line[top], total[top]), "the curve", (0, 7), INK, ha="center")
    ax.text(x, 1.0, f"x = {x:g} ", va="top", ha="right", transform=ax.get_xaxis_transform())
    ax.set_ylabel("weight × basis value")
    ax.margins(y=0.12)


def one_weight(line: Tensor, before: Tensor, after: Tensor, t: Tensor, k: int, j: int) -> None:
    """Draws a curve before and after coefficient ``j`` changed, and the intervals that the change can reach."""
    ax = _figure(2.9)
    _grid_ground(ax, t, k)
    ax.axvspan(float(t[j]), float(t[j + k + 1]), color=BLUE, alpha=0.12, lw=0)
    ax.plot(line, after, color=BLUE, lw=2.6)
    ax.plot(line, before, color=INK, lw=1.8, ls=(0, (4, 2)))
    at = int((after - before).abs().argmax())
    _beside(ax, (line[at], after[at]), "after", (10, 4), BLUE)
    _beside(ax, (line[at], before[at]), "before", (-10, -20), INK, ha="center")
    middle = float(t[j] + t[j + k + 1]) / 2
    ax.text(middle, 0.07, f"k + 1 = {k + 1} intervals", ha="center", color=BLUE, transform=ax.get_xaxis_transform())
    ax.set_ylabel("curve")
    ax.margins(y=0.2)


def against_grid(
    sizes: Sequence[int], panels: dict[str, dict[str, Sequence[float]]], marks: Sequence[int] = ()
) -> None:
    """Draws quantities against the grid size on two logarithmic axes, one panel for each of ``panels``.

    ``panels`` maps a title to ``{name: values}``; a name that begins with "dense" is drawn in vermilion, others in
    blue, green and purple. ``marks``: grid sizes whose points are marked.
    """
    axes = _figure(3.4, 1, len(panels), squeeze=False)
    for ax, (title, lines) in zip(axes[0], panels.items(), strict=True):
        others = iter((BLUE, GREEN, PURPLE))
        for name, values in lines.items():
            color = DENSE if name.startswith("dense") else next(others)
            ax.loglog(sizes, values, color=color, marker="o", ms=5, markevery=[sizes.index(m) for m in marks])
            _beside(ax, (sizes[-1], values[-1]), f"{name}: {values[-1]:.3g}", (-4, 7), color, ha="right")
        ax.set_title(title)
        ax.set_xlabel("grid size G (intervals)")
        ax.set_xticks(marks or sizes, [str(m) for m in marks or sizes])
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.margins(y=0.16)
        ax.grid(axis="y", color=WASH)


def ends(line: Tensor, values: Tensor, t: Tensor, k: int) -> None:
    """Draws the basis functions faintly and their sum: 1 on the grid, 0 from ``k`` intervals beyond it."""
    ax = _figure(3.0)
    _grid_ground(ax, t, k)
    ax.plot(line, values, color=BLUE, alpha=0.35, lw=1.3)
    ax.plot(line, values.sum(1), color=INK, lw=2.8)
    ax.set_xlim(float(line[0]), float(line[-1]))
    inner = t[k : len(t) - k]
    ax.text(float(inner.mean()), 1.03, "the sum: 1 everywhere on the grid", ha="center", va="bottom")
    ax.text(float(inner.mean()), 0.74, "the basis functions", ha="center", va="bottom", color=BLUE)
    for a, b in ((t[0], inner[0]), (inner[-1], t[-1])):
        ax.annotate("", (float(a), 1.08), (float(b), 1.08), arrowprops={"arrowstyle": "<->", "color": GREY})
        ax.text(float(a + b) / 2, 1.1, f"{k} intervals", color=GREY, ha="center", va="bottom")
    ax.set_ylim(0, 1.2)
    ax.set_ylabel("value")


def last_interval(x: Tensor, right: Tensor, wrong: Tensor, t: Tensor, top: float) -> None:
    """Draws the sum of the basis at the end of a grid, with the right cells and with those of a clamp before the floor.

    ``x``, ``right``, ``wrong`` (N,): positions and the two sums; ``t``: the knots to mark; ``top``: the clamped ``u``.
    """
    ax = _figure(2.9)
    ax.vlines(t, 0, 1, color=PALE, lw=1, transform=ax.get_xaxis_transform())
    ax.plot(x, wrong, color=VERMILION)
    ax.plot(x, right, color=BLUE)
    ax.text(float(x[0]) + 0.0006, 1.008, "floor, then clamp: the sum is 1", color=BLUE, va="bottom", bbox=GROUND)
    text = f"clamp at {top:.5f}, then floor:\nthe last cell is never used"
    ax.text(float(t[-2]) - 0.0006, 0.9, text, color=VERMILION, ha="right", va="center", bbox=GROUND)
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.set_ylim(0.8, 1.06)
    ax.set_xlabel("x, the last intervals of the grid (lines: knots)")
    ax.set_ylabel("sum of the basis")


def collisions(rows: Sequence[int], true: Tensor, careless: Tensor, hits: Tensor) -> None:
    """Compares two gradients of one curve's coefficients as bars; ``hits`` counts the samples that touch each one."""
    ax, count = _figure(3.9, 2, 1, sharex=True, height_ratios=[3, 1])
    place = torch.tensor(rows, dtype=torch.float64).numpy()
    ax.axhline(0, color=GREY, lw=0.8)
    ax.bar(place - 0.2, true.numpy(), 0.4, color=BLUE)
    ax.bar(place + 0.2, careless.numpy(), 0.4, color=VERMILION)
    ax.set_title("blue: all samples added up", color=BLUE)
    ax.set_title("vermilion: dW[rows] += parts", color=VERMILION, loc="right")
    ax.set_ylabel("gradient")
    count.bar(place, hits.numpy(), 0.8, color=PALE)
    for row, hit in zip(rows, hits.tolist(), strict=True):
        count.text(row, hit / 2, f"{hit:g}", ha="center", va="center", fontsize=9)
    count.set_xticks(list(rows))
    count.set_yticks([])
    count.spines["left"].set_visible(False)
    count.set_ylabel("samples")
    count.set_xlabel("coefficient of one curve")


def cosines(batches: Sequence[int], found: Sequence[float], expected: Sequence[float]) -> None:
    """Draws the cosine between the careless and the true gradient against the batch size, with the expected one."""
    ax = _figure(3.1)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.semilogx(batches, expected, color=GREY, ls=(0, (4, 2)))
    ax.semilogx(batches, found, "o-", color=VERMILION, ms=6)
    ax.axhline(1, color=BLUE)
    ax.text(batches[-1], 0.97, "the true gradient", color=BLUE, ha="right", va="top")
    middle = len(batches) // 2
    _beside(ax, (batches[middle], found[middle]), "measured for +=", (8, 8), VERMILION)
    _beside(ax, (batches[middle], expected[middle]), "expected: 1/√n", (-6, -16), GREY, ha="right")
    ax.set_xticks(batches, [str(b) for b in batches])
    ax.minorticks_off()
    ax.set_ylim(-0.15, 1.08)
    ax.set_xlabel("batch size B (samples)")
    ax.set_ylabel("cosine with the true gradient")


def signs(line: Tensor, measured: tuple[Tensor, Tensor], minus: Tensor, plus: Tensor) -> None:
    """Draws the slope of one basis function: finite differences as dots, the difference and the sum of two bumps.

    ``line``, ``minus``, ``plus`` (N,); ``measured``: positions and slopes of the dots. Slopes per unit of ``x``.
    """
    ax = _figure(3.1)
    ax.axhline(0, color=GREY, lw=0.8)
    ax.plot(line, plus, color=VERMILION)
    ax.plot(line, minus, color=BLUE)
    ax.plot(*measured, "o", color=INK, ms=5, mec="white", zorder=4)
    start = int((plus > 0.6 * plus.max()).nonzero()[-1])
    low, high = int(minus.argmin()), int(minus.argmax())
    _beside(ax, (line[start], plus[start]), "added", (8, 4), VERMILION)
    _beside(ax, (line[low], minus[low]), "subtracted", (0, -15), BLUE, ha="center")
    _beside(ax, (line[high], minus[high]), "finite differences", (-12, 8), INK, ha="right")
    ax.margins(y=0.16)
    ax.set_xlabel("x")
    ax.set_ylabel("slope of one basis function")


def learning(curves: dict[str, Sequence[float]], accuracy: dict[str, float]) -> None:
    """Draws loss against epoch for two named runs, the lower first, with their test accuracies (0 to 1)."""
    ax = _figure(3.1)
    for (name, losses), color, at in zip(curves.items(), (BLUE, VERMILION), (-1, 4), strict=True):
        epochs = range(1, len(losses) + 1)
        ax.plot(epochs, losses, "o-", ms=4, color=color)
        text = f"{name}: test accuracy {accuracy[name]:.1%}"
        _beside(ax, (epochs[at], losses[at]), text, (8, 8), color, ha="right" if at == -1 else "left")
    ax.set_xticks(range(1, len(losses) + 1, 2))
    ax.set_ylim(0)
    ax.set_xlabel("epoch")
    ax.set_ylabel("training loss (nats)")
