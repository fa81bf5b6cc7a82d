"""Tsallis-INF: follow the regularised leader with the 1/2-Tsallis entropy; nothing to set, optimal for fair and unfair
rewards alike (Zimmert and Seldin 2021)."""

import jax.numpy as jnp

from coincide_jax.curriculum import rewards
from coincide_jax.curriculum.exp3 import LossState, lose
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


def tsallis_inf(settings: Settings, facts: Pool | None) -> Sampler:
    """p_i = 4 (eta (L̂_i − x))⁻² with the x at which p sums to one, L̂_i ← L̂_i + (1/B) Σ (1 − reward)/p_i.

    eta = 2/√t at step t unless it is set.
    """
    del facts

    def init(arms: int) -> LossState:
        return LossState(jnp.zeros(arms), jnp.zeros((), jnp.int32), rewards.start(arms, settings.rescale))

    def probabilities(state: LossState, alive):
        rate = settings.eta or 2.0 / jnp.sqrt((state.time + 1).astype(jnp.float32))
        return bandits.tsallis(state.losses, alive, jnp.float32(rate))

    def update(state: LossState, arms, losses, weight) -> LossState:
        return lose(settings, state, arms, losses, weight, weight)

    return Sampler(init, probabilities, update)
