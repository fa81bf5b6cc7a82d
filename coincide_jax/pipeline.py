"""The stages in order, what each needs, and the rows of a table. The only file that imports stages.

A run is one selector, one curriculum, one seed; its stages leave one folder each in the workdir. A table is a sweep of
ordinary runs: the first row is the headline in the top folder, the others live in `rows/<row>/seed<k>/` and are handed
dataset, features and clusters of the headline, or of the first row with the same settings; where no row has them, they
are made once for all seeds, in `rows/<row>/`. So nothing is trained, extracted or clustered twice. PROGRESS has two
stages more: `cluster/warmup`, another clustering of the features, and `select/warmup`, what COINCIDE picks from it.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from coincide_jax import cluster, curriculum, dataset, evaluation, extract, report, selection, training
from coincide_jax.core import artifacts, manifests, precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.keys import flatten, subset
from coincide_jax.core.metrics import say
from coincide_jax.evaluation import relative
from coincide_jax.report import audits

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its function, the config keys it may read, the stages whose folders it is handed."""

    name: str
    run: Callable
    keys: tuple[str, ...]
    version: int
    inputs: tuple[str, ...] = ()


WARMUP = ("cluster/warmup", "select/warmup")
FEATURES = ("dataset", "extract")
KINDS = training.Kinds(one_arm=curriculum.ONE_ARM, of_tasks=curriculum.OF_TASKS, asks=curriculum.ASKS)


STAGES = (
    Stage("dataset", dataset.run, dataset.KEYS, dataset.STAGE_VERSION),
    Stage("base", training.run_base, training.BASE_KEYS, training.STAGE_VERSION, ("dataset",)),
    Stage("reference", training.run_reference, training.REFERENCE_KEYS, training.STAGE_VERSION, ("dataset", "base")),
    Stage("extract", extract.run, extract.KEYS, extract.STAGE_VERSION, ("dataset", "base", "reference")),
    Stage("cluster", cluster.run, cluster.KEYS, cluster.STAGE_VERSION, FEATURES),
    Stage("select", selection.run, selection.KEYS, selection.STAGE_VERSION, ("dataset", "extract", "cluster", "match")),
    Stage(WARMUP[0], cluster.run_warmup, cluster.WARMUP_KEYS, cluster.STAGE_VERSION, FEATURES),
    Stage(WARMUP[1], selection.run_warmup, selection.WARMUP_KEYS, selection.STAGE_VERSION, (*FEATURES, WARMUP[0])),
    Stage(
        "train",
        functools.partial(training.run, prepare=curriculum.prepare, kinds=KINDS),
        training.TRAIN_KEYS,
        training.STAGE_VERSION,
        ("dataset", "base", "extract", "cluster", "select", WARMUP[1], "match"),
    ),
    Stage("evaluate", evaluation.run, evaluation.KEYS, evaluation.STAGE_VERSION, ("dataset", "train")),
    Stage("report", report.run, report.KEYS, report.STAGE_VERSION),
)
NAMES = tuple(stage.name for stage in STAGES)
SHARED = ("dataset", "base", "reference", "extract", "cluster")  # what rows with the same settings have in common
SEEDS = ("base.seed", "train.seed", "select.seed")  # what `seeds` sets in every row


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir by an OS lock that dies with the process."""
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(workdir / ".lock", "a+", encoding="utf-8"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise UserError(f"workdir {workdir} is in use by process {handle.read().strip() or '?'}") from error
        except OSError as error:
            raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def external(config: ConfigDict, stage: Stage) -> dict[str, str]:
    """Identities of files from outside the workdir that the stage's keys name, so that an edited file is noticed."""
    flat, found = flatten(subset(config, stage.keys)), {}
    for key in ("dataset.records", "dataset.base_records", "evaluate.questions", "extract.features",
                "cluster.centroids", "cluster.assignment", "target.path", "reference.path", "extract.image_encoder",
                "extract.text_encoder"):  # fmt: skip
        value = flat.get(key)
        if value and Path(str(value)).exists():
            found[key] = artifacts.identity(Path(str(value)))
    return found


def compared(config: ConfigDict, stage: Stage) -> dict[str, object]:
    """The config keys that a stage reads, as JSON holds them."""
    return json.loads(json.dumps(flatten(subset(config, stage.keys))))


def expected(config: ConfigDict, stage: Stage, inputs: dict[str, Path]) -> dict:
    """The compared part of a manifest: stage, version, config keys, identities of what it is made from."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "config": compared(config, stage),
        "inputs": {name: manifests.identity(folder) for name, folder in inputs.items()} | external(config, stage),
    }


def arrays_only(config: ConfigDict) -> bool:
    """Whether the run selects from features made elsewhere, without records: it clusters and selects, no more."""
    return bool(config.extract.features) and not config.dataset.records


def needed(config: ConfigDict, name: str) -> bool:
    """Whether a run of this config has the stage at all."""
    if arrays_only(config):
        return name in ("cluster", "select")
    if name == "base":
        return not config.target.path
    if name == "reference":  # it sees the answers of the pool
        return not config.reference.path and not config.extract.features and config.extract.reads == "all"
    asks = config.curriculum.name in curriculum.ASKS
    if name == "select":
        return not asks
    if name in WARMUP:
        return asks and config.curriculum.warmup > 0
    return True


def reads(config: ConfigDict, stage: Stage) -> tuple[str, ...]:
    """The stages whose folders a stage reads under this config. 'match' is a select folder of the size to match."""
    names = [name for name in stage.inputs if needed(config, name)]
    if stage.name == "train":
        online, coreset = config.curriculum.name not in curriculum.ONE_ARM, config.curriculum.pool == "coreset"
        clusters = online and config.curriculum.name not in curriculum.OF_TASKS
        used = {"cluster": clusters, "select": coreset, "match": online and not coreset}
        used["extract"] = bool(config.curriculum.difficulty)
        names = [name for name in names if used.get(name, True)]
    if stage.name == "extract":
        towers = config.extract.reads == "questions" and not config.extract.image_encoder
        used = {"base": towers and not config.reference.path and not config.extract.features}
        names = [name for name in names if used.get(name, True)]
    return tuple(names)


def check_rows(config: ConfigDict, mesh, names: Sequence[str]) -> None:
    """Finds batches that the devices cannot share evenly, before the stages `names` run.

    Raises:
      UserError: rows of one pass that are no multiple of the devices on 'data'.
    """
    flat, devices = flatten(config), mesh.shape["data"]
    for name, key in (("base", "base.micro_batch"), ("reference", "reference.train.micro_batch"),
                      ("train", "train.micro_batch"), ("evaluate", "evaluate.rows")):  # fmt: skip
        if name in names and needed(config, name) and flat[key] % devices:
            raise UserError(f"{key} is {flat[key]}; expected a multiple of the {devices} devices that share its rows")


def check(config: ConfigDict) -> None:
    """Finds what a config can get wrong before anything runs.

    Raises:
      UserError: an unknown name, a number out of its range, broken questions.
    """
    if config.curriculum.pool not in training.POOLS:
        raise unknown("curriculum.pool", config.curriculum.pool, training.POOLS)
    flat = flatten(config)
    training.check(config, KINDS)
    extract.check(config)
    for key, least in (("extract.num_layers", 1),
                       ("extract.rows_per_device", 1), ("evaluate.rows", 1), ("evaluate.max_new_tokens", 1),
                       ("evaluate.bootstrap", 1), ("evaluate.limit", 0), ("dataset.limit", 0),
                       ("dataset.threads", 1), ("curriculum.round_steps", 1)):  # fmt: skip
        if flat[key] < least:
            raise UserError(f"{key} = {flat[key]}; expected {least} or more")
    if config.curriculum.difficulty and (config.extract.features or not config.extract.scores):
        raise UserError(
            f"curriculum.difficulty is '{config.curriculum.difficulty}', a score of the reference model; it takes "
            "extract.scores=True, and features that are extracted here"
        )
    if config.evaluate.part == "dev" and not arrays_only(config) and config.dataset.share_dev <= 0:
        raise UserError("evaluate.part is 'dev' but dataset.share_dev is 0: there would be no questions")
    if not config.seeds:
        raise UserError("seeds is empty; expected at least one, as in --config.seeds='(0,)'")
    if not config.evaluate.questions and config.dataset.records != "drawn" and config.dataset.share_heldout <= 0:
        raise UserError(
            "there would be no questions: dataset.share_heldout is 0 and evaluate.questions names no folder"
        )
    extract.check(config)
    cluster.check(config)
    selection.check(config)
    if config.cluster.centre and config.select.intra == "nearest":
        raise UserError("select.intra is 'nearest' but cluster.centre is set: its centroids are not those of the rows")
    curriculum.make(config.curriculum)
    precision.choose(config.device.precision)
    for name, recipe in (("base", config.base), ("reference.train", config.reference.train), ("train", config.train)):
        training.Recipe.from_config(recipe, name)
    evaluation.check(config.evaluate)


def run_row(
    config, workdir: Path, mesh, *, shared: dict[str, Path], names: Sequence[str], force: str | None, command
) -> dict[str, Path]:
    """Runs the stages `names` of one run; earlier ones must be complete and of this config. `force` names a stage that
    is run again, with all after it.

    Args:
      shared: stage → folder of another run that takes its place.

    Returns:
      Stage → folder of every complete stage.
    """
    folders = dict(shared)
    last = max(NAMES.index(name) for name in names)
    for position, stage in enumerate(STAGES):
        if stage.name == "report" or stage.name in shared or not needed(config, stage.name):
            continue
        out, wants = workdir / stage.name, reads(config, stage)
        inputs = {name: folders[name] for name in wants if name in folders}
        missing = [name for name in wants if name not in folders and name != "match"]
        if stage.name in names:
            if missing:
                raise UserError(
                    f"stage '{stage.name}' needs '{missing[0]}', which {workdir} does not hold; run it first"
                )
            again = force is not None and position >= NAMES.index(force)
            action = functools.partial(stage.run, subset(config, stage.keys), inputs, out, mesh)
            manifests.run(out, expected(config, stage, inputs), action, force=again, command=command)
        elif position < last and manifests.complete(out) and not missing:
            manifests.verify(out, expected(config, stage, inputs))
        if manifests.complete(out):
            folders[stage.name] = out
    return folders


def row_folder(workdir: Path, row: str, seed: int, headline: str, first_seed: int) -> Path:
    """Where a row of one seed lives: the top folder for the headline's first seed."""
    return workdir if (row, seed) == (headline, first_seed) else workdir / "rows" / row / f"seed{seed}"


def table_rows(config: ConfigDict, sweep: Callable | None, given: Sequence[str]) -> dict[str, dict]:
    """`{row: {dotted key: value}}`; the first row is the headline. Without a sweep the run is its own and only row.

    Raises:
      UserError: a key `given` on the command line is one that the rows set.
    """
    if sweep is None:
        return {config.select.name if config.curriculum.pool == "coreset" else config.curriculum.name: {}}
    rows = {}
    sweep(lambda row, changes: rows.update({row: changes}))
    for key in given:
        for row, changes in rows.items():
            if key in changes:
                raise UserError(
                    f"config key '{key}' is set by row '{row}' of the table; add --notable for one run of yours"
                )
        if key in SEEDS:
            raise UserError(
                f"config key '{key}' is set by the rows of the table; give --config.seeds='(7,)', or --notable"
            )
    return rows


def row_config(config: ConfigDict, changes: dict, seed: int | None) -> ConfigDict:
    """The config of one row and seed: the seed reaches base, order and random picks, never features or clusters."""
    one = config.copy_and_resolve_references()
    seeds = {} if seed is None else dict.fromkeys(SEEDS, seed)
    one.update_from_flattened_dict(changes | seeds)
    return one.lock()


def run(
    config: ConfigDict,
    workdir: Path,
    mesh,
    *,
    sweep: Callable | None = None,
    given: Sequence[str] = (),
    stages: Sequence[str] = (),
    last: str = NAMES[-1],
    force: str | None = None,
    command: Sequence[str] = (),
) -> None:
    """Runs the headline, then every other row of the table for every seed, then the report.

    Args:
      sweep: the config file's `sweep(add)`; None: one run, with the seeds of its own keys.
      given: config keys of the command line.
      stages: run only these stages of the headline.
      last: the stage at which every row ends.
      force: run this stage and all after it again, in every row.

    Raises:
      UserError: unknown stage, workdir in use, not writable or made with another config, whatever a stage finds wrong.
    """
    for name in [*stages, *([force] if force else [])]:
        if name not in NAMES:
            raise unknown("stage", name, NAMES)
    check(config)
    rows = table_rows(config, sweep, given)
    seeds = config.seeds if sweep is not None else (None,)
    names = tuple(stages) or NAMES[: NAMES.index(last) + 1]
    for changes in rows.values():
        one = row_config(config, changes, seeds[0])
        check(one)
        check_rows(one, mesh, names)
    headline = next(iter(rows))
    options = {"mesh": mesh, "force": force, "command": command}
    with locked(workdir):
        first = row_config(config, rows[headline], seeds[0])
        top = run_row(first, workdir, shared={}, names=names, **options)
        if not stages:
            common = run_others(config, workdir, rows, seeds, top, last, options)
            audits.tell(workdir, {row: folders["cluster"] for row, folders in common.items() if "cluster" in folders})
        if arrays_only(first):
            say("select", f"indices {workdir / 'select' / 'indices.npy'}")
        elif "report" in names:
            folders = {row: [row_folder(workdir, row, s, headline, seeds[0]) for s in seeds] for row in rows}
            finish(first, workdir, mesh, top, folders, force == "report", command)


def run_others(
    config: ConfigDict, workdir: Path, rows: dict, seeds: Sequence, top: dict[str, Path], last: str, options: dict
) -> dict[str, dict[str, Path]]:
    """Runs every row and seed but the headline's first, each up to the stage `last`.

    Returns:
      Row → the folders of what its seeds have in common.
    """
    headline, until = next(iter(rows)), NAMES[: NAMES.index(last) + 1]
    first = row_config(config, rows[headline], seeds[0])
    shared = [stage for stage in STAGES if stage.name in SHARED and stage.name in until]
    made = {settings(first, stage, top): top[stage.name] for stage in shared if stage.name in top}
    common = {}
    for seed in seeds:
        if seed != seeds[0] and last not in SHARED:
            folder = workdir / "rows" / "base" / f"seed{seed}"
            share(row_config(config, rows[headline], seed), folder, shared[:2], made, options)
        for row, changes in rows.items():
            folder, one = row_folder(workdir, row, seed, headline, seeds[0]), row_config(config, changes, seed)
            if folder != workdir:
                say("rows", row if seed is None else f"{row} · seed {seed}")
            if seed == seeds[0]:
                common[row] = share(one, workdir / "rows" / row, shared, made, options)
            if folder == workdir or last in SHARED:
                continue
            given = common[row] | share(one, folder, shared[:2], made, options)  # the base is each seed's own
            names = ("select", "train", "evaluate") if one.curriculum.pool == "coreset" else ("train", "evaluate")
            names = (*(name for name in WARMUP if needed(one, name)), *names)
            if row != headline and "select.fraction" not in changes and "select" in top:
                given["match"] = top["select"]
            run_row(one, folder, shared=given, names=[name for name in names if name in until], **options)
    return common


def settings(config: ConfigDict, stage: Stage, folders: dict[str, Path]) -> str:
    """What a stage of this config is made from, in one line: two rows with the same line share its folder."""
    keys = {key: value for key, value in compared(config, stage).items() if key.split(".")[-1] not in manifests.NEUTRAL}
    inputs = {name: str(folders[name]) for name in reads(config, stage) if name in folders}
    return json.dumps([stage.name, keys, inputs], sort_keys=True)


def share(config, folder: Path, stages: Sequence[Stage], made: dict[str, Path], options: dict) -> dict[str, Path]:
    """Stage → folder, for the first of the stages: those in `made` (by `settings`) where a row before has the same,
    else made in `folder` and entered there."""
    folders = {}
    for stage in stages:
        if needed(config, stage.name):
            key = settings(config, stage, folders)
            if key not in made:
                made[key] = run_row(config, folder, shared=folders, names=(stage.name,), **options)[stage.name]
            folders[stage.name] = made[key]
    return folders


def finish(
    config, workdir: Path, mesh, top: dict[str, Path], runs: dict[str, list[Path]], force: bool, command
) -> None:
    """Compares the rows that have answers, writes the report, prints where everything is and the table."""
    answered = {row: [f for f in folders if manifests.complete(f / "evaluate")] for row, folders in runs.items()}
    answered = {row: folders for row, folders in answered.items() if folders}
    trained = {row: [f for f in folders if manifests.complete(f / "train")] for row, folders in runs.items()}
    trained = {row: folders for row, folders in trained.items() if folders}
    inputs = {name: folder for name, folder in top.items() if name != "match"}
    for row, folders in answered.items():
        inputs |= {f"{row}/{number}": folder / "evaluate" for number, folder in enumerate(folders)}
    answers = {
        row: [artifacts.read_jsonl(f / "evaluate" / "answers.jsonl") for f in fs] for row, fs in answered.items()
    }
    settings = config.evaluate
    table = relative.compare(
        answers,
        resamples=settings.bootstrap,
        seed=settings.seed,
        minimum=settings.tasks_to_rank,
        part=settings.part,
    )
    stage, out = STAGES[-1], workdir / "report"
    wanted = expected(config, stage, inputs)
    action = functools.partial(stage.run, subset(config, stage.keys), inputs, out, mesh, rows=trained, table=table)
    # a report is cheap and only shows what is there: one of another state is written anew without being asked
    stale = manifests.complete(out) and bool(manifests.difference(artifacts.read_json(out / "manifest.json"), wanted))
    manifests.run(out, wanted, action, force=force or stale, command=command)
    print()
    for what, path in (("coreset", "select/coreset.json"), ("model", "train/model"), ("report", "report/report.html")):
        if (workdir / path).exists():
            print(f"{what:8}{workdir / path}")
    print()
    print(relative.text(table))
