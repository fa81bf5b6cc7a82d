"""Stage 1: records → activation features `f16[N, D]` and per-record scores, one forward pass of the reference model.

Feature of a record (COINCIDE, EMNLP 2024, Eq. 1-3, in the order of the authors' code): the output of `o_proj` in L
layers spread over the decoder; per layer the mean over visual and over text tokens, tanh, unit length; the 2·L parts
concatenated layer by layer, `[v_l, t_l, …]`, and divided by sqrt(2·L). Text tokens are question and answers, never the
system prompt. A text-only record has a zero visual half and is scaled back to unit length, so text-only records meet
each other on the text half (the authors' code pools positions of padding there).

CLIP alone can be the reference as well (`reference.path` names its folder; the paper's fourth reference model): the
feature is then its image embedding and the text embedding of questions and answers, both of unit length, side by side,
divided by sqrt(2); a text-only record has a zero image half and is scaled back in the same way.

With `extract.reads=questions` no answer is read: features are those of `towers.py`, or, where `reference.path` names a
model, its activations on questions alone.

Rows go to disk shard by shard (`SHARD_ROWS` consecutive records), each shard with its list of finished rows, so a
killed run goes on at the first unfinished shard. Every device always runs `rows_per_device` rows of one length bucket,
which makes features bitwise independent of the number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from coincide_jax.core import artifacts, axes, processes
from coincide_jax.core import store as stores
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import READING, Dataset, batches, source
from coincide_jax.extract import activations, towers
from coincide_jax.extract.activations import choose_taps, features
from coincide_jax.extract.pairs import joint_features, open_pairs
from coincide_jax.extract.towers import open_towers
from coincide_jax.models import clip, hf, vlm

__all__ = ["KEYS", "STAGE_VERSION", "check", "run"]

STAGE_VERSION = 1
JOINT = ("joint",)  # what stands for the layers when CLIP is the reference: one pair of halves
TOWERS = ("towers",)  # likewise, of two encoders
KEYS = ("extract", "reference.path", "target.path", *READING, "device.precision")


def check(config) -> None:
    """Finds what a config can get wrong about features, before anything runs.

    Raises:
      UserError: as of `activations.check` and `towers.check`.
    """
    activations.check(config)
    towers.check(config)


def run(config, inputs: dict[str, Path], out: Path, mesh) -> dict:
    """The stage: writes features.zarr, scores.parquet, quarantine.jsonl.

    Raises:
      UserError: a tap outside the decoder, a reference folder that cannot be read, given features of another number
      of records, what `check` raises.
    """
    check(config)
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    if config.extract.features:
        return processes.led(functools.partial(take_given, config.extract, split, inputs["dataset"], out))
    mesh = axes.own(mesh)  # shards are shared out among processes, each of which has the whole model
    with jax.set_mesh(mesh):
        return extract(config, inputs, split, out, mesh)


def extract(config, inputs: dict[str, Path], split: dict, out: Path, mesh) -> dict:
    """Features of the pool by the reference, see `run`."""
    names, precision = ("nll", "el2n", "aum") if config.extract.scores else (), config.device.precision
    blind, cfg = config.extract.reads == "questions", None
    if config.reference.path or not blind:
        folder = Path(config.reference.path) if config.reference.path else inputs["reference"]
        cfg, _ = hf.describe(folder, precision)
    if cfg is None:
        base = Path(config.target.path) if config.target.path else inputs.get("base")
        (data, compute, width, told), taps = open_towers(split, base, config, mesh), TOWERS
    elif isinstance(cfg, clip.CLIPConfig):
        params, cfg, card = hf.load(folder, mesh, precision, storage="compute")
        data, taps, width = open_pairs(split, folder, card, cfg, config), JOINT, 2 * cfg.text.projection
        compute = functools.partial(joint_features, params, cfg=cfg)
        told = "CLIP's image and text embedding"
    elif isinstance(cfg, vlm.VLMConfig):
        depth, taps = cfg.decoder.depth, choose_taps(config.extract, cfg.decoder.depth)
        layers = None if names else taps[-1] + 1  # without scores only the layers that run are read
        params, cfg, card = hf.load(folder, mesh, precision, storage="compute", layers=layers, head=bool(names))
        data, width = (
            Dataset.of_model(split, folder, card, cfg.image_tokens, config.dataset),
            2 * len(taps) * cfg.decoder.width,
        )
        shown = {"tap_from": config.extract.tap_from, "squash": config.extract.squash}
        compute = functools.partial(features, params, cfg=cfg, taps=taps, scores=bool(names), **shown)
        told = f"{config.extract.tap_from} of decoder layers {list(taps)} of {depth}"
        if not blind:
            tell_cuts(data, split["pool"])
    else:
        raise UserError(f"reference.path: {folder} holds neither a vision-language model nor CLIP")
    if blind:
        data.withhold()
        told += " · questions alone"
    say("extract", f"{len(split['pool'])} records · {told} · D = {width}")
    processes.led(lambda: stores.create(out / "features.zarr", split["n"], width).shape)  # else they race for it
    store = stores.create(out / "features.zarr", split["n"], width)
    pool_rows = np.asarray(split["pool"], np.int64)
    shards = processes.share(range(0, split["n"], artifacts.SHARD_ROWS))
    pool_rows = np.sort(pool_rows)
    members = {
        shard: pool_rows[slice(*np.searchsorted(pool_rows, (shard, shard + artifacts.SHARD_ROWS)))] for shard in shards
    }
    with Progress("extract", sum(map(len, members.values())), "records") as progress:
        for shard, rows in members.items():
            part = out / "parts" / f"{shard:012d}.npz"
            if not part.exists():
                count = config.extract.rows_per_device
                write_shard(store, part, shard, rows, data, compute, names, count, mesh)
            progress.advance(len(rows))
    processes.together()
    return processes.led(lambda: collect(out, split, data, names, inputs["dataset"], width, taps))


def tell_cuts(data: Dataset, pool: Sequence[int]) -> None:
    """Says how many records fill `dataset.max_length`: those are cut there, some before their answer."""
    full = np.asarray(pool)[data.lengths(pool) >= data.buckets[-1]]
    unanswered = sum(not data.encode(int(index)).labels.any() for index in full)
    if len(full):
        tail = f"; {unanswered} of them have no answer left" if unanswered else ""
        say("extract", f"{len(full)} records reach dataset.max_length = {data.buckets[-1]} and are cut there{tail}")


def write_shard(store, part: Path, shard: int, members: np.ndarray, data, compute: Callable, names: Sequence[str],
                rows_per_device: int, mesh) -> None:  # fmt: skip
    """Features of one shard's records, written whole, then the shard's list of rows, which marks it as finished.

    `compute(batch)` gives features, repaired and what `names` says of a batch on the devices.
    """
    rows = min(artifacts.SHARD_ROWS, store.shape[0] - shard)
    block = np.zeros((rows, store.shape[1]), np.float16)
    columns = {name: np.zeros(rows, np.float32) for name in names} | {
        "valid": np.zeros(rows, bool), "repaired": np.zeros(rows, bool)
    }  # fmt: skip
    count = rows_per_device * mesh.shape["data"]
    pending = []
    for batch in batches.ordered(data, members, count, threads=data.threads):
        pending.append((batch, compute(axes.put_batch(batch, mesh))))
        if len(pending) > 2:  # the device works on the next batches while this one is fetched
            take(*pending.pop(0), shard, block, columns)
    for batch, result in pending:
        take(batch, result, shard, block, columns)
    store.write(shard, block)
    part.parent.mkdir(exist_ok=True)
    with artifacts.atomic(part, each=True) as temporary, open(temporary, "wb") as file:
        np.savez(file, **columns)


def take(batch: dict, result: dict, shard: int, block: np.ndarray, columns: dict) -> None:
    """Moves the valid rows of one batch from the device into the shard's block."""
    keep = batch["valid"]
    rows = batch["index"][keep] - shard
    result = jax.device_get(result)
    block[rows] = result["features"][keep]
    for name in columns.keys() - {"valid"}:
        columns[name][rows] = result[name][keep]
    columns["valid"][rows] = True


def collect(out: Path, split: dict, data, names: Sequence[str], dataset: Path, width: int, taps: Sequence) -> dict:
    """Joins the shards' columns into scores.parquet; records whose image failed now join the quarantine."""
    parts = [dict(np.load(path)) for path in sorted((out / "parts").glob("*.npz"))]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in (*names, "valid", "repaired")}
    write_scores(out, data.records, columns, names)
    lost = [i for i in split["pool"] if not columns["valid"][i]]
    rows = artifacts.read_jsonl(dataset / "quarantine.jsonl")
    rows += [{"index": i, "id": data.records[i].id, "reason": "unreadable at extraction"} for i in lost]
    artifacts.write_jsonl(out / "quarantine.jsonl", rows)
    repaired = int(columns["repaired"].sum())
    if repaired:
        say("extract", f"{repaired} records had non-finite activations, replaced by 0")
    return {
        "records": int(columns["valid"].sum()),
        "width": width,
        "taps": list(taps),
        "repaired": repaired,
        "lost": len(lost),
    }


def write_scores(out: Path, records: Sequence, columns: dict, names: Sequence[str]) -> None:
    """Writes scores.parquet: one row a record, quarantined and held-out ones with zeros and valid=false."""
    table = {
        "index": np.arange(len(records)),
        "id": [record.id if record else "" for record in records],
        "task": [record.task if record else "" for record in records],
        "valid": columns["valid"],
    }
    artifacts.write_parquet(out / "scores.parquet", table | {name: columns[name] for name in names})


def take_given(keys, split: dict, dataset: Path, out: Path) -> dict:
    """Features made elsewhere: copied into the store, rows outside the pool zeroed."""
    given = stores.open_features(Path(keys.features))
    if given.shape[0] != split["n"]:
        raise UserError(
            f"extract.features {keys.features} has {given.shape[0]} rows, the data set {split['n']} records"
        )
    valid = np.zeros(split["n"], bool)
    valid[split["pool"]] = True
    store = stores.create(out / "features.zarr", *given.shape)
    for shard in range(0, split["n"], artifacts.SHARD_ROWS):
        rows = slice(shard, min(shard + artifacts.SHARD_ROWS, split["n"]))
        store.write(shard, np.where(valid[rows, None], given[rows], 0).astype(np.float16))
    records, _ = source.parse(source.load(split["records"])[: split["n"]])
    write_scores(out, records, {"valid": valid}, ())
    artifacts.write_jsonl(out / "quarantine.jsonl", artifacts.read_jsonl(dataset / "quarantine.jsonl"))
    return {"records": int(valid.sum()), "width": int(given.shape[1]), "taps": [], "repaired": 0, "lost": 0}
