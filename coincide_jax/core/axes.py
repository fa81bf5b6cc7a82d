"""The mesh, and the one table that says which logical axis lies on which mesh axis.

Mesh axes are Explicit: the sharding is part of an array's type. Rows of a batch are shared by 'data'; weights are
shared by 'data' too (FSDP) and gathered one block at a time by `use`; heads, MLP columns and vocabulary by 'model'.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from coincide_jax.core.errors import UserError

RULES = {
    "batch": "data",
    "embed": "data",  # the model width of a weight: FSDP
    "heads": "model",  # key/value heads, each with the queries that read it
    "mlp": "model",
    "vocab": "model",
    "layer": None,
    "width": None,  # the model width of vectors and tables: too small to be worth a gather
    "group": None,  # queries of one key/value head
    "head_dim": None,
    "patch": None,
    "position": None,
    "rank": None,
}


def make_mesh(model_parallel: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh ('data', 'model') over `devices` (all by default), `model_parallel` of them holding one copy of a layer.

    Raises:
      UserError: `model_parallel` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if model_parallel < 1 or len(devices) % model_parallel:
        raise UserError(f"device.model_parallel is {model_parallel}; expected a divisor of the {len(devices)} devices")
    shape = (len(devices) // model_parallel, model_parallel)
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=devices)


def spec(axes: Sequence[str | None], shape: Sequence[int] | None = None, mesh: Mesh | None = None) -> jax.P:
    """Logical axis names → partition spec. With `shape` and `mesh`, a dimension that its mesh axis does not divide is
    replicated on that axis: this is the only place that decides so.

    Raises:
      ValueError: two of the names lie on one mesh axis.
    """
    names = [None if axis is None else RULES[axis] for axis in axes]
    used = [name for name in names if name]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis: {names}")
    if shape is not None and mesh is not None:
        names = [
            name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape, strict=True)
        ]
    return jax.P(*names)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int] | None = None) -> NamedSharding:
    """The sharding of an array with these logical axes (and this shape, where it may not divide)."""
    return NamedSharding(mesh, spec(axes, shape, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over 'data', every other dimension whole."""
    return sharding(mesh, ("batch",))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves a batch to the devices, rows shared by 'data'.

    Raises:
      UserError: the rows do not divide among the devices.
    """
    count, devices = len(next(iter(batch.values()))), mesh.shape["data"]
    if count % devices:
        raise UserError(f"a batch has {count} rows; expected a multiple of the {devices} devices that share them")
    return put(batch, batch_sharding(mesh))


def put(tree, sharding: NamedSharding):
    """Moves arrays that every process has to the devices, each process the parts that lie on its own."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(array) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree)


def fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """The whole array on the host, of every process; all of them call it. An array of the host stays as it is."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        array = jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, jax.P()))(array)
    return np.asarray(jax.device_get(array))


def own(mesh: Mesh) -> Mesh:
    """A mesh like it over this process's devices, for records that the processes share out among themselves.

    Raises:
      UserError: the process has too few devices for one copy of a layer.
    """
    if jax.process_count() == 1:
        return mesh
    return make_mesh(mesh.shape["model"], jax.local_devices())


def use(tree, dtype):
    """Weights ready for a product: cast to `dtype`, then gathered over 'data' (the FSDP all-gather, made visible).
    Its transpose sums the gradient over 'data' and leaves each device its share."""

    def gather(leaf: jax.Array) -> jax.Array:
        leaf = leaf.astype(dtype)
        names = jax.typeof(leaf).sharding.spec
        if "data" not in names:
            return leaf
        return jax.reshard(leaf, jax.P(*(None if name == "data" else name for name in names)))

    return jax.tree.map(gather, tree)


def row_sharding(array: jax.Array, rank: int) -> jax.P | None:
    """Spec of a result of `rank` dimensions whose rows lie where the rows of `array` lie and whose rest is whole; it is
    named where a product contracts a dimension that 'model' shares. None outside a mesh."""
    here = jax.typeof(array).sharding
    return None if here.mesh.empty else jax.P(here.spec[0], *(None,) * (rank - 1))
