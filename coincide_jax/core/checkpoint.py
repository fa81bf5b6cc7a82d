"""Checkpoints of a train state, and folders that hold one model, by Orbax.

Orbax writes a step whole or not at all, but does not notice flipped bits in array data. Every leaf therefore carries
a fingerprint that does not depend on how the leaf is laid out over devices; it is taken on the device before the
save, kept beside the arrays, and compared after the restore.

A model folder holds `params/` (Orbax), `tokenizer.json`, `fingerprints.json` and `model.json`, which is chosen by the
caller; the stages write `{"config": VLMConfig.to_dict(), "image_size", "vocab", "template", "system"}`.
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from coincide_jax.core import artifacts, axes
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import say

ODD = 2654435761  # golden-ratio multiplier: neighbouring elements get unlike weights


def _leaf_fingerprint(x: jax.Array) -> jax.Array:
    """uint32 sum of each element's bits times an odd weight that depends on its index: a flipped bit changes it."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    width = x.dtype.itemsize
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    elif width == 4:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    elif width < 4:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint16 if width == 2 else jnp.uint8).astype(jnp.uint32)
    else:
        raise TypeError(f"no fingerprint for {x.dtype}: states hold elements of at most 32 bits")
    index = jnp.zeros_like(bits)
    for axis, size in enumerate(x.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=jax.typeof(x).sharding)
        index = index * jnp.uint32(size) + position
    # Sums of uint32 wrap around and so do not depend on their order: any sharding gives the same number.
    return jnp.sum(bits * (index * jnp.uint32(2 * ODD % 2**32) + jnp.uint32(1)), dtype=jnp.uint32)


@jax.jit
def _fingerprints(tree):
    return jax.tree.map(_leaf_fingerprint, tree)


def _named(tree) -> dict:
    """`{dotted path: leaf}`, in the order of the tree's leaves."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def fingerprints(tree) -> dict[str, int]:
    """Fingerprint of every leaf, `{path: uint32}`; the same for any device count and sharding."""
    return {path: int(value) for path, value in _named(jax.device_get(_fingerprints(tree))).items()}


def fingerprint(params) -> str:
    """One word for a whole tree: equal weights give equal words, on any device count."""
    return hashlib.sha256(json.dumps(sorted(fingerprints(params).items())).encode()).hexdigest()[:16]


def _differing(expected: dict[str, int], found: dict[str, int]) -> list[str]:
    return sorted(path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Checkpoints:
    """The checkpoints of one training run, `keep` newest ones; writing goes on while training does."""

    def __init__(self, folder: pathlib.Path, keep: int):
        self.folder = pathlib.Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, meta: dict) -> None:
        """Begins to write `state` (any tree of arrays, typed random keys included) and `meta` (JSON) as step `step`.

        Returns once the arrays have left the device, so that the caller may donate them.
        """
        record = {"fingerprints": fingerprints(state), "meta": meta}
        # Leaves by name: Orbax then meets no node types of ours or Optax's, some of which hold nothing.
        items = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), record=ocp.args.JsonSave(record))
        self.manager.save(step, args=items)

    def restore(self, abstract_state) -> tuple[int, object, dict] | None:
        """Reads the newest sound checkpoint as `(step, state, meta)`; None when there is none.

        Shapes, dtypes and shardings are those of `abstract_state` (a tree of `jax.ShapeDtypeStruct`), whatever the
        devices were at the save. A checkpoint that cannot be read, or whose bits changed, is left out and deleted; the
        screen says so and the one before it is taken.

        Raises:
          UserError: one of several processes cannot read its part; nothing is deleted.
        """
        named, form = _named(abstract_state), jax.tree.structure(abstract_state)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(named), record=ocp.args.JsonRestore())
        for step in sorted(self.manager.all_steps(), reverse=True):
            try:
                restored = self.manager.restore(step, args=items)
                state = jax.tree.unflatten(form, [restored.state[name] for name in named])
                wrong = _differing(restored.record["fingerprints"], fingerprints(state))
                fault = f"{len(wrong)} arrays changed on disk, the first is {wrong[0]}" if wrong else ""
            except Exception as error:  # of what Orbax and TensorStore meet in a damaged folder, nearly any
                if jax.process_count() > 1:  # the others are in the middle of it; and one that died is no damage
                    raise UserError(
                        f"step {step} of {self.folder} was not read: {_first_line(error)}; the same command tries "
                        f"again; where that fails too, take the folder {step} away: the step before it is then taken"
                    ) from error
                fault = f"it cannot be read: {_first_line(error)}"
            if not fault:
                return step, state, restored.record["meta"]
            say("checkpoint", f"step {step} of {self.folder} is left out ({fault}); the step before it is taken")
            self.manager.delete(step)
        return None

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets the folder go."""
        self.wait()
        self.manager.close()


def save_model(folder: pathlib.Path, params, model: dict, tokenizer: pathlib.Path | None = None) -> None:
    """Writes a model folder; one that is there is replaced, other files in it stay.

    `model.json` goes first when an older model is replaced and comes last: a folder without it holds no model.

    Args:
      params: tree of arrays.
      model: JSON description from which the caller of `load_model` builds the abstract tree.
      tokenizer: file copied as `tokenizer.json`.
    """
    folder = pathlib.Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.remove(folder / "model.json")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "params", params, force=True)
    artifacts.write_json(folder / "fingerprints.json", fingerprints(params))
    if tokenizer is not None:
        with artifacts.atomic(folder / "tokenizer.json") as temporary:
            shutil.copyfile(tokenizer, temporary)
    artifacts.write_json(folder / "model.json", model)


def load_model(folder: pathlib.Path, mesh: jax.sharding.Mesh, abstract_from: Callable[[dict], object]):
    """Reads a model folder onto `mesh`.

    Args:
      abstract_from: gives, from the content of `model.json`, the tree of leaf descriptions (`shape`, `axes`; float32).

    Returns:
      `(params, model)`: the tree of sharded arrays and the content of `model.json`.

    Raises:
      UserError: the folder is missing, incomplete, of other shapes, or its arrays changed on disk.
    """
    folder = pathlib.Path(folder).absolute()
    for name in ("model.json", "fingerprints.json", "params"):
        if not (folder / name).exists():
            raise UserError(f"model folder {folder} has no {name}; expected a model folder that a finished stage left")
    model = artifacts.read_json(folder / "model.json")

    def describe(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=axes.sharding(mesh, leaf.axes, leaf.shape))

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder / "params", jax.tree.map(describe, abstract_from(model)))
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(f"model folder {folder} cannot be read: {_first_line(error)}") from error
    wrong = _differing(artifacts.read_json(folder / "fingerprints.json"), fingerprints(params))
    if wrong:
        raise UserError(f"model folder {folder}: {len(wrong)} arrays changed on disk, the first is {wrong[0]}")
    return params, model
