"""The feature store: float16 `[N, D]` on disk, written shard by shard and read by row slices in bounded memory.

On disk it is zarr v3 written by TensorStore: one shard for every `artifacts.SHARD_ROWS` rows, crc32c on every chunk, no
compression (features barely compress). `<store>/finished/<first row>.json` is written after a shard and makes the
manifest of finished shards; `<store>/writing/<first row>.lock` is held (flock, which dies with its process) while a
shard is written. So several processes write disjoint shards, a killed writer goes on at the first unfinished one, and a
reader tells what is missing from what is damaged and from what is under way. Nothing missing is ever read as zeros.

`.npy` files (the authors' `tan_act.npy` included) are read through a memory map by the same interface, and a zarr store
without `finished/`, made by another program, by its checksums alone.
"""

import contextlib
import fcntl
import itertools
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorstore as ts

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError

FINISHED, WRITING = "finished", "writing"
IN_WORK = 16 << 20  # bytes of chunks that one read of scattered rows has decoded at a time


class Features:
    """Rows of a feature file `[N, D]`: `shape`, `dtype`, `len`, and `features[a:b]` or `features[rows]` as NumPy.

    Nothing is kept in memory but what was asked for.
    """

    def __init__(self, path: pathlib.Path, array):
        self.path, self._array = pathlib.Path(path), array
        self.shape = tuple(int(size) for size in array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype if isinstance(array, ts.TensorStore) else array.dtype)

    @property
    def mapped(self) -> bool:
        """Whether a row is read alone, from a memory map; else whole chunks are decoded for it."""
        return isinstance(self._array, np.ndarray)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows) -> np.ndarray:
        """`f[n, D]` for a slice of step 1 or an array of row numbers (or a mask); raises `UserError` for damage."""
        if self.mapped:
            return np.array(self._array[rows])
        if isinstance(rows, slice):
            begin, end, step = rows.indices(len(self))
            if step != 1:
                raise IndexError(f"features are read by slices of step 1, not {step}")
            return self._read(self._array[begin : max(begin, end)])
        rows = np.asarray(rows)
        return self._scattered(np.flatnonzero(rows) if rows.dtype == bool else rows)

    def _scattered(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers. TensorStore decodes every chunk that a request touches at once, a chunk for each row
        at worst (at full width 10 MiB for 40 KiB), so a request is cut where its chunks are `IN_WORK` bytes."""
        out, order = np.empty((len(rows), self.shape[1]), self.dtype), np.argsort(rows, kind="stable")
        height = self._array.chunk_layout.read_chunk.shape[0]
        most = max(IN_WORK // (height * self.shape[1] * self.dtype.itemsize), 1)
        _, firsts = np.unique(rows[order] // height, return_index=True)
        for begin, end in itertools.pairwise([*firsts[::most], len(rows)]):
            part = order[begin:end]
            out[part] = self._read(self._array.vindex[rows[part], :])
        return out

    def _read(self, part: ts.TensorStore) -> np.ndarray:
        try:
            return part.read().result()
        except (ValueError, OSError) as error:
            raise UserError(f"features {self.path} cannot be read: {_reason(error)}") from error


class Rows:
    """A view of some rows of features, ascending, by the same interface: record numbers stay out of the kernels."""

    def __init__(self, features, rows: np.ndarray):
        self.features, self.rows = features, np.asarray(rows)
        self.shape, self.dtype = (len(self.rows), features.shape[1]), features.dtype

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        rows = self.rows[index]
        if not isinstance(index, slice) or len(rows) == 0 or rows[-1] - rows[0] >= 2 * len(rows) + 64:
            return self.features[rows]
        part = self.features[int(rows[0]) : int(rows[-1]) + 1]  # near together: one read instead of many
        return part if len(part) == len(rows) else part[rows - rows[0]]


class Writer:
    """A store under way. `write` takes whole shards, in any order and from any process that was given them."""

    def __init__(self, path: pathlib.Path, rows: int, width: int):
        self.path, self.shape = pathlib.Path(path), (rows, width)
        with _told(self.path):
            self._array = artifacts.create_features(self.path, rows, width)
        self.shard_rows = self._array.chunk_layout.write_chunk.shape[0]

    @property
    def shards(self) -> range:
        """First rows of all shards."""
        return range(0, self.shape[0], self.shard_rows)

    def finished(self, first: int) -> bool:
        """Whether the shard that begins with row `first` is on disk, whole."""
        return _mark(self.path, first).exists()

    def write(self, first: int, block: np.ndarray) -> None:
        """Writes the shard that begins with row `first` and enters it in the manifest.

        Raises:
          UserError: the block is not that shard's shape, another process is writing it, the disk is full.
        """
        expected = (min(self.shard_rows, self.shape[0] - first), self.shape[1])
        if first not in self.shards or block.shape != expected:
            raise UserError(
                f"features {self.path}: a block of shape {block.shape} at row {first}; expected {expected} at a "
                f"multiple of {self.shard_rows}"
            )
        with _told(self.path), _lock(self.path, first):
            _mark(self.path, first).unlink(missing_ok=True)
            self._array[first : first + len(block)].write(np.asarray(block, np.float16)).result()
            with artifacts.atomic(_mark(self.path, first), each=True) as temporary:
                temporary.write_text(json.dumps({"first": first, "rows": len(block)}), encoding="utf-8")


def create(path: pathlib.Path, rows: int, width: int) -> Writer:
    """Creates a store, or reopens one to go on with it.

    Raises:
      UserError: a store of another shape is there, or nothing can be written.
    """
    writer = Writer(path, rows, width)
    (writer.path / FINISHED).mkdir(exist_ok=True)
    return writer


def open_features(path: pathlib.Path) -> Features:
    """Opens a zarr store or a .npy file for reading by rows.

    Raises:
      UserError: missing, not two-dimensional numbers, a shard missing, or still being written by another process.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"features {path} do not exist")
    try:
        if path.suffix == ".npy":
            array = np.load(path, mmap_mode="r")
        else:
            array = ts.open(artifacts.zarr_spec(path), read=True, write=False).result()
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"features {path} cannot be read: {_reason(error)}") from error
    if array.ndim != 2:
        raise UserError(f"features {path} have shape {tuple(array.shape)}; expected [records, width]")
    features = Features(path, array)
    if features.dtype.kind != "f":
        raise UserError(f"features {path} are of type {features.dtype}; expected floating-point numbers")
    if (path / FINISHED).is_dir():
        _complete(path, len(features), array.chunk_layout.write_chunk.shape[0])
    return features


def _complete(path: pathlib.Path, rows: int, shard_rows: int) -> None:
    """Raises `UserError` for the first shard that is not finished."""
    for first in range(0, rows, shard_rows):
        if _mark(path, first).exists():
            continue
        where = f"rows {first} to {min(first + shard_rows, rows) - 1}"
        if holder := _holder(path):
            raise UserError(f"features {path} are being written by process {holder}; {where} are not finished")
        raise UserError(f"features {path} are not finished: {where} were never written; let their stage end first")


def _mark(path: pathlib.Path, first: int) -> pathlib.Path:
    return path / FINISHED / f"{first:012d}.json"


def _holder(path: pathlib.Path) -> str:
    """The number of a living process that writes some shard; empty if there is none."""
    for file in sorted((path / WRITING).glob("*.lock")):
        with open(file, encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return handle.read().strip() or "?"
    return ""


@contextlib.contextmanager
def _lock(path: pathlib.Path, first: int) -> Iterator[None]:
    """Holds the shard for this process."""
    file = path / WRITING / f"{first:012d}.lock"
    file.parent.mkdir(exist_ok=True)
    with open(file, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "?"
            raise UserError(
                f"features {path}: the shard at row {first} is being written by process {holder}"
            ) from error
        if os.fstat(handle.fileno()).st_nlink == 0:  # its holder ended and took it away in between
            raise UserError(f"features {path}: the shard at row {first} was just written by another process")
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def _told(path: pathlib.Path) -> Iterator[None]:
    """Turns what goes wrong in writing into one sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UserError(f"features {path} cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The telling part of an error's message."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split(" [source locations")[0][:300]
