"""COINCIDE (EMNLP 2024): more records from clusters that transfer well and are diverse, each cluster's by greedy MMD.

Cluster i gets a share `softmax_i(S_i / (tau D_i))` of the budget, S_i its transferability, D_i its density.
`select.variant` presets four keys: `official` is what the authors' program does, `paper` what the text says.
"""

import dataclasses

import jax
import numpy as np

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import Progress, say
from coincide_jax.kernels import density, kmeans, mmd
from coincide_jax.selection.view import Selection, SelectionView


@dataclasses.dataclass(frozen=True)
class Variant:
    """The keys that a variant presets."""

    transfer_part: str  # text | all
    mask_above: float
    diagonal: str  # yes | no
    allocation: str  # sequential | exact


VARIANTS = {
    "official": Variant("text", 0.9, "yes", "sequential"),
    "paper": Variant("all", 2.0, "no", "exact"),
}
CHOICES = {
    "transfer_part": ("text", "all"),
    "diagonal": ("yes", "no"),
    "allocation": ("sequential", "exact"),
    "intra": ("mmd", "nearest", "random"),
}


def select(view: SelectionView, keys) -> Selection:
    """Selects about (`allocation=sequential`) or exactly (`exact`) `view.budget` rows.

    Args:
      view: features, clusters and budget.
      keys: config.select.

    Raises:
      UserError: a key without such a choice, tau or sigma not positive, features that do not split into the tapped
        layers, a minimum per cluster above the budget, no clusters.
    """
    variant = resolve(keys)
    if view.assignment is None:
        raise UserError("select.name=coincide needs clusters; run the stage cluster first")
    members = kmeans.members(view.assignment, len(view.centroids))
    sizes = np.array([len(rows) for rows in members], np.int64)
    device = jax.local_devices(backend="cpu")[0] if jax.default_backend() == "tpu" else jax.local_devices()[0]
    # float64, and one order of sums, on one device
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,), devices=[device])
    with jax.set_mesh(mesh):
        try:
            S = density.transferability(
                view.centroids,
                part=variant.transfer_part,
                num_layers=view.num_layers,
                mask_above=variant.mask_above,
            )
        except ValueError as error:
            raise UserError(f"select.transfer_part=text: {error}; set extract.num_layers") from error
        D, orders, scores = _measure(view, members, sizes, keys, variant.diagonal == "yes")
    score = S / D
    probability = np.exp((score - np.max(score)) / keys.tau)
    probability = probability / np.sum(probability)
    least = np.minimum(sizes, keys.min_per_cluster)
    if np.sum(least) > view.budget:
        raise UserError(
            f"select.min_per_cluster={keys.min_per_cluster} of {len(sizes)} clusters asks for {np.sum(least)} records; "
            f"the budget is {view.budget}"
        )
    allocate = sequential if variant.allocation == "sequential" else exact
    quota = least + allocate(probability, sizes - least, view.budget - int(np.sum(least)))
    visits = _visits(probability)
    rank = np.concatenate([np.arange(quota[i]) for i in visits])
    cluster = np.repeat(visits, quota[visits])
    return Selection(
        np.concatenate([members[i][orders[i][: quota[i]]] for i in visits]).astype(np.int64),
        {
            "transferability": S,
            "density": D,
            "score": score,
            "probability": probability,
            "quota": quota,
        },
        {"rank": rank, "score": np.array([scores[i][r] for i, r in zip(cluster, rank, strict=True)], np.float64)},
    )


def resolve(keys) -> Variant:
    """The preset of `keys.variant` with the keys that are set in its place; checks every choice."""
    if keys.variant not in VARIANTS:
        raise unknown("select.variant", keys.variant, VARIANTS)
    for name, choices in CHOICES.items():
        if keys[name] not in choices and (keys[name] or name == "intra"):
            raise unknown(f"select.{name}", keys[name], choices)
    for name in ("tau", "sigma"):
        if not keys[name] > 0:
            raise UserError(f"select.{name} is {keys[name]}; expected a positive number")
    if keys.min_per_cluster < 0:
        raise UserError(f"select.min_per_cluster is {keys.min_per_cluster}; expected 0 or more")
    names = [field.name for field in dataclasses.fields(Variant)]
    return dataclasses.replace(VARIANTS[keys.variant], **{name: keys[name] for name in names if keys[name]})


def sequential(probability: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """Quotas i64[K] as the authors' program gives them; their sum is at most `budget` and may be below it.

    Clusters by falling probability (ties: larger index first); each takes `round(remaining · ratio)`, halves to even,
    at most its size; then the ratios of the later ones are normalised again. Ratios that have all vanished get
    nothing.
    """
    quota = np.zeros(len(sizes), np.int64)
    order = _visits(probability)
    ratio, remaining = probability[order], budget
    for position, cluster in enumerate(order):
        quota[cluster] = min(round(remaining * ratio[position]), int(sizes[cluster]))
        remaining -= int(quota[cluster])
        later = np.sum(ratio[position + 1 :])
        if later <= 0 or remaining == 0:
            break
        ratio[position + 1 :] /= later
    return quota


def exact(probability: np.ndarray, sizes: np.ndarray, budget: int) -> np.ndarray:
    """Quotas i64[K] that sum to `budget` (≤ the sum of sizes): shares by probability, what is above a size spread on.

    Whole parts first, then one each by largest fraction (ties: larger probability, then smaller index), never above a
    size. Where every cluster with room has probability 0 they share alike.
    """
    share = np.zeros(len(sizes))
    free = sizes > 0
    while True:
        room = budget - np.sum(sizes[~free])
        weight = np.where(free, probability, 0.0)
        if not np.any(weight > 0):
            weight = free.astype(np.float64)
        share = np.where(free, room * (weight / max(np.sum(weight), 1e-300)), sizes)
        full = free & (share >= sizes)
        if not np.any(full):
            break
        free &= ~full
    quota = np.floor(share).astype(np.int64)
    order = np.lexsort((np.arange(len(sizes)), -probability, -(share - quota)))
    while (left := budget - int(np.sum(quota))) > 0:
        takers = order[quota[order] < sizes[order]][:left]
        quota[takers] += 1
    return quota


def _visits(probability: np.ndarray) -> np.ndarray:
    """Clusters by falling probability, ties with the larger index first."""
    return np.argsort(probability, kind="stable")[::-1]


def _measure(view: SelectionView, members, sizes, keys, diagonal: bool):
    """Density float64[K], and for each cluster the order of its members and a score for each place in it.

    The score is the MMD² of the picks so far (mmd), the cosine to the centroid (nearest), or 0 (random).
    """
    D = np.zeros(len(sizes))
    orders, scores = [None] * len(sizes), [None] * len(sizes)
    with Progress("select", len(sizes), "clusters") as progress:
        for padded, batch in density.batches(sizes, view.centroids.shape[1]):
            real = batch[batch >= 0]
            first = view.features(members[real[0]])
            x = np.zeros((len(batch), padded, first.shape[1]), first.dtype)
            for place, cluster in enumerate(real):
                x[place, : sizes[cluster]] = view.features(members[cluster])
            counts = np.where(batch >= 0, sizes[batch], 0)
            kernel = density.gram(x, keys.sigma)
            D[real] = density.density(kernel, counts, diagonal)[: len(real)]
            if keys.intra == "mmd":
                picked, discrepancy = mmd.greedy_order(kernel, counts)
            for place, cluster in enumerate(real):
                n = sizes[cluster]
                if keys.intra == "mmd":
                    orders[cluster], scores[cluster] = picked[place, :n], discrepancy[place, :n]
                elif keys.intra == "nearest":
                    near = kmeans.cosines(x[place, :n], view.centroids, np.full(n, cluster))
                    orders[cluster] = np.argsort(-near, kind="stable")
                    scores[cluster] = near[orders[cluster]]
                else:
                    orders[cluster] = np.random.default_rng([keys.seed, int(cluster)]).permutation(n)
                    scores[cluster] = np.zeros(n)
            progress.advance(len(real))
    if keys.intra != "mmd":
        say("select", f"inside clusters records are picked by select.intra={keys.intra}")
    return D, orders, scores
