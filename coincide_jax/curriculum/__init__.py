"""In what order a target sees its records. One file a sampler; a new one is a file and a line here."""

from coincide_jax.core import errors
from coincide_jax.curriculum import exp3, uniform
from coincide_jax.kernels.bandits import Sampler

SAMPLERS = {
    "uniform": uniform.uniform,
    "coincide_plus": exp3.coincide_plus,
    "exp3": exp3.exp3,
}


def make(settings) -> Sampler:
    """The sampler that `config.curriculum` names.

    Raises:
      UserError: unknown name, or a constant out of its range.
    """
    if settings.name not in SAMPLERS:
        raise errors.unknown("curriculum.name", settings.name, SAMPLERS)
    for key, low, high in (("gamma", 0.0, 1.0), ("mu", 0.0, 1.0)):
        if not low <= settings[key] <= high:
            raise errors.UserError(f"curriculum.{key} is {settings[key]}; expected a number from {low:g} to {high:g}")
    return SAMPLERS[settings.name](settings)
