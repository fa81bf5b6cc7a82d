"""Every record equally likely: the pool as one arm, in keyed random order, without repeats within an epoch."""

from coincide_jax.kernels import bandits
from coincide_jax.kernels.bandits import Sampler


def uniform(settings) -> Sampler:
    """No state; hand the records in as ONE arm (over several arms it is uniform over arms, not over records)."""
    del settings  # nothing to set
    return bandits.UNIFORM
