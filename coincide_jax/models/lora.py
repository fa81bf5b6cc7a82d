"""LoRA (arXiv 2106.09685) on the decoder's products, as a tree of its own: {target: {"a": [l, …, r], "b": [l, r, …]}},
a tuple of such trees where the decoder's blocks are one.

`vlm.forward(..., lora=(adapters, scale, dropout))` adds scale · dropout(x) A B to each target; scale = alpha / rank.
Adapters are float32 whatever the type of the frozen weights. Biases stay frozen.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import unknown
from coincide_jax.models import decoder
from coincide_jax.models.decoder import DecoderConfig
from coincide_jax.models.layers import init, matrix
from coincide_jax.models.vlm import VLMConfig

__all__ = ["abstract", "choose_targets", "init", "merge", "unmerge"]

ALL = "all-linear"


def choose_targets(cfg: DecoderConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """Targets as our names of the block's products, each once, in their order.

    A target is one of our names ("wq"), the last part of the checkpoint's name ("q_proj"), or "all-linear".

    Raises:
      UserError: a target that is no product of this decoder.
    """
    valid, found = decoder.projections(cfg), set()
    files = {name: decoder.NAMES[cfg.family][name].rsplit(".", 1)[-1] for name in valid}
    for target in targets:
        here = [name for name in valid if target in (ALL, name, files[name])]
        if not here:
            raise unknown("LoRA target", target, (ALL, *valid, *files.values()))
        found.update(here)
    return tuple(name for name in valid if name in found)


def abstract(cfg: VLMConfig, rank: int, targets: Sequence[str]) -> dict | tuple:
    """The adapters' parameters; A as PEFT draws it (uniform in ±1/√inputs), B zero: at first nothing is changed.

    Raises:
      UserError: a target that is no product of the decoder.
    """
    targets, names = choose_targets(cfg.decoder, targets), decoder.NAMES[cfg.decoder.family]

    def of_run(run: decoder.Run) -> dict:
        tree = {}
        for name in targets:
            inputs, outputs = decoder.named_sizes(cfg.decoder, run, name)
            source = f"base_model.model.{decoder.SOURCE}.layers.{{layer}}.{names[name]}"
            low, count = {"rank": rank}, run.count
            a = matrix(inputs, low, f"{source}.lora_A.weight", layers=count, init="uniform")
            b = matrix(low, outputs, f"{source}.lora_B.weight", layers=count, init="zeros")
            # a uniform draw in ±bound has the standard deviation bound/√3
            tree[name] = {"a": a.replace(std=a.std / 3**0.5, first=run.first), "b": b.replace(first=run.first)}
        return tree

    return decoder.per_run(cfg.decoder, of_run)


def merge(params: dict, adapters: dict | tuple, scale: float) -> dict:
    """Parameters whose plain forward pass is that of `params` with the adapters (without dropout): W + scale · A B,
    computed in float32, in the type of W."""
    blocks = params["decoder"]["blocks"]
    if isinstance(blocks, tuple):
        merged = tuple(_merged(stack, own, scale) for stack, own in zip(blocks, adapters, strict=True))
    else:
        merged = _merged(blocks, adapters, scale)
    return params | {"decoder": params["decoder"] | {"blocks": merged}}


def unmerge(params: dict, adapters: dict | tuple, scale: float) -> dict:
    """The opposite of `merge`, up to the rounding of its sum."""
    return merge(params, adapters, -scale)


def _merged(blocks: dict, adapters: dict, scale: float) -> dict:
    blocks = dict(blocks)
    for name, pair in adapters.items():
        inputs, outputs = decoder.PROJECTIONS[name]
        a, b = (pair[side].astype(jnp.float32) for side in ("a", "b"))
        change = jnp.einsum(f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", a, b, precision=jax.lax.Precision.HIGHEST)
        weight = blocks[name]
        blocks[name] = (weight.astype(jnp.float32) + scale * change).astype(weight.dtype)
    return blocks
