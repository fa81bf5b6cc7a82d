"""COINCIDE (EMNLP 2024): more records from clusters that transfer well and are diverse, each cluster's by greedy MMD.

Cluster i gets a share `softmax_i(S_i / (tau D_i))` of the budget, S_i its transferability, D_i its density.
`select.variant` presets four keys: `official` is what the authors' program does, `paper` what the text says.
"""

import dataclasses

import jax
import numpy as np

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.kernels import density, kmeans, transfer
from coincide_jax.selection import picks
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
    "weights": ("both", "transfer", "density", "equal"),
    "intra": ("mmd", "nearest", "random"),
    "gram": density.PRECISIONS,
}
PRESET = tuple(field.name for field in dataclasses.fields(Variant))


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
            S = transfer.transferability(
                view.centroids,
                part=variant.transfer_part,
                num_layers=view.num_layers,
                mask_above=variant.mask_above,
            )
        except ValueError as error:
            raise UserError(f"select.transfer_part=text: {error}; set extract.num_layers") from error
        picker = picks.Picker(view, members, sizes, keys)
        D = picker.measure(variant.diagonal == "yes")
        with np.errstate(divide="ignore", invalid="ignore"):  # what comes of it is told below
            score = {"both": S / D, "transfer": S, "density": 1.0 / D, "equal": np.zeros(len(D))}[keys.weights]
        if not np.isfinite(score).all():
            worst = int(np.argmin(np.isfinite(score)))
            raise UserError(
                f"cluster {worst} has density {D[worst]:g} and transferability {S[worst]:g}, hence no share of the "
                f"budget; a larger select.sigma than {keys.sigma:g} may help"
            )
        probability = np.exp((score - np.max(score)) / keys.tau)
        probability = probability / np.sum(probability)
        quota, whole = _allocate(variant, keys, probability, sizes, view.budget)
        orders, scores, cost = picker.picks(quota, whole)
    visits = _visits(probability)
    return Selection(
        np.concatenate([members[i][orders[i]] for i in visits]).astype(np.int64),
        {
            "transferability": S,
            "density": D,
            "score": score,
            "probability": probability,
            "quota": quota,
        },
        {
            "rank": np.concatenate([np.arange(quota[i]) for i in visits]),
            "score": np.concatenate([scores[i] for i in visits]).astype(np.float64),
        },
        cost,
    )


def resolve(keys) -> Variant:
    """The preset of `keys.variant` with the keys that are set in its place; checks every choice."""
    if keys.variant not in VARIANTS:
        raise unknown("select.variant", keys.variant, VARIANTS)
    for name, choices in CHOICES.items():
        if keys[name] not in choices and (keys[name] or name not in PRESET):
            raise unknown(f"select.{name}", keys[name], choices)
    for name in ("tau", "sigma"):
        if not keys[name] > 0:
            raise UserError(f"select.{name} is {keys[name]}; expected a positive number")
    for name, least in (("min_per_cluster", 0), ("refine", 0), ("cache_mib", 1)):
        if keys[name] < least:
            raise UserError(f"select.{name} is {keys[name]}; expected {least} or more")
    return dataclasses.replace(VARIANTS[keys.variant], **{name: keys[name] for name in PRESET if keys[name]})


def _allocate(variant: Variant, keys, probability: np.ndarray, sizes: np.ndarray, budget: int):
    """Quotas i64[K], and bool[K]: whether a cluster is taken as it is, since it was offered more than it holds."""
    least = np.minimum(sizes, keys.min_per_cluster)
    if np.sum(least) > budget:
        raise UserError(
            f"select.min_per_cluster={keys.min_per_cluster} of {len(sizes)} clusters asks for {np.sum(least)} records; "
            f"the budget is {budget}"
        )
    room, rest = sizes - least, budget - int(np.sum(least))
    if variant.allocation == "exact":
        return least + exact(probability, room, rest), np.zeros(len(sizes), bool)
    quota, over = sequential(probability, room, rest)
    return least + quota, over


def sequential(probability: np.ndarray, sizes: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Quotas i64[K] as the authors' program gives them; their sum is at most `budget` and may be below it.

    Clusters by falling probability (ties: larger index first); each takes `round(remaining · ratio)`, halves to even,
    at most its size; then the ratios of the later ones are normalised again. Ratios that have all vanished get
    nothing. The second result, bool[K], names the clusters that were offered more than their size: the authors' program
    takes those as they are, without ordering them.
    """
    quota, over = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), bool)
    order = _visits(probability)
    ratio, remaining = probability[order], budget
    for position, cluster in enumerate(order):
        offered = round(remaining * ratio[position])
        quota[cluster], over[cluster] = min(offered, int(sizes[cluster])), offered > sizes[cluster]
        remaining -= int(quota[cluster])
        later = np.sum(ratio[position + 1 :])
        if later <= 0 or remaining == 0:
            break
        ratio[position + 1 :] /= later
    return quota, over


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
