"""The feature store: whole shards from several processes, and nothing damaged, missing or unfinished is ever read."""

import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from coincide_jax.core import artifacts, store
from coincide_jax.core.errors import UserError

N, WIDTH, SHARD = 20, 6, 8


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 8 rows in chunks of 4."""
    monkeypatch.setattr(artifacts, "SHARD_ROWS", SHARD)
    monkeypatch.setattr(artifacts, "CHUNK_ROWS", 4)


@pytest.fixture
def rows():
    """Random rows; those of the second shard are zeros, as of records left out."""
    found = np.random.default_rng(0).standard_normal((N, WIDTH)).astype(np.float16)
    found[8:16] = 0
    return found


@pytest.fixture
def made(tmp_path, rows):
    """A finished store of three shards."""
    writer = store.create(tmp_path / "features.zarr", N, WIDTH)
    for first in writer.shards:
        writer.write(first, rows[first : first + SHARD])
    return tmp_path / "features.zarr"


def shards(path):
    return sorted(p for p in (path / "c").rglob("*") if p.is_file())


def test_rows_come_back_by_slices_and_numbers(made, rows):
    features = store.open_features(made)
    assert features.shape == (N, WIDTH) and features.dtype == np.float16 and len(features) == N
    assert not list((made / "writing").iterdir())  # locks are gone, so that the folder's hashes never differ
    some = np.array([19, 0, 3, 3, 11])
    for index in (slice(None), slice(5, 13), slice(18, 40), slice(4, 4), some, np.arange(N) % 3 == 0, some[:0]):
        np.testing.assert_array_equal(features[index], rows[index])
    with pytest.raises(IndexError, match="step 1"):
        features[::2]


def test_npy_is_the_same_thing(tmp_path, rows):
    artifacts.write_npy(tmp_path / "a.npy", rows)
    features = store.open_features(tmp_path / "a.npy")
    assert features.shape == (N, WIDTH) and features.dtype == np.float16
    part = features[3:5]
    part[:] = 7  # a copy: the file stays as it is
    np.testing.assert_array_equal(features[np.array([4, 3])], rows[[4, 3]])


def test_views_of_rows(made, rows):
    for chosen in (np.array([0, 1, 2, 5, 6, 9, 19]), np.array([7]), np.arange(3, 15)):
        view = store.Rows(store.open_features(made), chosen)
        assert view.shape == (len(chosen), WIDTH) and view.dtype == np.float16
        np.testing.assert_array_equal(view[:], rows[chosen])
        np.testing.assert_array_equal(view[1:4], rows[chosen[1:4]])
        np.testing.assert_array_equal(view[np.array([0])], rows[chosen[:1]])
        inner = store.Rows(view, np.arange(len(chosen))[::2])
        np.testing.assert_array_equal(inner[:], rows[chosen[::2]])


@pytest.mark.parametrize("shard", range(3))
def test_damage_is_found_and_named(made, shard):
    file = shards(made)[shard]
    data = bytearray(file.read_bytes())
    whole = bytes(data)
    data[5] ^= 4
    for content in (bytes(data), whole[:-7], b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"features .*features\.zarr cannot be read: ") as found:
            store.open_features(made)[:]
        assert "\n" not in str(found.value)
    file.unlink()
    with pytest.raises(UserError, match=r"features\.zarr cannot be read"):
        store.open_features(made)[shard * SHARD : shard * SHARD + 1]


def test_an_unfinished_store_is_not_read_and_goes_on(tmp_path, rows):
    path = tmp_path / "features.zarr"
    writer = store.create(path, N, WIDTH)
    writer.write(16, rows[16:])
    writer.write(0, rows[:8])
    with pytest.raises(UserError, match="not finished: rows 8 to 15 were never written"):
        store.open_features(path)
    again = store.create(path, N, WIDTH)
    assert [again.finished(first) for first in again.shards] == [True, False, True]
    again.write(8, rows[8:16])
    np.testing.assert_array_equal(store.open_features(path)[:], rows)


def test_wrong_shapes_are_named(made, rows, tmp_path):
    writer = store.create(made, N, WIDTH)
    for first, block in ((0, rows[:7]), (4, rows[:8]), (16, rows[:8]), (0, rows[:8, :5])):
        with pytest.raises(UserError, match=rf"a block of shape \({len(block)}, {block.shape[1]}\) at row {first}"):
            writer.write(first, block)
    with pytest.raises(UserError, match="cannot be written"):
        store.create(made, N, WIDTH + 1)
    np.save(tmp_path / "one.npy", np.zeros(5, np.float16))
    np.save(tmp_path / "int.npy", np.zeros((5, 2), np.int32))
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    for name, message in (
        ("one.npy", r"have shape \(5,\); expected \[records, width\]"),
        ("int.npy", "are of type int32; expected floating-point numbers"),
        ("cut.npy", "cannot be read"),
        ("none.zarr", "do not exist"),
    ):
        with pytest.raises(UserError, match=message):
            store.open_features(tmp_path / name)


def hold(path, first, ready, done) -> None:
    """A writer that has begun a shard and does not end."""
    with store._lock(path, first):
        ready.set()
        done.wait(60)


def begun(path):
    """A new store, and another process that is writing its second shard until the event is set."""
    writer = store.create(path, N, WIDTH)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(path, 8, ready, done))
    other.start()
    assert ready.wait(60)
    return writer, other, done


def test_a_store_that_another_process_writes(tmp_path, rows):
    path = tmp_path / "features.zarr"
    writer, other, done = begun(path)
    with pytest.raises(UserError, match=f"are being written by process {other.pid}; rows 0 to 7 are not finished"):
        store.open_features(path)
    with pytest.raises(UserError, match=f"shard at row 8 is being written by process {other.pid}"):
        writer.write(8, rows[8:16])
    writer.write(0, rows[:8])  # disjoint shards do not disturb each other
    done.set()
    other.join()
    writer.write(8, rows[8:16])
    writer.write(16, rows[16:])
    np.testing.assert_array_equal(store.open_features(path)[:], rows)


FILL = """
import resource, signal, sys
import numpy as np
from coincide_jax.core import store
from coincide_jax.core.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
writer = store.create(sys.argv[1], 3 * 4096, 512)
writer.write(0, np.ones((4096, 512), np.float16))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    writer.write(4096, np.ones((4096, 512), np.float16))
except UserError as error:
    print(error)
"""


def test_no_room_for_a_shard_is_one_sentence_and_leaves_the_others(tmp_path, monkeypatch):
    """A limit on the size of files stands for a full disk: the write of the shard fails in its middle."""
    path = tmp_path / "features.zarr"
    done = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"features {path} cannot be written: ") and len(done.stdout.splitlines()) == 1
    monkeypatch.undo()
    writer = store.create(path, 3 * 4096, 512)
    assert [writer.finished(first) for first in writer.shards] == [True, False, False]
    with pytest.raises(UserError, match="rows 4096 to 8191 were never written"):
        store.open_features(path)


def test_a_killed_writer_blocks_nobody(tmp_path, rows):
    path = tmp_path / "features.zarr"
    writer, other, _ = begun(path)
    os.kill(other.pid, 9)
    other.join()
    time.sleep(0.01)
    with pytest.raises(UserError, match="were never written"):
        store.open_features(path)
    writer.write(8, rows[8:16])
    assert writer.finished(8)
