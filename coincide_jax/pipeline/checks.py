"""What a config can get wrong, found before anything runs."""

import importlib.util
import pathlib
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict

from coincide_jax import cluster, curriculum, evaluation, extract, selection, training
from coincide_jax.core import precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.keys import flatten
from coincide_jax.pipeline.stages import KINDS, arrays_only, needed


def check_rows(config: ConfigDict, mesh, names: Sequence[str]) -> None:
    """Finds batches that the devices cannot share evenly and checkpoints that are not there, before `names` run.

    Raises:
      UserError: rows of one pass that are no multiple of the devices on 'data', a folder that does not exist; of
        several processes one that has too few devices for a copy of a layer.
    """
    wide, here = mesh.shape["model"], jax.local_device_count()
    if jax.process_count() > 1 and here % wide:
        raise UserError(f"device.model_parallel is {wide}; expected a divisor of the {here} devices that a process has")
    for key, folder in (("target.path", config.target.path), ("reference.path", config.reference.path)):
        if folder and not arrays_only(config) and not pathlib.Path(folder).is_dir():
            raise UserError(f"{key}: {folder} does not exist; expected the folder of a checkpoint")
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
    k, made = config.curriculum.k, not config.cluster.centroids and needed(config, "cluster")
    if made and k > config.cluster.k:
        raise UserError(f"curriculum.k is {k}; expected at most cluster.k, the {config.cluster.k} clusters it merges")
    cluster.check(config)
    selection.check(config)
    if config.cluster.centre and config.select.intra == "nearest":
        raise UserError("select.intra is 'nearest' but cluster.centre is set: its centroids are not those of the rows")
    curriculum.make(config.curriculum)
    precision.choose(config.device.precision)
    for name, recipe in (("base", config.base), ("reference.train", config.reference.train), ("train", config.train)):
        training.Recipe.from_config(recipe, name)
        if recipe.tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise UserError(
                f"{name}.tensorboard is set, but tensorboardX is not installed; expected pip install tensorboardX"
            )
    evaluation.check(config.evaluate)
