"""The stages: their functions and keys, what each reads under a config, and what its manifest compares."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

from ml_collections import ConfigDict

from coincide_jax import cluster, curriculum, dataset, evaluation, extract, report, selection, training
from coincide_jax.core import artifacts, manifests
from coincide_jax.core.keys import flatten, subset

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage: its function, the config keys it may read, the stages whose folders it is handed, and whether of
    several processes the one that leads runs it alone."""

    name: str
    run: Callable
    keys: tuple[str, ...]
    version: int
    inputs: tuple[str, ...] = ()
    alone: bool = False


WARMUP = ("cluster/warmup", "select/warmup")
FEATURES = ("dataset", "extract")
FOR_CLUSTERS = ("reference", "extract", "cluster", "select")
KINDS = training.Kinds(curriculum.ONE_ARM, curriculum.OFFLINE, curriculum.OF_TASKS, curriculum.ASKS)


STAGES = (
    Stage("dataset", dataset.run, dataset.KEYS, dataset.STAGE_VERSION, alone=True),
    Stage("base", training.run_base, training.BASE_KEYS, training.STAGE_VERSION, ("dataset",)),
    Stage("reference", training.run_reference, training.REFERENCE_KEYS, training.STAGE_VERSION, ("dataset", "base")),
    Stage("extract", extract.run, extract.KEYS, extract.STAGE_VERSION, ("dataset", "base", "reference")),
    Stage("cluster", cluster.run, cluster.KEYS, cluster.STAGE_VERSION, FEATURES),
    Stage(
        "select",
        selection.run,
        selection.KEYS,
        selection.STAGE_VERSION,
        ("dataset", "extract", "cluster", "match"),
        alone=True,
    ),
    Stage(WARMUP[0], cluster.run_warmup, cluster.WARMUP_KEYS, cluster.STAGE_VERSION, FEATURES),
    Stage(
        WARMUP[1],
        selection.run_warmup,
        selection.WARMUP_KEYS,
        selection.STAGE_VERSION,
        (*FEATURES, WARMUP[0]),
        alone=True,
    ),
    Stage(
        "train",
        functools.partial(training.run, prepare=curriculum.prepare, kinds=KINDS),
        training.TRAIN_KEYS,
        training.TRAIN_VERSION,
        ("dataset", "base", "extract", "cluster", "select", WARMUP[1], "match"),
    ),
    Stage("evaluate", evaluation.run, evaluation.KEYS, evaluation.STAGE_VERSION, ("dataset", "train")),
    Stage("report", report.run, report.KEYS, report.STAGE_VERSION, alone=True),
)
NAMES = tuple(stage.name for stage in STAGES)
SHARED = ("dataset", "base", "reference", "extract", "cluster", *WARMUP)  # what rows of the same settings share
SEEDS = ("base.seed", "train.seed", "select.seed")  # what `seeds` sets in every row


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
    # the arms are tasks, and the records of all of them may be drawn
    if config.curriculum.name in curriculum.OF_TASKS and not config.curriculum.difficulty and name in FOR_CLUSTERS:
        return False
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
