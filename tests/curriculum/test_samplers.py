"""The registry, and uniform."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core.errors import UserError


def keys(**changes):
    return ConfigDict({"name": "uniform", "gamma": 0.1, "mu": 0.3} | changes)


@pytest.mark.parametrize("name", curriculum.SAMPLERS)
def test_every_sampler_begins_uniform_over_what_is_alive(name):
    sampler = curriculum.make(keys(name=name))
    alive = jnp.asarray([True, False, True, True])
    p = sampler.probabilities(sampler.init(4), alive)
    np.testing.assert_allclose(p, [1 / 3, 0, 1 / 3, 1 / 3], rtol=1e-6)


def test_uniform_learns_nothing():
    sampler = curriculum.make(keys())
    state = sampler.update(sampler.init(2), jnp.asarray([0]), jnp.asarray([1.0]), jnp.asarray([1.0]))
    np.testing.assert_array_equal(sampler.probabilities(state, jnp.ones(2, bool)), [0.5, 0.5])


def test_mistakes_are_sentences():
    with pytest.raises(UserError, match=r"curriculum.name 'exp33'; did you mean 'exp3'"):
        curriculum.make(keys(name="exp33"))
    with pytest.raises(UserError, match=r"curriculum.gamma is 1.5; expected a number from 0 to 1"):
        curriculum.make(keys(gamma=1.5))
