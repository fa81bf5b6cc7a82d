"""Rehearsal: forgetting is seen and replayed, the sampler inside is undisturbed, the coverage promise is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.curriculum import rehearsal
from coincide_jax.kernels import bandits, plan
from configs import common

ARMS = 5
FACTS = curriculum.pool(np.repeat(np.arange(ARMS), 40), ARMS)


def made(**changes):
    keys = dict(common.defaults().curriculum) | {"name": "coincide_plus", "rehearsal": 0.2, "mu": 0.5} | changes
    return curriculum.make(ConfigDict(keys), FACTS)


def feed(sampler, state, arms, losses, replay):
    weight = jnp.where(jnp.asarray(replay), -1.0, float(ARMS))
    return sampler.update(state, jnp.asarray(arms), jnp.asarray(losses, jnp.float32), weight)


def test_forgetting_is_the_replayed_loss_above_its_best():
    sampler = made()
    state = feed(sampler, sampler.init(ARMS), [0, 1, 2], [9.0, 9.0, 9.0], [False] * 3)
    np.testing.assert_array_equal(rehearsal.forgetting(state), np.zeros(ARMS))
    np.testing.assert_allclose(
        sampler.replay(state, jnp.asarray([True, True, True, False, False])), [0.2 / 3] * 3 + [0, 0]
    )
    for losses in ([2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [3.0, 1.0, 2.0]):  # averages 2, 1.5, 2.25 · 1, 1, 1 · 1, 1.5, 1.75
        state = feed(sampler, state, [0, 1, 2], losses, [True] * 3)
    np.testing.assert_allclose(rehearsal.forgetting(state), [0.75, 0, 0.75, 0, 0], rtol=1e-6)
    r = sampler.replay(state, jnp.asarray([True, True, True, True, False]))
    explored = 0.1 / 4
    np.testing.assert_allclose(
        r, 0.2 * np.asarray([0.45 + explored, explored, 0.45 + explored, explored, 0]), rtol=1e-5
    )


def test_the_sampler_inside_does_not_see_replays():
    alone, sampler = made(rehearsal=0.0), made()
    bare, state = alone.init(ARMS), sampler.init(ARMS)
    for number in range(4):
        losses = [3.0 - number, 2.0, 7.0 + number]
        bare = feed(alone, bare, [0, 1, 1], losses, [False, False, True])
        state = feed(sampler, state, [0, 1, 1], losses, [False, False, True])
    for one, two in zip(jax.tree.leaves(bare), jax.tree.leaves(state.inner), strict=True):
        np.testing.assert_array_equal(one, two)
    assert float(bare.reward[0]) > 0


def test_a_separate_probe_takes_the_place_of_replayed_losses():
    sampler = made(probe=2)
    state = feed(sampler, sampler.init(ARMS), [0, 1], [9.0, 9.0], [True, True])
    assert not state.known.any()
    for values in ([1.0, 2.0, np.nan, 3.0, 1.0], [2.0, 1.0, 5.0, np.nan, 1.5]):
        state = sampler.probe(state, jnp.asarray(values))
    np.testing.assert_allclose(rehearsal.forgetting(state), [1.0, 0.0, 0.0, 0.0, 0.5])


def run(sampler, rounds, steps, batch, lag):
    """Plans and updates as the loop does; arm 0 alone is rewarding. Returns arms and weights, in order."""
    member = plan.members(np.arange(200), np.repeat(np.arange(ARMS), 40), ARMS)

    @jax.jit
    def draw(state, position, first):
        def p(alive):
            return sampler.probabilities(state, alive)

        ways = bandits.ways(sampler, state)
        return plan.draw_plan(p, jax.random.key(1), member, position, first, np.int32(10**6), steps, batch, **ways)

    update = jax.jit(sampler.update)
    state, position, waiting, found = sampler.init(ARMS), plan.start(ARMS), [], []
    for number in range(rounds + lag):
        drawn, position = draw(state, position, np.int32(number * steps * batch))
        waiting.append(drawn)
        if number < lag:
            continue
        drawn = waiting.pop(0)
        for s in range(steps):
            losses = jnp.where(drawn.arms[s] == 0, 3.0 * 0.9 ** len(found), 1.0)
            state = update(state, drawn.arms[s], losses, drawn.weight[s])
            found.append((np.asarray(drawn.arms[s]), np.asarray(drawn.weight[s])))
    return found


@pytest.mark.parametrize("draw", ["sample", "step"])
@pytest.mark.parametrize("lag", [0, 1])
def test_no_arm_waits_longer_than_promised(lag, draw):
    steps = 3 if draw == "sample" else ARMS  # of a round: it has room for a visit of every arm
    changes = {"gamma": 0.0, "round_steps": steps, "lag": lag, "rehearsal": 0.0, "draw": draw}
    promised = made(**changes, visits=2, window=8 * steps)
    ages, longest = np.zeros(ARMS, int), np.zeros(ARMS, int)
    found = run(promised, 14, steps, 4, lag)
    for arms, _ in found:
        ages += 1
        ages[np.unique(arms[arms >= 0])] = 0
        longest = np.maximum(longest, ages)
    assert longest.max() <= 4 * steps, longest
    if draw == "step":  # one estimate a step, with a weight of one over a small p, wakes what had been dropped
        return
    free = run(made(**changes), 14, steps, 4, lag)
    late = np.concatenate([arms for arms, _ in free[-4 * steps :]])
    assert len(set(late.tolist())) < ARMS, "without the promise some arm is dropped, or this test says nothing"


def test_a_share_of_the_slots_is_replayed():
    found = run(made(rehearsal=0.3, round_steps=3), 10, 3, 4, 0)
    replayed = np.concatenate([weight for _, weight in found]) < 0
    assert 0.15 < replayed.mean() < 0.45
