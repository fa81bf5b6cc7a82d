"""Figures of a curriculum over its rounds: who was drawn, how widely, what was learned, what was forgotten."""

import re
from collections.abc import Sequence

import matplotlib
import numpy as np

from coincide_jax.report.figures import ACCENT, FAINT, INK, PAPER, TASKS, WIDTH, canvas, plt, styled, svg

HEAT = ("#0a5460", "#0d8a7f", "#cfe0dd", "#d9622b")  # a share of the first loss: low is learned, above 1 is worse
LEVELS = ("easy third", "middle third", "hard third")


def slug(name: str) -> str:
    """A name as part of an id."""
    return re.sub(r"\W+", "-", name)


@styled
def ratio(name: str, rounds: np.ndarray, tasks: Sequence[str], shares: np.ndarray) -> str:
    """Task shares `[rounds, tasks]` of the draws, stacked over rounds, largest at the bottom."""
    figure, axes = canvas(3.9)
    colours = [TASKS[number % len(TASKS)] for number in range(len(tasks))]
    axes.stackplot(rounds, 100 * shares.T, colors=colours, edgecolor=PAPER, linewidth=0.5)
    tops = 100 * np.cumsum(shares[-1])
    middles = tops - 50 * shares[-1]
    at = -np.inf
    for task, middle, share in zip(tasks, middles, shares[-1], strict=True):
        at = max(middle, at + 4.6)  # labels keep a line's distance
        axes.annotate(
            f"{task}  {100 * share:.0f} %", (rounds[-1], middle), xytext=(1.025, at / 100),
            textcoords="axes fraction", va="center", fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0},
        )  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set_xlim(rounds[0], rounds[-1] if len(rounds) > 1 else rounds[0] + 1)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("round")
    axes.set_ylabel("share of the draws, %")
    return svg(figure, f"curriculum-{slug(name)}", f"Task ratio over rounds, {name}")


@styled
def spread(rows: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colours: dict[str, str]) -> str:
    """Per row over its rounds: exp(entropy) as a share of the arms (left), share of the arms drawn so far (right)."""
    figure, (left, right) = canvas(2.9, 2)
    for name, (rounds, effective, visited) in rows.items():
        mark = "o" if len(rounds) < 25 else None
        left.plot(rounds, 100 * effective, color=colours[name], label=name, marker=mark, markersize=3)
        right.plot(rounds, 100 * visited, color=colours[name], marker=mark, markersize=3)
    left.set_title("arms in use, exp(entropy)")
    right.set_title("arms drawn from so far")
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.set_ylim(0, 104)
        axes.locator_params(axis="x", integer=True, nbins=8)
    left.set_ylabel("% of the arms")
    figure.legend(loc="outside upper left", ncols=min(len(rows), 6), columnspacing=1.4)
    return svg(figure, "spread", "Entropy and visited arms over rounds")


@styled
def heat(name: str, steps: np.ndarray, losses: np.ndarray, learned: np.ndarray, labels: Sequence[str]) -> str:
    """Loss of each arm, or group of arms, as a share of its first one; rows in the order in which they were learned.

    Args:
      steps: int[L], where losses were measured.
      losses: f64[G, L], shares of the first loss; NaN is left blank.
      learned: f64[G], column at which half of the fall was done; NaN for arms that did not fall.
      labels: of the rows; shown where they have room.
    """
    groups, count = losses.shape
    figure, axes = canvas(max(0.9 + min(0.16 * groups, 5.2), 2.6))
    ramp = matplotlib.colors.LinearSegmentedColormap.from_list("loss", HEAT)
    image = axes.imshow(
        np.ma.masked_invalid(losses), aspect="auto", cmap=ramp, vmin=0.0, vmax=1.5, interpolation="nearest"
    )
    seen = np.flatnonzero(np.isfinite(learned))
    axes.plot(learned[seen], seen, "|", color=PAPER, markersize=min(8, 200 / groups), markeredgewidth=1.6)
    axes.set_yticks(np.arange(groups), labels, fontsize=min(7, 330 / groups))
    shown = np.unique(np.linspace(0, count - 1, min(count, 9)).round().astype(int))
    axes.set_xticks(shown, [f"{int(steps[column])}" for column in shown])
    axes.set_xlabel("steps done when it was measured")
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("loss / the arm's first")
    return svg(figure, f"heat-{slug(name)}", f"Loss by arm over rounds, {name}")


@styled
def forgotten(name: str, steps: np.ndarray, now: np.ndarray, ever: np.ndarray) -> str:
    """Arms that are forgotten at each measurement int[L], and those that have been at any time until then int[L]."""
    figure, axes = canvas(2.0)
    axes.fill_between(steps, ever, step="pre", color=FAINT, label="forgotten at any time so far")
    axes.fill_between(steps, now, step="pre", color=ACCENT, label="forgotten now")
    axes.set_xlim(steps[0], steps[-1])
    axes.set_ylim(0, max(int(ever.max()), 1) * 1.08)
    axes.locator_params(axis="y", integer=True, nbins=5)
    axes.set_xlabel("steps")
    axes.set_ylabel("arms")
    figure.legend(loc="outside upper left", ncols=2)
    return svg(figure, f"forgotten-{slug(name)}", f"Arms forgotten and recovered, {name}")


@styled
def difficulty(rows: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]], colours: dict[str, str]) -> str:
    """Watched records in three levels of difficulty: a row's steps int[L], accuracy f64[3, L], loss f64[3, L]. The
    axis is the share of a row's own steps, since rows may differ in length."""
    figure, panels = plt.subplots(2, 3, figsize=(WIDTH, 4.6), layout="constrained", sharex=True, sharey="row")
    for name, (steps, accuracy, loss) in rows.items():
        share = 100 * steps / steps[-1]
        for level in range(3):
            label = name if level == 0 else None
            panels[0, level].plot(share, 100 * accuracy[level], color=colours[name], label=label)
            panels[1, level].plot(share, loss[level], color=colours[name])
    for level, title in enumerate(LEVELS):
        panels[0, level].set_title(title)
        panels[1, level].set_xlabel("% of the row's steps")
    panels[0, 0].set_ylabel("exact answers, %")
    panels[1, 0].set_ylabel("loss, nats a token")
    best = max(100 * np.nanmax(accuracy) for _, accuracy, _ in rows.values())
    panels[0, 0].set_ylim(0, max(1.05 * best, 5))
    figure.legend(loc="outside upper left", ncols=min(len(rows), 6), columnspacing=1.4, labelcolor=INK)
    return svg(figure, "difficulty", "Accuracy and loss by difficulty over steps")
