"""Counted floating-point operations of models: what model FLOP utilisation (MFU) is a share of.

Convention. A product costs 2 a weight and token forward, 2 for the gradient of its input, 2 for that of its weight. So
a trained weight counts 6 a token, a frozen one on the way back to a trained one 4, a frozen one before all of them (the
vision tower under LoRA) 2. Attention costs 4 · heads · head_dim a query and visible key forward, twice that backward;
keys that the mask hides count nothing, whichever implementation makes their scores. The head counts at supervised
positions alone, where it is computed. Norms, activations, softmax, dropout, the optimiser, padding, and what remat
computes a second time are not counted.
"""

import dataclasses
import math
from typing import NamedTuple

import jax

from coincide_jax.models import decoder, lora, vlm
from coincide_jax.models.layers import is_leaf
from coincide_jax.models.vlm import VLMConfig


class Costs(NamedTuple):
    """FLOP of a training step: for each position that holds a token (image positions too), each pair of a query and a
    key that it sees, each supervised position, each image."""

    position: float
    pair: float
    supervised: float
    image: float


def products(abstract) -> int:
    """Weights of the products of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract, is_leaf=is_leaf) if leaf.inputs)


def elements(abstract) -> int:
    """Numbers of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract, is_leaf=is_leaf))


def encode(cfg: VLMConfig, rows: int, length: int) -> float:
    """A forward pass of `rows` records of `length` positions without the head. Attention: 4 · keys · columns a query,
    with (length + 1) / 2 keys on average in the causal decoder."""
    tree, eye = vlm.abstract(cfg), cfg.vision
    seen = eye.tokens + eye.extra
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


def training(cfg: VLMConfig, mode: str, rank: int, targets: tuple[str, ...]) -> Costs:
    """mode: 'full', 'lora' with adapters of `rank` on `targets`, or 'projector'; in the last two the projector is
    trained and the tower frozen."""
    tree, eye, full = vlm.abstract(cfg), cfg.vision, mode == "full"
    adapters = 0 if mode != "lora" else products(lora.abstract(cfg, rank, targets))
    behind = 6 if full else 4  # a frozen weight behind something trained
    before = 6 if full else 2
    seen = eye.tokens + eye.extra
    columns = cfg.decoder.head_dim * sum(run.count * run.heads for run in decoder.runs(cfg.decoder))
    tower = before * (products(tree["vision"]) * seen + 2 * eye.depth * seen**2 * eye.width)
    return Costs(
        position=float(behind * products(tree["decoder"]["blocks"]) + 6 * adapters),
        pair=float(3 * 4 * columns),
        supervised=float(behind * cfg.decoder.vocab * cfg.decoder.width),
        image=float(tower + 6 * products(tree["projector"]) * eye.tokens),
    )


def step(cfg: VLMConfig, recipe, rows: int, length: int) -> float:
    """What training on `rows` records of `length` positions, all supervised, takes of the devices by a recipe of the
    config (mode, remat, lora.rank, lora.targets); the decoder's forward pass that `remat` repeats is counted."""
    costs = training(cfg, recipe.mode, recipe.lora.rank, recipe.lora.targets)
    each = length * (costs.position + costs.supervised) + length * (length + 1) / 2 * costs.pair + costs.image
    again = encode(cfg, rows, length) - encode(cfg, rows, 0) if recipe.remat else 0.0
    return rows * each + again


def first_layers(cfg: VLMConfig, count: int) -> VLMConfig:
    """The model cut behind its first `count` decoder layers."""
    shapes = cfg.decoder.layer_shapes[:count]
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, depth=count, layer_shapes=shapes))
