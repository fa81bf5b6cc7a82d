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


def test_a_limit_gives_the_first_picks():
    x = np.stack([rows(30, seed=8), rows(30, seed=9)])
    kernel = density.gram(x, 1.0)
    whole, values = mmd.greedy_order(kernel, [30, 20])
    order, first = mmd.greedy_order(kernel, [30, 20], 7)
    np.testing.assert_array_equal(order[:, :7], whole[:, :7])
    np.testing.assert_array_equal(first[:, :7], values[:, :7])
    assert np.all(order[:, 7:] == -1) and np.all(first[:, 7:] == 0)


@pytest.mark.parametrize("held", [64, 128, 1000])
def test_picks_without_the_stored_matrix_are_the_same(held):
    x = rows(300, seed=10, duplicates=0.2)
    order, value = mmd.greedy_order(density.gram(x[None], 1.0), [300], 90)
    made = []

    def rows_of(picked):
        made.append(len(picked))
        return density.kernel_rows(x, picked, 1.0)

    picks, values = mmd.greedy_picks(rows_of, density.row_sums(x, 1.0), 90, held)
    np.testing.assert_array_equal(picks, order[0, :90])
    np.testing.assert_allclose(values, value[0, :90], atol=1e-14)
    # rows at hand serve later picks: half as many passes as picks, and even one panel at hand saves many
    assert max(made) <= mmd.PANEL and len(made) < (45 if held > mmd.PANEL else 60)
    found = mmd.discrepancies_of(rows_of, density.row_sums(x, 1.0), picks)
    np.testing.assert_allclose(found, values, atol=1e-14)


def swapped(kernel, picks, sweeps) -> list[int]:
    """Swap sweeps by the formula: every place takes the member, free or its own, of least MMD²."""
    picks = list(picks)
    for _ in range(sweeps):
        for place in range(len(picks)):
            own = round(discrepancy(kernel, picks), 13)
            trial = [
                np.inf if c in picks else round(discrepancy(kernel, [*picks[:place], c, *picks[place + 1 :]]), 13)
                for c in range(len(kernel))
            ]
            if min(trial) < own:
                picks[place] = int(np.argmin(trial))
    return picks


def test_swap_sweeps_lower_the_discrepancy_as_by_the_formula():
    sizes, quota = [40, 25, 1], [9, 5, 1]
    x = np.zeros((3, 40, 24), np.float16)
    for i, n in enumerate(sizes):
        x[i, :n] = rows(n, seed=20 + i)
    kernel = density.gram(x, 1.0)
    order, value = mmd.greedy_order(kernel, sizes)
    before = np.where(np.arange(10)[None] < np.array(quota)[:, None], order[:, :10], -1)
    for sweeps in (1, 3):
        after = mmd.refine(kernel, sizes, before, sweeps)
        values = mmd.discrepancies(kernel, sizes, after)
        for i, (n, m) in enumerate(zip(sizes, quota, strict=True)):
            own = np.asarray(kernel)[i, :n, :n]
            assert list(after[i, :m]) == swapped(own, before[i, :m], sweeps) and np.all(after[i, m:] == -1)
            assert len(set(after[i, :m])) == m and np.all(after[i, :m] < n)
            np.testing.assert_allclose(
                values[i, :m], [discrepancy(own, after[i, : s + 1]) for s in range(m)], atol=1e-14
            )
            assert values[i, m - 1] <= value[i, m - 1] + 1e-15

            def rows_of(picked, own=own):
                return own[picked]

            alone = mmd.refine_picks(rows_of, own.sum(axis=1), before[i, :m], sweeps)
            np.testing.assert_array_equal(alone, after[i, :m])
    # greedy picks of clusters so small cannot be bettered; those of no method can
    first = np.where(before < 0, -1, np.arange(10)[None]).astype(np.int32)
    start, end = (mmd.discrepancies(kernel, sizes, picks) for picks in (first, mmd.refine(kernel, sizes, first, 3)))
    assert end[0, quota[0] - 1] < 0.9 * start[0, quota[0] - 1]


@pytest.mark.parametrize("held", [64, 256])
def test_exchanges_make_rows_for_a_panel_at_once(held):
    x = rows(300, seed=40)
    x = x[np.argsort(x[:, 0].astype(np.float32))]  # the first are all of one side: poor picks
    kernel = density.gram(x[None], 1.0)
    first, sums = np.arange(80, dtype=np.int32), density.row_sums(x, 1.0)
    expected = mmd.refine(kernel, [300], first[None], 2)[0]
    made, told = [], []

    def rows_of(picked):
        made.append(len(picked))
        return density.kernel_rows(x, picked, 1.0)

    found = mmd.refine_picks(rows_of, sums, first, 2, held, told.append)
    np.testing.assert_array_equal(found, expected)
    exchanged = np.sum(found != first)  # at least so many: one pass each would be as many again
    assert exchanged > 40 and len(made) < 6 + exchanged // 2 and max(made) <= mmd.PANEL and sum(told) == 160


def test_equal_rows_tie_wherever_the_tiles_are_cut():
    half = rows(90, seed=30)
    x = np.concatenate([half, half])  # every row once more, tiles away
    order, _ = mmd.greedy_order(density.gram(x[None], 1.0), [180], 60)
    for block in (32, 64, 2048):
        sums = density.row_sums(x, 1.0, block=block)
        np.testing.assert_array_equal(sums[:90], sums[90:])
        picks, _ = mmd.greedy_picks(lambda picked, b=block: density.kernel_rows(x, picked, 1.0, block=b), sums, 60, 64)
        np.testing.assert_array_equal(picks, order[0, :60])
