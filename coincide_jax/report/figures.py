"""The report's plots, as inline SVG: text stays text, same data give same bytes, colours follow the page's theme."""

import io
import re
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

INK, FAINT, PAPER = "#11223a", "#c9cdd3", "#fdfdfe"  # stand for the page's variables, swapped in `svg`
THEME = {INK: "var(--ink)", FAINT: "var(--rule)", PAPER: "var(--paper)"}
POOL, ACCENT = "#9aa5b1", "#0d8a7f"
ROWS = ("#0d8a7f", "#d9622b", "#5b5bd6", "#b7860b", "#c2417c", "#2f7fc1", "#5d8a2c", "#8a5fb8")
TASKS = (
    "#2a7f78", "#d9a05b", "#6f74b8", "#c2b04a", "#a85f86", "#6fa8c4", "#8aa257", "#8d75ab",
    "#c27f70", "#4f7699", "#7cb5a7", "#ad9072", "#a3adb8", "#cfa3b8", "#77877c",
)  # fmt: skip
WIDTH = 9.0  # inches; one figure fills the text column
LABELS = 8  # clusters with a name in the scatter
LABEL_PIXELS = (80, 16)  # room of a name, at 100 pixels an inch
MAX_POINTS = 300  # of a curve; longer ones are averaged in equal pieces

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "coincide",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
styled = matplotlib.rc_context(STYLE)  # decorates what draws


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an inline <svg> that fills its column; ids are made unique by `name`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.05, metadata=nothing)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', text, count=1
    )
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = (
        text.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-').replace("xlink:href", "href")
    )
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return text


def canvas(height: float, columns: int = 1, **options):
    """A figure of the column's width with `columns` axes side by side."""
    return plt.subplots(1, columns, figsize=(WIDTH, height), layout="constrained", **options)


def row_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each row; full data and random are grey, so that the methods stand out."""
    fixed = {"full": INK, "random": POOL}
    others = [name for name in names if name not in fixed]
    return {name: fixed[name] for name in names if name in fixed} | {
        name: ROWS[number % len(ROWS)] for number, name in enumerate(others)
    }


def smooth(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `MAX_POINTS` equal pieces."""
    pieces = min(MAX_POINTS, max(1, len(steps) // 4 if len(steps) > 40 else len(steps)))
    return tuple(
        np.array([piece.mean() for piece in np.array_split(array, pieces)], float) for array in (steps, values)
    )


@styled
def composition(tasks: Sequence[str], pool: np.ndarray, coreset: np.ndarray) -> str:
    """Records of each task in the pool and in the coreset, as shares of each (bars)."""
    shares = np.stack([pool / max(pool.sum(), 1), coreset / max(coreset.sum(), 1)]) * 100
    figure, axes = canvas(0.9 + 0.36 * len(tasks))
    y = np.arange(len(tasks))
    axes.barh(y - 0.18, shares[0], 0.34, color=POOL, label=f"pool, {pool.sum():,} records")
    axes.barh(y + 0.18, shares[1], 0.34, color=ACCENT, label=f"coreset, {coreset.sum():,} records")
    for row in range(len(tasks)):
        factor = shares[1, row] / shares[0, row] if shares[0, row] else float("nan")
        label = f"{pool[row]:,} → {coreset[row]:,}  (×{factor:.2f})"
        axes.text(shares[:, row].max() + 0.25, row, label, va="center", fontsize=8.5)
    axes.set_yticks(y, tasks)
    axes.invert_yaxis()
    axes.set_xlim(0, shares.max() * 1.28)
    axes.set_xlabel("share of the records, %")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, "composition", "Task composition of pool and coreset")


@styled
def scores(table: dict) -> str:
    """Score of every row on every task with its interval, beside the blind floor."""
    tasks, rows = table["tasks"], table["rows"]
    colours = row_colours(list(rows))
    figure, axes = canvas(1.0 + len(tasks) * (0.2 + 0.13 * len(rows)))
    offsets = (np.arange(len(rows)) - (len(rows) - 1) / 2) * min(0.16, 0.62 / max(len(rows), 1))
    for y, task in enumerate(tasks):
        axes.plot(
            [100 * task["blind"]] * 2,
            [y - 0.4, y + 0.4],
            color=INK,
            linewidth=1.4,
            label="blind floor" if y == 0 else None,
        )
        for (name, row), offset in zip(rows.items(), offsets, strict=True):
            score = row["scores"][task["task"]]
            ends = [100 * value for value in score["interval"] or ()]
            axes.plot(ends, [y + offset] * len(ends), color=colours[name], linewidth=1.4)
            axes.plot(
                100 * score["score"],
                y + offset,
                "o",
                color=colours[name],
                markersize=4.5,
                label=name if y == 0 else None,
            )
    names = [f"{'• ' if task['counted'] else ''}{task['task']}" for task in tasks]
    axes.set_yticks(np.arange(len(tasks)), names)
    axes.set_ylim(len(tasks) - 0.45, -0.55)
    axes.set_xlim(left=-1)
    axes.set_xlabel("score, %")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=min(len(rows) + 1, 6), handletextpad=0.3, columnspacing=1.4)
    return svg(figure, "scores", "Scores by task")


@styled
def relative(table: dict) -> str:
    """Rel. % of every row with its interval."""
    rows = table["rows"]
    colours = row_colours(list(rows))
    figure, axes = canvas(0.7 + 0.34 * len(rows))
    for y, (name, row) in enumerate(rows.items()):
        ends = row["rel_interval"] or ()
        axes.plot(ends, [y] * len(ends), color=colours[name], linewidth=2.2, solid_capstyle="round")
        axes.plot(row["rel"], y, "o", color=colours[name], markersize=6.5)
        if name != table["full"]:
            axes.text(row["rel"], y - 0.27, f"{row['rel']:.1f}", ha="center", fontsize=8.5)
    axes.axvline(100, color=INK, linewidth=0.9, linestyle=(0, (3, 3)))
    axes.set_yticks(np.arange(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.7)
    axes.set_xlabel(f"Rel. % of the row tuned on all data, mean over {len(table['counted'])} tasks")
    axes.grid(axis="y", visible=False)
    return svg(figure, "relative", "Relative performance of the rows")


@styled
def plane(size, transferability, density, picked, names: Sequence[str]) -> str:
    """Clusters by transferability and density; area by picks, colour by the share that was picked."""
    size, picked = np.asarray(size, float), np.asarray(picked, float)
    share = np.divide(picked, size, out=np.zeros_like(picked), where=size > 0) * 100
    figure, axes = canvas(4.6)
    area = 12 + 480 * picked / max(picked.max(), 1)
    order = np.argsort(-area, kind="stable")
    ramp = matplotlib.colors.LinearSegmentedColormap.from_list("picked", ["#cfe0dd", "#0d8a7f", "#0a5460"])
    points = axes.scatter(
        np.asarray(transferability)[order], np.asarray(density)[order], s=area[order], c=share[order],
        cmap=ramp, vmin=0, alpha=0.88, edgecolors=PAPER, linewidths=0.8,
    )  # fmt: skip
    axes.margins(0.1)
    placed = np.empty((0, 2))
    for row in order[:LABELS]:  # the largest first; a label that would lie on another is left out
        at = axes.transData.transform((transferability[row], density[row]))
        if (np.abs(placed - at) < LABEL_PIXELS).all(1).any():
            continue
        placed = np.vstack([placed, at])
        axes.annotate(
            names[row], (transferability[row], density[row]), xytext=(0, 1.5 + np.sqrt(area[row]) / 2),
            textcoords="offset points", fontsize=8, ha="center",
        )  # fmt: skip
    axes.set_xlabel("transferability S: mean cosine to the other clusters' centroids")
    axes.set_ylabel("density D: mean kernel value inside the cluster")
    bar = figure.colorbar(points, ax=axes, shrink=0.75, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("picked, % of the cluster")
    return svg(figure, "plane", "Clusters by transferability and density")


@styled
def kmeans(history: dict[str, np.ndarray]) -> str:
    """One panel a measure over the iterations."""
    figure, panels = canvas(2.3, len(history), squeeze=False)
    for axes, (name, values) in zip(panels[0], history.items(), strict=True):
        axes.plot(np.arange(len(values)), values, color=ACCENT, marker="o" if len(values) < 25 else None, markersize=3)
        axes.set_title(name)
        axes.set_xlabel("iteration")
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.ticklabel_format(axis="y", useOffset=False)
    return svg(figure, "kmeans", "k-means history")


@styled
def curves(runs: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]) -> str:
    """Training loss (left) and learning rate (right) over optimiser steps; a line a seed."""
    colours = row_colours(list(runs))
    figure, (left, right) = canvas(3.1, 2, gridspec_kw={"width_ratios": [2.4, 1]})
    for name, seeds in runs.items():
        for number, (steps, loss, rate) in enumerate(seeds):
            label = name if number == 0 else None
            left.plot(*smooth(steps, loss), color=colours[name], label=label, alpha=0.9 if number == 0 else 0.45)
            if np.isfinite(rate).any() and number == 0:
                right.plot(*smooth(steps, rate), color=colours[name])
    left.set_title("loss")
    right.set_title("learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (left, right):
        axes.set_xlabel("optimiser step")
        axes.set_xlim(left=0)
    left.legend(ncols=2)
    return svg(figure, "training", "Training curves")


@styled
def cost(stages: Sequence[tuple[str, float, str]]) -> str:
    """Seconds of each stage: (name, seconds, kind), kind 'reference', 'selection' or 'rest' sets the colour."""
    colours = {"reference": "#d9622b", "selection": ACCENT, "rest": POOL}
    labels = {"reference": "training of the reference", "selection": "selection", "rest": "everything else"}
    figure, axes = canvas(0.7 + 0.3 * len(stages))
    seen = set()
    longest = max((seconds for _, seconds, _ in stages), default=1) or 1
    for y, (_, seconds, kind) in enumerate(stages):
        axes.barh(y, seconds, 0.62, color=colours[kind], label=None if kind in seen else labels[kind])
        axes.text(seconds + 0.008 * longest, y, f"{seconds:,.1f} s", va="center", fontsize=8.5)
        seen.add(kind)
    axes.set_yticks(np.arange(len(stages)), [name for name, _, _ in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)
    axes.set_xlabel("seconds")
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper left", ncols=3)
    return svg(figure, "cost", "Seconds per stage")
