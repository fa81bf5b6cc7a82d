"""What each stage takes, counted from the config: floating-point operations, disk, host and device memory, chunk sizes.

Chunks come from the functions that the stages themselves cut with (`tiles.tiling`, `density.batches`, `choose_taps`,
`cache_bytes`). Counted are the arrays that grow with records, clusters, width or model; not counted are the records as
Python objects, small JSON and Parquet files, and the few hundred MB of JAX itself.
"""

import math
from typing import NamedTuple

import numpy as np

from coincide_jax.cluster.audit import cache_bytes
from coincide_jax.core import artifacts
from coincide_jax.extract.activations import choose_taps
from coincide_jax.kernels import density
from coincide_jax.kernels.kmeans import seeding, tiles
from coincide_jax.models import clip, flops, lora, vlm
from coincide_jax.plan import training
from coincide_jax.plan.devices import GB, Devices
from coincide_jax.plan.sizes import Sizes

NPY_HEADER = 128  # bytes of a .npy file before its numbers
IMBALANCE = 2.0  # K Σ n_k² / N² that clusters are taken to have; cluster/history.json holds that of a run
TRANSFER_BLOCK = 1024  # rows of a tile of the centroids' cosines
PARALLEL_BYTES = 24  # on the host for each number of the rows that k-means|| has drawn


class Cost(NamedTuple):
    """What one stage takes."""

    stage: str
    records: int
    flop: float
    kind: str  # of the products: 'half', the compute type, or 'double', float64
    disk: float  # bytes that stay, and those of select's file of sorted rows, which goes with the stage
    host: float  # bytes
    device: float  # bytes on each device
    how: str  # the chunks, and what was chosen
    remedy: str  # what to change where it does not fit


def npy(*arrays: tuple[int, ...]) -> float:
    """Bytes of .npy files, each given as (bytes a number, shape…)."""
    return float(sum(NPY_HEADER + math.prod(array) for array in arrays))


def store(rows: int, width: int) -> float:
    """Bytes of the shards of a feature store: whole chunks with a checksum each, an index of each shard."""
    height, chunks = artifacts.CHUNK_ROWS, -(-rows // artifacts.CHUNK_ROWS)
    shards, each = -(-rows // artifacts.SHARD_ROWS), artifacts.SHARD_ROWS // height
    return float(chunks * (2 * height * width + 4) + shards * (16 * each + 4))


def forward_set(cfg, rows: int, length: int, wide: int) -> float:
    """Bytes that one decoder block works with where nothing is kept for a backward pass, its tap included."""
    text, c = cfg.decoder, cfg.precision.dtype.itemsize
    _, attention, layer = training.block_sets(cfg, rows, length, wide)
    columns = 7 * text.width + 2 * text.heads * text.head_dim / wide + 2 * text.mlp / wide
    return c * rows * length * columns + 3 * attention + layer


def extract(config, s: Sizes, devices: Devices) -> Cost:
    """Features of the pool's records, one forward pass."""
    rows, length, data = config.extract.rows_per_device, config.dataset.max_length, s.mesh.shape["data"]
    host = 4 * artifacts.SHARD_ROWS * s.width + (config.dataset.cache_mib << 20)
    remedy = "lower extract.rows_per_device or dataset.max_length"
    if config.extract.features:
        return Cost("extract", s.records, 0.0, "half", store(s.records, s.width), host, 0.0, "copied", remedy)
    cfg, wide = s.reference, config.device.model_parallel
    c = cfg.precision.dtype.itemsize
    if isinstance(cfg, clip.CLIPConfig):
        tree = clip.abstract(cfg)
        flop = 2.0 * s.pool * (flops.products(tree["vision"]) * cfg.vision.tokens
                               + flops.products(tree["text"]) * cfg.text.positions)  # fmt: skip
        device = c * training.elements(tree, s.mesh) + rows * (16 * c * cfg.vision.tokens * cfg.vision.width)
        return Cost("extract", s.pool, flop, "half", store(s.records, s.width), host, device, "CLIP's pairs", remedy)
    depth, scores = cfg.decoder.depth, config.extract.scores
    held = depth if scores else choose_taps(config.extract, depth)[-1] + 1
    cut = flops.first_layers(cfg, held)
    working = [forward_set(cut, rows, length, wide), training.tower_sets(cut, rows, wide)[1]]
    if scores:  # logits, and what softmax makes of them
        working.append(5 * 4 * rows * length * cfg.decoder.vocab / wide)
    tree = vlm.abstract(cut)
    weights = training.elements(tree, s.mesh)
    if not scores:
        weights -= training.elements({key: tree["decoder"][key] for key in ("head",) if key in tree["decoder"]}, s.mesh)
    device = c * weights + max(working) + 4 * rows * s.width * 4
    if not config.reference.path:  # a model trained here is read in float32, then cast
        device = max(device, (4 + c) * weights)
    flop = flops.encode(cut, s.pool, s.length) + (flops.head(cut, s.pool, s.length) if scores else 0.0)
    host += 4 * rows * data * 3 * cfg.vision.image_size**2
    how = f"{rows} rows a device, {held} of {depth} layers, D = {s.width}, shards of {artifacts.SHARD_ROWS} rows"
    return Cost("extract", s.pool, flop, "half", store(s.records, s.width), host, device, how, remedy)


def cluster_row(keys, *, labels: bool) -> int:
    """Bytes on the host for each clustered row, where most are held; `labels`: its records may have some to agree with.

    k-means keeps 28 (length, loss in the cast, gap, label) and 24 more while it draws first centroids, 63 by k-means||;
    the stage row numbers and labels, up to 20; the agreement with labels takes 65 beside 40 of the stage's own.
    """
    size = 105 if (labels and keys.audit_labels) or keys.init == "k-means||" else 70
    if keys.mode == "sketch":  # the coordinates, and what k-means keeps of them
        size += 4 * keys.sketch_rank + 20
    return size + 20 * bool(keys.audit.stability)  # what the first clustering left


def cluster(config, s: Sizes, devices: Devices) -> Cost:
    """Spherical k-means (an upper bound: rows and centroids that provably stay are left out), and the audit."""
    keys, n, width = config.cluster, s.pool, s.width
    k = min(keys.k, n)
    disk = npy((4, k, width), (4, s.records))
    sample = min(n, keys.max_points_per_centroid * k or n)
    fast = devices.fast if keys.product == "auto" else keys.product
    wide, limit = config.device.model_parallel, devices.usable * devices.bytes
    parts = tiles.parts(wide, k, width, tiles.CPU_MEMORY if devices.cpu else limit)
    own = -(-k // parts)  # clusters of a device
    memory = (keys.memory_mib << 20) or devices.count * tiles.free(limit, 0, own, width)
    if devices.cpu and not keys.memory_mib:
        memory = tiles.CPU_MEMORY
    cut = tiles.tiling(sample, width, own, keys.chunk, devices.count // parts, "float16", fast, memory / parts)
    kept = cut.count * cut.per if cut.resident else 3 * cut.per
    device = kept * tiles.row_bytes(width, "float16", fast) + cut.per * tiles.work_bytes(width, own)
    device += tiles.CENTROID_BYTES * own * width
    host = 3 * 2 * cut.chunk * width + 8 * k * width + cluster_row(keys, labels=s.target is not None) * n
    flop = 2.0 * sample * k * width * keys.iterations + 2.0 * n * k * width * (sample < n)
    passes = keys.iterations + 2
    how = [f"tiles of {cut.chunk} rows", "features stay on the devices"]
    if not cut.resident:
        how[1] = f"features streamed, {2 * sample * width / GB:.1f} GB in each of {passes} passes at most"
    if parts > 1:
        how.append(f"centroids shared by {parts} devices")
    if keys.init == "k-means||":
        host += PARALLEL_BYTES * 2 * seeding.ROUNDS * k * width
        how.append(f"k-means|| holds {2 * seeding.ROUNDS * k} drawn rows on the host")
    audit = keys.audit
    if keys.centroids:
        flop, how = 0.0, ["clusters made elsewhere"]
    if audit.stability and not keys.centroids:
        flop *= 2
    if audit.separation:
        flop += 2.0 * n * k * width
        how.append("separation: one pass more")
    if audit.duplicates < 1:
        flop += IMBALANCE * n**2 / k * width
        cache = cache_bytes(keys)
        host += min(cache, 2 * n * width)
        how.append(f"duplicates: {math.ceil(2 * n * width / cache)} passes more")
    share = f"raise device.model_parallel (up to {devices.count} devices, which share the centroids), "
    remedy = f"lower cluster.k, {share * (wide < devices.count)}or take fewer layers by extract.num_layers"
    return Cost("cluster", n, flop, "half", disk, host, device, "; ".join(how), remedy)


def select(config, s: Sizes, devices: Devices) -> Cost:
    """Transferability, density and greedy picks, in float64 on one device; of a TPU, on its host."""
    keys, n = config.select, s.pool
    budget = int(keys.fraction * n)
    disk = npy((8, budget)) + keys.fraction * s.file
    remedy = "lower select.cache_mib"
    if keys.name != "coincide":
        return Cost("select", n, 0.0, "double", disk, 16.0 * n, 0.0, f"{budget} records", remedy)
    k, share = min(config.cluster.k, n), (keys.cache_mib << 20) // 4
    typical = np.full(k, max(round(IMBALANCE * n / k), 1))
    block = min(TRANSFER_BLOCK, k)
    transfer = 16 * block * (s.width + block)
    limit = density.stored_limit(share)
    if typical[0] <= limit:
        padded, batch = density.batches(typical, s.width, min(density.BATCH_BYTES, share))[0]
        working = len(batch) * density.cluster_bytes(padded, s.width)
        cuts = f"batches of {len(batch)} clusters of {padded} rows"
        copied = 2 * len(batch) * padded * s.width
    else:
        side = int(np.clip(limit // 8 * 8, 64, 2048))
        working, copied = 32 * side**2 + 16 * side * s.width, 0
        cuts = f"clusters of {typical[0]} rows by tiles of {side}"
    rows = min(2 * n * s.width, 2 * share)
    host = rows + copied + 8 * 4 * n
    flop = float(k) ** 2 * s.width + 2 * IMBALANCE * n**2 / k * s.width
    how = f"{budget} records; {cuts} (imbalance {IMBALANCE:g} taken), matrices stored up to {limit} rows; "
    if 2 * n * s.width > 2 * share and not config.extract.features.endswith(".npy"):
        disk, host = disk + 2 * n * s.width, host + 16 * n
        how += f"1 pass over the features, copied by clusters to {2 * n * s.width / GB:.1f} GB of disk meanwhile"
    else:
        count = 1 + bool(keys.refine or keys.gram == "float32" or typical[0] > limit)
        how += f"{count} {'pass' if count == 1 else 'passes'} over the features at most"
    return Cost("select", n, flop, "double", disk, host, max(transfer, working), how, remedy)


def train(config, s: Sizes, devices: Devices, key: str = "train") -> tuple[Cost, training.Memory]:
    """One of the trainings; `key`: 'base', 'reference.train' or 'train'."""
    recipe = {"base": config.base, "reference.train": config.reference.train, "train": config.train}[key]
    records = {"base": s.base, "reference.train": s.pool}.get(key, int(config.select.fraction * s.pool))
    if key == "train" and config.curriculum.pool == "all" and config.curriculum.name == "uniform":
        records = s.pool
    slots = recipe.steps * recipe.batch or max(math.ceil(records * recipe.epochs - 1e-6), 1)
    found = training.of_recipe(config, s.target, recipe, key, devices)
    whole = flops.elements(vlm.abstract(s.target))
    trained = whole if recipe.mode == "full" else flops.elements(vlm.abstract(s.target)["projector"])
    if recipe.mode == "lora":
        trained += flops.elements(lora.abstract(s.target, recipe.lora.rank, recipe.lora.targets))
    written = 4 * whole * (2 if key == "train" else 1) + 4 * trained * (recipe.mode == "lora")
    disk = written + recipe.keep * 12 * trained
    host = 4 * whole + (config.dataset.cache_mib << 20)
    steps = math.ceil(slots / recipe.batch)
    rows = recipe.micro_batch // s.mesh.shape["data"]
    how = f"{steps} steps of {recipe.batch} records, {rows} rows a device at a time"
    flop = flops.step(s.target, recipe, slots, s.length)
    remedy = f"lower {key}.micro_batch or dataset.max_length, or take more devices"
    if found.ending > found.steps:
        remedy = "take more devices: it is writing the trained model that takes the most"
    stage = key.split(".")[0]
    return Cost(stage, slots, flop, "half", disk, host, found.total, how, remedy), found


def evaluate(config, s: Sizes, devices: Devices) -> Cost:
    """Greedy answers, as if every question took all `max_new_tokens`."""
    keys, cfg, data = config.evaluate, s.target, s.mesh.shape["data"]
    wide, c = config.device.model_parallel, cfg.precision.dtype.itemsize
    rows, length, new = -(-keys.rows // data), config.dataset.max_length, keys.max_new_tokens
    text = cfg.decoder
    cache = 2 * c * rows * (length + new) * text.depth * text.kv_heads * text.head_dim / wide
    weights = training.elements(vlm.abstract(cfg), s.mesh)
    working = max(forward_set(cfg, rows, length, wide), training.tower_sets(cfg, rows, wide)[1])
    device = max(c * weights + cache + working, (4 + c) * weights)  # read in float32, then cast
    flop = flops.encode(cfg, s.questions, s.length) + flops.decode(cfg, s.questions, s.length, new)
    how = f"{keys.rows} questions at a time, {new} new tokens each at most"
    host = float(config.dataset.cache_mib << 20)
    return Cost(
        "evaluate", s.questions, flop, "half", 0.0, host, device, how, "lower evaluate.rows or dataset.max_length"
    )
