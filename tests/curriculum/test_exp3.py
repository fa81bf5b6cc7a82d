"""COINCIDE+ and Exp3: probabilities stay probabilities whatever the losses, and move the right way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from coincide_jax import curriculum

ARMS, BATCH = 7, 6
KEYS = ConfigDict({"name": "exp3", "gamma": 0.1, "mu": 0.3})
ONLINE = {name: curriculum.SAMPLERS[name](KEYS) for name in ("coincide_plus", "exp3")}
UPDATE = {name: jax.jit(sampler.update) for name, sampler in ONLINE.items()}
PROBABILITIES = {name: jax.jit(sampler.probabilities) for name, sampler in ONLINE.items()}

loss = st.floats(width=32) | st.floats(0, 10, width=32) | st.sampled_from([3e38, -3e38, 0.0, 1e-38])
slot = st.tuples(st.integers(-1, ARMS - 1), loss, st.sampled_from([0.0, 1.0, 7.0, 700.0, 1e12]))
steps = st.lists(st.lists(slot, min_size=BATCH, max_size=BATCH), min_size=1, max_size=6)


@pytest.mark.parametrize("name", ONLINE)
@settings(max_examples=60, deadline=None)
@given(steps=steps, dead=st.sets(st.integers(0, ARMS - 1), max_size=ARMS - 1))
def test_never_negative_never_nan_sums_to_one(name, steps, dead):
    state = ONLINE[name].init(ARMS)
    alive = np.asarray([arm not in dead for arm in range(ARMS)])
    for step in steps:
        arms, losses, weight = (np.asarray(column) for column in zip(*step, strict=True))
        weight = np.where(arms < 0, 0.0, weight).astype(np.float32)
        state = UPDATE[name](state, arms.astype(np.int32), losses.astype(np.float32), weight)
        p = np.asarray(PROBABILITIES[name](state, alive))
        assert np.isfinite(p).all() and (p >= 0).all() and (p[~alive] == 0).all()
        assert abs(p.sum() - 1) < 1e-5
        assert (p[alive] >= 0.1 / ARMS - 1e-7).all()


def run(name, losses_of, count=40):
    """Feeds one slot of each arm a step; `losses_of(step)` gives the losses f32[ARMS]. Returns p."""
    state, arms = ONLINE[name].init(ARMS), jnp.arange(ARMS)
    for step in range(count):
        weight = 1.0 / PROBABILITIES[name](state, jnp.ones(ARMS, bool))
        state = UPDATE[name](state, arms, jnp.asarray(losses_of(step), jnp.float32), weight)
    return np.asarray(PROBABILITIES[name](state, jnp.ones(ARMS, bool)))


@pytest.mark.parametrize("name", ONLINE)
def test_the_arm_that_is_being_learned_gains(name):
    p = run(name, lambda step: [2.0, 2.0, 2.0 * 0.9**step, 2.0, 2.0, 2.0, 2.0])
    assert p.argmax() == 2 and p[2] > 1.04 * np.delete(p, 2).max()


@pytest.mark.parametrize("name", ONLINE)
def test_no_reward_on_a_first_visit(name):
    p = run(name, lambda step: [9.0, 1.0, 0.1, 5.0, 2.0, 3.0, 0.0], count=1)
    np.testing.assert_allclose(p, 1 / ARMS, rtol=1e-6)


def test_coincide_plus_is_the_moving_average_of_the_drop():
    sampler, weight = ONLINE["coincide_plus"], jnp.asarray([1.0, 1.0, 1.0])
    state = sampler.init(2)
    for losses in ([2.0, 3.0, 1.0], [1.0, 3.0, 2.0]):  # arm 0 sees one record, arm 1 two
        state = sampler.update(state, jnp.asarray([0, 1, 1]), jnp.asarray(losses), weight)
    np.testing.assert_allclose(state.reward, [0.3 * 1.0, 0.3 * (2.0 - 2.5)], rtol=1e-6)
    np.testing.assert_allclose(sampler.probabilities(state, jnp.ones(2, bool)), [0.95, 0.05], rtol=1e-6)


def test_exp3_estimate_is_importance_weighted_over_the_batch():
    sampler = ONLINE["exp3"]
    state = sampler.update(sampler.init(2), jnp.asarray([0, 1]), jnp.asarray([2.0, 2.0]), jnp.ones(2))
    state = sampler.update(state, jnp.asarray([0, 0]), jnp.asarray([1.0, 1.0]), jnp.asarray([4.0, 4.0]))
    # reward 0.5, estimate 0.5 · 4, exponent gamma · 2 / K
    np.testing.assert_allclose(state.log_weights, [0.0, -0.1 * 2.0 / 2], rtol=1e-6)


@pytest.mark.parametrize("name", ONLINE)
def test_empty_slots_change_nothing(name):
    sampler = ONLINE[name]
    state = sampler.update(sampler.init(3), jnp.asarray([0, 1]), jnp.asarray([2.0, 1.0]), jnp.ones(2))
    same = sampler.update(state, jnp.asarray([-1, -1]), jnp.asarray([9.0, jnp.nan]), jnp.zeros(2))
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(one, two)
