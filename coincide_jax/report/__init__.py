"""Stage 6: everything a run left → one self-contained page `report.html`; the results as `table.json`, `table.md`.

Each section is made from its own artefacts; where one is missing, the section says so and the others stand.
"""

import pathlib
from collections.abc import Callable, Sequence

import jinja2
import markupsafe
import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.core.metrics import say
from coincide_jax.report import curricula, figures, gallery, tables
from coincide_jax.report.sources import Artefacts, MissingError

__all__ = ["KEYS", "STAGE_VERSION", "run"]

STAGE_VERSION = 2
KEYS = ("name", "evaluate.part", "evaluate.bootstrap", "evaluate.seed", "evaluate.tasks_to_rank")
SHOWN_CLUSTERS = 300  # rows of the cluster table; the rest are in select/clusters.parquet
LOW_SHARE = 0.5  # a task whose share falls below this factor of its pool share is named


def run(
    config,
    inputs: dict[str, pathlib.Path],
    out: pathlib.Path,
    mesh,
    *,
    rows: dict[str, Sequence[pathlib.Path]],
    table: dict,
) -> dict:
    """Writes `report.html`, `table.json` and `table.md`.

    Args:
      config: holds `name`.
      inputs: stage → folder of the headline run; any may be missing.
      out: the stage's folder.
      mesh: not used.
      rows: row → its run folders, one a seed, the headline's own among them.
      table: the comparison of the rows (tasks, rows, counted, sentence, …).

    Returns:
      Names of the sections left out, and the size of the page.
    """
    del mesh
    artefacts = Artefacts(inputs, rows)
    sections = {
        name: _attempt(builder, artefacts, table)
        for name, builder in (
            ("results", results),
            ("composition", composition),
            ("clusters", clusters),
            ("kmeans", kmeans),
            ("gallery", galleries),
            ("training", training),
            ("curriculum", curriculum),
            ("cost", cost),
            ("data", data),
            ("provenance", provenance),
        )
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"percent": tables.percent, "duration": tables.duration, "number": number}
    page = environment.get_template("page.html").render(
        name=config.name, verdict=verdict(table), table=table, facts=facts(artefacts, sections), **sections
    )
    artifacts.write_text(out / "report.html", page)
    artifacts.write_json(out / "table.json", table)
    forgetting = "\n".join(curricula.forgetting_table(sections["curriculum"]))
    artifacts.write_text(out / "table.md", tables.markdown(table, tables.seen(artefacts, table)) + forgetting)
    missing = {name: section["missing"] for name, section in sections.items() if section.get("missing")}
    for name, what in missing.items():
        say("report", f"'{name}' is left out: {what} is missing")
    say("report", f"{out / 'report.html'} · {len(page) / 1e6:.1f} MB")
    return {"left_out": sorted(missing), "bytes": len(page.encode())}


def _attempt(builder: Callable[[Artefacts, dict], dict], artefacts: Artefacts, table: dict) -> dict:
    """A section, or the name of the artefact it lacks."""
    try:
        return {"missing": None} | builder(artefacts, table)
    except MissingError as missing:
        return {"missing": str(missing)}


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash for none."""
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def verdict(table: dict) -> str:
    """The report's first line: what the rows are worth, or that nothing can be ranked."""
    if table["sentence"]:
        return table["sentence"]
    parts = []
    for name, row in table["rows"].items():
        if name != table["full"]:
            interval = row["rel_interval"]
            parts.append(f"{name} {row['rel']:.1f} %" + (" [{:.1f}, {:.1f}]".format(*interval) if interval else ""))
    counted = f"{len(table['counted'])} of {len(table['tasks'])} tasks"
    return f"Relative to the row tuned on all data, over {counted}: " + ", ".join(parts) + "."


def facts(artefacts: Artefacts, sections: dict) -> list[tuple[str, str]]:
    """The few numbers at the head of the page, as far as they are known."""
    found = []
    for label, value in (
        ("records", lambda: f"{artefacts.split['n']:,}"),
        ("in the pool", lambda: f"{len(artefacts.pool):,}"),
        ("clusters", lambda: f"{len(artefacts.clusters['cluster']):,}"),
        ("picked", lambda: f"{len(artefacts.coreset):,}"),
        ("of the pool", lambda: f"{100 * len(artefacts.coreset) / max(len(artefacts.pool), 1):.1f} %"),
    ):
        try:
            found.append((label, value()))
        except MissingError:
            continue
    if not sections["cost"]["missing"] and sections["cost"]["selection"]:
        found.append(("selection cost", tables.duration(sections["cost"]["without_reference"])))
    return found


def results(artefacts: Artefacts, table: dict) -> dict:
    """What each row was trained on, the scores by task, Rel. %; the page takes the scores' table from `table`."""
    if not table["rows"]:
        raise MissingError("evaluate/answers.jsonl of a row")
    return {
        "seen": tables.seen(artefacts, table),
        "scores": markupsafe.Markup(figures.scores(table)),
        "relative": markupsafe.Markup(figures.relative(table)) if table["counted"] else None,
    }


def composition(artefacts: Artefacts, table: dict) -> dict:
    """Task composition of pool and coreset."""
    tasks, pool = np.unique(artefacts.tasks[artefacts.pool].astype(str), return_counts=True)
    picked = artefacts.tasks[artefacts.coreset].astype(str)
    coreset = np.array([(picked == task).sum() for task in tasks])
    order = np.argsort(-pool, kind="stable")
    factor = (coreset / max(coreset.sum(), 1)) / (pool / pool.sum())
    low = [str(tasks[row]) for row in order if factor[row] < LOW_SHARE]
    return {"figure": markupsafe.Markup(figures.composition(tasks[order], pool[order], coreset[order])), "low": low}


def clusters(artefacts: Artefacts, table: dict) -> dict:
    """Scatter of transferability and density, the cluster table."""
    described = gallery.describe(artefacts)
    columns = {name: [row[name] for row in described] for name in ("size", "transferability", "density", "picked")}
    names = [f"{row['cluster']} {row['words'][0] if row['words'] else ''}".strip() for row in described]
    shown = sorted(described, key=lambda row: (-row["picked"], -row["size"], row["cluster"]))[:SHOWN_CLUSTERS]
    scored = "transferability" in artefacts.clusters and "density" in artefacts.clusters
    return {
        "figure": markupsafe.Markup(figures.plane(**columns, names=names)) if scored else None,
        "rows": shown,
        "total": len(described),
        "empty": sum(row["size"] == 0 for row in described),
    }


def kmeans(artefacts: Artefacts, table: dict) -> dict:
    """History of the clustering and its quality against the audit labels."""
    found = artifacts.read_json(artefacts.path("cluster", "history.json"))
    titles = {"objective": "objective (mean cosine)", "imbalance": "imbalance", "empties": "clusters re-seeded"}
    history = {title: np.asarray(found[name], float) for name, title in titles.items() if found.get(name)}
    if not history:
        raise MissingError("a history in cluster/history.json (the clusters were handed in)")
    try:
        quality = artefacts.quality
    except MissingError:
        quality = None
    return {"figure": markupsafe.Markup(figures.kmeans(history)), "quality": quality, "dropped": found["dropped"]}


def galleries(artefacts: Artefacts, table: dict) -> dict:
    """Samples of a few clusters, picked and left."""
    return {"clusters": gallery.galleries(artefacts, gallery.describe(artefacts))}


def training(artefacts: Artefacts, table: dict) -> dict:
    """Loss and learning rate of all rows that left `train/metrics.jsonl`."""
    runs, absent = {}, []
    for name, folders in artefacts.rows.items():
        for number, folder in enumerate(folders):
            try:
                lines = [line for line in artefacts.lines(folder, "metrics.jsonl") if "loss" in line]
            except MissingError:
                absent.append(f"{name}, seed {number}")
                continue
            if lines:
                columns = (
                    np.array([line.get(key, np.nan) for line in lines], float)
                    for key in ("step", "loss", "learning_rate")
                )
                runs.setdefault(name, []).append(tuple(columns))
    if not runs:
        raise MissingError("train/metrics.jsonl of every row")
    last = {
        name: [float(loss[-max(len(loss) // 10, 1) :].mean()) for _, loss, _ in seeds] for name, seeds in runs.items()
    }
    steps = {name: int(seeds[0][0][-1]) for name, seeds in runs.items()}
    return {"figure": markupsafe.Markup(figures.curves(runs)), "absent": absent, "last": last, "steps": steps}


def curriculum(artefacts: Artefacts, table: dict) -> dict:
    """What the samplers with arms to choose from drew, and what was learned and forgotten."""
    return curricula.section(artefacts)


def cost(artefacts: Artefacts, table: dict) -> dict:
    """Seconds per stage and the overall selection cost."""
    found = tables.cost(artefacts)
    return found | {"figure": markupsafe.Markup(figures.cost(found["stages"]))}


def data(artefacts: Artefacts, table: dict) -> dict:
    """Records, parts and quarantine."""
    return tables.data(artefacts, table)


def provenance(artefacts: Artefacts, table: dict) -> dict:
    """Versions, command, seeds."""
    return tables.provenance(artefacts, table)
