"""The stages base, reference and train: which weights, which records, how many steps; `fit`; a model folder."""

import functools
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.core import artifacts, checkpoint, precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.dataset import READING, Dataset, annotate, source
from coincide_jax.kernels import bandits, kmeans
from coincide_jax.models import hf, layers
from coincide_jax.models.vlm import VLMConfig, abstract
from coincide_jax.training import asking, skills
from coincide_jax.training.asking import Draw, Kinds
from coincide_jax.training.loop import Termination, fit
from coincide_jax.training.state import Recipe

STAGE_VERSION = 3  # of base and reference
TRAIN_VERSION = 4  # since export/ has a tokenizer and says its conversation
BASE_KEYS = ("base", "model", "dataset.image_size", *READING, "device.precision")
REFERENCE_KEYS = ("reference.train", "target.path", *READING, "device.precision")
TRAIN_KEYS = ("train", "curriculum", "target.path", "select.fraction", *READING, "device.precision")
ROUND_STEPS = 50  # steps between two plans where nothing is learned from them
POOLS = ("coreset", "all")
HARDLY = 0.05  # of the probability of an even draw: a curriculum that moves less is as good as an even draw
MERGE = {"iterations": 50, "chunk": 4096}  # k-means over centroids, when fewer arms than clusters are asked for


def run_base(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'base': a tiny model, made here and trained on the records that are in no pool and no held-out part."""
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    if not split["base"]:
        raise UserError("the base has no records: dataset.base_share is 0; set it, dataset.base_records or target.path")
    chosen, size = precision.choose(config.device.precision), config.dataset.image_size
    tokenizer = inputs["dataset"] / "tokenizer.json"
    tiny = VLMConfig.tiny(config.model, size, 1, chosen)
    data = Dataset.open(
        split,
        "base_records" if split["base_records"] else "records",
        tokenizer_path=tokenizer,
        settings=config.dataset,
        image_size=size,
        image_tokens=tiny.image_tokens,
        template=config.dataset.template,
        mean=tiny.vision.mean,
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
        "mean": list(cfg.vision.mean),
    }
    with Termination() as stop:
        params, summary = _fit_uniform("base", params, cfg, data, split["base"], recipe, config, mesh, out, stop)
        checkpoint.save_model(out, params, card, tokenizer)
    return summary | {"fingerprint": checkpoint.fingerprint(params), "parameters": _size(params)}


def run_reference(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'reference': the base tuned on the whole pool (the paper's small VLM tuned on the target set)."""
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    folder = pathlib.Path(config.target.path) if config.target.path else inputs["base"]
    recipe = Recipe.from_config(config.reference.train, "reference.train")
    params, card, cfg, data = _open(folder, split, config, mesh, recipe)
    with Termination() as stop:
        params, summary = _fit_uniform("reference", params, cfg, data, split["pool"], recipe, config, mesh, out, stop)
        params = _float32(params)
        data.tokenizer.save(out / "tokenizer.json")
        checkpoint.save_model(out, params, card)
    return summary | {"fingerprint": checkpoint.fingerprint(params), "parameters": _size(params)}


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh, *, prepare: Callable, kinds: Kinds) -> dict:
    """The stage 'train': the target, tuned on a coreset or on the pool in the order that a sampler draws.

    Args:
      inputs: 'dataset', 'base' (unless target.path), 'select' for a coreset, 'cluster' for an online sampler; 'match',
        a select folder whose number of records an online sampler over the pool is to see as well.
        'extract', whose scores.parquet says how difficult records are, if `curriculum.difficulty` names a column of it;
        'select/warmup', whose indices.npy are the warm-up of a sampler that asks for answers.
      prepare: (config.curriculum, records, arm, arms, difficulty, graph) → (sampler, rank within an arm or None).

    Raises:
      UserError: an unknown pool or sampler, more arms than clusters, records outside the clusters, a budget below one
        batch or below the warm-up.
    """
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    settings, seed = config.curriculum, config.train.seed
    asks, of_tasks = settings.name in kinds.asks, settings.name in kinds.of_tasks
    draw, names = _draw(config, inputs, split, out, kinds)
    budget, budgeted = draw.total, asks or of_tasks
    if budgeted:
        asking.begin(draw, settings, inputs, seed, kinds.asks)

    def prepared(graph=None):
        difficulty = _difficulty(draw.records, settings, inputs)
        sampler, rank = prepare(settings, draw.records, draw.arm, draw.arms, difficulty, graph=graph)
        # under a budget the order of `begin` stays through all epochs
        return (sampler._replace(shuffle=False), draw.rank) if budgeted else (sampler, rank)

    sampler, rank = prepared()
    if sampler.probe and settings.probe_from == "heldout":
        asking.hold_out(draw, settings.probe, seed)
        sampler, rank = prepared()  # of the records that are left
    draw.rank = rank
    if budgeted:
        asking.check_budget(draw, config.train.batch)
    room = settings.round_steps * (1 if sampler.per_step else config.train.batch)
    if settings.visits and draw.arms > room:
        raise UserError(
            f"curriculum.visits promises every arm a visit, but a round of {settings.round_steps} steps has room for "
            f"{room} of {draw.arms} arms; take fewer arms by curriculum.k"
            + (", or curriculum.draw=sample" if sampler.per_step else "")
        )
    folder = pathlib.Path(config.target.path) if config.target.path else inputs["base"]
    recipe = Recipe.from_config(config.train, "train")
    params, card, cfg, data = _open(folder, split, config, mesh, recipe)
    begun, more = checkpoint.fingerprint(params), {}
    members = draw.members()
    if settings.watch:
        members["watched"] = _watched(np.asarray(split["dev"], np.int64), settings.watch)
        artifacts.write_npy(out / "watched.npy", members["watched"])
    known = members.get("watched", ())
    asker = asking.annotator(data, settings, out / "annotations.jsonl", budget, known) if asks else None
    if sampler.probe:
        members["probed"] = asking.probes(draw, settings, asker, seed)
    if budgeted:
        members["limit"] = draw.limit()
    if draw.arms > 1:  # for the report: the arm of every row of the file, -1 = none
        number = np.full(split["n"], -1, np.int32)
        number[members["records"]] = members["arm"]
        artifacts.write_npy(out / "arms" / "records.npy", number)
    exporter = functools.partial(_export_adapter, cfg, recipe, folder, out / "adapter")
    with Termination() as stop:
        if of_tasks and settings.graph != "identity":
            trial = skills.Trial(params, cfg, data, draw, recipe, settings, config.dataset.threads, mesh, stop)
            graph, cost = skills.learn(trial, names, out / "skills")
            sampler, _ = prepared(graph)
            more = {"graph_steps": cost}
        params, summary = fit(
            name="train",
            params=params,
            cfg=cfg,
            dataset=data,
            members=members,
            sampler=sampler,
            total_records=budget,  # what a probe holds out of it are records, not steps
            recipe=recipe,
            round_steps=settings.round_steps,
            lag=settings.lag,
            threads=config.dataset.threads,
            mesh=mesh,
            out=out,
            stop=stop,
            objective="accuracy" if settings.objective == "accuracy" else "nll",
            at_end=exporter if recipe.mode == "lora" else None,
            ask=asker and asker.ask_round,
        )
        params = _float32(params)
        data.tokenizer.save(out / "model" / "tokenizer.json")
        checkpoint.save_model(out / "model", params, card)
        try:
            hf.export(params, cfg, out / "export", card=card)
            data.tokenizer.save(out / "export" / "tokenizer.json")
        except UserError as error:  # the model is there all the same
            say("train", str(error))
    if asker is not None:
        more = {"asked": {purpose: asker.count(purpose) for purpose in annotate.PURPOSES}, "budget": budget}
        say("train", "asked for {train} answers to train on and {probe} to probe".format(**more["asked"]))
    if settings.name not in kinds.offline and draw.arms > 1 and summary["moved"] < HARDLY:
        say(
            "train",
            f"'{settings.name}' hardly moved: no probability changed by more than {100 * summary['moved']:.1f} % of "
            f"1/{draw.arms}; more steps, shorter rounds (curriculum.round_steps), fewer arms (curriculum.k) or, for "
            "samplers that have one, a larger curriculum.eta let it choose",
        )
    say("train", f"model {out / 'model'} · Hugging Face files {out / 'export'}")
    more |= {"start": begun, "fingerprint": checkpoint.fingerprint(params)}
    more |= {"arms": draw.arms, "pool": len(draw.records), "sampler": settings.name, "lag": settings.lag}
    return summary | more | _measured(out)


def _draw(config, inputs: dict[str, pathlib.Path], split: dict, out: pathlib.Path, kinds: Kinds):
    """What may be drawn, in arms, and the names of the arms if they are tasks."""
    records, total = _records(config, inputs, split)
    name, names = config.curriculum.name, ()
    if name in kinds.one_arm:
        return Draw(records, np.zeros(len(records), np.int64), 1, total), names
    if name in kinds.of_tasks:
        names, arm = _tasks(records, split)
        return Draw(records, arm, len(names), total), names
    arm, arms = _arms(records, config, inputs, out)
    if lost := int((arm < 0).sum()):
        say("train", f"{lost} records of the pool are in no cluster and cannot be drawn")
        records, arm = records[arm >= 0], arm[arm >= 0]
    return Draw(records, arm, arms, total), names


def _tasks(records: np.ndarray, split: dict) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the tasks of these records, in alphabetical order, and the number of each record's: int64[N]."""
    parsed, _ = source.parse(source.load(split["records"])[: split["n"]])
    names, arm = np.unique([parsed[row].task for row in records], return_inverse=True)
    return tuple(names.tolist()), arm.astype(np.int64)


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
    if settings.budget:
        return pool, math.ceil(settings.budget * len(pool) - 1e-6)
    if "match" in inputs:
        return pool, len(np.load(inputs["match"] / "indices.npy"))
    return pool, max(math.ceil(config.select.fraction * len(pool) - 1e-6), 1)


def _watched(dev: np.ndarray, count: int) -> np.ndarray:
    """`count` records of the dev part, drawn by fixed seed, the same in every row and seed: int64[count]."""
    if not 3 <= count <= len(dev):  # shown in thirds
        raise UserError(
            f"curriculum.watch is {count}; expected 0 (none), or 3 to {len(dev)}, the records of the dev part "
            "(dataset.share_dev)"
        )
    return np.sort(np.random.default_rng(0).permutation(dev)[:count])


def _measured(out: pathlib.Path) -> dict:
    """Of the summary: how many records a probe measured a round at most, how often, and the seconds of probing and
    watching."""
    path = out / "arms.jsonl"
    lines = artifacts.read_jsonl(path) if path.exists() else []
    found = {}
    for name in ("probe", "watch"):
        each = [(line["measured"][name], line["seconds"][name]) for line in lines if name in line["seconds"]]
        if each:
            counts, seconds = zip(*each, strict=True)
            found[name] = {"records": max(counts), "times": len(each), "seconds": round(sum(seconds), 2)}
    return found


def _difficulty(records: np.ndarray, settings, inputs: dict[str, pathlib.Path]) -> np.ndarray | None:
    """The column of scores.parquet that `curriculum.difficulty` names, at `records`; None if it names none."""
    if not settings.difficulty or "extract" not in inputs:
        return None
    path = inputs["extract"] / "scores.parquet"
    columns = artifacts.read_parquet(path)
    if settings.difficulty not in columns:
        raise UserError(
            f"curriculum.difficulty is '{settings.difficulty}', but {path} has no such column; set extract.scores=True"
        )
    return columns[settings.difficulty][records]


def _arms(records: np.ndarray, config, inputs: dict[str, pathlib.Path], out: pathlib.Path) -> tuple[np.ndarray, int]:
    """Arm of each record (-1: in no cluster) and number of arms: the clusters, or fewer, by k-means over centroids.

    Arms without a record are left out. Where arms are not the clusters, arms/assignment.npy says which arm each
    cluster is in (-1: none).
    """
    if "cluster" not in inputs:
        raise UserError(
            f"curriculum.name is '{config.curriculum.name}' but there is no cluster folder; run cluster first"
        )
    centroids = np.load(inputs["cluster"] / "centroids.npy")
    assignment = np.load(inputs["cluster"] / "assignment.npy")
    clusters, k = len(centroids), config.curriculum.k
    if k < 0 or k > clusters:
        raise UserError(f"curriculum.k is {k}; expected 0 (the clusters) or 1 to {clusters}, the number of clusters")
    names, arms = np.arange(clusters), clusters  # cluster → arm
    if k not in (0, clusters):
        merged = kmeans.fit(centroids, k, seed=config.train.seed, **MERGE)
        artifacts.write_npy(out / "arms" / "centroids.npy", merged.centroids)
        names, arms = merged.assignment.astype(np.int64), k
        say("train", f"{clusters} clusters merged into {k} arms")
    arm = np.where(assignment[records] < 0, -1, names[assignment[records]])
    filled = np.unique(arm[arm >= 0])
    if len(filled) < arms:  # as a coreset leaves them
        say("train", f"{arms - len(filled)} of {arms} arms have no record to draw and are left out")
        number = np.full(arms + 1, -1, np.int64)  # the last entry is that of -1
        number[filled] = np.arange(len(filled))
        names, arm = number[names], number[arm]
    if len(filled) < clusters:
        artifacts.write_npy(out / "arms" / "assignment.npy", names)
    else:  # what an earlier run of other arms may have left
        artifacts.remove(out / "arms" / "assignment.npy")
    return arm, len(filled)


def _open(folder: pathlib.Path, split: dict, config, mesh, recipe: Recipe) -> tuple[dict, dict, VLMConfig, Dataset]:
    """Weights, card, configuration of a model folder, and the pool's records as this model reads them. What stays
    frozen is held in the compute type."""
    storage = "float32" if recipe.mode == "full" else "compute"
    params, cfg, card = hf.load(folder, mesh, config.device.precision, storage=storage)
    if not isinstance(cfg, VLMConfig):
        raise UserError(f"target.path: {folder} holds no vision-language model; expected vision tower and decoder")
    return params, card, cfg, Dataset.of_model(split, folder, card, cfg.image_tokens, config.dataset)


def _float32(params: dict) -> dict:
    """The tree as model folders hold it."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)


def _export_adapter(cfg: VLMConfig, recipe: Recipe, base: pathlib.Path, out: pathlib.Path, trained: dict) -> None:
    """The adapters, not merged, and the projector as a PEFT folder."""
    settings = {"rank": recipe.rank, "alpha": recipe.alpha, "dropout": recipe.dropout, "targets": recipe.targets}
    try:
        hf.export_adapter(trained["lora"], cfg, out, **settings, base=str(base), projector=trained["projector"])
    except UserError as error:  # the merged model comes all the same
        say("train", str(error))


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
