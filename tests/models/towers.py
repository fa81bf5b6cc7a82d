"""A random `transformers` tower as oracle: its saved tensors as our tree, by `Leaf.source`."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from safetensors.numpy import load_file

from coincide_jax.core import axes
from coincide_jax.models import layers

FLOAT32 = jnp.dtype("float32")


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter normal with std 0.2, around 1 where it scales (norms, layer scale): attention is far from
    uniform, and a bias or scale left out shows."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scales = value.ndim == 1 and name.endswith(("weight", "lambda1"))
            value.copy_(torch.randn(value.shape, generator=draw) * 0.2 + float(scales))
    return model.eval()


def saved(model: torch.nn.Module, folder) -> dict[str, np.ndarray]:
    """The tensors that `save_pretrained` writes, by their names in the file."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def tree(abstract, tensors: dict[str, np.ndarray], mesh, prefixes: dict[str, str], unused=()) -> dict:
    """Our tree of a file's tensors, laid on the mesh. prefixes: ours → the file's, the first that fits is replaced.
    Every tensor must be read, except those that begin with one of `unused`."""
    read = set()

    def fetch(name: str) -> np.ndarray:
        ours = next(ours for ours in prefixes if name.startswith(ours))
        name = prefixes[ours] + name.removeprefix(ours)
        read.add(name)
        return tensors[name]

    def one(leaf: layers.Leaf, place) -> jax.Array:
        stacked, parts = leaf.axes[0] == "layer", []
        shape = leaf.shape[1:] if stacked else leaf.shape
        order = (*range(leaf.inputs, len(shape)), *range(leaf.inputs))
        for name in leaf.names():
            found = fetch(name) if leaf.part is None else fetch(name)[slice(*leaf.part)]
            assert found.shape == leaf.source_shape, (name, found.shape, leaf.source_shape)
            parts.append(found.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)))
        return jax.device_put(np.stack(parts) if stacked else parts[0], place.sharding)

    result = jax.tree.map(one, abstract, layers.abstract_arrays(abstract, mesh), is_leaf=layers.is_leaf)
    left = {name for name in set(tensors) - read if not name.startswith(tuple(unused))}
    assert not left, f"nobody reads {sorted(left)}"
    return result


def apart(found, expected) -> float:
    """max |a - b| / max |b|; the oracle's values must be far from zero and from constant."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape and expected.std() > 0.01
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def meshes() -> tuple:
    """One device, and eight as 4 × 2."""
    return axes.make_mesh(1, jax.devices()[:1]), axes.make_mesh(2, jax.devices())
