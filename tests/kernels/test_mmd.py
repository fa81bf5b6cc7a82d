"""Greedy MMD by running sums against the cubic brute force."""

import numpy as np
import pytest

from coincide_jax.kernels import density, mmd


def rows(n, seed, duplicates=0.0, width=24) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, width)) + 1
    copies = rng.random(n) < duplicates
    x[copies] = x[rng.integers(0, n, copies.sum())]
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def discrepancy(kernel, picks) -> float:
    return kernel.mean() + kernel[np.ix_(picks, picks)].mean() - 2 * kernel[:, picks].mean()


def brute_order(x) -> list[int]:
    x = x.astype(np.float64)
    kernel = np.exp(-np.sum((x[:, None] - x[None]) ** 2, axis=2) / 2)
    picks = []
    for _ in range(len(x)):
        values = [np.inf if c in picks else round(discrepancy(kernel, [*picks, c]), 13) for c in range(len(x))]
        picks.append(int(np.argmin(values)))
    return picks


@pytest.mark.parametrize("duplicates", [0.0, 0.3, 1.0])
def test_order_equals_brute_force(duplicates):
    sizes = [1, 2, 3, 7, 16, 25, 40]
    x = np.zeros((len(sizes), 40, 24), np.float16)
    for i, n in enumerate(sizes):
        x[i, :n] = rows(n, seed=i, duplicates=duplicates)
    order, _ = mmd.greedy_order(density.gram(x, 1.0), sizes)
    for i, n in enumerate(sizes):
        assert list(order[i, :n]) == brute_order(x[i, :n]), f"cluster of {n}"
        assert np.all(order[i, n:] == -1)


def test_ties_go_to_the_smallest_index():
    x = np.repeat(rows(1, 0), 9, axis=0)[None]
    order, value = mmd.greedy_order(density.gram(x, 1.0), [9])
    assert list(order[0]) == list(range(9))
    np.testing.assert_allclose(value, 0, atol=1e-15)


def test_reported_discrepancy_is_the_formula_in_float64():
    x = rows(30, seed=4)
    kernel = density.gram(x[None], 1.0)
    order, value = mmd.greedy_order(kernel, [30])
    assert value.dtype == np.float64
    kernel = np.asarray(kernel)[0]
    expected = [discrepancy(kernel, order[0, : m + 1]) for m in range(30)]
    np.testing.assert_allclose(value[0], expected, atol=1e-14)
    assert abs(value[0, -1]) < 1e-14 and value[0, 0] > 1e-6


def test_padding_and_neighbours_change_nothing():
    x = rows(11, seed=6)
    alone, _ = mmd.greedy_order(density.gram(x[None], 1.0), [11])
    padded = np.ones((3, 16, 24), np.float16)
    padded[1, :11] = x
    order, _ = mmd.greedy_order(density.gram(padded, 1.0), [16, 11, 0])
    np.testing.assert_array_equal(order[1, :11], alone[0])
    assert np.all(order[2] == -1)


def test_picks_are_closer_to_the_cluster_than_random_ones():
    x = rows(120, seed=7)
    kernel = density.gram(x[None], 1.0)
    _, value = mmd.greedy_order(kernel, [120])
    rng = np.random.default_rng(0)
    others = [discrepancy(np.asarray(kernel)[0], rng.permutation(120)[:24]) for _ in range(20)]
    assert value[0, 23] < min(others)
