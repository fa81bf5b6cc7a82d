"""A warm-up: all of its records before any other, in any round; then the sampler as if it had never been there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.kernels import bandits, plan
from configs import common

ARM = np.repeat(np.arange(3), [10, 6, 8])
FIRST = np.arange(24) % 4 == 0  # 3, 1 and 2 of the arms: six in all


def keys(**changes):
    return ConfigDict(dict(common.defaults().curriculum) | {"name": "progress", "round_steps": 2} | changes)


def begin(settings):
    """Sampler, members of its six arms, its state."""
    sampler, _ = curriculum.prepare(settings, np.arange(24), ARM, 3, first=FIRST)
    member = plan.members(np.arange(24), np.where(FIRST, ARM, 3 + ARM), 6, np.arange(24)[::-1])
    return sampler, member, sampler.init(6)


def draw(sampler, member, state, position, number, fresh=None):
    return plan.draw_plan(
        lambda alive: sampler.probabilities(state, alive), jax.random.key(3), member, position,
        np.int32(number * 8), np.int32(10**6), 2, 4, fresh=fresh, **bandits.ways(sampler, state),
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"rehearsal": 0.4, "gamma": 0.5}, {"visits": 1, "window": 4}])
def test_the_warm_up_comes_first_and_whole(changes):
    """Also where the round of eight slots goes over it at its seventh, and whatever is wrapped around the sampler."""
    sampler, member, state = begin(keys(**changes))
    drawn, position = draw(sampler, member, state, plan.start(6), 0)
    drawn = jax.device_get(drawn)
    fresh = drawn.records[drawn.weight > 0].tolist()
    assert set(fresh[:6]) <= set(np.flatnonzero(FIRST).tolist())
    assert len(set(fresh)) == len(fresh) and not sampler.shuffle
    if not changes:
        assert set(fresh[:6]) == set(np.flatnonzero(FIRST).tolist()) and not FIRST[np.asarray(fresh[6:])].any()
        assert int(position.cursor[:3].sum()) == 6


def test_the_sampler_learns_of_both_and_decides_alone_afterwards():
    plain = curriculum.make(keys(), curriculum.pool(ARM, 3))
    sampler, _, state = begin(keys())
    alone = plain.init(3)
    alive = jnp.asarray([False] * 3 + [True] * 3)
    for losses in ([3.0, 2.0, 4.0, 4.0], [2.0, 1.9, 1.0, 1.0], [1.9, 1.9, 0.5, 0.5], [1.8, 1.7, 0.4, 0.4]):
        arms, weight = jnp.asarray([0, 4, 2, 5]), jnp.ones(4)
        state = sampler.update(state, arms, jnp.asarray(losses), weight)
        alone = plain.update(alone, arms % 3, jnp.asarray(losses), weight)
    p = sampler.probabilities(state, alive)
    np.testing.assert_array_equal(p[3:], plain.probabilities(alone, jnp.ones(3, bool)))
    assert not p[:3].any() and p[5] > p[4]
    again = sampler.probabilities(state, jnp.ones(6, bool))  # a later epoch has both kinds
    np.testing.assert_allclose(again[:3] + again[3:], p[3:], rtol=1e-6)


def test_a_second_epoch_goes_over_the_budget_again():
    sampler, member, state = begin(keys())
    position, seen = plan.start(6), []
    for number in range(4):
        drawn, position = draw(sampler, member, state, position, number, fresh=jnp.int32(10))
        state = sampler.update(state, drawn.arms[0], jnp.ones(4), drawn.weight[0])
        seen += drawn.records.ravel().tolist()
    assert len(set(seen)) == 10 and set(seen[:10]) == set(seen[10:20]) == set(seen[20:30])
    assert set(np.flatnonzero(FIRST).tolist()) < set(seen)


@pytest.mark.parametrize("changes", [{}, {"positive_only": True}, {"rehearsal": 0.3}, {"probe": 1}])
def test_probabilities_whatever_the_losses_and_the_arms_that_are_left(changes):
    sampler, _, state = begin(keys(**changes))
    rng, step = np.random.default_rng(0), jax.jit(sampler.update)
    p_of = jax.jit(sampler.probabilities)
    for number in range(60):
        losses = rng.choice([0.0, 1e-8, 3.0, 1e30, np.inf, np.nan], 4).astype(np.float32)
        state = step(
            state, rng.integers(-1, 6, 4).astype(np.int32), losses, rng.choice([0.0, 1.0, -1.0], 4).astype(np.float32)
        )
        if sampler.probe and number % 5 == 0:
            state = sampler.probe(state, jnp.asarray(rng.choice([np.nan, 0.0, 2.0, 1e30], 3), jnp.float32))
        alive = rng.random(6) < 0.6
        p = np.asarray(p_of(state, alive))
        assert np.isfinite(p).all() and (p >= 0).all() and not p[~alive].any()
        assert p.sum() == pytest.approx(float(alive.any()), abs=1e-5)
        if alive[:3].any() and not bool(state.over):
            assert not p[3:].any()
