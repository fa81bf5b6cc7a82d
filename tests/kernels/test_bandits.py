"""Arms: probabilities sum to one over what is alive, draws follow them, dead arms are never drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.kernels import bandits


def test_proportional_is_uniform_without_a_positive_reward_and_follows_rewards_otherwise():
    alive = jnp.asarray([True, True, False, True])
    np.testing.assert_allclose(
        bandits.proportional(jnp.asarray([-1.0, 0.0, 5.0, -2.0]), alive, 0.2), [1 / 3, 1 / 3, 0, 1 / 3]
    )
    p = bandits.proportional(jnp.asarray([3.0, -4.0, 5.0, 1.0]), alive, 0.3)
    np.testing.assert_allclose(p, [0.7 * 0.75 + 0.1, 0.1, 0.0, 0.7 * 0.25 + 0.1], rtol=1e-6)


def test_exponential_survives_weights_whose_exponentials_overflow():
    p = bandits.exponential(jnp.asarray([1e4, 1e4, -1e4, 2e4]), jnp.asarray([True, True, True, False]), 0.1)
    np.testing.assert_allclose(p, [0.45 + 0.1 / 3, 0.45 + 0.1 / 3, 0.1 / 3, 0.0], rtol=1e-6)


def test_draws_follow_the_probabilities_and_never_touch_a_dead_arm():
    p = jnp.asarray([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    u = (jnp.arange(4096, dtype=jnp.float32) + 0.5) / 4096
    counts = np.bincount(jax.vmap(lambda u: bandits.draw(p, u))(u), minlength=6)
    np.testing.assert_allclose(counts / 4096, p, atol=1e-3)
    assert (counts[[0, 2, 5]] == 0).all()


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-24])
def test_ends_of_the_unit_interval_hit_living_arms(u):
    p = jnp.zeros(10_000).at[jnp.asarray([17, 9_000])].set(jnp.asarray([1e-9, 1.0]))
    assert int(bandits.draw(p, jnp.float32(u))) == (17 if u == 0.0 else 9_000)


def test_tsallis_sums_to_one_for_any_number_of_arms_and_spread_of_losses():
    for arms, spread, eta in ((1, 1.0, 1.0), (7, 0.0, 2.0), (300, 50.0, 0.3), (10_000, 1e6, 0.01), (10_000, 0.0, 1e-3)):
        losses = jnp.asarray(np.random.default_rng(arms).uniform(0, 1, arms) * spread + 5.0, jnp.float32)
        alive = jnp.arange(arms) != 3
        p = np.asarray(bandits.tsallis(losses, alive, jnp.float32(eta)), np.float64)
        assert abs(p.sum() - 1) < 1e-5 and (p >= 0).all() and (arms <= 3 or p[3] == 0)
        # p = 4/(eta (L − x))² with one x: 2/(eta √p) − L is the same for all arms alive
        x = np.asarray(losses, np.float64)[np.asarray(alive)] - 2.0 / (eta * np.sqrt(p[np.asarray(alive)]))
        np.testing.assert_allclose(x, np.median(x), rtol=1e-3, atol=1e-3 / eta)
    np.testing.assert_array_equal(bandits.tsallis(jnp.zeros(3), jnp.zeros(3, bool), jnp.float32(1.0)), [0, 0, 0])


def test_estimate_is_unbiased_for_the_rewards_of_the_arms():
    rng, p, rewards = np.random.default_rng(0), np.asarray([0.7, 0.25, 0.05]), np.asarray([0.2, 0.9, 0.5])
    arms = rng.choice(3, 3000, p=p)
    weight = jnp.asarray(1 / p[arms], jnp.float32)
    found = np.asarray(bandits.estimate(jnp.asarray(rewards[arms], jnp.float32), jnp.asarray(arms), weight, weight > 0))
    np.testing.assert_allclose([found[arms == arm][0] for arm in range(3)], rewards, rtol=0.2)


def test_same_arm_sum_gives_the_slots_of_an_arm_equal_bits():
    arms = jnp.asarray([2, 0, 2, -1, 2])
    counts = jnp.asarray([True, True, True, False, False])
    total = bandits.same_arm_sum(jnp.asarray([0.1, 0.7, 0.3, 9.0, 9.0]), arms, counts)
    np.testing.assert_allclose(total[:3], [0.4, 0.7, 0.4], rtol=1e-6)
    assert total[0] == total[2]
    table = bandits.scatter(jnp.zeros(3), arms, counts, total)
    np.testing.assert_allclose(table, [0.7, 0.0, 0.4], rtol=1e-6)


def test_huge_and_broken_losses_are_held_or_left_out():
    losses, counts = bandits.usable(
        jnp.asarray([1e38, jnp.nan, jnp.inf, -3.0, 2.0]), jnp.asarray([1.0, 1.0, 1.0, 1.0, 0.0])
    )
    assert counts.tolist() == [True, False, False, True, False]
    np.testing.assert_allclose(losses, [1e4, 0.0, 0.0, 0.0, 0.0])
