"""How many FLOP/s a device can reach: what model FLOP utilisation is a share of."""

import functools
import time

import jax
import jax.numpy as jnp

# dense products of half precision with float32 sums, as the makers publish them, of one JAX device; the longest name
# that the device's kind holds counts
PUBLISHED = {
    "V100": 125e12,
    "T4": 65e12,
    "L4": 121e12,
    "A100": 312e12,
    "H100": 989e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "TPU v3": 61.5e12,  # a device is one of a chip's two cores
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
HALF = ("bfloat16", "float16")
SIZES = {"cpu": 512}  # of the square matrices measured; elsewhere 4096
CHAIN = 4
RUNS = 5


def total(compute: str, mesh) -> tuple[float, str]:
    """FLOP/s of all devices of a mesh in a compute type, and where the number is from: 'published', or 'measured' by
    `matmul` on the first device. The devices of one CPU share its cores and count once."""
    device = mesh.devices.flat[0]
    names = [name for name in PUBLISHED if name in device.device_kind]
    if names and compute in HALF:
        return PUBLISHED[max(names, key=len)] * mesh.size, "published"
    count = jax.process_count() if device.platform == "cpu" else mesh.size
    return count * matmul(compute, SIZES.get(device.platform, 4096), CHAIN, RUNS), "measured"


@functools.lru_cache(maxsize=8)
def matmul(compute: str, size: int, chain: int, runs: int) -> float:
    """FLOP/s of a chain of square products in a type on the first device, the best of some runs: what it can reach."""

    @jax.jit
    def run(x, w):
        return jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x)

    draw, dtype = jax.random.split(jax.random.key(0)), jnp.dtype(compute)
    with jax.set_mesh(jax.make_mesh((), (), devices=jax.local_devices()[:1])):
        x, w = (jax.random.normal(key, (size, size), dtype) * jnp.asarray(size**-0.5, dtype) for key in draw)
        seconds = []
        for _ in range(1 + runs):
            begin = time.perf_counter()
            jax.block_until_ready(run(x, w))
            seconds.append(time.perf_counter() - begin)
    return 2.0 * size**3 * chain / min(seconds[1:])
