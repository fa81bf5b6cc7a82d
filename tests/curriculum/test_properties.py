"""One table: every sampler, and rehearsal around every online one, has every property that the loop relies on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from ml_collections import ConfigDict

from coincide_jax import curriculum
from coincide_jax.core import axes
from coincide_jax.kernels import bandits
from configs import common

ARMS, BATCH = 7, 6
SIZES = np.asarray([3, 40, 9, 1, 25, 12, 5])
ARM = np.repeat(np.arange(ARMS), SIZES)
DIFFICULTY = np.random.default_rng(0).uniform(0, 4, len(ARM))
FACTS = curriculum.pool(ARM, ARMS, DIFFICULTY)
ONLINE = [name for name in curriculum.SAMPLERS if name not in curriculum.OFFLINE]
SCALED = ("coincide_plus", "exp3", "exp3r", "exp3_ix", "tsallis_inf")
TABLE = {
    **{name: {"name": name} for name in curriculum.SAMPLERS},
    "easy_to_hard by nll": {"name": "easy_to_hard", "difficulty": "nll"},
    **{f"{name} rescaled": {"name": name, "rescale": True} for name in SCALED},
    **{f"{name} rehearsed": {"name": name, "rehearsal": 0.2, "visits": 1, "window": 20} for name in ONLINE},
    **{f"{name} probed": {"name": name, "probe": 1} for name in ("progress", "skill_it")},
}
TABLE = {row: {"round_steps": 3} | changes for row, changes in TABLE.items()}


def keys(**changes):
    return ConfigDict(dict(common.defaults().curriculum) | changes)


def made(row):
    return curriculum.make(keys(**TABLE[row]), FACTS)


COMPILED = {}


def compiled(row):
    """The sampler's functions as the loop has them, compiled; `COMPILED[row]['traces']` counts how often."""
    if row not in COMPILED:
        sampler, traces = made(row), []

        def step(state, alive, arms, losses, weight):
            traces.append(row)
            state = sampler.update(state, arms, losses, weight)
            return state, sampler.probabilities(state, alive), bandits.ways(sampler, state)["due"]

        @jax.jit
        def replay(state, seen):
            return sampler.replay(state, seen)

        COMPILED[row] = {"sampler": sampler, "step": jax.jit(step), "replay": replay, "traces": traces}
    return COMPILED[row]


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)


loss = st.floats(width=32) | st.floats(0, 10, width=32) | st.sampled_from([3e38, -3e38, 0.0, 1e-38])
slot = st.tuples(st.integers(-1, ARMS - 1), loss, st.sampled_from([0.0, 1.0, 7.0, 700.0, 1e12, -1.0]))
steps = st.lists(st.lists(slot, min_size=BATCH, max_size=BATCH), min_size=1, max_size=6)


@pytest.mark.parametrize("row", TABLE)
@hypothesis(max_examples=25, deadline=None)
@given(steps=steps, dead=st.sets(st.integers(0, ARMS - 1), max_size=ARMS - 1))
def test_probabilities_whatever_the_losses(row, steps, dead):
    made = compiled(row)
    state = made["sampler"].init(ARMS)
    alive = np.asarray([arm not in dead for arm in range(ARMS)])
    for step in steps:
        arms, losses, weight = (np.asarray(column) for column in zip(*step, strict=True))
        weight = np.where(arms < 0, 0.0, weight).astype(np.float32)
        state, p, _ = made["step"](state, alive, arms.astype(np.int32), losses.astype(np.float32), weight)
        p = np.asarray(p)
        assert np.isfinite(p).all() and (p >= 0).all() and (p[~alive] == 0).all()
        assert abs(p.sum() - 1) < 1e-5
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state) if leaf.dtype == np.float32)
        if made["sampler"].replay:
            again = np.asarray(made["replay"](state, ~alive))
            assert np.isfinite(again).all() and (again >= 0).all() and (again[alive] == 0).all()
            assert abs(again.sum() - (0.2 if dead else 0.0)) < 1e-5
    assert len(made["traces"]) == 1, "compiled more than once"


def feed(row, state, first, count):
    """`count` steps of a falling loss from step `first` on; returns the state and the probabilities of each step."""
    step, found = compiled(row)["step"], []
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        arms = rng.integers(0, ARMS, BATCH).astype(np.int32)
        losses = (3.0 * np.exp(-0.02 * number * (1 + arms)) * rng.uniform(0.9, 1.1, BATCH)).astype(np.float32)
        weight = np.where(rng.random(BATCH) < 0.2, -1.0, ARMS).astype(np.float32)
        state, p, _ = step(state, np.ones(ARMS, bool), arms, losses, weight)
        found.append(np.asarray(p))
        if compiled(row)["sampler"].probe and number % 3 == 2:
            state = compiled(row)["sampler"].probe(state, jnp.asarray(losses[0] * np.arange(1, ARMS + 1), jnp.float32))
    return state, np.stack(found)


@pytest.mark.parametrize("row", TABLE)
def test_deterministic_and_resumed_exactly(row):
    start = compiled(row)["sampler"].init(ARMS)
    whole, p = feed(row, start, 0, 24)
    again, _ = feed(row, start, 0, 24)
    same(whole, again)
    half, _ = feed(row, start, 0, 11)
    saved = jax.tree.map(np.array, half)  # what a checkpoint holds: arrays, and nothing beside them
    resumed, after = feed(row, jax.tree.map(jnp.asarray, saved), 11, 13)
    same(whole, resumed)
    np.testing.assert_array_equal(p[11:], after)
    assert compiled(row)["sampler"] is made(row), "compiled steps are kept by sampler: equal keys, one object"


@pytest.mark.parametrize("row", TABLE)
def test_form_is_known_without_arrays(row):
    sampler, f32 = made(row), jax.ShapeDtypeStruct((BATCH,), jnp.float32)
    state = jax.eval_shape(lambda: sampler.init(ARMS))
    after = jax.eval_shape(sampler.update, state, jax.ShapeDtypeStruct((BATCH,), jnp.int32), f32, f32)
    p = jax.eval_shape(sampler.probabilities, state, jax.ShapeDtypeStruct((ARMS,), bool))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert p.shape == (ARMS,) and p.dtype == jnp.float32
    assert all(0 not in leaf.shape for leaf in jax.tree.leaves(state)), "checkpoints hold no empty arrays"


@pytest.mark.parametrize("row", TABLE)
def test_the_same_on_one_device_and_on_eight(row):
    found = []
    for devices in (1, 8):
        mesh = axes.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = jax.device_put(compiled(row)["sampler"].init(ARMS), jax.NamedSharding(mesh, jax.P()))
            found.append(jax.device_get(feed(row, state, 0, 6)))
    same(*found)
