"""Rows of features are read by blocks, from arrays and from stores alike."""

import numpy as np
import pytest

from coincide_jax.core import artifacts, store
from coincide_jax.selection import view


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
    with pytest.raises(FileNotFoundError):  # what is too much for memory goes to the given folder, not to /tmp
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
