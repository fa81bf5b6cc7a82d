"""The authors' program as §4.4 of the method's description has it, written anew as slow float64 NumPy, against our
official variant: every index, in its order."""

import math

import command
import numpy as np
import pytest

from coincide_jax.core import artifacts
from coincide_jax.kernels import density, mmd
from coincide_jax.selection import SelectionView, coincide
from configs import common

LAYERS = 5


def kernel_of(x: np.ndarray, kind=np.float64) -> np.ndarray:
    """Gaussian kernel of width 1 by the expansion of the norms, all in one type."""
    x = x.astype(kind)
    norms = np.sum(x * x, axis=1)
    return np.exp((norms[:, None] + norms[None, :] - kind(2) * (x @ x.T)) / kind(-2))


def greedy(kernel: np.ndarray, count: int) -> list[int]:
    """Eq. 7 anew for every candidate at every pick; the first of equal ones wins."""
    chosen, whole, to_all = [], kernel.mean(), kernel.mean(axis=0)
    for m in range(1, count + 1):
        free = np.setdiff1d(np.arange(len(kernel)), chosen)
        chosen_too = kernel[np.ix_(free, chosen)].sum(axis=1) if chosen else np.zeros(len(free))
        among = (kernel[np.ix_(chosen, chosen)].sum() + 2 * chosen_too + kernel[free, free]) / m**2
        across = (to_all[chosen].sum() + to_all[free]) / m
        chosen.append(int(free[np.argmin(whole + among - 2 * across)]))
    return chosen


def program(features, centroids, assignment, fraction, tau=0.1) -> list[int]:
    """The whole selection, cluster by cluster."""
    k, width = centroids.shape
    text = centroids.astype(np.float64).reshape(k, LAYERS, width // LAYERS)[:, :, width // LAYERS // 2 :]
    text = text.reshape(k, -1)
    text = text / np.sqrt((text**2).sum(axis=1))[:, None]
    cosine = text @ text.T
    low = cosine <= 0.9
    transfer = np.where(low, cosine, 0).sum(axis=1) / low.sum(axis=1)
    members = [np.flatnonzero(assignment == i) for i in range(k)]
    compact = [kernel_of(features[rows]).mean() for rows in members]
    weight = [math.exp(s / d / tau) for s, d in zip(transfer, compact, strict=True)]
    ratio = [value / sum(weight) for value in weight]
    visits = np.argsort(ratio, kind="stable")[::-1]
    ratio, remaining, indices = [ratio[i] for i in visits], int(fraction * len(assignment)), []
    for cluster in visits:
        share, ratio = ratio[0], ratio[1:]
        count, rows = round(remaining * share), members[cluster]
        local = range(len(rows)) if count > len(rows) else greedy(kernel_of(features[rows]), count)
        indices += [int(rows[i]) for i in local]
        remaining -= len(local)
        ratio = [value / sum(ratio) for value in ratio] if ratio else ratio
    return indices


def arrays(seed: int, half: int, rows: int = 500, k: int = 24):
    """Features f16[N, 5·2·half], centroids and assignment of uneven clusters: some of one member, some tight ones that
    are offered more than they hold, one with 20 % of the rows."""
    rng = np.random.default_rng(seed)
    sizes = np.concatenate([[1, 1, 1, 2, 3, 5], rng.integers(6, 30, k - 7)])
    sizes = np.append(np.maximum(sizes * (0.8 * rows) / sizes.sum(), 1).astype(int), 0)
    sizes[:3] = 1
    sizes[-1] = rows // 5
    sizes[-2] += rows - sizes.sum()
    label = rng.permutation(np.repeat(np.arange(k), sizes))
    width = LAYERS * 2 * half
    common_part, own = 0.6 * rng.normal(size=width), rng.normal(size=(k, width))
    own[3:6] *= 0.2  # near to all others, and wide: they are offered more than they hold
    own[9] = own[10] + 0.2 * own[9]  # above the mask
    spread = rng.uniform(0.2, 1.5, k)
    spread[3:6] = 1.5
    x = common_part + own[label] + spread[label, None] * rng.normal(size=(rows, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    sums = np.stack([x[label == i].astype(np.float64).sum(axis=0) for i in range(k)])
    return x, (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32), label.astype(np.int32)


def ours(x, centroids, assignment, fraction, **changes):
    keys = common.defaults().select
    keys.update(changes)
    everything = np.ones(len(x), bool)
    view = SelectionView(lambda rows: x[rows], everything, assignment, centroids, LAYERS, int(fraction * len(x)))
    return coincide.select(view, keys)


@pytest.mark.parametrize("half", [64, 256])
@pytest.mark.parametrize("seed", range(5))
def test_every_index_in_the_order_of_the_authors_program(seed, half):
    x, centroids, assignment = arrays(seed, half)
    expected = program(x, centroids, assignment, 0.2)
    found = ours(x, centroids, assignment, 0.2)
    assert found.indices.tolist() == expected
    size, quota = np.bincount(assignment), found.clusters["quota"]
    assert size.max() == len(x) // 5 and np.sum(size == 1) >= 3
    assert np.any((quota == size) & (size > 1)) and np.sum((quota > 0) & (quota < size)) >= 3


def test_parts_of_large_matrices_change_no_index():
    """Under so small a budget the matrices of all larger clusters are made in parts."""
    x, centroids, assignment = arrays(0, 64, rows=900)
    expected = ours(x, centroids, assignment, 0.2)
    found = ours(x, centroids, assignment, 0.2, cache_mib=1)
    assert density.stored_limit((1 << 20) // 4) < np.bincount(assignment).max()
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(found.records["score"], expected.records["score"], atol=1e-13)
    np.testing.assert_allclose(found.clusters["density"], expected.clusters["density"], rtol=1e-13)


@pytest.mark.parametrize(("n", "spread", "sums"), [(1000, 0.02, np.float64), (2000, 0.3, np.float32)])
def test_near_duplicates_where_a_float32_gram_picks_differently(n, spread, sums):
    """Of the tight cluster a float32 Gram alone changes the picks within the first dozens; of the wide one it does so
    not within the first 400, and float32 sums over it do within 100."""
    rng = np.random.default_rng(7)
    x = rng.normal(size=640) + spread * rng.normal(size=(n, 640))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    count = 100
    expected = greedy(kernel_of(x), count)
    assert greedy(kernel_of(x, np.float32).astype(sums), count) != expected
    order, _ = mmd.greedy_order(density.gram(x[None], 1.0), [n], count)
    assert order[0, :count].tolist() == expected


@pytest.mark.parametrize("empty", [False, True])
def test_the_command_on_given_clusters(tmp_path, empty):
    """Every index in its order from files to files; clusters without a record in between change none, and the numbers
    that the others had are kept beside the new ones."""
    x, centroids, assignment = arrays(1, 32)
    expected, old = program(x, centroids, assignment, 0.2), np.arange(len(centroids))
    given, label = centroids, assignment
    if empty:
        old = old + (old >= 4) + (old >= 11)
        given, label = np.insert(centroids, [4, 11], centroids[:2], axis=0), old[assignment]
    for name, array in (("x", x), ("c", given), ("a", label)):
        np.save(tmp_path / f"{name}.npy", array)
    status, output = command.call(
        "--config=configs/arrays.py",
        f"--workdir={tmp_path}/w",
        f"--config.extract.features={tmp_path}/x.npy",
        f"--config.cluster.centroids={tmp_path}/c.npy",
        f"--config.cluster.assignment={tmp_path}/a.npy",
        f"--config.extract.num_layers={LAYERS}",
        "--config.select.variant=official",
        "--config.select.fraction=0.2",
    )
    assert status == 0, output
    assert np.load(tmp_path / "w" / "select" / "indices.npy").tolist() == expected
    np.testing.assert_array_equal(np.load(tmp_path / "w" / "cluster" / "centroids.npy"), centroids)
    table = artifacts.read_parquet(tmp_path / "w" / "select" / "clusters.parquet")
    assert ("given" in table) == empty
    np.testing.assert_array_equal(table.get("given", old), old)
    np.testing.assert_array_equal(table["size"], np.bincount(label)[old])
