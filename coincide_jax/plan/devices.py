"""The devices that a plan is made for: those present, or a description such as `4xV100-32GB`."""

import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.peaks import KINDS, Kind, known
from coincide_jax.core.precision import choose
from coincide_jax.kernels.kmeans import tiles

DEFAULT_SHARE = 0.75  # of a GPU's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
LARGEST_SHARE = 0.92
GB = 1e9


class Devices(NamedTuple):
    """`count` accelerators of `kind` with `bytes` of memory each."""

    count: int
    kind: str
    bytes: float
    speed: Kind
    usable: float  # share of the memory that JAX takes as it is
    largest: float  # share that it can be told to take
    host: float = 0.0  # bytes of the host's memory; 0 = not known

    @classmethod
    def parse(cls, text: str) -> "Devices":
        """Reads '4xV100-32GB'.

        Raises:
          UserError: another form, or a kind that is not among `KINDS`.
        """
        found = re.fullmatch(r"(\d+)x([A-Za-z0-9]+)-(\d+(?:\.\d+)?)GB", text.strip())
        if not found or int(found[1]) < 1:
            raise UserError(
                f"--plan_devices: '{text}' is no device description; expected COUNTxKIND-MEMORYGB as in 4xV100-32GB"
            )
        if found[2] not in KINDS:
            raise unknown("accelerator in --plan_devices", found[2], KINDS)
        gpu = found[2] != "CPU" and not found[2].startswith("TPU")
        shares = (DEFAULT_SHARE, LARGEST_SHARE) if gpu else (LARGEST_SHARE, LARGEST_SHARE)
        return cls(int(found[1]), found[2], float(found[3]) * GB, KINDS[found[2]], *shares)

    @classmethod
    def present(cls) -> "Devices":
        """The devices of this process: the memory that JAX has of them, speeds by the sheet; of CPUs, measured."""
        first, count = jax.devices()[0], jax.device_count()
        if first.platform == "cpu":
            kind = Kind("float32", measured(jnp.float32) / count, measured(jnp.float64) / count)
            memory = physical_memory()
            return cls(count, "CPU", memory / count, kind, LARGEST_SHARE, LARGEST_SHARE, memory)
        limit, name = (first.memory_stats() or {}).get("bytes_limit", 0), known(first.device_kind)
        kind = KINDS[name] if name else Kind(choose().compute, 0.0, 0.0)
        name = name or first.device_kind.replace(" ", "")
        return cls(count, name, float(limit), kind, 1.0, 1.0, physical_memory())

    @property
    def cpu(self) -> bool:
        """Whether the devices' memory is the host's."""
        return self.kind == "CPU"

    @property
    def fast(self) -> str:
        """The type of k-means' fast products (of CPUs that are not here: float32)."""
        if self.cpu:
            return "float32" if jax.default_backend() != "cpu" else tiles.fast_dtype().name
        return "bfloat16" if self.kind.startswith("TPU") else "float16"

    def __str__(self) -> str:
        return f"{self.count}x{self.kind}-{self.bytes / GB:.3g}GB"


def measured(dtype, size: int = 1024) -> float:
    """FLOP/s of a product of two square matrices on the first device, the best of three."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices()[0]):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.matmul(x, x, precision=jax.lax.Precision.HIGHEST))
        product(x).block_until_ready()
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            product(x).block_until_ready()
            times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def physical_memory() -> float:
    """Bytes of memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
