"""Files that stages leave for each other: whole or not at all; and how the feature store lies on disk.

It is zarr v3 written by TensorStore: float16 `[N, D]`, one shard per block of rows, crc32c on every chunk. A missing
shard or a flipped bit raises; it is never read as zeros. `core/store.py` reads and writes it by rows.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorstore as ts

from coincide_jax.core import processes
from coincide_jax.core.errors import UserError

SHARD_ROWS = 4096
CHUNK_ROWS = 256
HASHED_BYTES = 2 << 30  # what comes from outside is hashed up to this size


@contextlib.contextmanager
def atomic(path: pathlib.Path, *, each: bool = False) -> Iterator[pathlib.Path]:
    """Yields a temporary name beside `path`; what was written there takes the name `path` when the block ends well.
    Of several processes only the one that leads has a name to write to, the others write what is thrown away; with
    `each` every process writes a file of its own.

    Raises:
      UserError: it cannot be written, for want of room or of rights; nothing of it stays.
    """
    path = pathlib.Path(path)
    if not (each or processes.leads()):
        with tempfile.TemporaryDirectory() as folder:
            yield pathlib.Path(folder) / path.name
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # where its folder could not be made
                temporary.unlink()
        if _of_writing(error, path):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{path} cannot be written: {reason}") from error
        raise


def _once(write: Callable) -> Callable:
    """Of several processes only the one that leads runs `write`, which returns nothing."""

    @functools.wraps(write)
    def one(*arguments, **more) -> None:
        if processes.leads():
            write(*arguments, **more)

    return one


def _of_writing(error: BaseException, path: pathlib.Path) -> bool:
    """Whether an error comes of writing `path`: one of the system that names no file elsewhere. safetensors and
    tokenizers raise exceptions of other types, with the system's number in the text."""
    if isinstance(error, OSError):
        return error.filename is None or pathlib.Path(str(error.filename)).is_relative_to(path.parent)
    return "(os error " in str(error) and not isinstance(error, UserError)


@_once
def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file whole."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: pathlib.Path, value, indent: int | None = 1) -> None:
    """Writes a JSON file whole."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_jsonl(path: pathlib.Path, rows: Sequence[dict]) -> None:
    """Writes a JSON-lines file whole."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: pathlib.Path):
    """Reads a JSON file that a stage wrote; raises `UserError` with line and column if it is cut or edited wrongly."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error


def read_jsonl(path: pathlib.Path) -> list[dict]:
    """Reads a JSON-lines file that a stage wrote."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


@_once
def append_jsonl(path: pathlib.Path, lines: Sequence[dict]) -> None:
    """Adds lines to a JSON-lines file, on disk when it returns.

    Raises:
      UserError: they cannot be written; half a line may stay, which readers leave out.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


@_once
def cut_jsonl(path: pathlib.Path, keep: Callable[[dict], bool]) -> None:
    """Drops the lines of a JSON-lines file that `keep` refuses, and a last line cut short by a kill."""
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    write_text(path, "".join(line for line in whole if keep(json.loads(line))))


class _Written(NamedTuple):
    """A file of which NumPy knows `write` alone: to a real one it writes by a buffer of its own, and where the disk is
    full the end of an array is lost without an error."""

    write: Callable[[bytes], int]


@_once
def write_npy(path: pathlib.Path, array: np.ndarray) -> None:
    """Writes a .npy file whole."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(_Written(file.write), array)


@_once
def write_parquet(path: pathlib.Path, columns: dict[str, Sequence]) -> None:
    """Writes columns of equal length as one parquet file, whole."""
    with atomic(path) as temporary:
        pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), temporary)


def read_parquet(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads a parquet file as `{column: array}`."""
    table = pq.read_table(path)
    return {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}


@_once
def remove(path: pathlib.Path) -> None:
    """Deletes a file if it is there."""
    path.unlink(missing_ok=True)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file, or of a folder's file names and contents in sorted order."""
    path = pathlib.Path(path)
    sha = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            sha.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as handle:
            while block := handle.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


def identity(path: pathlib.Path) -> str:
    """What tells a file or folder from outside from another one: a model folder by its fingerprints, up to 2 GiB by
    content, beyond that by names, sizes and times, since reading it in every run would take minutes."""
    path = pathlib.Path(path)
    if (path / "fingerprints.json").is_file():
        return digest(path / "fingerprints.json")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    states = [(str(file.relative_to(path)), file.stat()) for file in files]
    if sum(state.st_size for _, state in states) <= HASHED_BYTES:
        return digest(path)
    listed = [(name, state.st_size, state.st_mtime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def zarr_spec(path: pathlib.Path) -> dict:
    """The TensorStore specification of a feature store."""
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(pathlib.Path(path).absolute()) + "/"},
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def create_features(path: pathlib.Path, rows: int, width: int) -> ts.TensorStore:
    """Creates, or reopens to go on with, a float16 `[rows, width]` store; a shard is written whole by one writer."""
    metadata = {
        "shape": [rows, width],
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [SHARD_ROWS, width]}},
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [CHUNK_ROWS, width],
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                },
            }
        ],
    }
    return ts.open(zarr_spec(path) | {"metadata": metadata}, create=True, open=True).result()
