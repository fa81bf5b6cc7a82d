"""The numbers of benchmarks/bandits.py at a small size: bounds hold and say something; Exp3.S follows the switch."""

import json
import math
import subprocess
import sys

import command
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import bandits, forgetting
from coincide_jax import curriculum
from coincide_jax.curriculum import rehearsal
from coincide_jax.curriculum.settings import Settings
from configs import common

ARMS, STEPS = 5, 2000
VARIANTS = ("exp3", "exp3s", "exp3r", "exp3_ix", "tsallis_inf")


@pytest.fixture(scope="module")
def found():
    return bandits.measure(arms=ARMS, steps=STEPS, runs=8, stretches=2, seed=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_regret_is_below_the_published_bound(found, name):
    row = found["stationary"][name]
    assert 0 < row["regret"] < row["bound"]
    assert row["regret"] < 0.6 * found["stationary"]["uniform"]["regret"], "it hardly learned"
    assert row["best_in_last_tenth"] > 2 / ARMS


def test_the_bounds_are_no_empty_promise(found):
    uniform = found["stationary"]["uniform"]["regret"]
    assert uniform == pytest.approx(0.4 * 4 / 5 * STEPS)
    assert all(found["stationary"][name]["bound"] < uniform for name in ("exp3", "tsallis_inf"))


def test_bounds_by_hand():
    assert bandits.bound("exp3", 10, 1000, 0.1, 0)[0] == pytest.approx(
        2.6217 * math.sqrt(10_000 * math.log(10)), rel=1e-4
    )
    assert bandits.bound("tsallis_inf", 10, 1000, 0.1, 0)[0] == 401.0
    none, one = (bandits.bound("exp3r", 10, 1000, 0.1, resets)[0] for resets in (0, 1))
    assert one - none == pytest.approx(10 * math.log(10) / 0.1)


def test_exp3s_beats_exp3_where_the_best_arm_moves(found):
    rows = found["switching"]
    assert rows["exp3s"]["regret"] < 0.9 * rows["exp3"]["regret"]
    assert rows["exp3s"]["best_in_last_tenth"] > rows["exp3"]["best_in_last_tenth"]


def test_a_task_taken_away_is_drawn_no_more_but_replayed():
    settings = ConfigDict(dict(common.defaults().curriculum) | {"name": "coincide_plus", "rehearsal": 0.2})
    bare = curriculum.make(ConfigDict(dict(settings) | {"rehearsal": 0.0}))
    gone = forgetting.without(bare, 1, 2)
    sampler = rehearsal.rehearsal(gone, Settings.of(settings))
    state, alive, slots = sampler.init(3), jnp.ones(3, bool), jnp.arange(3)
    for step in range(4):
        p = np.asarray(sampler.probabilities(state, alive))
        assert (p[1] == 0) == (step >= 2) and p.sum() == pytest.approx(1)
        state = sampler.update(state, slots, jnp.asarray([1.0, 2.0 + step, 1.0]), jnp.asarray([3.0, -1.0, 3.0]))
    assert float(sampler.replay(state, alive)[1]) > 0.15, "it is being forgotten"
    only = sampler.probabilities(state, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(only, [0, 1, 0])  # nothing else is left


def test_the_command_prints_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bandits", "--arms=5", "--steps=2000", "--runs=8", "--stretches=2"],
        capture_output=True, text=True, cwd=command.ROOT, env=command.environment(), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (only,) = done.stdout.splitlines()
    line = json.loads(only)
    assert line["benchmark"] == "bandits" and line["steps"] == 2000
    assert set(line["stationary"]) == set(line["switching"]) == {*VARIANTS, "uniform"}
