"""COINCIDE+: clusters as bandit arms, the drop of the training loss as reward, probability matching on its average.

It is not Exp3: there is no importance weight and no exponential. `coincide_plus` is Algorithm 1 with its faults mended:
a uniform first round, no reward on a first visit, negative rewards clipped, exhausted arms masked, one arm drawn per
sample. `printed` is Algorithm 1 to the letter, with the smallest guard that keeps it defined.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.curriculum import rewards
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


class PlusState(NamedTuple):
    """reward: f32[K], moving average R; seen: last losses."""

    reward: jax.Array
    seen: rewards.Seen


def coincide_plus(settings: Settings, facts: Pool | None) -> Sampler:
    """p = (1 − gamma) R⁺/ΣR⁺ + gamma/#alive, R ← (1 − mu) R + mu (loss before − loss now)."""
    del facts
    gamma, mu, relative = settings.gamma, settings.mu, settings.reward == "relative"

    def init(arms: int) -> PlusState:
        return PlusState(jnp.zeros(arms), rewards.start(arms, settings.rescale))

    def probabilities(state: PlusState, alive):
        return bandits.proportional(state.reward, alive, gamma)

    def update(state: PlusState, arms, losses, weight) -> PlusState:
        step, seen = rewards.measure(state.seen, arms, losses, weight, relative)
        old = state.reward[jnp.maximum(arms, 0)]
        moved = jnp.where(step.again, (1.0 - mu) * old + mu * step.reward, old)
        return PlusState(bandits.scatter(state.reward, arms, step.counts, moved), seen)

    return Sampler(init, probabilities, update)


def printed(settings: Settings, facts: Pool | None) -> Sampler:
    """p = (1 − gamma) R/ΣR + gamma/K; one arm a step; the first loss before is 0, so that a first reward is −loss.

    As printed, an arm whose reward is the most negative wins when all are negative. The guard: where |ΣR| is below
    1e-12 p is uniform; what comes out negative, or is of an arm without records, counts as 0, and the rest is scaled
    to sum to one.
    """
    del facts
    gamma, mu = settings.gamma, settings.mu

    def init(arms: int) -> PlusState:
        return PlusState(jnp.zeros(arms), rewards.start(arms, rescale=False))

    def probabilities(state: PlusState, alive):
        total = state.reward.sum()
        defined = jnp.abs(total) > 1e-12
        p = (1.0 - gamma) * state.reward / jnp.where(defined, total, 1.0) + gamma / state.reward.shape[0]
        p = jnp.where(alive, jnp.maximum(p, 0.0), 0.0)
        left = p.sum()
        return jnp.where(defined & (left > 1e-12), p / jnp.maximum(left, 1e-12), bandits.uniform(alive))

    def update(state: PlusState, arms, losses, weight) -> PlusState:
        step, seen = rewards.measure(state.seen, arms, losses, weight, relative=False)
        here = jnp.maximum(arms, 0)
        moved = (1.0 - mu) * state.reward[here] + mu * (state.seen.last[here] - step.mean)
        return PlusState(bandits.scatter(state.reward, arms, step.counts, moved), seen)

    return Sampler(init, probabilities, update, per_step=True)
