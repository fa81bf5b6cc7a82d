"""Spherical k-means: against faiss, and bitwise equal on any device count and chunk size."""

import contextlib
import gc

import faiss
import jax
import numpy as np
import pytest

from coincide_jax.kernels import kmeans


@contextlib.contextmanager
def devices(count: int):
    with jax.set_mesh(jax.make_mesh((count, 1), ("data", "model"), devices=jax.devices()[:count])):
        yield


def blobs(rows=1500, width=300, centers=12, spread=0.6, seed=0) -> np.ndarray:
    """Unit float16 rows around unit centres that share a common direction, as activations do."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(centers, width)) + rng.normal(size=width)
    x = centre[rng.integers(0, centers, rows)] + spread * rng.normal(size=(rows, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def fit(x, k, count=1, **settings):
    with devices(count):
        return kmeans.fit(x, k, **{"seed": 1, "iterations": 30, "chunk": 256} | settings)


def nearest(x, centroids) -> np.ndarray:
    return np.argmax(x.astype(np.float64) @ centroids.astype(np.float64).T, axis=1)


def same(a: kmeans.KMeansResult, b: kmeans.KMeansResult):
    for name in ("centroids", "assignment", "objective", "updated", "imbalance", "empties", "moved", "iterations"):
        left, right = getattr(a, name), getattr(b, name)
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert a.centroids.tobytes() == b.centroids.tobytes()


def test_bitwise_equal_on_any_device_count_and_chunk():
    x = blobs(centers=40, spread=1.5)
    one = fit(x, 40, chunk=1000)
    for count, chunk in ((8, 1000), (8, 96), (3, 5000), (1, 77)):
        same(one, fit(x, 40, count, chunk=chunk))


def test_bitwise_equal_when_scores_tie():
    """Rows and their copies, symmetric rows and zero rows make exact and near ties everywhere."""
    rng = np.random.default_rng(2)
    x = np.sign(rng.normal(size=(64, 16))).astype(np.float16) / 4
    x = np.concatenate([x, x[:40], -x[:30], np.zeros((7, 16), np.float16)])
    x = x[rng.permutation(len(x))]
    one = fit(x, 20, chunk=141)
    for count, chunk in ((8, 141), (8, 16), (2, 50)):
        same(one, fit(x, 20, count, chunk=chunk))


def test_labels_are_the_nearest_of_the_returned_centroids():
    x = blobs()
    result = fit(x, 12)
    np.testing.assert_array_equal(result.assignment, nearest(x, result.centroids))
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    assert result.iterations == len(result.objective) < 30 and result.moved[-1] == 0
    assert np.all(np.diff(result.objective) > -1e-7)
    stopped = fit(x, 12, iterations=2)
    np.testing.assert_array_equal(stopped.assignment, nearest(x, stopped.centroids))


def test_centroids_are_the_exact_means():
    x = blobs(rows=400)
    result = fit(x, 5)
    for k in range(5):
        total = np.sum(x[result.assignment == k].astype(np.float64), axis=0)  # exact: multiples of 2^-24 below 2^29
        np.testing.assert_array_equal(result.centroids[k], (total / np.sqrt(np.sum(total * total))).astype(np.float32))


@pytest.mark.parametrize("spread", [0.6, 2.0])
def test_objective_equals_faiss_from_the_same_start(spread):
    x = blobs(rows=3000, width=96, centers=30, spread=spread).astype(np.float32)
    start = x[np.random.default_rng(5).choice(len(x), 30, replace=False)]
    start /= np.linalg.norm(start, axis=1, keepdims=True)
    peer = faiss.Kmeans(96, 30, niter=20, seed=1234, spherical=True)
    peer.train(x, init_centroids=start)
    similarity, _ = peer.index.search(x, 1)
    ours = fit(x, 30, iterations=20, init=start)
    np.testing.assert_allclose(ours.objective[0], peer.obj[0] / len(x), rtol=1e-5)
    with devices(1):
        assigned, cosine = kmeans.assign(x, ours.centroids, 512)
    assert np.mean(cosine) >= np.mean(similarity) * (1 - 1e-3)
    np.testing.assert_array_equal(assigned, ours.assignment)


def test_empty_clusters_restart_at_the_farthest_row():
    x = blobs(rows=300, width=40, centers=6, spread=0.1)
    start = np.repeat(x[:1].astype(np.float32), 6, axis=0)  # five of six start empty
    result = fit(x, 6, init=start)
    assert result.empties[0] == 5 and result.empties[-1] == 0
    assert result.objective[-1] > fit(x, 1).objective[-1]
    one = kmeans.cosines(x, fit(x, 1, iterations=1).centroids, np.zeros(300, np.int32))
    with devices(1):
        second = kmeans.fit(x, 6, seed=0, iterations=1, chunk=64, init=start)
    farthest = x[np.argmin(one)].astype(np.float32)
    np.testing.assert_allclose(second.centroids[1], farthest / np.linalg.norm(farthest), atol=1e-6)


def test_duplicates_leave_clusters_empty():
    x = np.repeat(blobs(rows=3, width=20, centers=3), 10, axis=0)
    result = fit(x, 8)
    assert len(np.unique(result.assignment)) == 3 and result.iterations < 30
    assert result.objective[-1] == pytest.approx(np.mean(np.linalg.norm(x.astype(np.float64), axis=1)), abs=1e-6)


def test_as_many_clusters_as_rows_and_zero_rows():
    x = blobs(rows=20, width=50)
    result = fit(x, 20)
    assert sorted(result.assignment) == list(range(20))
    x[3:6] = 0
    result = fit(x, 4)
    assert np.all(result.assignment[3:6] == 0) and np.all(np.isfinite(result.centroids))
    with devices(8):
        _, cosine = kmeans.assign(x, result.centroids, 16)
    assert np.all(cosine[3:6] == 0) and np.all(cosine[6:] > 0)
    assert np.all(fit(np.zeros((5, 8), np.float16), 2).assignment == 0)


def test_rows_closer_than_float32_are_decided_in_float64():
    """Two centroids that float32 products cannot tell apart, and one that keeps the centred ones large."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=400)
    x = base + 0.7 * rng.normal(size=(500, 400))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    c = np.stack([base, base * (1 + 1e-6 * rng.normal(size=400)), -base])
    c = (c / np.linalg.norm(c, axis=1, keepdims=True)).astype(np.float32)
    single = np.argmax(x.astype(np.float32) @ c.T, axis=1)
    assert np.any(single != nearest(x, c)) and 0 < np.mean(single) < 1
    for count, chunk in ((8, 64), (1, 500)):
        with devices(count):
            labels, _ = kmeans.assign(x, c, chunk)
        np.testing.assert_array_equal(labels, nearest(x, c))


def test_nothing_stays_on_the_devices():
    """Without the help of the garbage collector: the features are most of what a device holds."""
    x = blobs(rows=400)
    fit(x, 12, product="bfloat16")
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        fit(x, 12, product="bfloat16")
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_float32_features_are_rounded_to_the_grid():
    x = blobs(rows=300).astype(np.float32) * np.float32(1.0000001)
    rounded = (np.rint(x.astype(np.float64) * 2**24) / 2**24).astype(np.float32)
    same(fit(x, 6, 1), fit(rounded, 6, 8))


def test_wrong_input_is_refused():
    x = blobs(rows=10, width=8)
    with pytest.raises(ValueError, match="k = 11 clusters of 10 rows"):
        fit(x, 11)
    with pytest.raises(ValueError, match="init has shape"):
        fit(x, 3, init=np.ones((2, 8)))
    x[0, 0] = np.inf
    with pytest.raises(kmeans.RowError, match="row 0 is not finite") as found:
        fit(x, 3)
    assert found.value.row == 0
    x[0, 0], x[7, 3] = 0, np.nan
    with pytest.raises(kmeans.RowError, match="row 7 is not finite"):
        fit(x, 3, 4, chunk=4)
    x[7, 3] = 17
    with pytest.raises(kmeans.RowError, match="row 7 holds a value of magnitude 17"):
        fit(x, 3)
    with pytest.raises(ValueError, match="init is 'k-mean'"):
        fit(x[:6], 3, init="k-mean")
