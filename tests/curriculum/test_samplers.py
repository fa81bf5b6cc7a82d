"""The registry, what is handed in, the offline samplers, mistakes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core.errors import UserError
from coincide_jax.kernels import bandits, plan
from configs import common

FACTS = curriculum.pool(np.repeat(np.arange(4), 5), 4)  # four arms of five records


def keys(**changes):
    return ConfigDict(dict(common.defaults().curriculum) | changes)


@pytest.mark.parametrize("name", curriculum.SAMPLERS)
def test_every_sampler_begins_uniform_over_what_is_alive(name):
    sampler = curriculum.make(keys(name=name), FACTS)
    alive = jnp.asarray([True, False, True, True])
    p = sampler.probabilities(sampler.init(4), alive)
    np.testing.assert_allclose(p, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)


def test_uniform_learns_nothing():
    sampler = curriculum.make(keys())
    state = sampler.update(sampler.init(2), jnp.asarray([0]), jnp.asarray([1.0]), jnp.asarray([1.0]))
    np.testing.assert_array_equal(sampler.probabilities(state, jnp.ones(2, bool)), [0.5, 0.5])


def test_proportional_follows_the_sizes_of_the_arms_that_are_left():
    sampler = curriculum.make(keys(name="proportional"), curriculum.pool(np.repeat([0, 1, 2], [2, 6, 12]), 3))
    state = sampler.init(3)
    np.testing.assert_allclose(sampler.probabilities(state, jnp.ones(3, bool)), [0.1, 0.3, 0.6], rtol=1e-6)
    alive = jnp.asarray([True, True, False])
    np.testing.assert_allclose(sampler.probabilities(state, alive), [0.25, 0.75, 0], rtol=1e-6)


def draw_all(settings, records, arm, arms, difficulty=None):
    """One epoch of the records, in the order that the sampler gives while it learns nothing."""
    sampler, rank = curriculum.prepare(settings, records, arm, arms, difficulty)
    state = sampler.init(arms)
    member = plan.members(records, arm, arms, rank)
    drawn, _ = plan.draw_plan(
        lambda alive: sampler.probabilities(state, alive), jax.random.key(0), member, plan.start(arms),
        0, 10**6, 1, len(records), **bandits.ways(sampler, state),
    )  # fmt: skip
    return drawn.records[0].tolist()


def test_static_keeps_the_order_of_the_coreset_or_permutes_it():
    coreset, arm = np.asarray([7, 3, 9, 1, 4, 8]), np.zeros(6, int)
    assert draw_all(keys(name="static", order="given"), coreset, arm, 1) == coreset.tolist()
    shuffled = draw_all(keys(name="static"), coreset, arm, 1)
    assert shuffled != coreset.tolist() and sorted(shuffled) == sorted(coreset.tolist())
    assert shuffled == draw_all(keys(), coreset, arm, 1), "in random order it is what uniform does with a coreset"


@pytest.mark.parametrize(("name", "sign"), [("easy_to_hard", 1), ("hard_to_easy", -1)])
def test_order_by_difficulty(name, sign):
    records, arm = np.arange(10, 19), np.asarray([2, 0, 1, 2, 0, 1, 2, 0, 1])
    difficulty = np.asarray([5.0, 1.0, 3.5, 4.0, 2.0, 3.0, 6.0, 0.5, 3.2])
    settings = keys(name=name, difficulty="nll")
    of = dict(zip(records.tolist(), sign * difficulty, strict=True))
    found = [of[record] for record in draw_all(settings, records, arm, 3, difficulty)]
    assert found == sorted(found)  # the arms do not overlap here, so by arms and within them is by record
    alone = [of[record] for record in draw_all(settings, records, np.zeros(9, int), 1, difficulty)]
    assert alone == sorted(alone)


def test_without_a_score_arms_are_ordered_by_their_first_loss():
    sampler = curriculum.make(keys(name="easy_to_hard"))
    state, alive = sampler.init(3), jnp.ones(3, bool)
    state = sampler.update(state, jnp.asarray([0, 2]), jnp.asarray([2.0, 1.0]), jnp.ones(2))
    np.testing.assert_array_equal(sampler.probabilities(state, alive), [0, 1, 0])  # not seen yet
    state = sampler.update(state, jnp.asarray([1, 2]), jnp.asarray([3.0, 9.0]), jnp.ones(2))
    np.testing.assert_array_equal(sampler.probabilities(state, alive), [0, 0, 1])  # first loss 1, whatever came later


@pytest.mark.parametrize("name", [name for name in curriculum.SAMPLERS if name != "uniform"])
def test_an_arm_a_sample_or_an_arm_a_step(name):
    assert curriculum.make(keys(name=name), FACTS).per_step == (name == "printed")
    assert curriculum.make(keys(name=name, draw="step"), FACTS).per_step
    assert not curriculum.make(keys(name=name, draw="sample"), FACTS).per_step


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "exp33"}, r"unknown curriculum.name 'exp33'; did you mean 'exp3"),
        ({"gamma": 1.5}, r"curriculum.gamma is 1.5; expected a number from 0 to 1"),
        ({"mu": -0.1}, r"curriculum.mu is -0.1; expected a number from 0 to 1"),
        ({"mu": float("nan")}, r"curriculum.mu is nan; expected a number from 0 to 1"),
        ({"eta": -1.0}, r"curriculum.eta is -1.0; expected a number of 0 or more"),
        ({"tau": 0.0}, r"curriculum.tau is 0.0; expected a number above 0"),
        ({"rehearsal": 1.0}, r"curriculum.rehearsal is 1.0; expected a number from 0 to 0.9"),
        ({"draw": "sampel"}, r"unknown curriculum.draw 'sampel'; did you mean 'sample'"),
        ({"difficulty": "nlll"}, r"unknown curriculum.difficulty 'nlll'; did you mean 'nll'"),
        ({"name": "odm", "reward": "relative"}, r"'odm' has a reward of its own; leave curriculum.reward=''"),
        ({"name": "printed", "rescale": True}, r"'printed' has a reward of its own"),
        ({"name": "static", "pool": "all"}, r"'static', the order of a coreset, but curriculum.pool is 'all'"),
        ({"name": "uniform", "rehearsal": 0.1}, r"wrap an online sampler; curriculum.name is 'uniform'"),
        ({"name": "progress", "objective": "accuracy"}, r"objective is 'accuracy' but curriculum.probe is 0"),
        ({"name": "skill_it", "objective": "accuracy", "probe": 1}, r"'skill_it' goes by evaluation losses"),
        ({"name": "exp3", "probe": 3}, r"curriculum.probe is 3, but 'exp3' measures nothing; set it to 0"),
        ({"name": "progress", "probe": 6}, r"curriculum.probe is 6 records an arm, but arm 0 has 5"),
        ({"name": "exp3", "visits": 6}, r"with rounds of 10 steps at most 5 can be promised"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        curriculum.make(keys(**changes), FACTS)


def test_mistakes_in_what_is_handed_in():
    with pytest.raises(UserError, match=r"arm 1 of 3 has no record that may be drawn \(1 such arms\).*curriculum.k"):
        curriculum.pool(np.asarray([0, 2, 2]), 3)
    with pytest.raises(UserError, match=r"the difficulty of 1 records is not a finite number"):
        curriculum.pool(np.asarray([0, 1]), 2, np.asarray([1.0, np.nan]))
    with pytest.raises(ValueError, match="needs the sizes of its 4 arms"):
        curriculum.make(keys(name="proportional")).init(4)
    with pytest.raises(ValueError, match="no difficulty of 4 arms was given"):
        curriculum.make(keys(name="easy_to_hard", difficulty="nll"), FACTS).init(4)
