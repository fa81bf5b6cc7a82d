"""The stages in order, what each needs, and when one is skipped. The only file that imports stages.

A run is one selector, one curriculum, one seed; its stages leave one folder each in the workdir, with a `manifest.json`
written last. A table is a sweep of ordinary runs: the first row is the headline in the top folder, the others live in
`rows/<row>/seed<k>/` and are handed the headline's dataset, features and clusters, so that nothing is trained or
extracted twice.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from coincide_jax import cluster, curriculum, dataset, evaluation, extract, report, selection, training
from coincide_jax.core import artifacts, precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.evaluation import relative

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its function, the config keys it may read, the stages whose folders it is handed."""

    name: str
    run: Callable
    keys: tuple[str, ...]
    version: int
    inputs: tuple[str, ...] = ()


STAGES = (
    Stage("dataset", dataset.run, dataset.KEYS, dataset.STAGE_VERSION),
    Stage("base", training.run_base, training.BASE_KEYS, training.STAGE_VERSION, ("dataset",)),
    Stage("reference", training.run_reference, training.REFERENCE_KEYS, training.STAGE_VERSION, ("dataset", "base")),
    Stage("extract", extract.run, extract.KEYS, extract.STAGE_VERSION, ("dataset", "reference")),
    Stage("cluster", cluster.run, cluster.KEYS, cluster.STAGE_VERSION, ("dataset", "extract")),
    Stage("select", selection.run, selection.KEYS, selection.STAGE_VERSION, ("dataset", "extract", "cluster")),
    Stage(
        "train",
        functools.partial(training.run, make_sampler=curriculum.make),
        training.TRAIN_KEYS,
        training.STAGE_VERSION,
        ("dataset", "base", "cluster", "select"),
    ),
    Stage("evaluate", evaluation.run, evaluation.KEYS, evaluation.STAGE_VERSION, ("dataset", "train")),
    Stage("report", report.run, report.KEYS, report.STAGE_VERSION),
)
NAMES = tuple(stage.name for stage in STAGES)
SHARED = ("dataset", "base", "reference", "extract", "cluster")  # what the rows of a table have in common
NEUTRAL = ("threads", "cache_mib", "checkpoint_every", "keep")  # keys that change speed or disk, never a result


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, object]:
    """`{dotted key: value}` of a config, tuples as lists."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def subset(config: ConfigDict, keys: Sequence[str]) -> ConfigDict:
    """The config with only the keys that a stage declares; reading another one fails."""
    view = ConfigDict()
    for key in keys:
        *parents, last = key.split(".")
        source, target = config, view
        for parent in parents:
            source = source[parent]
            if parent not in target:
                target[parent] = ConfigDict()
            target = target[parent]
        target[last] = (
            source[last].copy_and_resolve_references() if isinstance(source[last], ConfigDict) else source[last]
        )
    return view.lock()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir by an OS lock that dies with the process."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        handle = open(workdir / ".lock", "a+")  # noqa: SIM115 - held open for the lock's life
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise UserError(f"workdir {workdir} is in use by process {handle.read().strip() or '?'}") from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def external(config: ConfigDict, stage: Stage) -> dict[str, str]:
    """Digests of files from outside the workdir that the stage's keys name, so that an edited file is noticed."""
    flat, found = flatten(subset(config, stage.keys)), {}
    for key in ("dataset.records", "dataset.base_records", "evaluate.questions", "extract.features",
                "cluster.centroids", "cluster.assignment", "target.path", "reference.path"):  # fmt: skip
        value = flat.get(key)
        if value and Path(str(value)).exists():
            found[key] = artifacts.identity(Path(str(value)))
    return found


def expected(config: ConfigDict, stage: Stage, inputs: dict[str, Path]) -> dict:
    """The compared part of a manifest: stage, version, config keys, digests of what it is made from."""
    view = {k: v for k, v in flatten(subset(config, stage.keys)).items() if k.rsplit(".", 1)[-1] not in NEUTRAL}
    return {
        "stage": stage.name,
        "version": stage.version,
        "config": json.loads(json.dumps(view)),
        "inputs": {name: artifacts.read_json(folder / "manifest.json")["identity"] for name, folder in inputs.items()}
        | external(config, stage),
    }


def difference(found: dict, wanted: dict) -> str:
    """Says which key, version or input of a manifest differs; empty if none does."""
    if found["version"] != wanted["version"]:
        return f"stage version {found['version']}, now {wanted['version']}"
    for kind in ("config", "inputs"):
        for name in sorted(found[kind].keys() | wanted[kind].keys()):
            old, new = found[kind].get(name, "nothing"), wanted[kind].get(name, "nothing")
            if old != new:
                return f"{name} = {old}, now {new}" if kind == "config" else f"another state of its input '{name}'"
    return ""


def provenance(command: Sequence[str]) -> dict:
    """Versions, revision, device, command: recorded, never compared."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorstore", "tokenizers")
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "revision": revision or "unknown",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "command": list(command),
    }


def run_stage(
    config, stage: Stage, workdir: Path, inputs: dict[str, Path], mesh, *, again: bool, command, **extra
) -> bool:
    """Runs one stage unless its manifest says that it is complete. Returns whether it ran."""
    out = workdir / stage.name
    wanted = expected(config, stage, {name: inputs[name] for name in inputs})
    where = f"{workdir}/{stage.name}"
    if again and out.exists():
        shutil.rmtree(out)
    if (out / "manifest.json").exists():
        manifest = artifacts.read_json(out / "manifest.json")
        differs = difference(manifest, wanted)
        if differs:
            raise UserError(
                f"{where} was made with {differs}; take another --workdir, or --force={stage.name} to make it again"
            )
        missing = [name for name, (size, _) in manifest["outputs"].items() if not _has(out / name, size)]
        if not missing:
            say(stage.name, f"complete · {where}")
            return False
        say(stage.name, f"{missing[0]} is missing or was changed; running again")
        shutil.rmtree(out)
    attempts = 1
    if (out / "started.json").exists():
        started = artifacts.read_json(out / "started.json")
        if difference(started, wanted):
            shutil.rmtree(out)  # leftovers of a killed run of another config
        else:
            attempts = started["attempts"] + 1
    elif out.exists():
        shutil.rmtree(out)
    artifacts.write_json(out / "started.json", wanted | {"attempts": attempts})
    say(
        stage.name,
        f"begins · {where}" + (f" · attempt {attempts}, going on from what is there" if attempts > 1 else ""),
    )
    begin = time.time()
    summary = stage.run(subset(config, stage.keys), inputs, out, mesh, **extra) or {}
    seconds = time.time() - begin
    (out / "started.json").unlink()
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != "manifest.json"]
    outputs = {str(path.relative_to(out)): [path.stat().st_size, artifacts.digest(path)] for path in files}
    identity = hashlib.sha256(json.dumps([wanted, outputs], sort_keys=True).encode()).hexdigest()
    recorded = provenance(command) | {"seconds": round(seconds, 2), "began": begin, "attempts": attempts}
    artifacts.write_json(
        out / "manifest.json",
        wanted | {"identity": identity, "summary": summary, "outputs": outputs, "recorded": recorded},
    )
    say(stage.name, f"done in {seconds:.1f} s")
    return True


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def needed(config: ConfigDict, name: str) -> bool:
    """Whether a run of this config has the stage at all."""
    if name == "base":
        return not config.target.path
    if name == "reference":
        return not config.reference.path and not config.extract.features
    return True


def check(config: ConfigDict) -> None:
    """Finds what a config can get wrong before anything runs.

    Raises:
      UserError: unknown selector, sampler, pool or precision, a budget outside (0, 1], broken questions.
    """
    if config.select.name not in selection.SELECTORS:
        raise unknown("selector", config.select.name, selection.SELECTORS)
    if config.curriculum.name not in curriculum.SAMPLERS:
        raise unknown("sampler", config.curriculum.name, curriculum.SAMPLERS)
    if config.curriculum.pool not in ("coreset", "all"):
        raise unknown("curriculum.pool", config.curriculum.pool, ("coreset", "all"))
    if not 0 < config.select.fraction <= 1:
        raise UserError(f"select.fraction = {config.select.fraction}; the budget is a share above 0 and up to 1")
    precision.choose(config.device.precision)
    evaluation.check(config.evaluate)


def run_row(
    config, workdir: Path, mesh, *, shared: dict[str, Path], names: Sequence[str], force: str | None, command
) -> dict:
    """Runs the stages `names` of one run. `shared` maps stages to folders of another run. Returns stage → folder."""
    folders, again = dict(shared), False
    for stage in STAGES:
        if stage.name == "report" or stage.name in shared or not needed(config, stage.name):
            continue
        again = again or stage.name == force
        if stage.name in names:
            inputs = {name: folders[name] for name in (*stage.inputs, *(("match",) if "match" in shared else ()))
                      if name in folders and (name != "match" or stage.name in ("select", "train"))}  # fmt: skip
            for name in stage.inputs:
                if name not in folders and needed(config, name) and (stage.name, name) != ("train", "select"):
                    raise UserError(f"stage '{stage.name}' needs '{name}', which {workdir} does not hold; run it first")
            again |= run_stage(config, stage, workdir, inputs, mesh, again=again, command=command)
        if (workdir / stage.name / "manifest.json").exists():
            folders[stage.name] = workdir / stage.name
    return folders


def row_folder(workdir: Path, row: str, seed: int, headline: str, first_seed: int) -> Path:
    """Where a row of one seed lives: the top folder for the headline's first seed."""
    return workdir if (row, seed) == (headline, first_seed) else workdir / "rows" / row / f"seed{seed}"


def run(
    config: ConfigDict,
    workdir: Path,
    mesh,
    *,
    sweep: Callable | None = None,
    stages: Sequence[str] = (),
    force: str | None = None,
    command: Sequence[str] = (),
) -> None:
    """Runs the headline, then every other row of the table for every seed, then the report.

    Raises:
      UserError: unknown stage, workdir in use, not writable or made with another config, and whatever a stage finds
      wrong.
    """
    for name in [*stages, *([force] if force else [])]:
        if name not in NAMES:
            raise unknown("stage", name, NAMES)
    rows = table_rows(config, sweep)
    for changes in rows.values():
        check(row_config(config, changes, config.seeds[0]))
    headline, first_seed = next(iter(rows)), config.seeds[0]
    with locked(workdir):
        names = tuple(stages) or NAMES
        top = run_row(
            row_config(config, rows[headline], first_seed),
            workdir,
            mesh,
            shared={},
            names=names,
            force=force,
            command=command,
        )
        runs = {headline: [workdir]}
        if not stages:
            shared = {name: top[name] for name in SHARED if name in top}
            bases = {first_seed: shared.get("base")} | {
                seed: seed_base(config, workdir, mesh, shared, seed, force, command) for seed in config.seeds[1:]
            }
            runs = {row: [] for row in rows}
            for seed in config.seeds:
                for row, changes in rows.items():
                    folder = row_folder(workdir, row, seed, headline, first_seed)
                    runs[row].append(folder)
                    if folder == workdir:
                        continue
                    handed = shared | ({"base": bases[seed]} if bases[seed] else {})
                    one = row_config(config, changes, seed)
                    match = row != headline
                    kept = (
                        ("train", "evaluate")
                        if match and one.curriculum.pool == "all"
                        else ("select", "train", "evaluate")
                    )
                    say("rows", f"{row} · seed {seed}")
                    handed |= {"match": top["select"]} if match else {}
                    late = force if force in kept else None
                    run_row(one, folder, mesh, shared=handed, names=kept, force=late, command=command)
        if "report" in names:
            finish(config, workdir, mesh, top, runs, force == "report", command)


def table_rows(config: ConfigDict, sweep: Callable | None) -> dict[str, dict]:
    """`{row: {dotted key: value}}`; the first row is the headline. Without a sweep the run is its own and only row."""
    rows = {}
    if sweep is not None:
        sweep(lambda row, changes: rows.update({row: changes}))
    return rows or {config.select.name: {}}


def row_config(config: ConfigDict, changes: dict, seed: int) -> ConfigDict:
    """The config of one row and seed: the seed reaches base, order and random picks, never features or clusters."""
    one = config.copy_and_resolve_references()
    one.update_from_flattened_dict(changes | {"base.seed": seed, "train.seed": seed, "select.seed": seed})
    return one.lock()


def seed_base(config, workdir: Path, mesh, shared: dict, seed: int, force, command) -> Path | None:
    """The base of a further seed, shared by its rows; None when every row starts from `target.path`."""
    if config.target.path:
        return None
    folder = workdir / "rows" / "base" / f"seed{seed}"
    late = force if force == "base" else None
    handed = {"dataset": shared["dataset"]}
    run_row(row_config(config, {}, seed), folder, mesh, shared=handed, names=("base",), force=late, command=command)
    return folder / "base"


def finish(config, workdir: Path, mesh, top: dict, runs: dict[str, list[Path]], again: bool, command) -> None:
    """Compares the rows, writes the report, prints where everything is and the table."""
    inputs = {name: folder for name, folder in top.items() if name != "match"}
    answered = {
        row: [f for f in folders if (f / "evaluate" / "manifest.json").exists()] for row, folders in runs.items()
    }
    answered = {row: folders for row, folders in answered.items() if folders}
    for row, folders in answered.items():
        inputs |= {f"{row}/{index}": folder / "evaluate" for index, folder in enumerate(folders)}
    answers = {
        row: [artifacts.read_jsonl(f / "evaluate" / "answers.jsonl") for f in fs] for row, fs in answered.items()
    }
    stage = next(stage for stage in STAGES if stage.name == "report")
    differs = (workdir / "report" / "manifest.json").exists() and difference(
        artifacts.read_json(workdir / "report" / "manifest.json"), expected(config, stage, inputs)
    )
    table = relative.compare(answers, resamples=config.evaluate.bootstrap, seed=config.evaluate.seed)
    run_stage(
        config, stage, workdir, inputs, mesh, again=again or bool(differs), command=command, rows=answered, table=table
    )
    print()
    for what, path in (("coreset", "select/coreset.json"), ("model", "train/model"), ("report", "report/report.html")):
        if (workdir / path).exists():
            print(f"{what:8}{workdir / path}")
    print()
    print(relative.text(table))
