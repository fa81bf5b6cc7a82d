"""Model FLOP of passes through a VLM: 2 a weight and token, and attention. Norms, activations, softmax do not count."""

import dataclasses
import math

import jax

from coincide_jax.models import decoder, layers, vlm
from coincide_jax.models.vlm import VLMConfig


def products(abstract) -> int:
    """Weights of the products of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract, is_leaf=layers.is_leaf) if leaf.inputs)


def elements(abstract) -> int:
    """Numbers of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract, is_leaf=layers.is_leaf))


def encode(cfg: VLMConfig, rows: int, length: int) -> float:
    """A forward pass of `rows` records of `length` positions without the head. Attention: 4 · keys · columns a query,
    with (length + 1) / 2 keys on average in the causal decoder."""
    tree, eye = vlm.abstract(cfg), cfg.vision
    seen = eye.tokens + eye.class_token
    image = (
        2 * products({key: tree[key] for key in ("vision", "projector")}) * seen + 4 * eye.depth * seen**2 * eye.width
    )
    text = 2 * products(tree["decoder"]["blocks"]) * length
    heads = sum(run.count * run.heads for run in decoder.runs(cfg.decoder))
    return float(rows * (image + text + 2 * heads * cfg.decoder.head_dim * length * (length + 1)))


def decode(cfg: VLMConfig, rows: int, first: int, count: int) -> float:
    """`count` single tokens a row, the head included, the first of them at position `first`."""
    weights = products(vlm.abstract(cfg)["decoder"]["blocks"]) + cfg.decoder.vocab * cfg.decoder.width
    heads = sum(run.count * run.heads for run in decoder.runs(cfg.decoder))
    keys = count * (first + 1) + count * (count - 1) // 2
    return float(rows * (2 * weights * count + 4 * heads * cfg.decoder.head_dim * keys))


def head(cfg: VLMConfig, rows: int, length: int) -> float:
    """Logits of `length` positions."""
    return 2.0 * rows * length * cfg.decoder.width * cfg.decoder.vocab


def train(cfg: VLMConfig, recipe, rows: int, length: int) -> float:
    """Forward and backward passes: the backward one costs two forward ones, one where weights are frozen (LoRA, whose
    adapters add r of every product); `remat` runs the decoder's forward once more."""
    forward, top = encode(cfg, rows, length), head(cfg, rows, length)
    tower = encode(cfg, rows, 0)  # image and projector
    if recipe.mode == "full":
        return (3 + recipe.remat) * forward + 3 * top
    return tower + (2 + recipe.remat) * (forward - tower) + 2 * top


def first_layers(cfg: VLMConfig, count: int) -> VLMConfig:
    """The model cut behind its first `count` decoder layers."""
    shapes = cfg.decoder.layer_shapes[:count]
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, depth=count, layer_shapes=shapes))
