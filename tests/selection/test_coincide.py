"""COINCIDE's quotas and picks, each against a slow transcription of its rule."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from coincide_jax.core import metrics
from coincide_jax.core.errors import UserError
from coincide_jax.kernels import kmeans
from coincide_jax.selection import SelectionView, coincide
from configs import common

LAYERS, H = 3, 10


def slow_sequential(probability, sizes, budget) -> tuple[list[int], set[int]]:
    """The authors' loop as it is described: visit, round, cap, normalise the rest; and who was offered too much."""
    order = sorted(range(len(sizes)), key=lambda i: (probability[i], i), reverse=True)
    ratios, quota, remaining = [float(probability[i]) for i in order], [0] * len(sizes), budget
    over = set()
    while order:
        cluster, ratio = order.pop(0), ratios.pop(0)
        quota[cluster] = min(round(remaining * ratio), sizes[cluster])
        over |= {cluster} if round(remaining * ratio) > sizes[cluster] else set()
        remaining -= quota[cluster]
        total = np.sum(ratios)
        if total <= 0:
            break
        ratios = [value / total for value in ratios]
    return quota, over


@strategies.composite
def allocations(draw):
    sizes = np.array(draw(strategies.lists(strategies.integers(1, 60), min_size=1, max_size=30)))
    logits = draw(
        strategies.lists(
            strategies.sampled_from([-900.0, -30.0, -3.0, -1.0, -0.5, 0.0]), min_size=len(sizes), max_size=len(sizes)
        )
    )
    weight = np.exp(np.array(logits) - max(logits))
    return weight / weight.sum(), sizes, draw(strategies.integers(0, int(sizes.sum())))


@hypothesis.given(allocations())
@hypothesis.settings(max_examples=200, deadline=None)
def test_sequential_equals_the_slow_transcription_and_never_exceeds(case):
    probability, sizes, budget = case
    quota, over = coincide.sequential(probability, sizes, budget)
    assert (list(quota), set(np.flatnonzero(over))) == slow_sequential(probability, sizes, budget)
    assert quota.sum() <= budget and np.all(quota <= sizes) and np.all(quota >= 0)


@hypothesis.given(allocations())
@hypothesis.settings(max_examples=200, deadline=None)
def test_exact_sums_to_the_budget(case):
    probability, sizes, budget = case
    quota = coincide.exact(probability, sizes, budget)
    assert quota.sum() == budget and np.all(quota <= sizes) and np.all(quota >= 0)


def test_exact_by_hand():
    probability = np.array([0.5, 0.3, 0.2])
    assert list(coincide.exact(probability, np.array([100, 100, 100]), 10)) == [5, 3, 2]
    assert list(coincide.exact(probability, np.array([2, 100, 100]), 10)) == [2, 5, 3]  # 8 · 0.6, 8 · 0.4
    third = np.full(3, 1 / 3)
    assert list(coincide.exact(third, np.array([9, 9, 9]), 4)) == [2, 1, 1]  # equal fractions: the smaller index
    assert list(coincide.exact(np.array([1.0, 0.0]), np.array([3, 9]), 5)) == [3, 2]


def test_sequential_by_hand():
    # halves round to even: round(2.5) = 2; the surplus of a full cluster goes to later ones only
    cases = [
        ([0.5, 0.5], [9, 9], 5, [3, 2], [False, False]),
        ([0.7, 0.3], [2, 9], 10, [2, 8], [True, False]),
        ([0.7, 0.3], [9, 1], 10, [7, 1], [False, True]),  # two short
        ([0.7, 0.3], [7, 3], 10, [7, 3], [False, False]),  # exactly their sizes: not above
    ]
    for probability, sizes, budget, quota, over in cases:
        found = coincide.sequential(np.array(probability), np.array(sizes), budget)
        assert [list(part) for part in found] == [quota, over]


def make_view(rows=400, k=8, fraction=0.2, seed=0, dtype=np.float16) -> SelectionView:
    rng = np.random.default_rng(seed)
    label = np.minimum(rng.geometric(0.3, rows) - 1, k - 1)
    label[:k] = np.arange(k)
    x = 1.0 + rng.normal(size=(k, 2 * LAYERS * H))[label] + 0.4 * rng.normal(size=(rows, 2 * LAYERS * H))
    x[40:60] = x[60:80]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)
    assignment = np.where(np.arange(rows) % 11 == 10, -1, label).astype(np.int32)
    sums = np.stack([x[assignment == i].astype(np.float64).sum(0) for i in range(k)])
    centroids = (sums / np.linalg.norm(sums, axis=1, keepdims=True)).astype(np.float32)
    valid = assignment >= 0
    return SelectionView(lambda index: x[index], valid, assignment, centroids, LAYERS, int(fraction * valid.sum()))


def keys(**changes):
    config = common.defaults().select
    config.update(changes)
    return config


def slow_coincide(view, variant: coincide.Variant, tau):
    """§4.4 and §4.6 in float64 loops: transferability, density, quota, cubic greedy picks."""
    c = view.centroids.astype(np.float64)
    if variant.transfer_part == "text":
        c = c.reshape(len(c), LAYERS, 2, H)[:, :, 1].reshape(len(c), -1)
    c = c / np.linalg.norm(c, axis=1, keepdims=True)
    cosine = c @ c.T
    S = np.array([row[row <= variant.mask_above].mean() for row in cosine])
    members = [np.flatnonzero(view.assignment == i) for i in range(len(c))]
    kernels, D = [], []
    for rows in members:
        x = view.features(rows).astype(np.float64)
        kernels.append(np.exp(-np.sum((x[:, None] - x[None]) ** 2, axis=2) / 2))
        n = len(rows)
        D.append(kernels[-1].mean() if variant.diagonal == "yes" else (kernels[-1].sum() - n) / (n * (n - 1)))
    weight = np.exp(S / np.array(D) / tau)
    probability, sizes = weight / weight.sum(), np.array([len(rows) for rows in members])
    quota, over = (
        slow_sequential(probability, sizes, view.budget)
        if variant.allocation == "sequential"
        else (coincide.exact(probability, sizes, view.budget), ())
    )
    picks = []
    for cluster in sorted(range(len(c)), key=lambda i: (probability[i], i), reverse=True):
        kernel, chosen = kernels[cluster], list(range(quota[cluster])) if cluster in over else []
        for _ in range(quota[cluster] - len(chosen)):
            value = [
                np.inf
                if j in chosen
                else round(kernel[np.ix_([*chosen, j], [*chosen, j])].mean() - 2 * kernel[:, [*chosen, j]].mean(), 13)
                for j in range(len(kernel))
            ]
            chosen.append(int(np.argmin(value)))
        picks += list(members[cluster][chosen])
    return S, np.array(D), probability, np.array(quota), picks


@pytest.mark.parametrize(("name", "tau"), [("official", 0.3), ("paper", 0.3), ("official", 0.02)])
def test_whole_selection_equals_the_slow_one(name, tau):
    view = make_view()
    found = coincide.select(view, keys(variant=name, tau=tau))
    S, D, probability, quota, picks = slow_coincide(view, coincide.VARIANTS[name], tau)
    np.testing.assert_allclose(found.clusters["transferability"], S, atol=1e-13)
    np.testing.assert_allclose(found.clusters["density"], D, rtol=1e-12)
    np.testing.assert_allclose(found.clusters["probability"], probability, rtol=1e-10)
    np.testing.assert_array_equal(found.clusters["quota"], quota)
    assert list(found.indices) == picks and found.indices.dtype == np.int64
    assert len(set(picks)) == len(picks) and np.all(view.valid[picks])


def test_bitwise_equal_on_any_mesh():
    view = make_view()
    alone = coincide.select(view, keys())
    with jax.set_mesh(jax.make_mesh((8, 1), ("data", "model"))):
        many = coincide.select(view, keys())
    assert alone.indices.tobytes() == many.indices.tobytes()
    for name, column in alone.clusters.items():
        np.testing.assert_array_equal(column, many.clusters[name], err_msg=name)


def test_every_key_overrides_its_preset():
    assert coincide.resolve(keys()) == coincide.VARIANTS["official"]
    changes = {"transfer_part": "all", "mask_above": 0.5, "diagonal": "no", "allocation": "exact"}
    for name, value in changes.items():
        expected = dataclasses.replace(coincide.VARIANTS["official"], **{name: value})
        assert coincide.resolve(keys(**{name: value})) == expected
    assert coincide.resolve(keys(variant="paper", mask_above=0.9)).mask_above == 0.9


def test_inside_clusters_nearest_and_random():
    view = make_view()
    near = coincide.select(view, keys(intra="nearest", allocation="exact"))
    cluster = view.assignment[near.indices[0]]
    rows = np.flatnonzero(view.assignment == cluster)
    cosine = kmeans.cosines(view.features(rows), view.centroids, view.assignment[rows])
    assert near.indices[0] == rows[np.argmax(cosine)]
    assert np.all(np.diff(near.records["score"][view.assignment[near.indices] == cluster]) <= 0)
    one, two, other = (coincide.select(view, keys(intra="random", seed=seed)).indices for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


@pytest.mark.parametrize("allocation", ["sequential", "exact"])
def test_a_minimum_per_cluster(allocation):
    view = make_view()
    sizes = np.bincount(view.assignment[view.valid])
    quota = coincide.select(view, keys(min_per_cluster=4, tau=0.01, allocation=allocation)).clusters["quota"]
    assert np.all(quota >= np.minimum(sizes, 4)) and np.all(quota <= sizes) and quota.sum() <= view.budget


def test_singletons_and_the_whole_pool():
    view = make_view(rows=40, k=8)
    assignment = np.where((view.assignment == 6) & (np.arange(40) != 6), -1, view.assignment)
    valid = assignment >= 0
    view = dataclasses.replace(view, assignment=assignment, valid=valid, budget=int(valid.sum()))
    chosen = coincide.select(view, keys(variant="paper"))
    assert sorted(chosen.indices) == list(np.flatnonzero(view.valid))
    assert chosen.clusters["quota"][6] == 1 == chosen.clusters["density"][6]


def test_overflow_of_the_softmax():
    chosen = coincide.select(make_view(), keys(tau=1e-4, allocation="exact"))
    assert np.all(np.isfinite(chosen.clusters["probability"])) and len(chosen.indices) == make_view().budget


def test_wrong_keys_are_one_sentence():
    view = make_view()
    cases = [
        ({"variant": "offical"}, "did you mean 'official'"),
        ({"allocation": "sequentail"}, "did you mean 'sequential'"),
        ({"intra": ""}, "unknown select.intra"),
        ({"tau": 0.0}, "select.tau is 0.0"),
        ({"sigma": -1.0}, "select.sigma is -1.0"),
        ({"min_per_cluster": 50}, "the budget is"),
        ({"weights": "transfre"}, "did you mean 'transfer'"),
        ({"gram": "float16"}, "unknown select.gram 'float16'"),
        ({"refine": -1}, "select.refine is -1; expected 0 or more"),
        ({"cache_mib": 0}, "select.cache_mib is 0; expected 1 or more"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            coincide.select(view, keys(**changes))
    with pytest.raises(UserError, match="do not split into 7 layers"):
        coincide.select(dataclasses.replace(view, num_layers=7), keys())
    with pytest.raises(UserError, match="needs clusters"):
        coincide.select(dataclasses.replace(view, assignment=None), keys())


def test_each_criterion_alone():
    view = make_view()
    both = coincide.select(view, keys(allocation="exact")).clusters
    S, D, size = both["transferability"], both["density"], len(view.centroids)
    for weights, score in (("both", S / D), ("transfer", S), ("density", 1 / D), ("equal", np.zeros(size))):
        found = coincide.select(view, keys(weights=weights, allocation="exact", tau=0.3)).clusters
        np.testing.assert_allclose(found["score"], score, rtol=1e-12)
        share = np.exp(score / 0.3)
        np.testing.assert_allclose(found["probability"], share / share.sum(), rtol=1e-12)
    assert np.ptp(found["probability"]) == 0


def test_swap_sweeps_change_no_quota_and_lower_mmd():
    view = make_view()
    plain, swapped = (coincide.select(view, keys(refine=sweeps)) for sweeps in (0, 2))
    np.testing.assert_array_equal(plain.clusters["quota"], swapped.clusters["quota"])
    assert len(set(swapped.indices)) == len(swapped.indices) and np.all(view.valid[swapped.indices])
    last = np.cumsum(plain.clusters["quota"][np.argsort(plain.clusters["probability"], kind="stable")[::-1]]) - 1
    last = last[np.diff(last, prepend=-1) > 0]
    assert np.all(swapped.records["score"][last] <= plain.records["score"][last] + 1e-15)
    assert np.sum(swapped.records["score"][last] < plain.records["score"][last]) >= 2
    small = coincide.select(view, keys(refine=2, cache_mib=1))
    np.testing.assert_array_equal(small.indices, swapped.indices)


def test_float32_tells_its_cost(capsys):
    view = make_view()
    found = coincide.select(view, keys(gram="float32"))
    summary = found.summary
    partial = np.sum(
        (found.clusters["quota"] > 0) & (found.clusters["quota"] < np.bincount(view.assignment[view.valid]))
    )
    assert summary["gram"] == "float32" and summary["gram_audited"] == partial > 0
    assert 0.8 < summary["gram_equal_picks"] <= 1 and 0.9 < summary["gram_mmd2_ratio"] < 1.2
    assert "of the picks are the same" in capsys.readouterr().out
    assert not coincide.select(view, keys()).summary


def test_features_on_the_device_give_the_same():
    view = make_view()
    rows = jax.numpy.asarray(view.features(np.arange(len(view.valid))))
    for changes in ({}, {"intra": "nearest"}, {"cache_mib": 1}):
        here = coincide.select(dataclasses.replace(view, features=rows), keys(**changes))
        np.testing.assert_array_equal(here.indices, coincide.select(view, keys(**changes)).indices)


def test_float32_without_an_audit_says_so(capsys):
    """Clusters whose matrix the memory does not hold are not made whole in float64 either."""
    view = make_view(rows=2400, k=2)
    summary = coincide.select(view, keys(gram="float32", cache_mib=1)).summary
    assert summary == {"gram": "float32", "gram_audited": 0}
    assert "all 2 clusters that are picked from in part have more than 128 records" in capsys.readouterr().out


def test_long_work_inside_large_clusters_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(metrics, "LOG_EVERY_SECONDS", 0.0)
    found = coincide.select(make_view(rows=900), keys(cache_mib=1, refine=1, gram="float32"))
    output = capsys.readouterr().out
    for unit in ("clusters", "picks in large clusters", "clusters refined", "clusters picked from in float64 too"):
        done = [line.split()[1].split("/") for line in output.splitlines() if f" {unit} · " in line]
        assert done and done[-1][0] == done[-1][1], unit
    assert "places looked at in cluster" in output and len(found.indices)
