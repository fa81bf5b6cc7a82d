"""Samplers that learn nothing: every record equally likely, clusters by their size, a coreset in a fixed order."""

import jax.numpy as jnp

from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


def uniform(settings: Settings, facts: Pool | None) -> Sampler:
    """Every record equally likely, without repeats within an epoch: hand the records in as ONE arm.

    Over several arms it is uniform over arms, not over records.
    """
    del settings, facts  # nothing to set
    return bandits.UNIFORM


def proportional(settings: Settings, facts: Pool | None) -> Sampler:
    """p_i = n_i / Σ n over the arms that have records left: strata by cluster size. The state is n, f32[K]."""
    del settings

    def probabilities(state, alive):
        mass = jnp.where(alive, state, 0.0)
        return mass / jnp.maximum(mass.sum(), 1e-30)

    return Sampler(lambda arms: sizes(facts, arms), probabilities, lambda state, arms, losses, weight: state)


def static(settings: Settings, facts: Pool | None) -> Sampler:
    """A coreset as ONE arm, in the order that `rank` gives (curriculum.order=given), or permuted anew each epoch."""
    del facts
    return bandits.UNIFORM._replace(shuffle=settings.order == "random")


def sizes(facts: Pool | None, arms: int):
    """Records of each arm, f32[K].

    Raises:
      ValueError: the sampler was made without them, or for another number of arms.
    """
    if facts is None or len(facts.sizes) != arms:
        raise ValueError(
            f"this sampler needs the sizes of its {arms} arms: curriculum.make(settings, curriculum.pool(…))"
        )
    return jnp.asarray(facts.sizes, jnp.float32)
