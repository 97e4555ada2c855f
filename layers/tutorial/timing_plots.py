"""The pictures of notebook 03, drawn from rows of ``data/timings/*.csv`` or from rows that were measured just now.

A row is a dict with the columns of :mod:`layers.flash.benchmark`. Colours and style are those of
:mod:`layers.tutorial.plots`: blue is this project, vermilion what it is compared with.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from layers.tutorial.plots import BLUE, GREEN, GREY, INK, PALE, PURPLE, VERMILION, WASH, _figure, style

LAYERS_IN_README = ("FlashKAN", "KANLinear", "nn.Linear")
TIMINGS = Path(__file__).parents[2] / "data" / "timings"
LOOKS = {
    "FlashKAN": {"color": BLUE, "marker": "o", "lw": 2.4},
    "KANLinear": {"color": VERMILION, "marker": "s"},
    "KANLinear compiled": {"color": VERMILION, "marker": "s", "ls": "--", "mfc": "white"},
    "MLP": {"color": GREEN, "marker": "^"},
    "nn.Linear": {"color": GREY, "ls": ":"},
    "FlashKAN dense": {"color": PURPLE, "marker": "D"},
    "FlashKAN local": {"color": BLUE, "marker": "o", "ls": ":", "mfc": "white"},
}
OTHERS = {  # those of layers/flash/peers.py
    "efficient-kan": {"color": VERMILION, "marker": "s", "ls": ":"},
    "efficient-kan compiled": {"color": VERMILION, "marker": "s", "ls": "--", "mfc": "white"},
    "fast-kan": {"color": PURPLE, "marker": "D", "ls": ":"},
    "fast-kan compiled": {"color": PURPLE, "marker": "D", "ls": "--", "mfc": "white"},
    "inkan": {"color": GREEN, "marker": "^"},
    "inkan dense": {"color": GREEN, "marker": "^", "ls": "--", "mfc": "white"},
    "torchcurves": {"color": INK, "marker": "x"},
    "embedding_bag": {"color": GREY, "marker": "v"},
}
PART_COLOURS = {"loader": PALE, "forward": BLUE, "backward": GREEN, "optimiser": VERMILION}
Shape = tuple[int, int, int]


def read(folder: Path = TIMINGS) -> list[dict]:
    """All rows of all CSV files in ``folder``, numbers as numbers; an empty list where there are none."""
    rows = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            rows += [_typed(row) for row in csv.DictReader(file)]
    return rows


def _typed(row: dict) -> dict:
    whole, marks = ("B", "I", "O", "G", "k"), ("median_us", "p20_us", "p80_us", "peak_mib")
    row |= {key: int(row[key]) for key in whole} | {key: float(row[key]) if row[key] else None for key in marks}
    row["error"] = float(row["error"]) if row.get("error") else None  # a file without errors shows no check
    return row | {key: row[key] == "True" for key in ("tf32", "checked")}


def devices(rows: Iterable[dict]) -> tuple[list[str], list[str]]:
    """The names of the GPUs and of the CPUs in ``rows``, each once."""
    names = list(dict.fromkeys(row["device"] for row in rows))
    return [name for name in names if not name.startswith("CPU")], [name for name in names if name.startswith("CPU")]


def select(rows: Iterable[dict], shape: Shape, **wanted) -> list[dict]:
    """Rows of one shape (B, I, O) with the wanted values; float32 without TF32 unless asked for otherwise."""
    wanted = {"dtype": "float32", "tf32": False} | wanted
    fits = (row for row in rows if (row["B"], row["I"], row["O"]) == tuple(shape))
    return [row for row in fits if all(row[key] == value for key, value in wanted.items())]


def series(rows: Iterable[dict], value: str = "median_us") -> dict[str, dict[int, float]]:
    """By layer and G, sorted by G: a value of each row, where it has one."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["G"]):
        if row[value] is not None:
            found.setdefault(row["layer"], {})[row["G"]] = row[value]
    return found


def crossover(local: dict[int, float], other: dict[int, float]) -> float | None:
    """The G from which ``local`` is the smaller, on straight lines between the points of the log-log plot.

    The lowest common G if ``local`` is smaller from the start; ``None`` if it is not smaller at the end.
    """
    sizes = sorted(local.keys() & other.keys())
    if not sizes or local[sizes[-1]] >= other[sizes[-1]]:
        return None
    last = max((n for n, G in enumerate(sizes) if local[G] >= other[G]), default=-1)
    if last == -1:
        return float(sizes[0])
    a, b = sizes[last], sizes[last + 1]
    before, after = local[a] / other[a], other[b] / local[b]  # both at least 1
    share = _log(before) / (_log(before) + _log(after))
    return a * (b / a) ** share


def _log(value: float) -> float:
    return max(math.log(value), 1e-12)


def against_grid(
    rows: Sequence[dict],
    shapes: Sequence[Shape],
    what: str = "median_us",
    title: str = "",
    names: Sequence[str] = tuple(LOOKS),
) -> None:
    """Draws a value against G on logarithmic axes, one panel a shape, with the band from 20 to 80 %.

    Args:
        rows: already of one device, pass, mode and number format.
        shapes: one panel each, (B, I, O).
        what: the column, "median_us" (a ring marks where FlashKAN crosses KANLinear, an MLP or nn.Linear) or "peak_mib".
        title: above the panels.
        names: layers that are drawn if they have rows, in this order; default all but those of other projects.
    """
    axes = _figure(3.7, 1, len(shapes), squeeze=False)[0]
    names, looks = [name for name in names if any(row["layer"] == name for row in rows)], LOOKS | OTHERS
    for ax, shape in zip(axes, shapes, strict=True):
        lines = series((row for row in select(rows, shape) if row["layer"] in names), what)
        for name in names:
            points = lines.get(name)
            if points is None:
                continue
            if name == "nn.Linear":
                ax.axhline(next(iter(points.values())), label=name, **looks[name])
                continue
            ax.plot(points.keys(), points.values(), ms=5, label=name, **looks[name])
            if what == "median_us":
                low, high = (series(select(rows, shape, layer=name), mark_)[name] for mark_ in ("p20_us", "p80_us"))
                color = looks[name]["color"]
                ax.fill_between(low.keys(), low.values(), high.values(), color=color, alpha=0.15, lw=0)
        if what == "median_us":
            _rings(ax, lines)
        samples, features, outputs = shape
        ax.set_title(f"{features} → {outputs}, batch {samples}")
        ax.set_xscale("log")
        ax.set_yscale("log")
        sizes = sorted({G for points in lines.values() for G in points})
        ax.set_xticks(sizes, [str(G) for G in sizes], fontsize=9, rotation=45 if len(sizes) > 5 else 0)
        ax.minorticks_off()
        ax.set_xlabel("grid size G")
        ax.grid(color=WASH)
    axes[0].set_ylabel("µs" if what == "median_us" else "MiB")
    axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=11.5)
    handles = {text: line for ax in axes for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    axes[0].figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9.5
    )


def _rings(ax: Axes, lines: dict[str, dict[int, float]]) -> None:
    local = lines.get("FlashKAN", {})
    crossings = [(local, lines.get(name, {})) for name in ("KANLinear", "KANLinear compiled", "MLP")]
    if "nn.Linear" in lines:  # it has no grid, and wins on fine ones, if at all
        crossings.append((dict.fromkeys(local, next(iter(lines["nn.Linear"].values()))), local))
    for winner, other in crossings:
        at = crossover(winner, other)
        below = [G for G in local if at is not None and G <= at]
        above = [G for G in local if at is not None and G > at]
        if at is None or not below or not above or at == min(winner.keys() & other.keys()):
            continue
        a, b = max(below), min(above)
        share = _log(at / a) / _log(b / a)
        ax.plot(
            at,
            math.exp(_log(local[a]) * (1 - share) + _log(local[b]) * share),
            "o",
            ms=13,
            mfc="none",
            mec=INK,
            mew=1.2,
        )
        ax.annotate(f"G ≈ {at:.0f}", (at, local[a]), (0, 12), textcoords="offset points", ha="center", fontsize=9.5)


def parts(bars: dict[str, dict[str, float]], unit: str, title: str) -> None:
    """Draws horizontal bars made of parts; ``bars`` maps a label to its parts, each in ``unit``."""
    ax = _figure(0.42 * len(bars) + 1.3)
    names = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    left = dict.fromkeys(bars, 0.0)
    for name in names:
        widths = [bar.get(name, 0.0) for bar in bars.values()]
        ax.barh(list(bars), widths, left=list(left.values()), height=0.62, color=PART_COLOURS[name], label=name)
        left = {label: left[label] + width for label, width in zip(left, widths, strict=True)}
    for y, total in enumerate(left.values()):
        ax.text(total, y, f"  {_short(total)} {unit}", va="center", fontsize=10)
    ax.invert_yaxis()
    ax.set_xlim(0, max(left.values()) * 1.16)
    ax.set_xlabel(unit)
    ax.set_title(title)
    ax.tick_params(axis="y", length=0)
    ax.figure.legend(loc="outside lower center", ncols=len(names), frameon=False, fontsize=9.5)


def epochs(bars: dict[str, dict[str, float]], title: str) -> None:
    """Draws epoch times in seconds on a logarithmic axis: ``bars`` maps a way of training to times by layer."""
    ax = _figure(0.62 * len(bars) + 1.3)
    layers = list(dict.fromkeys(layer for bar in bars.values() for layer in bar))
    height = 0.8 / len(layers)
    low = min(value for bar in bars.values() for value in bar.values())
    for n, layer in enumerate(layers):
        ys = [y + (n - (len(layers) - 1) / 2) * height for y, bar in enumerate(bars.values()) if layer in bar]
        values = [bar[layer] for bar in bars.values() if layer in bar]
        ax.barh(ys, values, height=height * 0.9, color=LOOKS[layer]["color"], label=layer)
        for y, value in zip(ys, values, strict=True):
            ax.text(value, y, f" {_short(value)} s", va="center", fontsize=10)
    ax.set_yticks(range(len(bars)), list(bars))
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlim(low / 2, ax.get_xlim()[1] * 2)
    ax.set_xlabel("seconds an epoch")
    ax.set_title(title)
    ax.tick_params(axis="y", length=0)
    ax.figure.legend(loc="outside lower center", ncols=len(layers), frameon=False, fontsize=9.5)


def _short(value: float) -> str:
    """Three digits, never in powers of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def roofline(points: dict[str, tuple[float, float, float]], bandwidth: float, rate: float, title: str) -> None:
    """Draws measured work under the two measured ceilings.

    Args:
        points: label to bytes, operations and seconds of one call; forward and backward of a layer in turn.
        bandwidth: bytes a second. rate: operations a second.
    """
    ax = _figure(4.6)
    at = [operations / moved for moved, operations, _ in points.values()]
    reach = [min(at) / 4, max(*at, rate / bandwidth) * 6]
    ridge = rate / bandwidth
    roof = [reach[0], ridge, reach[1]]
    ax.plot(roof, [min(x * bandwidth, rate) / 1e9 for x in roof], color=INK, lw=1.6)
    ax.text(reach[0] * 1.1, reach[0] * bandwidth / 1e9 * 4, f"a copy: {bandwidth / 1e9:,.0f} GB/s", fontsize=9.5)
    ax.text(ridge, rate / 1e9 * 1.2, f"a matrix product: {rate / 1e9:,.0f} Gflop/s", fontsize=9.5)
    marks = "osD^vP*X"  # the backward pass of each pair is hollow
    for n, (label, (moved, operations, seconds)) in enumerate(points.items()):
        color = VERMILION if "KANLinear" in label else BLUE
        inside = "white" if n % 2 else color
        x, y = operations / moved, operations / seconds / 1e9
        ax.plot(x, y, marks[n // 2 % len(marks)], ms=8, mew=1.6, color=color, mfc=inside, label=label)
    ax.figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylim(top=rate / 1e9 * 3)
    ax.set_xlim(*reach)
    ax.set_xlabel("operations for each byte counted")
    ax.set_ylabel("Gflop/s")
    ax.set_title(title)
    ax.grid(color=WASH)


def missing(wanted: str) -> str:
    """One line for a picture that has no data."""
    return (
        f"No measurements of {wanted} in {TIMINGS.parent.name}/{TIMINGS.name}: run `python -m layers.flash.benchmark`."
    )


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in plain text, the first column to the left, all others to the right."""
    cells = [[str(cell) for cell in line] for line in (head, *lines)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def readme_picture() -> None:
    """Draws ``data/timings/time_against_grid.png``: ``python -m layers.tutorial.timing_plots``."""
    gpu = devices(read())[0][0]
    wanted = {"device": gpu, "pass": "forward+backward", "mode": "graph", "dtype": "float32", "tf32": False}
    shapes = [(200, 784, 10), (1024, 512, 512)]
    rows = [row for shape in shapes for row in select(read(), shape, **wanted) if row["layer"] in LAYERS_IN_README]
    style()
    against_grid(rows, shapes, title=f"Forward + backward, {gpu}, float32, replayed as a CUDA graph")
    plt.savefig(TIMINGS / "time_against_grid.png", dpi=130)


if __name__ == "__main__":
    readme_picture()
