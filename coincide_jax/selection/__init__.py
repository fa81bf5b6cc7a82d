"""Stage 3: clusters → coreset. One file a selector; each joins by one line in `SELECTORS`.

A selector is `select(view: SelectionView, keys) -> Selection`; it sees features and clusters, never records.
"""

import pathlib

import numpy as np

from coincide_jax.core import artifacts, store
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.dataset import source
from coincide_jax.kernels import kmeans
from coincide_jax.selection import coincide, random
from coincide_jax.selection.view import Selection, SelectionView, reader

__all__ = [
    "KEYS",
    "SELECTORS",
    "STAGE_VERSION",
    "WARMUP_KEYS",
    "Selection",
    "SelectionView",
    "check",
    "run",
    "run_warmup",
]

STAGE_VERSION = 2
KEYS = ("select", "extract.features", "extract.num_layers")
WARMUP_KEYS = (*KEYS, "curriculum.warmup")
SELECTORS = {
    "coincide": coincide.select,
    "random": random.select,
}


def check(config) -> None:
    """Finds what the keys can get wrong before anything runs.

    Raises:
      UserError: unknown selector, fraction outside (0, 1], keys that COINCIDE does not know, features made elsewhere
        that `extract.num_layers` does not divide.
    """
    keys = config.select
    if keys.name not in SELECTORS:
        raise unknown("selector", keys.name, SELECTORS)
    if not 0 < keys.fraction <= 1:
        raise UserError(f"select.fraction is {keys.fraction}; expected more than 0 and at most 1")
    if keys.name != "coincide":
        return
    variant = coincide.resolve(keys)
    if config.extract.features and variant.transfer_part == "text":
        width = store.open_features(config.extract.features).shape[1]
        if width % (2 * config.extract.num_layers):
            raise UserError(
                f"features {config.extract.features} of width {width} do not split into extract.num_layers = "
                f"{config.extract.num_layers} layers of two halves"
            )


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """Runs the stage; writes indices.npy, coreset.json, records.parquet and, where there are clusters,
    clusters.parquet, whose column `given` has the numbers of clusters made elsewhere, where empty ones of them were
    dropped. Without a data set (arrays made elsewhere) there is no coreset.json, and every row counts.

    `inputs['match']`, if there, is the folder of another selection; then this one holds exactly as many records.

    Raises:
      UserError: unknown selector, budget of no record or above all, what the selector raises.
    """
    del mesh
    check(config)
    keys = config.select
    split = artifacts.read_json(inputs["dataset"] / "split.json") if "dataset" in inputs else None
    assignment = centroids = None
    if "cluster" in inputs:
        assignment = np.load(inputs["cluster"] / "assignment.npy")
        centroids = np.load(inputs["cluster"] / "centroids.npy", mmap_mode="r")
        valid = assignment >= 0
    else:
        valid = np.zeros(split["n"], bool)
        valid[split["pool"]] = True
    features = store.open_features(pathlib.Path(config.extract.features or inputs["extract"] / "features.zarr"))
    if len(features) != len(valid):
        raise UserError(f"features {features.path} have {len(features)} rows; expected {len(valid)}, one a record")
    budget = _budget(keys.fraction, int(np.sum(valid)), inputs.get("match"))
    decoded = not features.mapped and assignment is not None
    members = kmeans.members(assignment, len(centroids)) if decoded else None
    rows = reader(features, (keys.cache_mib << 20) // 2, out, members)
    view = SelectionView(
        features=rows,
        valid=valid,
        assignment=assignment,
        centroids=centroids,
        num_layers=_num_layers(config, inputs),
        budget=budget,
    )
    chosen = SELECTORS[keys.name](view, keys)
    columns = {"index": chosen.indices}
    if split is not None:
        records = source.load(split["records"])
        artifacts.write_json(out / "coreset.json", [records[row] for row in np.sort(chosen.indices)])
        columns["id"] = [str(records[row].get("id", "")) for row in chosen.indices]
    summary = {"records": len(chosen.indices), "budget": budget, "shortfall": budget - len(chosen.indices)}
    if assignment is not None:
        columns["cluster"] = assignment[chosen.indices]
        picked = np.bincount(assignment[chosen.indices], minlength=len(centroids))
        table = {"cluster": np.arange(len(centroids)), "size": np.bincount(assignment[valid], minlength=len(centroids))}
        if (inputs["cluster"] / "given.npy").is_file():
            table["given"] = np.load(inputs["cluster"] / "given.npy")
        artifacts.write_parquet(out / "clusters.parquet", table | chosen.clusters | {"picked": picked})
        summary |= {"clusters": len(centroids), "clusters_picked": int(np.sum(picked > 0))}
    artifacts.write_parquet(out / "records.parquet", columns | chosen.records)
    artifacts.write_npy(out / "indices.npy", chosen.indices)
    _tell(keys.name, summary, int(np.sum(valid)))
    return summary | (chosen.summary or {})


def run_warmup(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage 'select/warmup': COINCIDE's picks of `curriculum.warmup` of the pool from the clusters of
    'cluster/warmup', by whole centroids, since the features are of no layers."""
    one = config.copy_and_resolve_references().unlock()
    one.select.update(name="coincide", fraction=config.curriculum.warmup, transfer_part="all")
    picked = run(one.lock(), inputs | {"cluster": inputs["cluster/warmup"]}, out, mesh)
    (out / "coreset.json").unlink()  # it holds answers, which nobody has asked for yet
    return picked


def _budget(fraction: float, valid: int, match: pathlib.Path | None) -> int:
    """M: as many records as the selection beside it, or the share of the valid ones."""
    if match is not None:
        budget = len(np.load(match / "indices.npy"))
        if budget > valid:
            raise UserError(f"{match / 'indices.npy'} holds {budget} records to match; only {valid} are valid here")
        return budget
    if int(fraction * valid) == 0:
        raise UserError(f"select.fraction {fraction} of {valid} valid records is no record; expected at least one")
    return int(fraction * valid)


def _num_layers(config, inputs: dict[str, pathlib.Path]) -> int:
    """Tapped layers in a feature: as many as were extracted; by config for features made elsewhere."""
    manifest = inputs["extract"] / "manifest.json" if "extract" in inputs else None
    taps = artifacts.read_json(manifest)["summary"]["taps"] if manifest and manifest.exists() else ()
    return len(taps) or config.extract.num_layers


def _tell(name: str, summary: dict, valid: int) -> None:
    share = 100 * summary["records"] / valid
    where = f" from {summary['clusters_picked']} of {summary['clusters']} clusters" if "clusters" in summary else ""
    say("select", f"{name}: {summary['records']} of {valid} records ({share:.1f} %){where}")
    if summary["shortfall"]:
        say(
            "select",
            f"{summary['shortfall']} records below the budget of {summary['budget']}: the clusters that sequential "
            "allocation reached last are full; nothing is filled up (select.allocation=exact fills to the record)",
        )
