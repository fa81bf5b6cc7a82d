"""COINCIDE+ and the online samplers move the right way: rewards, first visits, empty slots, drift, many arms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.curriculum import rewards
from configs import common

ARMS = 7
DROPS = ("coincide_plus", "exp3", "exp3s", "exp3r", "exp3_ix", "tsallis_inf", "progress")  # reward = what is learned
FACTS = curriculum.pool(np.arange(ARMS), ARMS)


@functools.cache
def made(name, **changes):
    """The sampler, with its functions compiled."""
    keys = dict(common.defaults().curriculum) | {"name": name, "gamma": 0.1, "mu": 0.3, "round_steps": 2} | changes
    sampler = curriculum.make(ConfigDict(keys), FACTS)
    return sampler._replace(update=jax.jit(sampler.update), probabilities=jax.jit(sampler.probabilities))


def run(name, losses_of, count=40):
    """Feeds one slot of each arm a step; `losses_of(step)` gives the losses f32[ARMS]. Returns p."""
    sampler, arms = made(name), np.arange(ARMS, dtype=np.int32)
    state = sampler.init(ARMS)
    for step in range(count):
        weight = 1.0 / np.asarray(sampler.probabilities(state, np.ones(ARMS, bool)))
        state = sampler.update(state, arms, np.asarray(losses_of(step), np.float32), weight)
    return np.asarray(sampler.probabilities(state, np.ones(ARMS, bool)))


@pytest.mark.parametrize("name", DROPS)
def test_the_arm_that_is_being_learned_gains(name):
    p = run(name, lambda step: [2.0, 2.0, 2.0 * 0.9**step, 2.0, 2.0, 2.0, 2.0])
    assert p.argmax() == 2 and p[2] > 1.04 * np.delete(p, 2).max()


@pytest.mark.parametrize("name", ["odm", "skill_it"])
def test_the_arm_with_the_highest_loss_gains(name):
    p = run(name, lambda step: [2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0])
    assert p.argmax() == 2 and p[2] > 1.04 * np.delete(p, 2).max()


@pytest.mark.parametrize("name", DROPS)
def test_no_reward_on_a_first_visit(name):
    p = run(name, lambda step: [9.0, 1.0, 0.1, 5.0, 2.0, 3.0, 0.0], count=1)
    np.testing.assert_allclose(p, 1 / ARMS, rtol=1e-6)


def test_coincide_plus_is_the_moving_average_of_the_drop():
    sampler, weight = made("coincide_plus"), jnp.asarray([1.0, 1.0, 1.0])
    state = sampler.init(2)
    for losses in ([2.0, 3.0, 1.0], [1.0, 3.0, 2.0]):  # arm 0 sees one record, arm 1 two
        state = sampler.update(state, jnp.asarray([0, 1, 1]), jnp.asarray(losses), weight)
    np.testing.assert_allclose(state.reward, [0.3 * 1.0, 0.3 * (2.0 - 2.5)], rtol=1e-6)
    np.testing.assert_allclose(sampler.probabilities(state, jnp.ones(2, bool)), [0.95, 0.05], rtol=1e-6)


def test_printed_rewards_the_first_visit_by_minus_its_loss_and_then_favours_the_worst():
    sampler = made("printed")
    state = sampler.update(sampler.init(2), jnp.asarray([0, 1]), jnp.asarray([3.0, 1.0]), jnp.ones(2))
    np.testing.assert_allclose(state.reward, [0.3 * -3.0, 0.3 * -1.0], rtol=1e-6)
    np.testing.assert_allclose(sampler.probabilities(state, jnp.ones(2, bool)), [0.9 * 0.75 + 0.05, 0.9 * 0.25 + 0.05])
    mixed = state._replace(reward=jnp.asarray([2.0, -1.0]))  # as printed 1.85 and −0.85
    np.testing.assert_allclose(sampler.probabilities(mixed, jnp.ones(2, bool)), [1.0, 0.0])
    even = state._replace(reward=jnp.asarray([1.0, -1.0]))  # as printed 1/0
    np.testing.assert_allclose(sampler.probabilities(even, jnp.ones(2, bool)), [0.5, 0.5])


def test_exp3_estimate_is_importance_weighted_over_the_batch():
    sampler = made("exp3")
    state = sampler.update(sampler.init(2), jnp.asarray([0, 1]), jnp.asarray([2.0, 2.0]), jnp.ones(2))
    state = sampler.update(state, jnp.asarray([0, 0]), jnp.asarray([1.0, 1.0]), jnp.asarray([4.0, 4.0]))
    # reward 0.5, estimate 0.5 · 4, exponent gamma · 2 / K
    np.testing.assert_allclose(state.log_weights, [0.0, -0.1 * 2.0 / 2], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in curriculum.SAMPLERS if name not in ("progress", "skill_it")])
def test_empty_slots_and_replays_change_nothing(name):
    sampler = made(name)
    arms = np.asarray([0, 1, -1], np.int32)
    state = sampler.update(
        sampler.init(ARMS), arms, np.asarray([2, 1, 0], np.float32), np.asarray([1, 1, 0], np.float32)
    )
    losses, weight = np.asarray([9, np.nan, 3], np.float32), np.asarray([0, 0, -1], np.float32)
    same = sampler.update(state, np.asarray([-1, -1, 1], np.int32), losses, weight)
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(one, two)


def test_progress_by_a_probe_of_accuracy_and_by_a_probe_of_loss():
    by_accuracy = made("progress", probe=1, objective="accuracy", tau=1.0, delta=0.0)
    state = by_accuracy.init(ARMS)
    first = np.asarray([0.0, 0.5, 0.5, 0.5, 0.5, np.nan, 0.2])
    for values in (first, np.asarray([0.5, 0.75, 0.25, 0.5, np.nan, 0.5, 0.9])):
        state = by_accuracy.probe(state, jnp.asarray(values, jnp.float32))
    # zero before counts as one right answer of one record; 3.5 is held to 1; not measured, or once, is no progress
    np.testing.assert_allclose(state.progress, [0.5, 0.5, -0.5, 0.0, 0.0, 0.0, 1.0], rtol=1e-6)
    p = by_accuracy.probabilities(state, np.ones(ARMS, bool))
    np.testing.assert_allclose(p, np.exp(state.progress) / np.exp(state.progress).sum(), rtol=1e-5)
    by_loss = made("progress", probe=1)
    state = by_loss.probe(by_loss.probe(by_loss.init(ARMS), jnp.full(ARMS, 2.0)), jnp.arange(ARMS, dtype=jnp.float32))
    np.testing.assert_allclose(state.progress, [1.0, 0.5, 0.0, -0.5, -1.0, -1.0, -1.0], rtol=1e-6)
    trained = by_loss.update(state, np.zeros(3, np.int32), np.ones(3, np.float32), np.ones(3, np.float32))
    np.testing.assert_array_equal(trained.progress, state.progress)


def test_skill_it_follows_its_graph_and_forgets_beyond_the_window():
    facts = curriculum.pool(np.arange(3), 3, graph=np.asarray([[1.0, 0.5], [0.0, 1.0], [0.0, 0.0]]))
    keys = dict(common.defaults().curriculum) | {"name": "skill_it", "eta": 0.2, "probe": 1}
    sampler = curriculum.make(ConfigDict(keys), facts)
    state = sampler.init(3)
    np.testing.assert_allclose(
        sampler.probabilities(state, jnp.ones(3, bool)), np.exp([0.3, 0.2, 0]) / np.exp([0.3, 0.2, 0]).sum(), rtol=1e-6
    )
    for losses in ([50.0, 50.0], [1.0, 2.0], [1.0, np.nan], [2.0, 3.0]):  # the first one is out, nan keeps 2
        state = sampler.probe(state, jnp.asarray(losses))
    scores = 0.2 * np.asarray([4 + 0.5 * 7, 7.0, 0.0])
    np.testing.assert_allclose(
        sampler.probabilities(state, jnp.ones(3, bool)), np.exp(scores) / np.exp(scores).sum(), rtol=1e-5
    )


def test_percentiles_hold_rewards_to_a_range_and_keep_zero():
    seen = rewards.start(2, rescale=True)
    levels = np.cumsum(np.random.default_rng(0).normal(size=1500))
    for level in levels[:50]:
        step, seen = rewards.measure(seen, jnp.asarray([0, 1]), jnp.asarray([100 - level, 3.0]), jnp.ones(2), False)
        assert (np.abs(step.reward) <= 1).all() and float(step.reward[1]) == 0.0
    drops = np.sort(np.concatenate([np.diff(levels[:50]), np.zeros(49)]))
    span = drops[int(0.95 * 97)] - drops[int(0.05 * 97)]
    expected = np.clip(2 * (levels[49] - levels[48]) / span, -1, 1)
    np.testing.assert_allclose(step.reward[0], expected, rtol=1e-3)
    assert int(seen.recent.count) == 98
    np.testing.assert_allclose(rewards.unit(step, True), [0.5 + 0.5 * expected, 0.5], rtol=1e-3)


def test_the_ring_of_rewards_keeps_the_last_1024():
    seen, arms = rewards.start(1500, rescale=True), jnp.arange(1500)
    for losses in (jnp.full(1500, 2.0), jnp.arange(1500, dtype=jnp.float32) / 1000.0):
        _, seen = jax.jit(rewards.measure, static_argnums=4)(seen, arms, losses, jnp.ones(1500), False)
    np.testing.assert_allclose(np.sort(seen.recent.rewards), np.sort(2.0 - np.arange(476, 1500) / 1000), atol=1e-6)


@pytest.mark.parametrize("name", ["coincide_plus", "exp3", "exp3_ix", "tsallis_inf", "odm"])
def test_ten_thousand_arms_learn_from_batches(name):
    sampler, rng, k = made(name), np.random.default_rng(0), 10_000
    state, alive = sampler.init(k), np.ones(k, bool)
    for number in range(6):  # a tenth of the arms is being learned
        p = np.asarray(sampler.probabilities(state, alive))
        arms = rng.permutation(200)[:128].astype(np.int32)
        losses = np.where(arms < 100, 3.0 * 0.6**number, 1.0).astype(np.float32)
        state = sampler.update(state, arms, losses, (1.0 / p[arms]).astype(np.float32))
    p = np.asarray(sampler.probabilities(state, alive), np.float64)
    assert abs(p.sum() - 1) < 1e-4 and p.max() < 0.5
    assert name == "odm" or p[:100].mean() > p[100:200].mean()
