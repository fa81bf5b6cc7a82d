"""Rows of features are read by blocks, from arrays and from stores alike."""

import errno
import os

import numpy as np
import pytest

from coincide_jax import selection
from coincide_jax.core import artifacts, store
from coincide_jax.core.errors import UserError
from coincide_jax.kernels import kmeans
from coincide_jax.selection import view
from configs import common


class Counted:
    """An array that says which rows were read together."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.reads = x, x.shape, x.dtype, []

    def __getitem__(self, rows):
        self.reads.append(rows)
        return self.x[rows]


def test_rows_come_as_asked_for_and_the_store_is_read_in_order(tmp_path):
    x = np.random.default_rng(0).normal(size=(5000, 8)).astype(np.float16)
    counted = Counted(x)
    rows = np.random.default_rng(1).choice([*range(900), *range(3000, 5000)], 700, replace=False)
    for cache in (1 << 30, 100):
        counted.reads.clear()
        np.testing.assert_array_equal(view.reader(counted, cache, tmp_path)(rows), x[rows])
        starts = [read[0] // view.READ_ROWS for read in counted.reads]
        assert starts == sorted(set(starts)) and 1 not in starts  # each block once, none without a wanted row
        assert all(read[0] // view.READ_ROWS == read[-1] // view.READ_ROWS for read in counted.reads)
    assert len(view.reader(counted, 1 << 30, tmp_path)(np.zeros(0, np.int64))) == 0
    with pytest.raises(UserError, match="gone has no room for"):  # too much for memory: the given folder, not /tmp
        view.reader(counted, 100, tmp_path / "gone")(rows)


@pytest.mark.parametrize("suffix", [".npy", ".zarr"])
def test_files_give_what_they_hold_and_nothing_that_is_not_finite(tmp_path, suffix):
    x = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float16)
    path = tmp_path / f"features{suffix}"
    x[2000, 3], x[2001, 0] = np.nan, -np.inf
    if suffix == ".npy":
        np.save(path, x)
    else:
        artifacts.create_features(path, *x.shape).write(x).result()
    found = view.reader(store.open_features(path), 1 << 30, tmp_path)(np.array([2001, 5, 2000, 2999]))
    np.testing.assert_array_equal(found, np.where(np.isfinite(x), x, 0)[[2001, 5, 2000, 2999]])
    assert found.dtype == np.float16


def test_clusters_that_do_not_fit_are_copied_in_one_pass(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5000, 8)).astype(np.float16)
    x[17, 2] = np.inf
    counted, label = Counted(x), rng.integers(-1, 40, 5000)
    members = kmeans.members(label, 40)
    wanted = np.where(np.isfinite(x), x, 0)
    read = view.reader(counted, 4000, tmp_path, members)
    assert len(read(np.zeros(0, np.int64))) == 0 and not counted.reads  # only what is read is copied
    for rows in (members[3], np.concatenate([members[30], members[2]]), rng.permutation(members[5])):
        np.testing.assert_array_equal(read(rows), wanted[rows])
    starts = [part[0] // view.READ_ROWS for part in counted.reads]
    assert starts == [0, 1, 2, 3, 4] and sum(map(len, counted.reads)) == np.sum(label >= 0)
    assert np.shares_memory(read(members[4]), read(members[4])) and not list(tmp_path.iterdir())
    # what fits is not copied
    counted.reads.clear()
    view.reader(counted, 1 << 20, tmp_path, members)(members[3])
    assert sum(map(len, counted.reads)) == len(members[3])


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    """The file's blocks are taken before it is mapped: a write into a hole would end the process by a signal."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    x = np.ones((3000, 8), np.float16)
    monkeypatch.setattr(os, "posix_fallocate", full)
    for members in (None, [np.arange(2000), np.arange(2000, 3000)]):
        with pytest.raises(UserError) as error:
            view.reader(Counted(x), 100, tmp_path, members)(np.arange(3000))
        assert str(error.value).startswith(f"{tmp_path} has no room for the 48000 bytes")
        assert str(error.value).endswith(": No space left on device") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"refine": 1}, {"gram": "float32"}, {"intra": "nearest"}])
def test_a_store_that_does_not_fit_is_read_once_and_gives_the_same(changes, tmp_path, monkeypatch):
    """The whole stage, clusters above and below the stored limit, from a .npy file and from a store."""
    rng = np.random.default_rng(0)
    label = np.where(rng.random(3000) < 0.2, 0, rng.integers(-1, 30, 3000)).astype(np.int32)
    x = rng.normal(size=(30, 200))[label] + rng.normal(size=(3000, 200))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "f.npy", x)
    artifacts.create_features(tmp_path / "f.zarr", *x.shape).write(x).result()
    np.save(tmp_path / "centroids.npy", rng.normal(size=(30, 200)).astype(np.float32))
    np.save(tmp_path / "assignment.npy", label)
    read, found = [], []
    monkeypatch.setattr(store.Features, "_scattered", counting(store.Features._scattered, read))
    for name in ("f.npy", "f.zarr"):
        config = common.defaults()
        config.extract.features, config.extract.num_layers = str(tmp_path / name), 5
        config.select.update({"cache_mib": 1, **changes})
        (tmp_path / "out").mkdir(exist_ok=True)
        selection.run(config, {"cluster": tmp_path}, tmp_path / "out", None)
        found.append(np.load(tmp_path / "out" / "indices.npy"))
    np.testing.assert_array_equal(*found)
    assert sorted(np.concatenate(read)) == list(np.flatnonzero(label >= 0))


def counting(function, calls):
    def counted(self, rows):
        calls.append(rows)
        return function(self, rows)

    return counted
