"""Every sampler against the slow simulation of its formula, over 500 steps of a noisy, changing, broken world."""

import jax
import numpy as np
import pytest
import slow_samplers
from ml_collections import ConfigDict

from coincide_jax import curriculum
from configs import common

ARMS, BATCH, STEPS = 6, 5, 500
SIZES = (3, 40, 9, 1, 25, 12)
FACTS = curriculum.pool(np.repeat(np.arange(ARMS), SIZES), ARMS)


def keys(name, **changes):
    return ConfigDict(dict(common.defaults().curriculum) | {"name": name} | changes)


ONLINE = [name for name in curriculum.SAMPLERS if name not in curriculum.OFFLINE]
MEMORY = {"rehearsal": 0.2, "visits": 1, "window": 12, "round_steps": 3}
CASES = [
    *((name, {}) for name in curriculum.SAMPLERS),
    *((name, MEMORY) for name in ONLINE),
    ("coincide_plus", MEMORY | {"probe": 1}),
    ("progress", MEMORY | {"probe": 1, "objective": "accuracy"}),
    *(("progress", {"probe": 1, "objective": objective}) for objective in ("loss", "accuracy")),
    ("skill_it", {"probe": 1}),
    ("coincide_plus", {"reward": "relative"}),
    ("coincide_plus", {"rescale": True}),
    *((name, {"rescale": True, "reward": "absolute"}) for name in ("exp3", "exp3s", "exp3r", "exp3_ix", "tsallis_inf")),
    ("exp3", {"eta": 0.02, "gamma": 0.3}),
    ("exp3r", {"drift": 0.01, "drift_draws": 1.0, "eta": 0.1}),
    ("exp3_ix", {"eta": 0.03}),
    ("tsallis_inf", {"eta": 0.2}),
    ("odm", {"gamma": 1.0}),
    ("progress", {"positive_only": True, "tau": 0.1, "round_steps": 7}),
    ("skill_it", {"eta": 0.5, "round_steps": 3}),
]


@pytest.mark.parametrize(
    ("name", "changes"), CASES, ids=lambda x: x if isinstance(x, str) else ",".join(x) or "default"
)
def test_the_formula(name, changes):
    settings = keys(name, **changes)
    sampler = curriculum.make(settings, FACTS)
    slow = slow_samplers.SLOW[name](ARMS, settings, SIZES)
    slow = slow_samplers.Rehearsed(slow, ARMS, settings) if settings.rehearsal else slow
    probabilities, update, probe, replay = (
        function and jax.jit(function)
        for function in (sampler.probabilities, sampler.update, sampler.probe, sampler.replay)
    )
    rng, state, moved = np.random.default_rng(7), sampler.init(ARMS), []
    for number in range(STEPS):
        alive = np.ones(ARMS, bool) if number < 400 else np.arange(ARMS) != 1
        p = np.asarray(probabilities(state, alive))
        np.testing.assert_allclose(p, slow.p(alive), atol=3e-4, err_msg=f"step {number}")
        moved.append(p)
        arms = rng.choice(np.flatnonzero(alive), BATCH)
        # three arms fall at their own rates, one rises, two stay; one of 25 losses is broken, some slots are empty
        level = np.asarray([2.0, 3.0, 1.0, 0.5, 4.0, 2.5]) * np.exp(
            np.asarray([-0.01, -0.003, 0.0, 0.002, -0.02, 0.0]) * number
        )
        losses = level[arms] * rng.uniform(0.8, 1.2, BATCH)
        losses = np.where(rng.random(BATCH) < 0.04, np.nan, losses).astype(np.float32)
        weight = np.where(rng.random(BATCH) < 0.1, 0.0, 1.0 / np.maximum(p[arms], 0.01)).astype(np.float32)
        arms = np.where(weight > 0, arms, -1).astype(np.int32)
        if replay:
            weight = np.where((rng.random(BATCH) < 0.3) & (weight > 0), -1.0, weight).astype(np.float32)
        state = update(state, arms, losses, weight)
        slow.update(arms, losses, weight)
        if probe and number % 5 == 4:
            values = rng.integers(0, 5, ARMS) / 4 if settings.objective == "accuracy" else level * rng.random(ARMS)
            values = np.where(rng.random(ARMS) < 0.2, np.nan, values).astype(np.float32)
            state = probe(state, values)
            slow.measured({arm: float(value) for arm, value in enumerate(values) if np.isfinite(value)})
        if replay:
            seen = np.arange(ARMS) <= number
            np.testing.assert_allclose(replay(state, seen), slow.replay(seen), atol=2e-4, err_msg=f"step {number}")
            np.testing.assert_array_equal(sampler.due(state), slow.due())
    online = name not in curriculum.OFFLINE
    assert (np.abs(moved[399] - moved[0]).max() > 1e-3) == (online or name.endswith(("easy", "hard")))
    if name == "exp3r" and changes.get("drift") == 0.01:
        assert slow.resets == int(state.resets) > 0
