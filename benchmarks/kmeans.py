"""Spherical k-means of `coincide_jax.kernels.kmeans` against faiss and scikit-learn; prints one JSON line.

    python -m benchmarks.kmeans [--rows N] [--width D] [--clusters K] [--iterations T] [--rounds R] [--seed S]
        [--peer faiss|faiss-0.1%|super|sklearn] [--mode exact|sketch] [--rank R] [--decay A]
    python -m benchmarks.kmeans --share [--rows …]
    python -m benchmarks.kmeans --device [--rows 665000 --width 20480 --clusters 10000 --iterations 3]

All run on the same unit rows (float16 numbers) from the same initial centroids, on the same cores, and do not sample
rows. `faiss` is `Kmeans(spherical=True)` run to convergence; `faiss-0.1%` the same stopped at the first iteration whose
objective is within 0.1 % of the converged one (found beforehand, untimed); `super` its `use_super_kmeans` on squared
distances, which on unit rows assign alike; `sklearn` its Lloyd, on squared distances too. Rounds are interleaved pairs
in one process, each with fresh rows and every other one begun by the peer; a first pair, untimed in the medians, holds
the compilation. The objective is the mean cosine of the rows to the nearest of the final centroids, by one float64
function for both.

With `--share` one pass over the rows, from stored rows to exact labels, meets the product alone by NumPy.

With `--device` nothing is compared: rows are made on the devices and never leave them; told are the seconds of each
iteration and the share of the half-precision matmul rate measured in the same process.
"""

import importlib.metadata
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from coincide_jax.cluster.centres import POLISH
from coincide_jax.core import axes
from coincide_jax.kernels import kmeans
from coincide_jax.kernels.kmeans import sketch, sweep, tiles

PEERS = {
    "faiss": "faiss {} Kmeans(spherical=True), run to convergence, no sampling of rows",
    "faiss-0.1%": "faiss {} Kmeans(spherical=True), stopped within 0.1 % of convergence, no sampling",
    "super": "faiss {} Kmeans(use_super_kmeans=True) on L2, run to convergence, no sampling of rows",
    "sklearn": "scikit-learn KMeans(algorithm='lloyd', tol=0), run to convergence",
}


def draw(rows: int, width: int, kinds: int, seed: int, decay: float = 0.0) -> np.ndarray:
    """Unit rows float16[N, D] around `kinds` directions of uneven weight, as activation features are stored; the i-th
    coordinate of all is scaled by i^-decay, so that the spectrum falls off as that of activations does."""
    rng = np.random.default_rng(seed)
    share = rng.lognormal(size=kinds)
    kind = rng.choice(kinds, rows, p=share / share.sum())
    x = rng.standard_normal((kinds, width), np.float32)[kind]
    x += rng.standard_normal((rows, width), np.float32)
    x *= np.arange(1, width + 1, dtype=np.float32) ** np.float32(-decay)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def ours(x: np.ndarray, init: np.ndarray, keys) -> tuple[np.ndarray, int]:
    """Centroids f32[K, D] and iterations run."""
    settings = {"seed": 0, "iterations": keys.iterations, "chunk": 4096}
    if keys.mode == "exact":
        found = kmeans.fit(x, len(init), init=init, **settings)
        return found.centroids, found.iterations
    rows = kmeans.lay_out(x, len(init), settings["chunk"])
    first, told = sketch.start(x, len(init), rank=keys.rank, init=init, source=rows, **settings)
    keys.energy = told["energy"]
    found = kmeans.fit(x, len(init), init=init if first is None else first, tolerance=POLISH, tiles=rows, **settings)
    return found.centroids, found.iterations


def peer(x: np.ndarray, init: np.ndarray, keys, iterations: int) -> tuple[np.ndarray, int]:
    """The same by the peer, on float32 rows."""
    if keys.peer == "sklearn":
        from sklearn.cluster import KMeans

        model = KMeans(len(init), init=init, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)
        return model.cluster_centers_, model.n_iter_
    import faiss  # not where rows are made on devices and no peer is asked

    more = {"use_super_kmeans": True} if keys.peer == "super" else {"spherical": True}
    model = faiss.Kmeans(x.shape[1], len(init), niter=iterations, max_points_per_centroid=len(x), nredo=1, **more)
    model.train(x, init_centroids=init)
    return model.centroids, len(model.obj)


def stop_at(wide: np.ndarray, init: np.ndarray, keys) -> int:
    """Iterations that faiss needs to within 0.1 % of where it converges; the limit for other peers."""
    if keys.peer != "faiss-0.1%":
        return keys.iterations
    import faiss

    model = faiss.Kmeans(wide.shape[1], len(init), niter=keys.iterations, spherical=True,
                         max_points_per_centroid=len(wide))  # fmt: skip
    model.train(wide, init_centroids=init)
    return int(np.argmax(model.obj >= model.obj[-1] * 0.999)) + 1


def objective(x: np.ndarray, centroids: np.ndarray, block: int = 4096) -> float:
    """Mean cosine of unit rows to their nearest centroid."""
    wide = centroids.astype(np.float64)
    wide /= np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-30)
    best = [(x[i : i + block].astype(np.float64) @ wide.T).max(axis=1) for i in range(0, len(x), block)]
    return float(np.concatenate(best).mean())


def timed(function, *arguments):
    """What the function returns, and its seconds."""
    begin = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - begin


def pair(keys, number: int) -> dict:
    """One pair on fresh rows: {name: (centroids, iterations, seconds, objective)}."""
    x = draw(keys.rows, keys.width, 2 * keys.clusters, keys.seed + number, keys.decay)
    wide = x.astype(np.float32)
    start = wide[np.random.default_rng(keys.seed + number + 1).choice(keys.rows, keys.clusters, replace=False)]
    init = start / np.linalg.norm(start, axis=1, keepdims=True)
    runs = {"ours": (ours, x, init, keys), "peer": (peer, wide, init, keys, stop_at(wide, init, keys))}
    found = {}
    for name in sorted(runs, reverse=number % 2 == 1):
        (centroids, iterations), seconds = timed(*runs[name])
        found[name] = iterations, seconds, objective(wide, centroids)
    return found


class OnDevices:
    """Rows that are made where they lie: uneven directions and noise, by the row's tile."""

    def __init__(self, rows: int, width: int, kinds: int, seed: int):
        self.shape, self.dtype, self.kinds, self.seed = (rows, width), np.dtype(np.float16), kinds, seed
        self.held: dict = {}

    def __len__(self) -> int:
        return self.shape[0]

    def on_devices(self, first: int, count: int, sharding) -> jax.Array:
        """The tile of `count` rows that begins with row `first`: f16[C, D]; rows after the last are zeros."""
        mesh, shared, local = sharding.mesh, sharding.spec[0], sharding.shard_shape((count, 1))[0]

        def make(first):
            key = jax.random.fold_in(jax.random.key(self.seed), first)
            key = jax.random.fold_in(key, jax.lax.axis_index(shared))
            kind = jax.random.randint(key, (local,), 0, self.kinds)
            centre = jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(jax.random.key(self.seed), k),
                                                          (self.shape[1],), jnp.float16))(kind)  # fmt: skip
            x = centre + jax.random.normal(key, (local, self.shape[1]), jnp.float16)
            wide = x.astype(jnp.float32)
            wide = wide / jnp.sqrt(jnp.sum(wide * wide, axis=1, keepdims=True))
            row = first + jax.lax.axis_index(shared) * local + jnp.arange(local)
            return jnp.where((row < self.shape[0])[:, None], wide, 0.0).astype(jnp.float16)

        if count not in self.held:
            self.held[count] = jax.jit(
                jax.shard_map(make, mesh=mesh, in_specs=jax.P(), out_specs=sharding.spec, check_vma=False)
            )
        whole = jax.NamedSharding(mesh, jax.P())
        return self.held[count](jax.device_put(np.int32(first), whole))

    def __getitem__(self, rows) -> np.ndarray:
        """Single rows are drawn anew: they only restart empty clusters."""
        count = len(range(*rows.indices(len(self)))) if isinstance(rows, slice) else len(rows)
        return draw(count, self.shape[1], 8, self.seed)


def peak(dtype, size: int = 8192) -> float:
    """Rate of a square matrix product of `dtype` with float32 accumulation, FLOP/s, on one device."""
    x = jax.device_put(jnp.ones((size, size), dtype), jax.devices()[0])
    product = jax.jit(lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    times = [timed(lambda: product(x).block_until_ready())[1] for _ in range(5)]
    return 2.0 * size**3 / min(times)


def on_devices(keys) -> dict:
    """Seconds of each iteration on rows made on the devices, from centroids drawn alike."""
    dtype = tiles.fast_dtype()
    rate = peak(dtype, 8192 if jax.devices()[0].platform != "cpu" else 512)
    bf16 = peak(jnp.bfloat16, 8192 if jax.devices()[0].platform != "cpu" else 512)
    features = OnDevices(keys.rows, keys.width, 2 * keys.clusters, keys.seed)
    init = draw(keys.clusters, keys.width, 2 * keys.clusters, keys.seed + 1)
    with jax.set_mesh(axes.make_mesh()):
        settings = {"seed": 0, "chunk": 8192, "init": init}
        kmeans.fit(features, keys.clusters, iterations=2, **settings)  # compiles
        found, whole = timed(lambda: kmeans.fit(features, keys.clusters, iterations=keys.iterations, **settings))
    flops = 2.0 * keys.rows * keys.width * keys.clusters
    full = flops / float(found.seconds[0]) / jax.device_count()
    return {
        "product": str(dtype),
        "resident": found.resident,
        "seconds_in_all": round(whole, 3),  # with making the rows and measuring their lengths
        "seconds": np.round(found.seconds, 4).tolist(),
        "work": np.round(found.work, 4).tolist(),
        "objective": found.objective.tolist(),
        "peak_flops": {"product": rate, "bfloat16": bf16},
        "share_of_peak_first": round(full / bf16, 4),  # an iteration in which every row meets every centroid
        "share_of_peak_median": round(flops / float(np.median(found.seconds)) / jax.device_count() / bf16, 4),
    }


def compare(keys) -> dict:
    """The rounds."""
    with jax.set_mesh(axes.make_mesh()):
        first, rounds = pair(keys, 0), [pair(keys, number + 1) for number in range(keys.rounds)]
    ratios = [found["peer"][1] / found["ours"][1] for found in rounds]
    middle = {
        name: [statistics.median(found[name][place] for found in rounds) for place in range(3)]
        for name in ("ours", "peer")
    }
    qualities = [found["ours"][2] / found["peer"][2] for found in rounds]
    return {
        "peer": PEERS[keys.peer].format(importlib.metadata.version("faiss-cpu")),
        "mode": keys.mode,
        **({"rank": keys.rank, "energy": round(keys.energy, 4)} if keys.mode == "sketch" else {}),
        "iterations": {name: values[0] for name, values in middle.items()} | {"limit": keys.iterations},
        "seconds": {name: round(values[1], 3) for name, values in middle.items()},
        "first_call_seconds": {name: round(values[1], 3) for name, values in first.items()},
        "speed_ratio": round(statistics.median(ratios), 3),  # peer / ours: above 1 ours is faster
        "speed_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "objective": {name: values[2] for name, values in middle.items()},
        "objective_ratio": round(statistics.median(qualities), 6),  # ours / peer: above 1 ours is tighter
        "objective_ratio_range": [round(min(qualities), 6), round(max(qualities), 6)],
    }


def pass_share(keys) -> dict:
    """Speed of the third iteration's pass, in which every row meets every centroid (labels exact, rechecks included),
    as a share of NumPy's float32 product."""
    x = draw(keys.rows, keys.width, 2 * keys.clusters, keys.seed, keys.decay)
    wide, size = x.astype(np.float32), 4096
    seconds, passes = {"numpy": []}, {}
    with jax.set_mesh(axes.make_mesh()):
        centroids = kmeans.fit(x, keys.clusters, seed=keys.seed, iterations=2, chunk=size).centroids
        for product in ("float32", "bfloat16"):
            held = tiles.Tiles(x, keys.clusters, size, jnp.dtype(product))
            sweeper, there = sweep.Sweeper(held, keys.clusters), held.spread(centroids)
            passes[product] = lambda s=sweeper, c=there: s.run(c, None, with_sums=False)
            passes[product]()
            seconds[product] = []
        for number in range(keys.rounds):
            for name in sorted(seconds, reverse=number % 2 == 1):
                begin = time.perf_counter()
                if name == "numpy":
                    for start in range(0, keys.rows, size):
                        wide[start : start + size] @ centroids.T
                else:
                    passes[name]()
                seconds[name].append(time.perf_counter() - begin)
    found = {"peer": f"NumPy {np.__version__} float32 products alone, in blocks of {size} rows"}
    for product in ("float32", "bfloat16"):
        share = [a / b for a, b in zip(seconds["numpy"], seconds[product], strict=True)]
        found[product] = [round(value, 3) for value in (statistics.median(share), min(share), max(share))]
    flops = 2.0 * keys.rows * keys.width * keys.clusters / 1e9
    return found | {"gflops": {name: round(flops / statistics.median(s), 1) for name, s in seconds.items()}}


def main() -> None:
    """Reads the arguments, runs, prints the line."""
    parser = record.arguments("Spherical k-means against its peers; one JSON line.")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--iterations", type=int, default=100, help="at most; all stop earlier when nothing moves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer", choices=PEERS, default="faiss")
    parser.add_argument("--mode", choices=("exact", "sketch"), default="exact")
    parser.add_argument("--decay", type=float, default=0.0, help="of the rows' spectrum")
    parser.add_argument("--rank", type=int, default=256, help="directions of the sketch")
    parser.add_argument("--device", action="store_true", help="no peer: rows made on the devices")
    parser.add_argument("--share", action="store_true", help="one pass against NumPy's float32 product")
    keys = parser.parse_args()
    sizes = {name: getattr(keys, name) for name in ("rows", "width", "clusters", "decay", "rounds", "seed")}
    if keys.device:
        record.emit("kmeans on devices", on_devices(keys) | sizes, keys)
    elif keys.share:
        record.emit("kmeans pass", pass_share(keys) | sizes, keys)
    else:
        record.emit("kmeans", compare(keys) | sizes, keys)


if __name__ == "__main__":
    main()
