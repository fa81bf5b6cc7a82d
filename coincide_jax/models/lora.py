"""LoRA (arXiv 2106.09685) as a tree of its own: W + scale · A B on chosen products of the decoder, scale = alpha / rank.

A is drawn Kaiming-uniform (a = √5, which is uniform within ±1/√inputs), B is zero, so a fresh adapter changes nothing.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import unknown
from coincide_jax.models import decoder
from coincide_jax.models.decoder import AXES, PROJECTIONS
from coincide_jax.models.layers import Leaf, stack
from coincide_jax.models.vlm import VLMConfig


def abstract(cfg: VLMConfig, rank: int, targets: Sequence[str]) -> dict:
    """`{projection: {'a': [l, inputs…, r], 'b': [l, r, outputs…]}}` as `layers.Leaf`s.

    Raises:
      UserError: a target that is no projection of the decoder.
    """
    size, tree = decoder.sizes(cfg.decoder), {}
    for name in targets:
        if name not in PROJECTIONS:
            raise unknown("LoRA target", name, PROJECTIONS)
        inputs, outputs = ([size[letter] for letter in letters] for letters in PROJECTIONS[name])
        ins, outs = ([AXES[letter] for letter in letters] for letters in PROJECTIONS[name])
        source = f"{decoder.SOURCE}.layers.{{layer}}.{decoder.NAMES[name]}"
        fan_in, fan_out = math.prod(inputs), math.prod(outputs)
        a = Leaf((*inputs, rank), (*ins, "rank"), "uniform", fan_in**-0.5, f"{source}.lora_A.weight", len(ins), (rank, fan_in))
        b = Leaf((rank, *outputs), ("rank", *outs), "zeros", 0.0, f"{source}.lora_B.weight", 1, (fan_out, rank))
        tree[name] = {"a": stack(a, cfg.decoder.depth), "b": stack(b, cfg.decoder.depth)}
    return tree


@jax.jit
def merge(params: dict, adapters: dict, scale: float) -> dict:
    """The whole tree with `scale` · A B added to the weights that have adapters; the argument stays as it is."""

    def added(name: str, weight: jax.Array) -> jax.Array:
        inputs, outputs = PROJECTIONS[name]
        where = jax.typeof(weight).sharding
        change = jnp.einsum(
            f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", adapters[name]["a"], adapters[name]["b"],
            precision=jax.lax.Precision.HIGHEST, out_sharding=None if where.mesh.empty else where,
        )  # fmt: skip
        return weight + scale * change

    blocks = params["decoder"]["blocks"]
    merged = blocks | {name: added(name, blocks[name]) for name in adapters}
    return params | {"decoder": params["decoder"] | {"blocks": merged}}
