"""The stages in order, what each needs, and the rows of a table. The only folder that imports stages.

A run is one selector, one curriculum, one seed; its stages leave one folder each in the workdir. A table is a sweep of
ordinary runs: the first row is the headline in the top folder, the others live in `rows/<row>/seed<k>/` and are handed
dataset, features and clusters of the headline, or of the first row with the same settings; where no row has them, they
are made once for all seeds, in `rows/<row>/`. So nothing is trained, extracted or clustered twice. PROGRESS has two
stages more: `cluster/warmup`, another clustering of the features, and `select/warmup`, what COINCIDE picks from it.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence

import jax
from ml_collections import ConfigDict

from coincide_jax.core import artifacts, manifests, processes
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.keys import flatten, subset
from coincide_jax.core.metrics import say
from coincide_jax.evaluation import relative
from coincide_jax.pipeline.checks import check, check_rows
from coincide_jax.pipeline.stages import (
    NAMES,
    SEEDS,
    SHARED,
    STAGES,
    WARMUP,
    Stage,
    arrays_only,
    compared,
    expected,
    needed,
    reads,
)
from coincide_jax.report import audits

__all__ = [
    "NAMES",
    "SHARED",
    "STAGES",
    "WARMUP",
    "arrays_only",
    "check",
    "flatten",
    "needed",
    "planned",
    "reads",
    "run",
    "subset",
]

Path = pathlib.Path
MAPPINGS = 20_000  # of this process, above which compiled programs are let go between rows


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir by an OS lock that dies with the process; of several processes the one that leads does."""
    with contextlib.ExitStack() as stack:
        held = processes.led(lambda: stack.enter_context(_lock(workdir)))
        seen = processes.told(_sees(workdir / ".lock", held))
        if not all(seen):
            raise UserError(
                f"process {seen.index(False)} does not see what process 0 writes in {workdir.absolute()}; expected a "
                "folder that all processes share"
            )
        yield


def _sees(lock: Path, held: str, seconds: float = 10.0) -> bool:
    """Whether a lock file holds these words, if need be after a while: some file systems take their time."""
    end = time.monotonic() + seconds
    while not (lock.exists() and lock.read_text(encoding="utf-8") == held):
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[str]:
    """Holds the lock; gives what it wrote there."""
    with contextlib.ExitStack() as stack:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            handle = stack.enter_context(open(workdir / ".lock", "a+", encoding="utf-8"))
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = (handle.read().split() or ["?"])[0]
            raise UserError(f"workdir {workdir} is in use by process {holder}") from error
        except OSError as error:
            raise UserError(f"workdir {workdir} cannot be written: {error.strerror}") from error
        held = f"{os.getpid()} {uuid.uuid4().hex}"
        handle.truncate(0)
        handle.write(held)
        handle.flush()
        os.fsync(handle.fileno())
        yield held


def let_programs_go() -> None:
    """Drops the programs of earlier rows when there are very many. Each takes some memory mappings, of which Linux
    gives a process 65,530; one that runs out of them dies inside XLA, without a word. (26 rows of samplers: 34,000.)"""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


def same_command(config: ConfigDict, **rest) -> None:
    """Raises `UserError` where processes were given different commands or programs: they would wait for each other."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    rest |= {"jax": jax.__version__, "program": hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:8]}
    first, *others = processes.told(flatten(config) | rest)
    for index, given in enumerate(others, 1):
        for key in first.keys() | given.keys():
            if first.get(key) != given.get(key):
                raise UserError(
                    f"{key} is {given.get(key)} in process {index} and {first.get(key)} in process 0; give all the "
                    "same command"
                )


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
    let_programs_go()
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
            wanted = expected(config, stage, inputs)
            manifests.run(out, wanted, action, force=again, command=command, alone=stage.alone)
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

    A value may be a function that takes the config and gives the value.

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
    changes = {key: value(config) if callable(value) else value for key, value in changes.items()}
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
    processes.join()
    same_command(config, stages=[*stages], last=last, force=force, workdir=str(workdir), table=sweep is not None)
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
    make = functools.partial(run_row, mesh=mesh, force=force, command=command)
    with locked(workdir):
        first = row_config(config, rows[headline], seeds[0])
        top = make(first, workdir, shared={}, names=names)
        if not stages:
            common = run_others(config, workdir, rows, seeds, top, last, make)
            audits.tell(workdir, {row: folders["cluster"] for row, folders in common.items() if "cluster" in folders})
        if arrays_only(first):
            say("select", f"indices {workdir / 'select' / 'indices.npy'}")
        elif "report" in names:
            folders = {row: [row_folder(workdir, row, s, headline, seeds[0]) for s in seeds] for row in rows}
            finish(first, workdir, mesh, top, folders, force == "report", command)


def planned(
    config: ConfigDict, sweep: Callable | None, given: Sequence[str] = (), last: str = NAMES[-1]
) -> list[tuple[str, ConfigDict, dict[str, int]]]:
    """What `run` makes of these arguments, found by the same steps with nothing run: for each row its name, its config
    of the first seed, and how often each stage is made for it (not at all where it has that of another row).

    Raises:
      UserError: as `run` of a key that the rows set, and of what a row gets wrong.
    """
    check(config)
    rows = table_rows(config, sweep, given)
    seeds, top = config.seeds if sweep is not None else (None,), Path()
    headline, counts = next(iter(rows)), {row: dict.fromkeys(NAMES[:-1], 0) for row in rows}

    def make(one, folder, *, shared, names):
        row = next((part for part in folder.parts[1:2] if part in rows), headline)
        own = [name for name in names if name != "report" and name not in shared and needed(one, name)]
        for name in own:
            counts[row][name] += 1
        return shared | {name: folder / name for name in own}

    found = {row: row_config(config, changes, seeds[0]) for row, changes in rows.items()}
    for one in found.values():
        check(one)
    first = make(found[headline], top, shared={}, names=NAMES[: NAMES.index(last) + 1])
    run_others(config, top, rows, seeds, first, last, make, announce=False)
    return [(row, one, {name: n for name, n in counts[row].items() if n}) for row, one in found.items()]


def run_others(
    config: ConfigDict,
    workdir: Path,
    rows: dict,
    seeds: Sequence,
    top: dict[str, Path],
    last: str,
    make: Callable,
    announce: bool = True,
) -> dict[str, dict[str, Path]]:
    """Makes every row and seed but the headline's first, each up to the stage `last`.

    Args:
      make: (config, folder, shared, names) → stage → folder, as `run_row`.
      announce: whether the screen says which row begins.

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
            share(row_config(config, rows[headline], seed), folder, shared[:2], made, make)
        for row, changes in rows.items():
            folder, one = row_folder(workdir, row, seed, headline, seeds[0]), row_config(config, changes, seed)
            if folder != workdir and announce:
                say("rows", row if seed is None else f"{row} · seed {seed}")
            if seed == seeds[0]:
                common[row] = share(one, workdir / "rows" / row, shared, made, make)
            if folder == workdir or last in SHARED:
                continue
            given = common[row] | share(one, folder, shared[:2], made, make)  # the base is each seed's own
            names = ("select", "train", "evaluate") if one.curriculum.pool == "coreset" else ("train", "evaluate")
            if row != headline and "select.fraction" not in changes and "select" in top:
                given["match"] = top["select"]
            make(one, folder, shared=given, names=[name for name in names if name in until])
    return common


def settings(config: ConfigDict, stage: Stage, folders: dict[str, Path]) -> str:
    """What a stage of this config is made from, in one line: two rows with the same line share its folder."""
    keys = {key: value for key, value in compared(config, stage).items() if key.split(".")[-1] not in manifests.NEUTRAL}
    inputs = {name: str(folders[name]) for name in reads(config, stage) if name in folders}
    return json.dumps([stage.name, keys, inputs], sort_keys=True)


def share(config, folder: Path, stages: Sequence[Stage], made: dict[str, Path], make: Callable) -> dict[str, Path]:
    """Stage → folder, for the first of the stages: those in `made` (by `settings`) where a row before has the same,
    else made in `folder` by `make` (`run_others`) and entered there."""
    folders = {}
    for stage in stages:
        if needed(config, stage.name):
            key = settings(config, stage, folders)
            if key not in made:
                made[key] = make(config, folder, shared=folders, names=(stage.name,))[stage.name]
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
    stale = processes.led(
        lambda: (
            manifests.complete(out) and bool(manifests.difference(artifacts.read_json(out / "manifest.json"), wanted))
        )
    )
    manifests.run(out, wanted, action, force=force or stale, command=command, alone=stage.alone)
    if not processes.leads():
        return
    print()
    for what, path in (("coreset", "select/coreset.json"), ("model", "train/model"), ("report", "report/report.html")):
        if (workdir / path).exists():
            print(f"{what:8}{workdir / path}")
    print()
    print(relative.text(table))
