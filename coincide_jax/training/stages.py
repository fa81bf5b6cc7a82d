"""The stages base, reference and train: which weights, which records, how many steps; `fit`; a model folder."""

import math
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from coincide_jax.core import artifacts, checkpoint, precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.dataset import READING, Dataset
from coincide_jax.kernels import bandits, kmeans
from coincide_jax.models import hf, layers
from coincide_jax.models.vlm import VLMConfig, abstract
from coincide_jax.training.loop import Termination, fit
from coincide_jax.training.state import Recipe

STAGE_VERSION = 1
BASE_KEYS = ("base", "model", "dataset.image_size", *READING, "device.precision")
REFERENCE_KEYS = ("reference.train", "target.path", *READING, "device.precision")
TRAIN_KEYS = ("train", "curriculum", "target.path", "select.fraction", *READING, "device.precision")
ROUND_STEPS = 50  # steps between two plans where nothing is learned from them
POOLS = ("coreset", "all")
MERGE = {"iterations": 50, "chunk": 4096}  # k-means over centroids, when fewer arms than clusters are asked for


def run_base(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'base': a tiny model, made here and trained on the records that are in no pool and no held-out part."""
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    if not split["base"]:
        raise UserError("the base has no records: dataset.base_share is 0; set it, dataset.base_records or target.path")
    chosen, size = precision.choose(config.device.precision), config.dataset.image_size
    tokenizer = inputs["dataset"] / "tokenizer.json"
    data = Dataset.open(
        split,
        "base_records" if split["base_records"] else "records",
        tokenizer_path=tokenizer,
        settings=config.dataset,
        image_size=size,
        image_tokens=VLMConfig.tiny(config.model, size, 1, chosen).image_tokens,
    )
    cfg = VLMConfig.tiny(config.model, size, data.vocab_size, chosen)
    recipe = Recipe.from_config(config.base, "base")
    params = layers.init(abstract(cfg), jax.random.key(recipe.seed), mesh)
    card = {
        "config": cfg.to_dict(),
        "image_size": size,
        "vocab": data.vocab_size,
        "template": config.dataset.template,
        "system": config.dataset.system,
    }
    with Termination() as stop:
        params, summary = _fit_uniform("base", params, cfg, data, split["base"], recipe, config, mesh, out, stop)
        checkpoint.save_model(out, params, card, tokenizer)
    return summary | {"fingerprint": checkpoint.fingerprint(params), "parameters": _size(params)}


def run_reference(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'reference': the base tuned on the whole pool (the paper's small VLM tuned on the target set)."""
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    folder = pathlib.Path(config.target.path) if config.target.path else inputs["base"]
    params, card, cfg, data = _open(folder, split, config, mesh)
    recipe = Recipe.from_config(config.reference.train, "reference.train")
    with Termination() as stop:
        params, summary = _fit_uniform("reference", params, cfg, data, split["pool"], recipe, config, mesh, out, stop)
        checkpoint.save_model(out, params, card, folder / "tokenizer.json")
    return summary | {"fingerprint": checkpoint.fingerprint(params), "parameters": _size(params)}


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh, *, make_sampler: Callable) -> dict:
    """The stage 'train': the target, tuned on a coreset or on the pool in the order that a sampler draws.

    Args:
      inputs: 'dataset', 'base' (unless target.path), 'select' for a coreset, 'cluster' for an online sampler; 'match',
        a select folder whose number of records an online sampler over the pool is to see as well.
      make_sampler: config.curriculum → sampler.

    Raises:
      UserError: an unknown pool or sampler, more arms than clusters, records outside the clusters.
    """
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    settings = config.curriculum
    sampler = make_sampler(settings)
    records, total = _records(config, inputs, split)
    arm, arms = np.zeros(len(records), np.int64), 1
    if settings.name != "uniform":
        arm, arms = _arms(records, config, inputs, out)
        if lost := int((arm < 0).sum()):
            say("train", f"{lost} records of the pool are in no cluster and cannot be drawn")
            records, arm = records[arm >= 0], arm[arm >= 0]
    folder = pathlib.Path(config.target.path) if config.target.path else inputs["base"]
    params, card, cfg, data = _open(folder, split, config, mesh)
    begun = checkpoint.fingerprint(params)
    with Termination() as stop:
        params, summary = fit(
            name="train",
            params=params,
            cfg=cfg,
            dataset=data,
            members={"records": records, "arm": arm, "arms": arms},
            sampler=sampler,
            total_records=total,
            recipe=Recipe.from_config(config.train, "train"),
            round_steps=settings.round_steps,
            lag=settings.lag,
            threads=config.dataset.threads,
            mesh=mesh,
            out=out,
            stop=stop,
        )
        checkpoint.save_model(out / "model", params, card, folder / "tokenizer.json")
        (out / "export").mkdir(exist_ok=True)
        hf.export(params, cfg, out / "export")
    say("train", f"model {out / 'model'} · Hugging Face files {out / 'export'}")
    return summary | {
        "start": begun,
        "fingerprint": checkpoint.fingerprint(params),
        "arms": arms,
        "pool": len(records),
        "sampler": settings.name,
        "lag": settings.lag,
    }


def _records(config, inputs: dict[str, pathlib.Path], split: dict) -> tuple[np.ndarray, int]:
    """The records that may be drawn int64[N], and how many of them one epoch of this row sees."""
    settings, pool = config.curriculum, np.asarray(split["pool"], np.int64)
    if settings.pool not in POOLS:
        raise unknown("curriculum.pool", settings.pool, POOLS)
    if settings.pool == "coreset":
        if "select" not in inputs:
            raise UserError("curriculum.pool is 'coreset' but there is no select folder; run the stage select first")
        records = np.load(inputs["select"] / "indices.npy")
        strangers = np.setdiff1d(records, pool)
        if len(strangers):
            raise UserError(f"{inputs['select'] / 'indices.npy'} names record {strangers[0]}, which is not in the pool")
        return records, len(records)
    if settings.name == "uniform":
        return pool, len(pool)
    if "match" in inputs:
        return pool, len(np.load(inputs["match"] / "indices.npy"))
    return pool, max(math.ceil(config.select.fraction * len(pool) - 1e-6), 1)


def _arms(records: np.ndarray, config, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> tuple[np.ndarray, int]:
    """Arm of each record (-1: in no cluster) and number of arms: the clusters, or fewer, by k-means over centroids."""
    if "cluster" not in inputs:
        raise UserError(
            f"curriculum.name is '{config.curriculum.name}' but there is no cluster folder; run cluster first"
        )
    centroids = np.load(inputs["cluster"] / "centroids.npy")
    assignment = np.load(inputs["cluster"] / "assignment.npy")
    clusters, k = len(centroids), config.curriculum.k
    if k < 0 or k > clusters:
        raise UserError(f"curriculum.k is {k}; expected 0 (the clusters) or 1 to {clusters}, the number of clusters")
    arm = assignment[records]
    if k in (0, clusters):
        return arm, clusters
    merged = kmeans.fit(centroids, k, seed=config.train.seed, **MERGE)
    artifacts.write_npy(out / "arms" / "centroids.npy", merged.centroids)
    artifacts.write_npy(out / "arms" / "assignment.npy", merged.assignment)
    say("train", f"{clusters} clusters merged into {k} arms")
    return np.where(arm < 0, -1, merged.assignment[arm]), k


def _open(folder: pathlib.Path, split: dict, config, mesh) -> tuple[dict, dict, VLMConfig, Dataset]:
    """Weights, card, configuration of a model folder, and the pool's records as this model reads them."""
    params, cfg, card = hf.load(folder, mesh, config.device.precision)
    return params, card, cfg, Dataset.of_model(split, folder, card, cfg.image_tokens, config.dataset)


def _fit_uniform(name, params, cfg, data, records, recipe: Recipe, config, mesh, out, stop) -> tuple[dict, dict]:
    """`fit` on all of `records`, each as often as the others."""
    return fit(
        name=name,
        params=params,
        cfg=cfg,
        dataset=data,
        members={"records": np.asarray(records), "arm": np.zeros(len(records), np.int64), "arms": 1},
        sampler=bandits.UNIFORM,
        total_records=len(records),
        recipe=recipe,
        round_steps=ROUND_STEPS,
        lag=1,
        threads=config.dataset.threads,
        mesh=mesh,
        out=out,
        stop=stop,
    )


def _size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))
