"""The report's section on curricula: task ratio, spread, what was learned in which order, what was forgotten.

Of a row its first seed is shown; difficulty and forgetting by task are means over seeds. What a run did not leave is
not shown: `train/arms.jsonl` has losses of runs with more than one arm, and what a probe or `curriculum.watch` saw.
"""

import pathlib
from typing import NamedTuple

import markupsafe
import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.report import figures, rounds
from coincide_jax.report.sources import Artefacts, MissingError

GROUPS = 60  # rows of a heat map; more arms are averaged in groups, in the order in which they were learned
COLUMNS = 60  # of a heat map; more measurements are averaged
LISTED = 8  # clusters named at either end of the order, and of those forgotten
LEAST_FALL = 0.1  # of its first loss: an arm that fell by less counts as not learned
MARGIN = 0.2  # of its first loss: an arm so far above its best is forgotten


class Story(NamedTuple):
    """Losses of arms over a run.

    steps: int[L]; losses: f64[L, K], NaN where not measured; learned: f64[K], index of the measurement at which half of
    the fall was done, NaN if there was none; forgotten: bool[L, K], as last known.
    """

    steps: np.ndarray
    losses: np.ndarray
    learned: np.ndarray
    forgotten: np.ndarray


def section(artefacts: Artefacts) -> dict:
    """Figures and facts of every row whose sampler has arms to choose from, and of the rows together.

    Raises:
      MissingError: no such row; a plan, a step or a clustering that belongs to it.
    """
    shown, spreads = [], {}
    for name, folders in artefacts.rows.items():
        for folder in folders[:1]:
            try:
                lines = artefacts.lines(folder, "curriculum.jsonl")
            except MissingError:
                continue
            if lines and len(lines[0]["probabilities"]) > 1:
                lines = trained(artefacts, folder, lines)
                tasks, shares = composition(artefacts, folder, len(lines[0]["probabilities"]))
                shown.append(
                    {"row": name}
                    | _ratio(name, lines, tasks, shares)
                    | _learning(name, folder, np.asarray(tasks)[shares.argmax(1)])
                )
                spreads[name] = _spread(lines)
    seen = watched(artefacts)
    if not shown and not seen["lost"]:
        raise MissingError("train/curriculum.jsonl of a row with more than one arm")
    colours = figures.row_colours(list(artefacts.rows))
    return {"rows": shown, "spread": markupsafe.Markup(rounds.spread(spreads, colours)) if shown else None} | seen


def trained(artefacts: Artefacts, folder: pathlib.Path, lines: list[dict]) -> list[dict]:
    """The rounds that were trained: a run that draws ahead (curriculum.lag=1) may end before its last one."""
    plan = folder / "train" / "run.json"
    if not plan.exists():
        raise MissingError(f"{folder.name}/train/run.json")
    round_steps = artifacts.read_json(plan)["round_steps"]
    last = max((line["step"] for line in artefacts.lines(folder, "metrics.jsonl")), default=0)
    lines = [line for line in lines if line["round"] * round_steps < last]  # drawn_at + lag rounds is where it begins
    if not lines:
        raise MissingError(f"a step in {folder.name}/train/metrics.jsonl")
    return lines


def composition(artefacts: Artefacts, folder: pathlib.Path, arms: int) -> tuple[list[str], np.ndarray]:
    """Names of the tasks, and which share of each arm's records is of each: f64[K, T]."""
    path = folder / "train" / "arms" / "records.npy"  # row of the records → arm
    if not path.exists():
        raise MissingError(f"the arms of the records, {path.name}")
    arm = np.load(path)
    if arm.max() + 1 != arms or len(arm) != len(artefacts.tasks):
        raise MissingError(f"{arms} arms of {len(artefacts.tasks)} records in {path.name}")
    inside = np.flatnonzero(arm >= 0)
    tasks, number = np.unique(artefacts.tasks[inside].astype(str), return_inverse=True)
    counts = np.bincount(arm[inside] * len(tasks) + number, minlength=arms * len(tasks)).reshape(arms, -1)
    return list(map(str, tasks)), counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _ratio(name: str, lines: list[dict], tasks: list[str], shares: np.ndarray) -> dict:
    """Task ratio over rounds: the draws of each arm, shared out by what the arm holds."""
    draws = np.array([line["draws"] for line in lines], float)
    ratio = (draws / np.maximum(draws.sum(1, keepdims=True), 1)) @ shares
    order = np.argsort(-ratio.mean(0), kind="stable")
    gain = ratio[-1] - ratio[0]
    number = np.array([line["round"] for line in lines], float)
    return {
        "figure": markupsafe.Markup(rounds.ratio(name, number, [tasks[task] for task in order], ratio[:, order])),
        "up": (tasks[gain.argmax()], float(gain.max())),
        "down": (tasks[gain.argmin()], float(gain.min())),
        "arms": draws.shape[1],
        "rounds": len(lines),
        "visited": int((draws.sum(0) > 0).sum()),
    }


def _spread(lines: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rounds, exp(entropy of p) and arms drawn so far, both as shares of the arms."""
    p = np.array([line["probabilities"] for line in lines], float)
    draws = np.array([line["draws"] for line in lines])
    entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
    visited = (np.cumsum(draws, axis=0) > 0).mean(1)
    return np.array([line["round"] for line in lines], float), np.exp(entropy) / p.shape[1], visited


def story(steps: np.ndarray, losses: np.ndarray) -> Story:
    """What became of each arm, from its losses f64[L, K] measured after `steps` int[L], NaN where they were not.

    An arm is learned where half of the way from its first to its least loss is done, if that is `LEAST_FALL` of the
    first or more. It is forgotten while its last known loss is above its best by more than `MARGIN` of the first.
    """
    count, arms = losses.shape
    known = np.isfinite(losses)
    first = losses[known.argmax(0), np.arange(arms)]  # NaN for arms that were never measured
    floor = np.fmin.accumulate(losses, axis=0)
    fall = first - floor[-1]
    done = known & (losses <= first - 0.5 * fall)
    learned = np.where(done.any(0) & (fall >= LEAST_FALL * first), done.argmax(0).astype(float), np.nan)
    forgotten, now = np.zeros((count, arms), bool), np.zeros(arms, bool)
    for line in range(count):
        now = np.where(known[line], losses[line] > floor[line] + MARGIN * first, now)
        forgotten[line] = now
    return Story(steps, losses, learned, forgotten)


def grouped(told: Story, names: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Columns' steps, shares of the first loss f64[G, C], learned column f64[G], labels; arms in the order learned."""
    known = np.isfinite(told.losses)
    arms = np.flatnonzero(known.any(0))
    first = told.losses[known.argmax(0), np.arange(told.losses.shape[1])]
    order = arms[np.argsort(np.where(np.isfinite(told.learned[arms]), told.learned[arms], np.inf), kind="stable")]
    shares = (told.losses / np.where(first > 0, first, 1.0)).T[order]
    rows = np.array_split(np.arange(len(order)), min(GROUPS, len(order)))
    columns = np.array_split(np.arange(len(told.steps)), min(COLUMNS, len(told.steps)))
    cells = np.array([[_mean(shares[np.ix_(row, column)]) for column in columns] for row in rows])
    at = np.concatenate([np.full(len(column), number) for number, column in enumerate(columns)])
    learned = np.array([_mean(told.learned[order[row]]) for row in rows])
    learned = np.where(np.isfinite(learned), at[np.nan_to_num(learned).round().astype(int)], np.nan)
    if len(rows) == len(order):
        labels = [f"{arm} {names[arm]}" for arm in order]
    else:
        labels = [f"{len(row)} arm{'s' * (len(row) > 1)}" for row in rows]
    return np.array([told.steps[column[-1]] for column in columns]), cells, learned, labels


def _mean(values: np.ndarray) -> float:
    """Of the finite ones; NaN if there is none."""
    kept = values[np.isfinite(values)]
    return float(kept.mean()) if len(kept) else float("nan")


def _learning(name: str, folder: pathlib.Path, main_task: np.ndarray) -> dict:
    """Heat map, order of learning and forgetting of one run; None for each if it left no losses by arm."""
    nothing = {"heat": None, "forgotten": None, "first": [], "last": [], "lost": [], "losses_are": ""}
    path = folder / "train" / "arms.jsonl"
    lines = artifacts.read_jsonl(path) if path.exists() else []
    kind = "probe" if any("probe" in line for line in lines) else "losses"
    lines = [line for line in lines if kind in line]
    if len(lines) < 2:
        return nothing
    losses = np.array([line[kind] for line in lines], float)
    if kind == "probe" and _by_accuracy(folder):
        losses = 1.0 - losses  # the share of wrong answers
    told = story(np.array([line["step"] for line in lines]), losses)
    arms = np.flatnonzero(np.isfinite(told.losses).any(0))
    order = arms[np.argsort(told.learned[arms], kind="stable")]  # NaN comes last
    order = order[np.isfinite(told.learned[order])]

    def named(arm: int) -> str:
        return f"{arm} ({main_task[arm]}, step {told.steps[int(told.learned[arm])]})"

    ever = told.forgotten.any(0)
    worst = np.argsort(-told.forgotten.sum(0), kind="stable")[: min(LISTED, int(ever.sum()))]
    return nothing | {
        "heat": markupsafe.Markup(rounds.heat(name, *grouped(told, main_task))),
        "forgotten": markupsafe.Markup(
            rounds.forgotten(
                name,
                told.steps,
                told.forgotten.sum(1),
                np.logical_or.accumulate(told.forgotten, axis=0).sum(1),
            )
        )
        if ever.any()
        else None,
        "first": [named(arm) for arm in order[:LISTED]],
        "last": [named(arm) for arm in order[LISTED:][-LISTED:]],
        "learned": len(order),
        "measured": len(arms),
        "ever": int(ever.sum()),
        "still": int(told.forgotten[-1].sum()),
        "lost": [f"{arm} ({main_task[arm]})" for arm in worst],
        "losses_are": "the sampler’s probe" if kind == "probe" else "the training losses of its draws in a round",
    }


def _by_accuracy(folder: pathlib.Path) -> bool:
    """Whether the run's probe measured exact answers."""
    path = folder / "train" / "manifest.json"
    return path.exists() and artifacts.read_json(path).get("config", {}).get("curriculum.objective") == "accuracy"


def watched(artefacts: Artefacts) -> dict:
    """Of the watched records: exact answers and loss by difficulty, what each task lost of its best; means over seeds.

    Difficulty: thirds of the records by their loss before the first step, which is the same for every row of a seed.
    """
    levels, tasks, lost = {}, [], {}
    for name, folders in artefacts.rows.items():
        seeds = [found for folder in folders if (found := _watch(folder)) is not None]
        if not seeds:
            continue
        seeds = [seed for seed in seeds if np.array_equal(seed[0], seeds[0][0])]
        by_level, by_task = [], []
        for _, nll, exact, records in seeds:
            third = np.array_split(np.argsort(nll[0], kind="stable"), 3)
            by_level.append([[np.nanmean(values[:, part], axis=1) for part in third] for values in (exact, nll)])
            of = artefacts.tasks[records].astype(str)
            tasks = sorted(set(of))
            accuracy, loss = ([np.nanmean(values[:, of == task], axis=1) for task in tasks] for values in (exact, nll))
            by_task.append(
                [[float(a.max() - a[-1]), float(v[-1] - v.min())] for a, v in zip(accuracy, loss, strict=True)]
            )
        accuracy, loss = np.mean(by_level, axis=0)
        levels[name] = (seeds[0][0], accuracy, loss)
        lost[name] = np.asarray(by_task)  # [seeds, tasks, 2]
    if not levels:
        return {"difficulty": None, "tasks": [], "lost": {}}
    return {
        "difficulty": markupsafe.Markup(rounds.difficulty(levels, figures.row_colours(list(artefacts.rows)))),
        "tasks": tasks,
        "lost": {name: values.mean(0).tolist() for name, values in lost.items()},
        "lost_mean": {name: values.mean((0, 1)).tolist() for name, values in lost.items()},
    }


def _watch(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps int[L], loss f64[L, n], exact answers f64[L, n], records int[n] of a run; None if it watched nothing."""
    path, records = folder / "train" / "arms.jsonl", folder / "train" / "watched.npy"
    if not path.exists() or not records.exists():
        return None
    lines = [line for line in artifacts.read_jsonl(path) if "watch" in line]
    if len(lines) < 2:
        return None
    nll, exact = (np.array([line["watch"][key] for line in lines], float) for key in ("nll", "exact"))
    return np.array([line["step"] for line in lines]), nll, exact, np.load(records)


def forgetting_table(found: dict) -> list[str]:
    """What each task lost of its best, as lines of Markdown; none if nothing was watched."""
    if not found.get("lost"):
        return []
    lines = ["", "| forgotten | " + " | ".join(found["lost"]) + " |", "|---|" + "---:|" * len(found["lost"])]
    cells = {name: [*values, found["lost_mean"][name]] for name, values in found["lost"].items()}
    for number, task in enumerate([*found["tasks"], "**mean**"]):
        row = " | ".join(f"{100 * values[number][0]:.1f} / {values[number][1]:.3f}" for values in cells.values())
        lines.append(f"| {task} | {row} |")
    lines += [
        "",
        "Watched records of the dev part: points of exact answers by which the end is below the best round / nats a "
        "token by which it is above the least loss; means over seeds. The best of noisy rounds is above the truth: a "
        "row that forgets nothing does not show 0.",
    ]
    return lines
