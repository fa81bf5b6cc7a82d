"""Relative performance of rows against the full-data row, with two-level bootstrap intervals.

Rel. % = 100 · mean over tasks of score(row) / score(full) (COINCIDE §4.1), the full-data row being one's own run under
the same harness. Only tasks count where the full row beats its blind floor by more than its interval: elsewhere a
ratio of two guessers would be taken for a result. Pure NumPy.
"""

import textwrap
from collections.abc import Sequence

import numpy as np

from coincide_jax.core.errors import UserError

LEVEL = (2.5, 97.5)  # percentiles of the 95 % interval
BLOCK = 64  # resamples at a time: BLOCK × images float64 of weights are in memory
WIDTH = 120  # columns of the terminal table
NOTHING = "Nothing was evaluated: no row has answers yet; run the stage 'evaluate'."


def check_resamples(resamples: int) -> None:
    """Raises `UserError` unless there is at least one resample."""
    if resamples < 1:
        raise UserError(f"evaluate.bootstrap is {resamples}; expected 1 resample or more")


def _layout(rows: dict[str, Sequence[Sequence[dict]]]):
    """The Q questions of all rows: tasks, task and image cluster i64[Q], {row: f64[seeds, Q]}, blind f64[Q].

    A text-only question is its own cluster.
    """
    first_name, first = next(iter(rows.items()))
    keys = [(answer["task"], answer["id"]) for answer in first[0]]
    order = {key: position for position, key in enumerate(keys)}
    scores = {}
    for name, seeds in rows.items():
        scores[name] = np.zeros((len(seeds), len(keys)))
        for number, answers in enumerate(seeds):
            found = [order.get((answer["task"], answer["id"]), -1) for answer in answers]
            if sorted(found) != list(range(len(keys))):
                raise UserError(
                    f"row '{name}', seed {number}, answered {len(answers)} questions, not the {len(keys)} of row "
                    f"'{first_name}'; rows are compared on the same questions (evaluate.questions, limit, seed)"
                )
            scores[name][number, found] = [answer["score"] for answer in answers]
    tasks = sorted({task for task, _ in keys})
    task_of = np.array([tasks.index(task) for task, _ in keys])
    images: dict = {}
    names = [answer.get("image") or ("", *key) for answer, key in zip(first[0], keys, strict=True)]
    cluster = np.array([images.setdefault(name, len(images)) for name in names])
    blind = np.array([answer["blind_score"] for answer in first[0]], float)
    return tasks, task_of, cluster, scores, blind


def _sums(values: np.ndarray, task_of: np.ndarray, cluster: np.ndarray, tasks: int) -> np.ndarray:
    """Sums per image and task: f64[..., Q] -> f64[..., images, tasks]."""
    slots = (cluster.max() + 1) * tasks
    flat = cluster * tasks + task_of
    rows = [np.bincount(flat, weights=row, minlength=slots) for row in values.reshape(-1, values.shape[-1])]
    return np.stack(rows).reshape(*values.shape[:-1], cluster.max() + 1, tasks)


def _resample(sums: dict[str, np.ndarray], counts: np.ndarray, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Bootstrap task scores {row: f64[R, tasks]}, from sums per image {row: [seeds, images, tasks]} and counts.

    One draw of images serves all rows and seeds; rows with equally many seeds share the draw of seeds (seed k of every
    row starts from the same base weights). A task none of whose images is drawn is NaN in that resample.
    """
    rng = np.random.default_rng(seed)
    images, tasks = counts.shape
    seed_shares = {
        count: rng.multinomial(count, np.full(count, 1 / count), size=resamples) / count
        for count in sorted({len(values) for values in sums.values()})
    }
    out = {name: np.empty((resamples, tasks)) for name in sums}
    for begin in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - begin)
        drawn = rng.integers(images, size=(size, images)) + images * np.arange(size)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=size * images).reshape(size, images).astype(float)
        total = weight @ counts
        total[total == 0] = np.nan
        for name, values in sums.items():
            per_seed = np.matmul(weight, values)  # [seeds, block, tasks]
            share = seed_shares[len(values)][begin : begin + size]
            out[name][begin : begin + size] = np.einsum("bs,sbt->bt", share, per_seed) / total
    return out


def _interval(samples: np.ndarray) -> list[float] | None:
    """The 95 % percentile interval of f64[R], NaN left out; None where fewer than half remain."""
    known = samples[~np.isnan(samples)]
    if 2 * len(known) < len(samples):
        return None
    low, high = np.percentile(known, LEVEL)
    return [round(float(low), 6), round(float(high), 6)]


def _ratios(score: np.ndarray, full: np.ndarray) -> np.ndarray:
    """Rel. % f64[R] of resampled task scores f64[R, counted]: 100 · mean of score / full over the tasks drawn.

    NaN, so that the resample is left out, where the full row scores 0 on a task or no image of any task was drawn.
    """
    drawn = full > 0  # NaN is not
    ratio = np.divide(score, full, out=np.zeros_like(score), where=drawn)
    tasks = np.where((full == 0).any(axis=1), 0, drawn.sum(axis=1))
    return np.divide(100 * ratio.sum(axis=1), tasks, out=np.full(len(full), np.nan), where=tasks > 0)


def intervals(answers: Sequence[dict], resamples: int, seed: int) -> dict[str, list[float] | None]:
    """Task → 95 % interval of its mean score: bootstrap over questions clustered by image, for one run's answers.

    For rows of one seed these are the intervals of `compare`. None where a task has so few images that it stays out of
    more than half of the resamples.

    Raises:
      UserError: no resamples.
    """
    check_resamples(resamples)
    tasks, task_of, cluster, scores, _ = _layout({"": [answers]})
    counts = _sums(np.ones(len(task_of)), task_of, cluster, len(tasks))
    sample = _resample({"": _sums(scores[""], task_of, cluster, len(tasks))}, counts, resamples, seed)[""]
    return {task: _interval(sample[:, number]) for number, task in enumerate(tasks)}


def compare(
    rows: dict[str, Sequence[Sequence[dict]]],
    full: str = "full",
    resamples: int = 1000,
    seed: int = 0,
    minimum: int = 5,
    baseline: str = "random",
    part: str = "heldout",
) -> dict:
    """Compares rows on the same questions.

    Args:
      rows: row name → over seeds → the lines of `answers.jsonl` (task, id, image, score, blind_score).
      full: name of the full-data row; Rel. % is left out (and said so) when it is not among `rows`.
      resamples: bootstrap resamples of seeds, then of questions clustered by image, paired between rows.
      seed: of the resampling.
      minimum: with fewer counted tasks nothing is said to be ranked.
      baseline: row that the others' Rel. % is subtracted from, paired, when it is there.
      part: whose questions were asked; on 'dev' settings are chosen, so nothing is ranked there.

    Returns:
      A JSON-able dict: `tasks` (name, metric, questions, images, blind, blind_interval, counted), `rows`
      (name → seeds, label, scores {task: score, interval, seeds}, rel, rel_interval, against), `counted`, `ranked`,
      `sentence` (empty when rows can be ranked), `full`, `baseline`, `label`, `resamples`, `seed`; scores in [0, 1].
      An interval is None where fewer than half of the resamples give a number. Without any answers there are no tasks
      and no rows, and the sentence says so.

    Raises:
      UserError: rows that answered different questions, no resamples.
    """
    check_resamples(resamples)
    rows = {name: [answers for answers in seeds if answers] for name, seeds in rows.items()}
    rows = {name: seeds for name, seeds in rows.items() if seeds}
    if not rows:
        known = {"ranked": False, "sentence": NOTHING, "label": "questions only", "resamples": resamples, "seed": seed}
        return {"tasks": [], "rows": {}, "counted": [], "full": None, "baseline": None} | known
    tasks, task_of, cluster, scores, blind = _layout(rows)
    counts = _sums(np.ones(len(task_of)), task_of, cluster, len(tasks))
    sums = {name: _sums(values, task_of, cluster, len(tasks)) for name, values in scores.items()}
    sums[""] = _sums(blind[None], task_of, cluster, len(tasks))  # the blind floor, resampled with the rows
    sample = _resample(sums, counts, resamples, seed)
    questions = counts.sum(0)
    per_seed = {name: values.sum(1) / questions for name, values in sums.items()}
    point = {name: values.mean(0) for name, values in per_seed.items()}

    has_full = full in rows
    counted = []
    if has_full:
        lead = [_interval(sample[full][:, number] - sample[""][:, number]) for number in range(len(tasks))]
        counted = [number for number, interval in enumerate(lead) if interval and interval[0] > 0]
    rel, rel_sample = {}, {}
    if counted:
        for name in rows:
            rel[name] = float(100 * (point[name][counted] / point[full][counted]).mean())
            rel_sample[name] = _ratios(sample[name][:, counted], sample[full][:, counted])

    metrics: dict[str, set[str]] = {task: set() for task in tasks}
    for answer in next(iter(rows.values()))[0]:
        metrics[answer["task"]].add(answer["metric"])
    table = {
        "tasks": [
            {
                "task": task,
                "metric": ", ".join(sorted(metrics[task])),
                "questions": int(questions[number]),
                "images": int((counts[:, number] > 0).sum()),
                "blind": round(float(point[""][number]), 6),
                "blind_interval": _interval(sample[""][:, number]),
                "counted": number in counted,
            }
            for number, task in enumerate(tasks)
        ],
        "rows": {},
        "counted": [tasks[number] for number in counted],
        "ranked": len(counted) >= minimum and part == "heldout",
        "sentence": _sentence(has_full, full, len(counted), len(tasks), minimum, part),
        "full": full if has_full else None,
        "baseline": baseline if baseline in rows else None,
        "resamples": resamples,
        "seed": seed,
    }
    for name, seeds in rows.items():
        fewest = min(len(seeds), len(rows[full])) if has_full else len(seeds)
        entry = {
            "seeds": len(seeds),
            "label": "seeds and questions" if fewest > 1 else "questions only",
            "scores": {
                task: {
                    "score": round(float(point[name][number]), 6),
                    "interval": _interval(sample[name][:, number]),
                    "seeds": [round(float(value), 6) for value in per_seed[name][:, number]],
                }
                for number, task in enumerate(tasks)
            },
            "rel": None,
            "rel_interval": None,
            "against": None,
        }
        if counted:
            entry["rel"] = round(rel[name], 4)
            entry["rel_interval"] = _interval(rel_sample[name])
            if baseline in rows and name not in (baseline, full):
                difference = {"difference": round(rel[name] - rel[baseline], 4)}
                entry["against"] = difference | {"interval": _interval(rel_sample[name] - rel_sample[baseline])}
        table["rows"][name] = entry
    labels = {entry["label"] for entry in table["rows"].values()}
    table["label"] = "seeds and questions" if labels == {"seeds and questions"} else "questions only"
    return table


def _sentence(has_full: bool, full: str, counted: int, tasks: int, minimum: int, part: str) -> str:
    """Why nothing can be ranked; empty when rows can be."""
    if part == "dev":
        return "These are questions of the dev part, for choosing settings: nothing is ranked by them."
    if not has_full:
        return f"Nothing can be ranked: there is no row '{full}' tuned on all data, so there is no Rel. %."
    if counted < minimum:
        return (
            f"Nothing can be ranked: the full-data row beats its blind floor by more than its interval on {counted} of "
            f"{tasks} tasks, and at least {minimum} are needed."
        )
    return ""


def _cell(score: float, interval: Sequence[float] | None, form: str, scale: float) -> str:
    if interval is None:
        return f"{score * scale:5.1f}"
    low, high = (value * scale for value in interval)
    if form == "interval":
        return f"{score * scale:5.1f} [{low:.1f}, {high:.1f}]"
    return f"{score * scale:5.1f} ±{(high - low) / 2:.1f}" if form == "half" else f"{score * scale:5.1f}"


def text(table: dict) -> str:
    """The table for a terminal, 120 columns wide: one line per task, one column per row, scores in percent.

    Whole intervals where they fit, half widths (±) where they do not; a dot marks the tasks that Rel. % counts. Only
    the sentence where nothing was evaluated.
    """
    if not table["rows"]:
        return "\n".join(textwrap.wrap(table["sentence"], WIDTH))
    for form in ("interval", "half", "score"):
        lines = _lines(table, form)
        if max(map(len, lines)) <= WIDTH:
            break
    seeds = ", ".join(f"{name} {entry['seeds']}" for name, entry in table["rows"].items())
    how = {"interval": "[95 % interval]", "half": "± half the 95 % interval", "score": "(no room for intervals)"}[form]
    notes = [f"Scores in percent {how}, bootstrap of {table['resamples']} over {table['label']}. Seeds: {seeds}."]
    if table["counted"]:
        notes.append("· counted in Rel. %: there the full row beats its blind floor by more than its interval.")
    for name, entry in table["rows"].items():
        if entry["against"]:
            difference = f"{entry['against']['difference']:+.1f}"
            if entry["against"]["interval"]:
                difference += " [{:+.1f}, {:+.1f}]".format(*entry["against"]["interval"])
            notes.append(f"Rel. % of {name} minus {table['baseline']}, paired: {difference}.")
    head = textwrap.wrap(table["sentence"], WIDTH)
    return "\n".join([*head, *lines, *(line for note in notes for line in textwrap.wrap(note, WIDTH))])


def _lines(table: dict, form: str) -> list[str]:
    """Header, tasks and the Rel. % line, as aligned columns."""
    grid = [["  task", "n", "blind", *table["rows"]]]
    for task in table["tasks"]:
        scores = (entry["scores"][task["task"]] for entry in table["rows"].values())
        cells = [_cell(score["score"], score["interval"], form, 100) for score in scores]
        mark = "· " if task["counted"] else "  "
        grid.append([mark + task["task"], str(task["questions"]), f"{100 * task['blind']:.1f}", *cells])
    if table["counted"]:
        cells = [_cell(entry["rel"], entry["rel_interval"], form, 1) for entry in table["rows"].values()]
        grid.append([f"  Rel. % ({len(table['counted'])} tasks)", "", "", *cells])
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    lines = [
        "  ".join(c.rjust(w) if column else c.ljust(w) for column, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in grid
    ]
    rule = "─" * len(lines[0])
    return [lines[0], rule, *lines[1 : 1 + len(table["tasks"])], rule, *lines[1 + len(table["tasks"]) :]]
