"""Models in and out: our model folders and Hugging Face's, PEFT's adapter folders.

`load` reads both kinds, `export` and `export_adapter` write what transformers and PEFT load.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from coincide_jax.core import artifacts, checkpoint, precision
from coincide_jax.core.errors import unknown
from coincide_jax.models import decoder, vlm
from coincide_jax.models.hf import layouts, read
from coincide_jax.models.hf.write import export, export_adapter
from coincide_jax.models.vlm import VLMConfig

__all__ = ["STORAGES", "describe", "export", "export_adapter", "load"]

STORAGES = ("float32", "compute")


def describe(folder: pathlib.Path, name: str) -> tuple[object, dict]:
    """Configuration and card of a folder, as `load` gives them for the whole model; no weights are read."""
    folder, chosen = pathlib.Path(folder), precision.choose(name)
    if (folder / "model.json").is_file():
        card = artifacts.read_json(folder / "model.json")
        return own(card, chosen)
    found = layouts.find(folder, chosen)
    return found.cfg, found.card


def load(
    folder: pathlib.Path,
    mesh: Mesh,
    name: str,
    *,
    storage: str = "float32",
    layers: int | None = None,
    head: bool = True,
) -> tuple[dict, object, dict]:
    """Reads a model folder (`core/checkpoint.py`) or a Hugging Face folder (`layouts.find`) onto the mesh.

    Args:
      name: `config.device.precision`.
      storage: 'float32' (every parameter is trained) or 'compute': weights held in the type they are computed in
        (extraction, evaluation, the frozen base of LoRA).
      layers: only the first so many of the decoder's layers; None = all.
      head: whether the decoder's head is read; without it, there are no logits.

    Returns:
      Parameters, configuration (a VLMConfig, or for plain towers DecoderConfig, VisionConfig, TextConfig, CLIPConfig;
      its decoder has `layers` layers), and the card: config, image_size, vocab, template, system, mean, of the whole
      model.

    Raises:
      UserError: unknown precision or storage; a folder that is missing, incomplete, not of a known layout, of other
      shapes or changed on disk.
    """
    if storage not in STORAGES:
        raise unknown("storage", storage, STORAGES)
    folder, chosen = pathlib.Path(folder), precision.choose(name)
    dtype = jnp.dtype(jnp.float32) if storage == "float32" else chosen.dtype
    if (folder / "config.json").is_file() and not (folder / "model.json").is_file():
        found = layouts.find(folder, chosen)
        tensors = read.match(found)
        tree, cfg = held(found.abstract, found.cfg, layers, head)
        return read.place(tree, tensors, mesh, dtype), cfg, found.card
    params, card = checkpoint.load_model(
        folder, mesh, lambda card: vlm.abstract(VLMConfig.from_dict(card["config"], chosen))
    )
    whole, card = own(card, chosen)
    params, cfg = held(params, whole, layers, head)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params), cfg, card


def own(card: dict, chosen: precision.Precision) -> tuple[VLMConfig, dict]:
    """Configuration and card of one of our model folders, from its model.json."""
    cfg = VLMConfig.from_dict(card["config"], chosen)
    return cfg, {"mean": list(cfg.vision.mean)} | card


def held(tree: dict, cfg, layers: int | None, head: bool) -> tuple[dict, object]:
    """The part of a tree (of parameters or of leaves) that is kept, and its configuration."""
    whole = cfg.decoder if isinstance(cfg, VLMConfig) else cfg
    if not isinstance(whole, decoder.DecoderConfig) or (layers is None and head):
        return tree, cfg
    part = dict(tree["decoder"] if isinstance(cfg, VLMConfig) else tree)
    if not head:
        part.pop("head", None)
        part.pop("head_bias", None)
    if layers is not None and layers < whole.depth:
        shorter = dataclasses.replace(whole, depth=layers, layer_shapes=whole.layer_shapes[:layers])
        blocks = part["blocks"]
        abstract = isinstance(jax.tree.leaves(blocks, is_leaf=read.is_leaf)[0], read.Leaf)
        part["blocks"] = decoder.abstract(shorter)["blocks"] if abstract else decoder.first_layers(blocks, layers)
        whole = shorter
    if isinstance(cfg, VLMConfig):
        return tree | {"decoder": part}, dataclasses.replace(cfg, decoder=whole)
    return part, whole
