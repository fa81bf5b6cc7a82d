"""Spherical k-means of `coincide_jax.kernels.kmeans` against `faiss.Kmeans(spherical=True)`; prints one JSON line.

    python -m benchmarks.kmeans [--rows N] [--width D] [--clusters K] [--iterations T] [--rounds R] [--seed S]

Both run float32 Lloyd on all rows from the same initial centroids until nothing moves (at most T iterations; faiss does
not sample the rows). The rounds alternate in one process, so that both meet the same load of the machine; every other
round begins with faiss. The first call of each, which for JAX holds the compilation, is timed apart. The objective is
the mean cosine of the rows to the nearest of the final centroids, by one float64 function for both.
"""

import argparse
import json
import statistics
import time

import faiss
import jax
import numpy as np

from coincide_jax.core import axes
from coincide_jax.kernels import kmeans

PEER = f"faiss {faiss.__version__} Kmeans(spherical=True), run to convergence, no sampling of rows"


def draw(rows: int, width: int, kinds: int, seed: int) -> np.ndarray:
    """Unit rows float16[N, D] around `kinds` directions of uneven weight, as activation features are stored."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(size=kinds)
    kind = rng.choice(kinds, rows, p=share / share.sum())
    x = rng.normal(size=(kinds, width)).astype(np.float32)[kind]
    x += rng.normal(size=(rows, width)).astype(np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def ours(x: np.ndarray, init: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """Centroids f32[K, D] and iterations run."""
    result = kmeans.fit(x, len(init), seed=0, iterations=iterations, chunk=4096, init=init)
    return result.centroids, result.iterations


def peer(x: np.ndarray, init: np.ndarray, iterations: int) -> tuple[np.ndarray, int]:
    """The same by faiss, on float32 rows."""
    model = faiss.Kmeans(
        x.shape[1], len(init), niter=iterations, spherical=True, max_points_per_centroid=len(x), nredo=1
    )
    model.train(x, init_centroids=init)
    return model.centroids, len(model.obj)


def objective(x: np.ndarray, centroids: np.ndarray, block: int = 4096) -> float:
    """Mean cosine of unit rows to their nearest centroid."""
    wide = centroids.astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    best = [(x[i : i + block].astype(np.float64) @ wide.T).max(axis=1) for i in range(0, len(x), block)]
    return float(np.concatenate(best).mean())


def timed(function, *arguments):
    """What the function returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def main() -> None:
    """Draws the rows, runs the rounds, prints the line."""
    parser = argparse.ArgumentParser(description="Spherical k-means against faiss; one JSON line.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=100, help="at most; both stop earlier when nothing moves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    keys = parser.parse_args()
    x = draw(keys.rows, keys.width, 2 * keys.clusters, keys.seed)
    wide = x.astype(np.float32)
    start = wide[np.random.default_rng(keys.seed + 1).choice(keys.rows, keys.clusters, replace=False)]
    init = start / np.linalg.norm(start, axis=1, keepdims=True)
    runs = {"ours": (ours, x, init, keys.iterations), "peer": (peer, wide, init, keys.iterations)}
    seconds = {name: [] for name in runs}
    with jax.set_mesh(axes.make_mesh()):
        found = {name: timed(*run) for name, run in runs.items()}  # the first calls
        for round_number in range(keys.rounds):
            for name in sorted(runs, reverse=round_number % 2 == 1):
                seconds[name].append(timed(*runs[name])[1])
    (ours_found, ours_iterations), ours_first = found["ours"]
    (peer_found, peer_iterations), peer_first = found["peer"]
    ratios = [theirs / own for theirs, own in zip(seconds["peer"], seconds["ours"], strict=True)]
    ours_objective, peer_objective = objective(wide, ours_found), objective(wide, peer_found)
    line = {
        "benchmark": "kmeans",
        "peer": PEER,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **{name: getattr(keys, name) for name in ("rows", "width", "clusters", "rounds", "seed")},
        "iterations": {"ours": ours_iterations, "peer": peer_iterations, "limit": keys.iterations},
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "first_call_seconds": {"ours": round(ours_first, 3), "peer": round(peer_first, 3)},
        "speed_ratio": round(statistics.median(ratios), 3),  # peer / ours: above 1 ours is faster
        "speed_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "objective": {"ours": ours_objective, "peer": peer_objective},
        "objective_ratio": round(ours_objective / peer_objective, 6),  # ours / peer: above 1 ours is tighter
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
