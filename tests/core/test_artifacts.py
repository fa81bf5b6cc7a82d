"""Files whole or not at all; a feature store that never reads damage as zeros."""

import subprocess
import sys

import numpy as np
import pytest

from coincide_jax.core import artifacts
from coincide_jax.core import store as stores
from coincide_jax.core.errors import UserError, unknown


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of three shards and the rows in it; the second shard is all zeros, as of records left out."""
    monkeypatch.setattr(artifacts, "SHARD_ROWS", 8)
    monkeypatch.setattr(artifacts, "CHUNK_ROWS", 4)
    rows = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float16)
    rows[8:16] = 0
    path = tmp_path / "features.zarr"
    opened = artifacts.create_features(path, 20, 6)
    for begin in range(0, 20, 8):
        opened[begin : begin + 8 if begin < 16 else 20].write(rows[begin : begin + 8]).result()
    return path, rows


def shards(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")


def test_rows_come_back(store):
    path, rows = store
    assert len(shards(path)) == 3
    np.testing.assert_array_equal(stores.open_features(path)[:], rows)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_missing_shard_is_an_error(store, shard):
    shards(store[0])[shard].unlink()
    with pytest.raises(UserError, match=r"features\.zarr"):
        stores.open_features(store[0])[:]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_a_flipped_bit_is_an_error(store, shard):
    file = shards(store[0])[shard]
    data = bytearray(file.read_bytes())
    data[5] ^= 4
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"features\.zarr"):
        stores.open_features(store[0])[:]


def test_npy_is_the_same_thing(tmp_path):
    array = np.ones((3, 2), np.float16)
    artifacts.write_npy(tmp_path / "a.npy", array)
    np.testing.assert_array_equal(stores.open_features(tmp_path / "a.npy")[:], array)
    artifacts.write_npy(tmp_path / "b.npy", array[0])
    with pytest.raises(UserError, match="shape"):
        stores.open_features(tmp_path / "b.npy")[:]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    artifacts.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        artifacts.write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), artifacts.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert artifacts.read_json(path) == {"a": 1} and len(list(tmp_path.iterdir())) == 1


def test_broken_json_names_line_and_column(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(UserError, match="line 2, column 7"):
        artifacts.read_json(tmp_path / "x.json")


def test_unknown_names_the_nearest():
    assert str(unknown("stage", "clustr", ("cluster", "select"))) == "unknown stage 'clustr'; did you mean 'cluster'?"
    assert "cluster, select" in str(unknown("stage", "zzz", ("cluster", "select")))


def test_an_error_of_another_file_is_not_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError), artifacts.atomic(tmp_path / "a"):
        (tmp_path.parent / "nowhere" / "b").read_text()
    with pytest.raises(UserError, match="a/b cannot be written: File exists"):
        (tmp_path / "a").write_text("")
        artifacts.write_text(tmp_path / "a" / "b", "")
    with pytest.raises(UserError, match="a cannot be written: "):
        (tmp_path / "c").mkdir()
        artifacts.write_json(tmp_path / "c" / "d", 1)
        with artifacts.atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise OSError("no room")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c"] and (tmp_path / "a").read_text() == ""


def test_arrays_of_every_layout_come_back(tmp_path):
    whole = np.arange(60, dtype=np.int32).reshape(6, 10)
    for array in (whole, whole[::2, 1::3], np.asfortranarray(whole), whole[:0], whole[2, 3]):
        artifacts.write_npy(tmp_path / "a.npy", array)
        found = np.load(tmp_path / "a.npy")
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


RUST = """
import pathlib, resource, sys
import numpy as np
from safetensors.numpy import save_file
from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError

resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
try:
    with artifacts.atomic(pathlib.Path(sys.argv[1]) / "model.safetensors") as temporary:
        save_file({"a": np.zeros(4000, np.float32)}, temporary)
except UserError as error:
    print(error)
"""


def test_no_room_for_weights_is_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, "-c", RUST, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith(f"{tmp_path}/model.safetensors cannot be written: "), done.stderr
    assert "File too large" in done.stdout and not list(tmp_path.iterdir())
