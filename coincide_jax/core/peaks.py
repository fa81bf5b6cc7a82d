"""How many FLOP/s a device can reach, by its maker or measured: what utilisation and hours are counted by."""

import functools
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Kind(NamedTuple):
    """What a kind of device computes in, and what its maker's sheet says of it (dense products, without sparsity)."""

    compute: str  # of `device.precision=auto`
    half: float  # FLOP/s in the compute type; 0 = no figure
    double: float  # FLOP/s in float64; 0 = no figure, or no float64


KINDS = {
    "V100": Kind("float16", 125e12, 7.8e12),
    "T4": Kind("float16", 65e12, 0.25e12),
    "A100": Kind("bfloat16", 312e12, 19.5e12),
    "A10": Kind("bfloat16", 125e12, 0.49e12),
    "A6000": Kind("bfloat16", 155e12, 0.6e12),
    "L40S": Kind("bfloat16", 362e12, 1.4e12),
    "L4": Kind("bfloat16", 121e12, 0.47e12),
    "RTX3090": Kind("bfloat16", 71e12, 0.56e12),
    "RTX4090": Kind("bfloat16", 165e12, 1.3e12),
    "H100": Kind("bfloat16", 989e12, 67e12),
    "H100PCIe": Kind("bfloat16", 756e12, 51e12),
    "H200": Kind("bfloat16", 989e12, 67e12),
    "B200": Kind("bfloat16", 2250e12, 40e12),
    "TPUv3": Kind("bfloat16", 61e12, 0.0),  # of one of a chip's two cores
    "TPUv4": Kind("bfloat16", 275e12, 0.0),
    "TPUv5e": Kind("bfloat16", 197e12, 0.0),
    "TPUv5p": Kind("bfloat16", 459e12, 0.0),
    "TPUv6e": Kind("bfloat16", 918e12, 0.0),
    "CPU": Kind("float32", 0.0, 0.0),
}
HALF = ("bfloat16", "float16")
SIZES = {"cpu": 512}  # of the square matrices measured; elsewhere 4096
CHAIN = 4
RUNS = 5


def known(device_kind: str) -> str:
    """The name in `KINDS` of what JAX calls a device, '' if it is not there."""
    name = device_kind
    for said, ours in (("TPU ", "TPU"), (" lite", "e"), ("H100 PCIe", "H100PCIe"), ("RTX ", "RTX")):
        name = name.replace(said, ours)
    name = "TPUv5p" if name == "TPUv5" else name
    words = re.split(r"[^A-Za-z0-9]+", name)
    slower = {"NVL", "Laptop", "MaxQ"} & set(words)  # of the same name
    return "" if slower else next((one for one in KINDS if one in words), "")


def total(compute: str, mesh) -> tuple[float, str]:
    """FLOP/s of all devices of a mesh in a compute type, and where the number is from: 'published', or 'measured' by
    `matmul` on the first device. The devices of one CPU share its cores and count once."""
    device = mesh.devices.flat[0]
    name = known(device.device_kind)
    if name and compute in HALF:
        return KINDS[name].half * mesh.size, "published"
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return count * matmul(compute, SIZES.get(device.platform, 4096), CHAIN, RUNS), "measured"


@functools.lru_cache(maxsize=8)
def matmul(compute: str, size: int, chain: int, runs: int) -> float:
    """FLOP/s of a chain of square products in a type on the first device, the best of some runs: what it can reach."""

    @jax.jit
    def run(x, w):
        return jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x)

    dtype = jnp.dtype(compute)
    with jax.set_mesh(jax.make_mesh((), (), devices=jax.local_devices()[:1])):
        draw = jax.random.split(jax.random.key(0))
        x, w = (jax.random.normal(key, (size, size), dtype) * jnp.asarray(size**-0.5, dtype) for key in draw)
        seconds = []
        for _ in range(1 + runs):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, w))
            seconds.append(time.perf_counter() - begin)
    return 2.0 * size**3 * chain / min(seconds[1:])
