"""One object that says in which type a device computes. Parameters are float32 everywhere.

TPUs and GPUs of compute capability 8.0 and above compute in bfloat16, CPUs in float32. Older GPUs (V100) have no
bfloat16 and compute in float32; float16 with a dynamic loss scale joins with the training of large models.
Norms, softmax and the loss are float32 whatever the compute type.
"""

import dataclasses

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import unknown

CHOICES = ("auto", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """`compute`: name of the type of products and of the residual stream."""

    compute: str

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
    if name != "auto":
        return Precision(name)
    device = jax.devices()[0] if device is None else device
    if device.platform == "tpu":
        return Precision("bfloat16")
    if device.platform == "gpu" and float(device.compute_capability) >= 8.0:
        return Precision("bfloat16")
    return Precision("float32")
