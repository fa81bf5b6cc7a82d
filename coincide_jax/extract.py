"""Stage 1: records → activation features `f16[N, D]` and per-record scores, one forward pass of the reference model.

Feature of a record (COINCIDE, EMNLP 2024, Eq. 1-3, in the order of the authors' code): the output of `o_proj` in L
layers spread over the decoder; per layer the mean over visual and over text tokens, tanh, unit length; the 2·L parts
concatenated layer by layer, `[v_l, t_l, …]`, and divided by sqrt(2·L). Text tokens are question and answers, never the
system prompt. A text-only record has a zero visual half and is scaled back to unit length, so text-only records meet
each other on the text half (the authors' code pools positions of padding there).

CLIP alone can be the reference as well (`reference.path` names its folder; the paper's fourth reference model): the
feature is then its image embedding and the text embedding of questions and answers, both of unit length, side by side,
divided by sqrt(2); a text-only record has a zero image half and is scaled back in the same way.

Rows go to disk shard by shard (`SHARD_ROWS` consecutive records), each shard with its list of finished rows, so a
killed run goes on at the first unfinished shard. Every device always runs `rows_per_device` rows of one length bucket,
which makes features bitwise independent of the number of devices.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coincide_jax.core import artifacts, axes
from coincide_jax.core import store as stores
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import READING, Dataset, batches, source
from coincide_jax.dataset.conversation import Encoded
from coincide_jax.dataset.tokenizer import Tokenizer
from coincide_jax.models import clip, hf, vlm

STAGE_VERSION = 1
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
JOINT = ("joint",)  # what stands for the layers when CLIP is the reference: one pair of halves
KEYS = ("extract", "reference.path", *READING, "device.precision")


def spread_taps(depth: int, count: int) -> tuple[int, ...]:
    """`count` 0-based layers spread over the decoder, the last one left out.

    24 layers, 5 taps → (3, 7, 11, 15, 19), the published choice. A decoder of `count` layers or fewer has all of them
    tapped.
    """
    if depth <= count:
        return tuple(range(depth))
    return tuple((i + 1) * depth // (count + 1) - 1 for i in range(count))


def pool(states: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `f32[B, T, W]` over the tokens of `bool[B, T]`, tanh, unit length: `f32[B, W]`.

    A row without such tokens is zero.
    """
    weight = mask.astype(jnp.float32)[:, :, None]
    mean = (states.astype(jnp.float32) * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
    squashed = jnp.tanh(mean)
    norm = jnp.sqrt((squashed * squashed).sum(-1, keepdims=True))
    return squashed / jnp.maximum(norm, 1e-12)


def assemble(pooled: jax.Array) -> jax.Array:
    """`f32[L, B, 2, W]` unit or zero parts → `f32[B, 2·L·W]` unit rows: a missing modality is zero, the rest scaled up.

    Layout: layer by layer, visual before text, as the authors have it.
    """
    layers, rows, parts, width = pooled.shape
    flat = jnp.transpose(pooled, (1, 0, 2, 3)).reshape(rows, layers * parts * width)
    norm = jnp.sqrt((flat * flat).sum(-1, keepdims=True))
    return flat / jnp.maximum(norm, 1e-12)


def token_scores(logits: jax.Array, tokens: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Per-record means over supervised tokens, each `f32[B]`: nll, EL2N `‖p − onehot‖₂`, AUM `p_y − max_{v≠y} p_v`
    (as COINCIDE's baselines define them).

    Args: logits `f32[B, T, V]`, tokens `i32[B, T]`, labels `bool[B, T]` (token t is predicted from t−1).
    """
    z, y = logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    weight = labels[:, 1:].astype(jnp.float32)
    total = jax.nn.logsumexp(z, axis=-1)
    # a comparison, since a gather along a shared vocabulary would fetch it whole
    here = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2, out_sharding=jax.typeof(z).sharding) == y[:, :, None]
    z_y = jnp.where(here, z, 0.0).sum(-1)
    others = jnp.where(here, -jnp.inf, z).max(-1)
    p_y = jnp.exp(z_y - total)
    squares = jnp.exp(jax.nn.logsumexp(2.0 * z, axis=-1) - 2.0 * total)
    el2n = jnp.sqrt(jnp.maximum(squares - 2.0 * p_y + 1.0, 0.0))
    count = jnp.maximum(weight.sum(1), 1.0)

    def mean(value: jax.Array) -> jax.Array:
        return (jnp.where(weight > 0, value, 0.0)).sum(1) / count

    return {"nll": mean(total - z_y), "el2n": mean(el2n), "aum": mean(p_y - jnp.exp(others - total))}


@functools.partial(jax.jit, static_argnames=("cfg", "taps", "scores"))
def features(
    params, batch: dict, cfg: vlm.VLMConfig, taps: tuple[int, ...], scores: bool = False
) -> dict[str, jax.Array]:
    """One forward pass through the layers that `params` hold: `{'features': f16[B, D], 'repaired': bool[B]}`.

    With `scores` (all layers held) also `nll`, `el2n`, `aum`, each `f32[B]`.
    """
    length = batch["tokens"].shape[1]
    start = batch["image_start"][:, None]
    position = jnp.arange(length)[None, :]
    visual = (start >= 0) & (position >= start) & (position < start + cfg.image_tokens)

    def tap(states: jax.Array) -> jax.Array:
        return jnp.stack([pool(states, visual), pool(states, batch["text"])], axis=1)

    out = vlm.forward(params, batch, cfg, tap=tap)
    result = stored(assemble(out.taps[jnp.array(taps)]))
    if scores:
        result |= token_scores(vlm.logits(params, out.hidden, cfg), batch["tokens"], batch["labels"])
    return result


@functools.partial(jax.jit, static_argnames=("cfg",))
def joint_features(params, batch: dict, cfg: clip.CLIPConfig) -> dict[str, jax.Array]:
    """The features of `features` from CLIP's two embeddings; `tokens` hold a text of CLIP's, `image_start` ≥ 0 says
    that there is an image."""
    image = clip.embed_images(params, batch["images"], cfg)
    image = jnp.where((batch["image_start"] >= 0)[:, None], image, 0.0)
    text = clip.embed_texts(params, batch["tokens"], batch["lengths"], cfg)
    return stored(assemble(jnp.stack([image, text], axis=1)[None]))


def stored(rows: jax.Array) -> dict[str, jax.Array]:
    """Rows as they go to disk, what is not finite replaced by 0 and said."""
    finite = jnp.isfinite(rows)
    return {
        "features": jnp.where(finite, rows, 0.0).astype(jnp.float16),
        "repaired": (~finite).any(axis=1),
    }


class Captions:
    """CLIP's texts: questions and answers of a record in order, between the marks that CLIP's tokenizer knows, cut to
    `positions` tokens. Takes the place of `conversation.Template` in a `Dataset`."""

    def __init__(self, tokenizer: Tokenizer, positions: int):
        self.tokenizer, self.positions = tokenizer, positions
        self.start, self.eos_id = (tokenizer.id_of(name) for name in (CLIP_START, CLIP_END))
        if self.start is None or self.eos_id is None:
            raise UserError(f"reference.path: the tokenizer lacks {CLIP_START} or {CLIP_END}; expected that of CLIP")

    def encode(self, turns: tuple[tuple[str, str], ...], has_image: bool) -> Encoded:
        """The text of a record; `image_start` is 0 if there is an image, which takes no position here."""
        ids = self.tokenizer.encode(" ".join(part for turn in turns for part in turn))
        ids = np.asarray([self.start, *ids[: self.positions - 2], self.eos_id], np.int32)
        inside = np.ones(len(ids), bool)
        return Encoded(ids, 0 if has_image else -1, inside, inside)


def choose_taps(keys, depth: int) -> tuple[int, ...]:
    """The tapped layers by config; an out-of-range one is an error."""
    taps = tuple(sorted(keys.taps)) or spread_taps(depth, keys.num_layers)
    if taps[0] < 0 or taps[-1] >= depth:
        raise UserError(f"extract.taps = {taps} names a layer outside the decoder's 0…{depth - 1}")
    return taps


def run(config, inputs: dict[str, Path], out: Path, mesh) -> dict:
    """The stage: writes features.zarr, scores.parquet, quarantine.jsonl.

    Raises:
      UserError: a tap outside the decoder, a reference folder that cannot be read, given features of another number
      of records.
    """
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    if config.extract.features:
        return take_given(config.extract, split, inputs["dataset"], out)
    folder = Path(config.reference.path) if config.reference.path else inputs["reference"]
    names, precision = ("nll", "el2n", "aum") if config.extract.scores else (), config.device.precision
    cfg, _ = hf.describe(folder, precision)
    if isinstance(cfg, clip.CLIPConfig):
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
        compute = functools.partial(features, params, cfg=cfg, taps=taps, scores=bool(names))
        told = f"decoder layers {list(taps)} of {depth}"
        tell_cuts(data, split["pool"])
    else:
        raise UserError(f"reference.path: {folder} holds neither a vision-language model nor CLIP")
    say("extract", f"{len(split['pool'])} records · {told} · D = {width}")
    store = stores.create(out / "features.zarr", split["n"], width)
    pool_rows = np.asarray(split["pool"], np.int64)
    with Progress("extract", len(pool_rows), "records") as progress:
        for shard in range(0, split["n"], artifacts.SHARD_ROWS):
            part = out / "parts" / f"{shard:012d}.npz"
            members = pool_rows[(pool_rows >= shard) & (pool_rows < shard + artifacts.SHARD_ROWS)]
            if not part.exists():
                rows = config.extract.rows_per_device
                write_shard(store, part, shard, members, data, compute, names, rows, mesh)
            progress.advance(len(members))
    return collect(out, split, data, names, inputs["dataset"], width, taps)


def open_pairs(split: dict, folder: Path, card: dict, cfg: clip.CLIPConfig, config) -> Dataset:
    """The split's records as CLIP reads them: pixels of its size, `Captions` as texts.

    Raises:
      UserError: scores are asked for, which CLIP has none of; a tokenizer that is not CLIP's.
    """
    if config.extract.scores:
        raise UserError(f"extract.scores is set but reference.path {folder} is CLIP, which predicts no answers")
    settings, positions = ConfigDict(config.dataset), cfg.text.positions
    settings.update(max_length=positions, buckets=(positions,))
    texts = functools.partial(Captions, positions=positions)
    data = Dataset.of_model(split, folder, card, 0, settings, template=texts, frame="crop")
    cut = int((data.lengths(split["pool"]) >= positions).sum())
    if cut:
        say("extract", f"{cut} records have {positions} tokens or more and are cut there")
    return data


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
    with artifacts.atomic(part) as temporary, open(temporary, "wb") as file:
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
