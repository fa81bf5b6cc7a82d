"""Greedy MMD picks by running sums against the published procedure in NumPy; prints one JSON line.

    python -m benchmarks.mmd [--rows n] [--fraction F] [--rounds R] [--seed S]

Both are given the same float64 Gram matrix of one cluster of n rows and have to give the same picks, or the benchmark
fails. The published procedure evaluates COINCIDE eq. 7 anew for every candidate at every pick, all candidates of a pick
at once, as the authors' program does on a GPU; here both run on the CPU. Ours orders all n rows, the peer only the
picks asked for. The rounds alternate in one process; our first call, which holds the compilation, is timed
apart.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from coincide_jax.kernels import density, mmd

PEER = f"published procedure (eq. 7 anew for every candidate), NumPy {np.__version__}, one cluster, Gram given"


def draw(rows: int, width: int, seed: int) -> np.ndarray:
    """Unit rows float16[n, D] of one cluster."""
    x = np.random.default_rng(seed).normal(size=(rows, width)) + 1.0
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def ours(kernel: jax.Array, count: int) -> list[int]:
    """The first `count` picks by running sums."""
    order, _ = mmd.greedy_order(kernel[None], [kernel.shape[0]])
    return order[0, :count].tolist()


def peer(kernel: np.ndarray, count: int) -> list[int]:
    """The first `count` picks; ties to the smallest index."""
    picks, whole = [], kernel.mean()
    for _ in range(count):
        free = np.setdiff1d(np.arange(len(kernel)), picks)
        trial = np.column_stack([np.tile(np.array(picks, np.int64), (len(free), 1)), free])  # i[candidates, picks + 1]
        among = kernel[trial[:, :, None], trial[:, None, :]].mean(axis=(1, 2))
        across = kernel[trial].mean(axis=(1, 2))
        picks.append(int(free[np.argmin(whole + among - 2.0 * across)]))
    return picks


def timed(function, *arguments):
    """What the function returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def main() -> None:
    """Makes the Gram matrix, runs the rounds, compares the picks, prints the line."""
    parser = argparse.ArgumentParser(description="Greedy MMD against the published procedure; one JSON line.")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    keys = parser.parse_args()
    count = int(keys.fraction * keys.rows)
    kernel = density.gram(draw(keys.rows, 64, keys.seed)[None], 1.0)[0]
    on_host = np.asarray(kernel)
    first, first_seconds = timed(ours, kernel, count)
    seconds = {"ours": [], "peer": []}
    for _ in range(keys.rounds):
        own, own_seconds = timed(ours, kernel, count)
        theirs, peer_seconds = timed(peer, on_host, count)
        assert first == own == theirs, f"the picks differ: {own} and {theirs}"
        seconds["ours"].append(own_seconds)
        seconds["peer"].append(peer_seconds)
    ratios = [theirs / own for theirs, own in zip(seconds["peer"], seconds["ours"], strict=True)]
    line = {
        "benchmark": "mmd",
        "peer": PEER,
        "jax": jax.__version__,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        **{name: getattr(keys, name) for name in ("rows", "fraction", "rounds", "seed")},
        "picks": count,
        "identical_picks": True,
        "seconds": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "first_call_seconds": round(first_seconds, 3),
        "speed_ratio": round(statistics.median(ratios), 1),  # peer / ours: above 1 ours is faster
        "speed_ratio_range": [round(min(ratios), 1), round(max(ratios), 1)],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
