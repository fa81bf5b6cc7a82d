"""The report's tables: results (HTML cells and Markdown), cost per stage, quarantine, provenance."""

import collections
import math
import pathlib
import re
from collections.abc import Sequence

from coincide_jax.core import artifacts
from coincide_jax.report.sources import Artefacts, MissingError

WARMUP = ("cluster/warmup", "select/warmup")
STAGES = ("dataset", "base", "reference", "extract", "cluster", "select", *WARMUP, "train", "evaluate")
SELECTION = ("extract", "cluster", "select", *WARMUP)
OWN = ("reference", "extract", "cluster", *WARMUP)  # what a row may have of its own, once for all its seeds
EXAMPLES = 12  # quarantined records shown


def percent(value: float | None, digits: int = 1) -> str:
    """A share as percent without its sign; a dash for nothing."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def seen(artefacts: Artefacts, table: dict) -> list[tuple[str, list[str]]]:
    """What the rows of the results were trained on: (what, a cell a row), from the summaries of their manifests.

    A quantity that no row recorded is left out; where seeds differ a cell is "from–to".
    """
    found = []
    for what, of in (
        ("distinct records", lambda summary: _grouped(summary.get("distinct"))),
        ("steps", lambda summary: _grouped(summary.get("steps"))),
        ("probes, rounds × records", lambda summary: _measured(summary.get("probe"))),
        ("skill graph, steps", lambda summary: _grouped(summary.get("graph_steps"))),
        ("a probability moved by, of 1/arms", lambda summary: _share(summary.get("moved"))),
    ):
        cells = []
        for name in table["rows"]:
            manifests = [artefacts.manifest(folder / "train") or {} for folder in artefacts.rows.get(name, ())]
            values = sorted({of(manifest.get("summary", {})) for manifest in manifests} - {None})
            ends = dict.fromkeys((*values[:1], *values[-1:]))
            cells.append("–".join(text for _, text in ends) or "–")
        if set(cells) != {"–"}:
            found.append((what, cells))
    return found


def _grouped(number: int | None) -> tuple[int, str] | None:
    return None if number is None else (number, f"{number:,}")


def _share(value: float | None) -> tuple[float, str] | None:
    """None where nothing moved, as with one arm."""
    return (value or None) and (value, f"{100 * value:.{0 if value >= 0.1 else 1}f} %")


def _measured(probe: dict | None) -> tuple[int, str] | None:
    """Passes between rounds that trained nothing; the number that they are ordered by, and their text."""
    return probe and (probe["times"] * probe["records"], f"{probe['times']} × {probe['records']:,}")


def markdown(table: dict, seen: Sequence[tuple[str, list[str]]]) -> str:
    """The results as a Markdown table, with the sentence above it when nothing can be ranked; else the sentence."""
    if not table["rows"]:
        return table["sentence"] + "\n"
    names = list(table["rows"])
    lines = [table["sentence"], ""] if table["sentence"] else []
    lines += ["| task | metric | n | blind | " + " | ".join(names) + " |", "|---|---|---:|---:|" + "---:|" * len(names)]
    for task in table["tasks"]:
        cells = []
        for row in table["rows"].values():
            score = row["scores"][task["task"]]
            interval = " [{}, {}]".format(*map(percent, score["interval"])) if score["interval"] else ""
            cells.append(percent(score["score"]) + interval)
        mark = " •" if task["counted"] else ""
        head = f"| {task['task']}{mark} | {task['metric']} | {task['questions']} | {percent(task['blind'])} | "
        lines.append(head + " | ".join(cells) + " |")
    if table["counted"]:
        cells = [
            f"{row['rel']:.1f}" + (" [{:.1f}, {:.1f}]".format(*row["rel_interval"]) if row["rel_interval"] else "")
            for row in table["rows"].values()
        ]
        lines.append(f"| **Rel. %** ({len(table['counted'])} tasks) | | | | " + " | ".join(cells) + " |")
    lines.append("| seeds | | | | " + " | ".join(str(row["seeds"]) for row in table["rows"].values()) + " |")
    lines += [f"| {what} | | | | " + " | ".join(cells) + " |" for what, cells in seen]
    lines += [
        "",
        f"Scores in percent [95 % interval], bootstrap of {table['resamples']} over {table['label']}, paired. "
        "• counted in Rel. %: there the full-data row beats its blind floor by more than its interval.",
    ]
    return "\n".join(lines) + "\n"


def seconds_of(manifest: dict | None) -> float | None:
    """Recorded seconds of a stage, None when it left no manifest."""
    return None if manifest is None else manifest.get("recorded", {}).get("seconds")


def cost(artefacts: Artefacts) -> dict:
    """Seconds per stage of the headline run and of each row, and the overall selection cost (OSC).

    OSC counts what is run because of the selection: extract, cluster and select, once with the training of the
    reference and once without. Raises `MissingError` when no stage has a manifest.
    """
    stages, resumed = [], []
    for name in STAGES:
        manifest = artefacts.manifest(artefacts.inputs[name]) if name in artefacts.inputs else None
        seconds = seconds_of(manifest)
        if seconds is None:
            continue
        kind = "reference" if name == "reference" else "selection" if name in SELECTION else "rest"
        stages.append((name, float(seconds), kind))
        if manifest["recorded"].get("attempts", 1) > 1:
            resumed.append(name)
    if not stages:
        raise MissingError("manifest.json of any stage")
    by_name = {name: seconds for name, seconds, _ in stages}
    measured = [name for name in SELECTION if name in by_name]
    without = sum(by_name[name] for name in measured)
    rows = []
    for name, folders in artefacts.rows.items():
        entry = {"row": name, "seeds": len(folders)}
        above = folders[0].parent
        own = [seconds_of(artefacts.manifest(above / stage)) for stage in OWN] if above.name == name else []
        own = [seconds for seconds in own if seconds is not None]
        entry["own"] = duration(sum(own)) if own else "–"
        for stage in ("select", "train", "evaluate"):
            found = [seconds_of(artefacts.manifest(folder / stage)) for folder in folders]
            found = [seconds for seconds in found if seconds is not None]
            entry[stage] = duration(sum(found) / len(found)) if found else "–"
        summaries = [(artefacts.manifest(folder / "train") or {}).get("summary", {}) for folder in folders]
        for what in ("probe", "watch"):
            found = [summary[what]["seconds"] for summary in summaries if what in summary]
            entry[what] = duration(sum(found) / len(found)) if found else "–"
        rows.append(entry)
    return {
        "stages": stages,
        "resumed": resumed,
        "selection": measured,
        "without_reference": without,
        "with_reference": without + by_name["reference"] if "reference" in by_name else None,
        "rows": rows,
    }


def data(artefacts: Artefacts, table: dict) -> dict:
    """Parts of the data set and what was quarantined, by reason."""
    split = artefacts.split
    parts = [
        (name, len(split[name]), meaning)
        for name, meaning in (
            ("pool", "may be picked and trained on"),
            ("base", "trains the base; in no pool"),
            ("dev", "for choosing settings"),
            ("heldout", "asked in the evaluation"),
        )
        if split.get(name) is not None
    ]
    if not split.get("heldout"):  # questions of their own files
        asked = sum(task["questions"] for task in table["tasks"])
        parts[-1] = ("questions", asked, "asked in the evaluation; from files of their own")
    rows = []
    for stage in ("dataset", "extract"):
        try:
            rows += artifacts.read_jsonl(artefacts.path(stage, "quarantine.jsonl"))
        except MissingError:
            continue
    rows = list({(row.get("index"), row.get("reason")): row for row in rows}.values())
    reasons = collections.Counter(re.sub(r"'[^']*'|\S*[/\\]\S*|\d+", "…", str(row.get("reason", ""))) for row in rows)
    return {
        "records": split["n"],
        "file": split["records"],
        "parts": parts,
        "quarantined": split.get("quarantined", len(rows)),
        "reasons": reasons.most_common(),
        "examples": rows[:EXAMPLES],
    }


def provenance(artefacts: Artefacts, table: dict) -> dict:
    """Per stage: version, seconds, attempts; of the run: library versions, device, revision, command, seeds."""
    stages, recorded, configs = [], {}, {}
    for name in STAGES:
        manifest = artefacts.manifest(artefacts.inputs[name]) if name in artefacts.inputs else None
        if manifest is None:
            continue
        recorded = manifest.get("recorded", {}) or recorded
        configs |= manifest.get("config", {})
        stages.append(
            {
                "stage": name,
                "version": manifest.get("version", "–"),
                "attempts": recorded.get("attempts", 1),
                "identity": str(manifest.get("identity", ""))[:12],
            }
        )
    if not stages:
        raise MissingError("manifest.json of any stage")
    command = recorded.get("command", [])
    return {
        "stages": stages,
        "versions": recorded.get("versions", {}),
        "device": recorded.get("device", "unknown"),
        "revision": recorded.get("revision", "unknown"),
        "command": command if isinstance(command, str) else " ".join(map(str, command)),
        "seeds": ", ".join(f"{name} {row['seeds']}" for name, row in table["rows"].items()),
        "bootstrap": f"{table['resamples']} resamples, seed {table['seed']}",
        "config": sorted((key, str(value)) for key, value in configs.items()),
        "folders": sorted({str(pathlib.Path(folder)) for folders in artefacts.rows.values() for folder in folders}),
    }
