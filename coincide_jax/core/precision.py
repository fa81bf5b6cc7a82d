"""One object that says in which type a device computes, and the loss scale that float16 needs.

TPUs and GPUs of compute capability 8.0 and above compute in bfloat16, CPUs and GPUs before 7.0 in float32. V100 and
Turing (7.x) have float16 units and no bfloat16: they compute in float16. Trained parameters are float32 whatever the
compute type; so are norms, softmax and the loss.

float16 ends at 65504 and loses what is below 6e-8. The objective is therefore multiplied by a scale before it is
differentiated, and the gradient divided by it: when a gradient overflows, the step is skipped and the scale halved;
after `GROWTH_STEPS` sound steps it is doubled (Micikevicius et al., arXiv 1710.03740). The objective is a sum over
tokens, not a mean, so that a scale of 2^10 here is one of about 2^20 for the mean loss of a micro-batch.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax.training.dynamic_scale import DynamicScale

from coincide_jax.core.errors import unknown

CHOICES = ("auto", "float32", "bfloat16", "float16")
FIRST_SCALE = 2.0**10
LOWEST_SCALE = 2.0**-10  # a gradient that still overflows below it is no matter of scale
GROWTH_STEPS = 200


@dataclasses.dataclass(frozen=True)
class Precision:
    """`compute`: name of the type of products and of the residual stream; `loss_scale`: whether training needs one."""

    compute: str
    loss_scale: bool = False

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type."""
        return jnp.dtype(self.compute)


def choose(name: str = "auto", device: jax.Device | None = None) -> Precision:
    """The precision of `config.device.precision`; 'auto' asks `device` (the first by default).

    Raises:
      UserError: a name that is not among `CHOICES`.
    """
    if name not in CHOICES:
        raise unknown("device.precision", name, CHOICES)
    if name == "auto":
        device = jax.devices()[0] if device is None else device
        name = "float32"
        if device.platform == "tpu":
            name = "bfloat16"
        elif device.platform == "gpu" and float(device.compute_capability) >= 7.0:
            name = "bfloat16" if float(device.compute_capability) >= 8.0 else "float16"
    return Precision(name, loss_scale=name == "float16")


def first_scale() -> DynamicScale:
    """The scale of the first step, as arrays, so that it lives in a train state."""
    return DynamicScale(
        growth_interval=GROWTH_STEPS,
        minimum_scale=LOWEST_SCALE / 2,  # one below the bound, where the loop sees it and stops
        fin_steps=jnp.zeros((), jnp.int32),
        scale=jnp.full((), FIRST_SCALE, jnp.float32),
    )


def next_scale(scale: DynamicScale, finite: jax.Array) -> DynamicScale:
    """The scale after a step whose gradient was `finite` bool[] or not.

    `DynamicScale.value_and_grad` does the same for a gradient that is taken in one piece; ours is a sum over
    micro-batches.
    """
    grow = finite & (scale.fin_steps + 1 >= scale.growth_interval)
    larger = jnp.where(grow, scale.scale * scale.growth_factor, scale.scale)
    smaller = jnp.maximum(scale.scale * scale.backoff_factor, scale.minimum_scale)
    return scale.replace(
        fin_steps=jnp.where(grow | ~finite, 0, scale.fin_steps + 1),
        scale=jnp.where(finite, larger, smaller),
    )
