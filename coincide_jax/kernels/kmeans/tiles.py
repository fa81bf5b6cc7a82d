"""The rows on the devices, a tile at a time: kept there when they fit, else read anew in every pass."""

import concurrent.futures
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from coincide_jax.kernels.kmeans import products, sums
from coincide_jax.kernels.kmeans.exact import LARGEST, grid

CENTROID_BYTES = 80  # on a device for each number of the centroids it has, at most (`kmeans` says of what)
SPLIT = 0.25  # of a device's memory: what takes more for the centroids has them shared by the mesh axis 'model'
CPU_MEMORY = 4 << 30  # bytes for features on CPUs, where there is no device memory to ask for
GATHERED = 64 << 20  # bytes of shared centroids that are brought to every device at a time, on their way to the host
SIZES = (128, 512)  # rows a device of one call for chosen rows


# told of a pass over the rows: what is counted, how many are done (0 before the first), of how many
OnTile = Callable[[str, int, int], None]


class RowError(ValueError):
    """A row that cannot be clustered; `row` is its number."""

    def __init__(self, row: int, what: str):
        super().__init__(f"row {row} {what}")
        self.row, self.what = row, what


@functools.cache
def fast_dtype(choice: str = "auto"):
    """The type of fast products: float16 on GPUs, bfloat16 on TPUs and on processors that multiply it (Linux says so),
    else float32."""
    if choice != "auto":
        return jnp.dtype(choice)
    platform = jax.devices()[0].platform
    if platform != "cpu":
        return jnp.dtype(jnp.bfloat16 if platform == "tpu" else jnp.float16)
    told = pathlib.Path("/proc/cpuinfo")
    flags = set(told.read_text(encoding="utf-8").split()) if told.exists() else set()
    return jnp.dtype(jnp.bfloat16 if _least(bool(flags & {"avx512_bf16", "amx_bf16"})) else jnp.float32)


def _least(number: int) -> int:
    """The least of what the processes found, below 2^31: they cut rows alike, and run the same programs."""
    if jax.process_count() == 1:
        return number
    return int(np.min(multihost_utils.process_allgather(np.int32(number))))


def device_limit() -> int:
    """Bytes of memory of a device, the smallest of all processes'; what is taken for it on CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return _least(stats.get("bytes_limit", CPU_MEMORY) >> 20) << 20


def parts(wide: int, k: int, width: int, limit: float, split: bool | None = None) -> int:
    """How many devices share the clusters, 1 = each has all: the `wide` of the mesh axis 'model' where one device of
    `limit` bytes had to give more than `SPLIT` of them to all clusters, or as `split` says."""
    if split is None:
        split = CENTROID_BYTES * k * width > SPLIT * limit
    return wide if split else 1


def device_memory(k: int, width: int) -> int:
    """Bytes for features on all devices: what the devices have, less 80 bytes for each number of the `k` centroids that
    a device has."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return CPU_MEMORY
    here = free(stats["bytes_limit"], stats.get("bytes_in_use", 0), k, width)
    return (_least(here >> 20) << 20) * jax.device_count()


def free(limit: float, used: float, k: int, width: int) -> int:
    """Bytes for features on one device that has `limit`, of which `used` are taken, and `k` centroids."""
    return int(max(0.9 * limit - used - CENTROID_BYTES * k * width, limit // 16))


class Tiling(NamedTuple):
    """How rows are cut: rows a device of a tile, rows of a tile over all devices, tiles, whether all are kept."""

    per: int
    chunk: int
    count: int
    resident: bool


def tiling(rows: int, width: int, k: int, chunk: int, shards: int, stored, fast, memory: float) -> Tiling:
    """Cuts `rows` of the type `stored`, with products in the type `fast`, for `memory` bytes on the `shards` devices
    that share them, each of which has `k` clusters."""
    row = row_bytes(width, stored, fast)
    # a tile in work: its rows three times over (two are on their way), and what is made of them
    chunk = max(min(chunk, rows, int(memory // 2) // (3 * row + work_bytes(width, k))), 1)
    per = -(-chunk // shards)
    chunk = per * shards
    count = -(-rows // chunk)
    return Tiling(per, chunk, count, count * chunk * row <= memory)


def row_bytes(width: int, stored, fast) -> int:
    """Bytes of a row on a device: as stored, and in the fast type where that is another."""
    stored, fast = jnp.dtype(stored), jnp.dtype(fast)
    return width * (stored.itemsize + (fast.itemsize if stored != fast else 0))


def work_bytes(width: int, k: int) -> int:
    """Bytes of what is made of a row: float64 in the first pass, scores."""
    return 24 * width + 16 * k


def put(array: np.ndarray, sharding) -> jax.Array:
    """A host array that every process has, on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def power_of_two(rows: np.ndarray, least: int = 8) -> np.ndarray:
    """Numbers i32[m] of rows, the last one repeated up to a power of two: so that few programs are compiled."""
    size = max(least, 1 << (len(rows) - 1).bit_length())
    return np.pad(rows, (0, size - len(rows)), mode="edge").astype(np.int32)


class Tiles:
    """`(x, fast)` of each tile of C rows: f16|f32[C, D] as stored, and the same in the type of fast products.

    Attributes:
      per: rows a device of a tile. chunk: rows of a tile over all devices, C. count: tiles. resident: kept?
      shards: devices that share the rows. split: as in `products`; parts: devices that share the clusters, 1 = each has
      all; clusters: how many a device has.
    """

    def __init__(
        self,
        features,
        k: int,
        chunk: int,
        dtype,
        memory: int = 0,
        on_tile: OnTile | None = None,
        split: bool | None = None,
    ):
        """`memory`: bytes for features on all devices; 0 = what they have free. `on_tile`: called by every pass.
        `split`: whether the clusters are shared; None: see `parts`."""
        mesh = jax.sharding.get_mesh()
        self.features, self.dtype, self.k = features, jnp.dtype(dtype), k
        self.rows, self.width = features.shape
        self.parts = parts(mesh.shape[products.SHARED], k, self.width, device_limit(), split)
        self.shards, self.clusters = mesh.size // self.parts, -(-k // self.parts)
        self.split = k if self.parts > 1 else 0
        specs = jax.P(products.row_axes(self.split)), products.cluster_axes(self.split), jax.P()
        self.by_rows, self.by_clusters, self.whole = (jax.NamedSharding(mesh, spec) for spec in specs)
        stored = jnp.dtype(jnp.float16 if features.dtype == np.float16 else jnp.float32)
        memory = memory or device_memory(self.clusters, self.width)
        cut = tiling(self.rows, self.width, self.clusters, chunk, self.shards, stored, self.dtype, memory / self.parts)
        self.per, self.chunk, self.count, self.resident = cut
        self.on_tile = on_tile or (lambda *_: None)
        self.kept: list = [None] * self.count
        self.measured: tuple[np.ndarray, np.ndarray] | None = None
        self._same = stored == self.dtype

    def spread(self, centroids: np.ndarray) -> jax.Array:
        """Centroids f32[K, D] on the devices, filled up with zeros where they are shared."""
        more = self.parts * self.clusters - len(centroids)
        return put(np.pad(centroids, ((0, more), (0, 0))) if more else centroids, self.by_clusters)

    def gather(self, centroids: jax.Array, chosen: np.ndarray | None = None) -> np.ndarray:
        """Centroids f32[K, D] of the devices on the host of every process, or the chosen ones of them."""
        if not self.split:
            return np.asarray(centroids) if chosen is None else np.asarray(centroids)[chosen]
        chosen = np.arange(self.k) if chosen is None else chosen
        out, most = np.empty((len(chosen), self.width), np.float32), max(GATHERED // (4 * self.width), 1)
        for begin in range(0, len(chosen), most):
            part = chosen[begin : begin + most]
            rows = put(power_of_two(part), self.whole)
            out[begin : begin + most] = np.asarray(products.take(centroids, rows, (products.SHARED,)))[: len(part)]
        return out

    def span(self, tile: int) -> tuple[int, int]:
        """First row of a tile and the row after its last."""
        return tile * self.chunk, min((tile + 1) * self.chunk, self.rows)

    def load(self, tile: int) -> jax.Array:
        """Reads a tile f[C, D] as stored; rows after the last are zeros."""
        first = tile * self.chunk
        if hasattr(self.features, "on_devices"):  # rows that are made on the devices
            x = self.features.on_devices(first, self.chunk, self.by_rows)
        else:
            held: dict = {}  # devices that share the clusters want the same rows

            def read(at: tuple) -> np.ndarray:
                begin, end, _ = at[0].indices(self.chunk)
                if (begin, end) not in held:
                    held[begin, end] = self._read(first + begin, first + end)
                return held[begin, end]

            x = jax.make_array_from_callback((self.chunk, self.width), self.by_rows, read)
        return x

    def _fast(self, x: jax.Array) -> jax.Array:
        return x if self._same else _cast(x, self.dtype)

    def _read(self, begin: int, end: int) -> np.ndarray:
        x = grid(self.features[begin : min(end, self.rows)]) if begin < self.rows else None
        if x is None:
            stored = np.float16 if self.features.dtype == np.float16 else np.float32
            return np.zeros((end - begin, self.width), stored)
        return np.pad(x, ((0, end - begin - len(x)), (0, 0)))

    def read(self, wanted: np.ndarray, what: str = "", turn: int = 0, turns: int = 1) -> Iterator[tuple]:
        """Yields (tile, x, fast) of the wanted tiles bool[count], the next one being read meanwhile.

        `what` is told of them, of so many turns of the like; nothing if it is empty.
        """
        order = np.flatnonzero(wanted)
        if what and turn == 0 and len(order):
            self.on_tile(what, 0, turns * len(order))
        for done, loaded in enumerate(self._loaded(order)):
            yield loaded
            if what:
                self.on_tile(what, turn * len(order) + done + 1, turns * len(order))

    def _loaded(self, order: np.ndarray) -> Iterator[tuple]:
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            # several processes start their programs in one order: the reader starts none
            cast_ahead = jax.process_count() == 1

            def load(tile: int) -> tuple:
                x = self.load(tile)
                return x, self._fast(x) if cast_ahead else None

            ahead = None
            for tile, following in itertools.zip_longest(map(int, order), map(int, order[1:])):
                x, fast = self.kept[tile] or (ahead.result() if ahead else load(tile))
                fast = self._fast(x) if fast is None else fast
                if self.resident:
                    self.kept[tile] = x, fast
                wanted = following is not None and self.kept[following] is None
                ahead = reader.submit(load, following) if wanted else None
                yield tile, x, fast

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Cuts rows of a tile, i[n], into calls: (places i[S·B] in `rows` or -1, rows within their device i32[S·B])."""
        queues = [np.flatnonzero(rows // self.per == shard) for shard in range(self.shards)]
        begin, longest = 0, max(len(queue) for queue in queues)
        while begin < longest:
            size = next((size for size in SIZES if size >= longest - begin), SIZES[-1])
            places = np.full((self.shards, size), -1)
            for shard, queue in enumerate(queues):
                part = queue[begin : begin + size]
                places[shard, : len(part)] = part
            places = places.ravel()
            yield places, np.where(places >= 0, rows[places] % self.per, 0).astype(np.int32)
            begin += size

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths f64[N] of the rows, and how much each loses in the cast to the fast type f64[N]; read once.

        Raises:
          RowError: a row that is not finite or holds a magnitude above 16.
        """
        if self.measured is not None:
            return self.measured
        norms, lost = np.zeros(self.rows), np.zeros(self.rows)
        for tile, x, fast in self.read(np.ones(self.count, bool), "tiles measured"):
            start, stop = self.span(tile)
            with jax.enable_x64(True):
                found = sums.inspect(x, fast, x.dtype != np.float16, self.split)
                if x.dtype == np.float16 and not np.max(jax.device_get(found[0])) < sums.EXACT:
                    found = sums.inspect(x, fast, True, self.split)
                length, cast, largest = jax.device_get(found)
            largest = largest[: stop - start]
            bad = np.flatnonzero(~(largest <= LARGEST))
            if len(bad):
                value = float(largest[bad[0]])
                what = f"holds a value of magnitude {value:g}" if np.isfinite(value) else "is not finite"
                raise RowError(start + int(bad[0]), what)
            norms[start:stop], lost[start:stop] = np.sqrt(length[: stop - start]), cast[: stop - start]
        self.measured = norms, lost
        return self.measured


# not a method: what refers to its Tiles would keep the features on the devices until the next garbage collection
_cast = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)
