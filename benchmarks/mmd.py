"""Greedy MMD picks by running sums against the published procedure in NumPy; prints one JSON line.

    python -m benchmarks.mmd [--rows n] [--fraction F] [--clusters B] [--rounds R] [--seed S]
    python -m benchmarks.mmd --gram [--rows n] [--width D] [--spread S] …     what a float32 Gram costs

Both are given the same float64 Gram matrices of clusters of n rows and have to give the same picks, or the benchmark
fails. The published procedure evaluates COINCIDE eq. 7 anew for every candidate at every pick, all candidates of a pick
at once, as the authors' program does on a GPU; here both run on the CPU. Ours takes a batch of clusters in one call, as
the selection does, and is timed twice: ordering all n rows of each (what the selection runs, since that order serves
any quota) and making the picks asked for only. Beside them stands a running sum in NumPy, one cluster at a time.
The rounds alternate in one process; our first call, which holds the compilation, is timed apart.

With `--gram` no speed is measured, but what `select.gram=float32` loses on one cluster against float64: the share of
equal picks, the ratio of MMD², and the same for a plain float32 Gram, that of the rows as they are.
"""

import statistics
import time

import jax
import numpy as np

from benchmarks import record
from coincide_jax.kernels import density, mmd

PEER = (
    f"published procedure (eq. 7 anew for every candidate), NumPy {np.__version__}, one cluster at a time, Gram given"
)


def draw(rows: int, width: int, seed: int, spread: float = 1.0) -> np.ndarray:
    """Unit rows float16[n, D] of one cluster; `spread` is their deviation, relative to the part they share."""
    rng = np.random.default_rng(seed)
    x = 1.0 + spread * rng.normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def ours(kernels: jax.Array, limit: int | None) -> np.ndarray:
    """Orders of all clusters i32[B, n], or their first `limit` picks."""
    return mmd.greedy_order(kernels, [kernels.shape[1]] * len(kernels), limit)[0]


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


def running(kernels: np.ndarray, count: int) -> list[list[int]]:
    """The first `count` picks of each cluster by running sums in NumPy."""
    found = []
    for kernel in kernels:
        mean, picks = kernel.mean(axis=1), []
        to_picks, diagonal = np.zeros(len(kernel)), np.diagonal(kernel) / 2
        for step in range(count):
            value = to_picks + diagonal - (step + 1) * mean
            value[picks] = np.inf
            picks.append(int(np.argmin(value)))
            to_picks += kernel[picks[-1]]
        found.append(picks)
    return found


def timed(function, *arguments):
    """What the function returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def precision(keys) -> dict:
    """Equal picks and MMD² of float32 Gram matrices against float64, on one cluster."""
    x = draw(keys.rows, keys.width, keys.seed, keys.spread)
    count, sizes = int(keys.fraction * keys.rows), [keys.rows]
    exact = density.gram(x[None], 1.0)
    single = x.astype(np.float32)
    norms = np.sum(single * single, axis=1)
    plain = np.exp((norms[:, None] + norms[None] - 2 * single @ single.T) / np.float32(-2)).astype(np.float64)
    best, least = mmd.greedy_order(exact, sizes, count)
    line = {}
    for name, kernel in (("float32", density.gram(x[None], 1.0, "float32")), ("plain_float32", plain[None])):
        picks, _ = mmd.greedy_order(kernel, sizes, count)
        value = mmd.discrepancies(exact, sizes, picks[:, :count])[0, -1]
        equal = len(np.intersect1d(picks[0, :count], best[0, :count])) / count
        line[name] = {"equal_picks": round(equal, 6), "mmd2_ratio": round(float(value / least[0, count - 1]), 6)}
    line |= {"density": float(density.density(exact, sizes, True)[0]), "width": keys.width, "spread": keys.spread}
    return line | {name: getattr(keys, name) for name in ("rows", "fraction", "seed")} | {"picks": count}


def speed(keys) -> dict:
    """Seconds and ratios of a cluster's picks."""
    count = int(keys.fraction * keys.rows)
    kernels = density.gram(np.stack([draw(keys.rows, 64, keys.seed + i) for i in range(keys.clusters)]), 1.0)
    on_host = np.asarray(kernels)
    first, first_seconds = timed(ours, kernels, None)
    ours(kernels, count)
    seconds = {"ours": [], "ours_picks_only": [], "numpy_running_sum": [], "peer": []}
    for number in range(keys.rounds):
        for name, limit in (("ours", None), ("ours_picks_only", count)):
            own, own_seconds = timed(ours, kernels, limit)
            assert np.array_equal(own[:, :count], first[:, :count])
            seconds[name].append(own_seconds / keys.clusters)
        picks, running_seconds = timed(running, on_host, count)
        assert picks == first[:, :count].tolist(), "the picks of the running sum differ"
        seconds["numpy_running_sum"].append(running_seconds / keys.clusters)
        cluster = number % keys.clusters
        theirs, peer_seconds = timed(peer, on_host[cluster], count)
        assert theirs == first[cluster, :count].tolist(), f"the picks differ: {first[cluster, :count]} and {theirs}"
        seconds["peer"].append(peer_seconds)

    def ratios(name: str) -> list[float]:
        return [theirs / own for theirs, own in zip(seconds["peer"], seconds[name], strict=True)]

    return {
        **{name: getattr(keys, name) for name in ("rows", "fraction", "clusters", "rounds", "seed")},
        "picks": count,
        "identical_picks": True,
        "seconds_a_cluster": {name: round(statistics.median(values), 6) for name, values in seconds.items()},
        "first_call_seconds": round(first_seconds, 3),
        # peer / ours: above 1 ours is faster
        "speed_ratio": round(statistics.median(ratios("ours")), 1),
        "speed_ratio_range": [round(min(ratios("ours")), 1), round(max(ratios("ours")), 1)],
        "speed_ratio_picks_only": round(statistics.median(ratios("ours_picks_only")), 1),
        "speed_ratio_numpy_running_sum": round(statistics.median(ratios("numpy_running_sum")), 1),
    }


def main() -> None:
    """Makes the Gram matrices, runs the rounds, compares the picks, prints the line."""
    parser = record.arguments("Greedy MMD against the published procedure; one JSON line.")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--fraction", type=float, default=0.2)
    parser.add_argument("--clusters", type=int, default=16, help="of one call of ours")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gram", action="store_true", help="what a float32 Gram costs, instead of speed")
    parser.add_argument("--width", type=int, default=2048, help="with --gram")
    parser.add_argument("--spread", type=float, default=0.3, help="with --gram")
    keys = parser.parse_args()
    if keys.gram:
        record.emit("mmd_gram", precision(keys), keys)
    else:
        record.emit("mmd", {"peer": PEER} | speed(keys), keys)


if __name__ == "__main__":
    main()
