"""LoRA (arXiv 2106.09685) on the decoder's products, as a tree of its own: {target: {"a": [l, …, r], "b": [l, r, …]}}.

`vlm.forward(..., lora=(adapters, scale, dropout))` adds scale · dropout(x) A B to each target; scale = alpha / rank.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import unknown
from coincide_jax.models import decoder
from coincide_jax.models.layers import init, matrix
from coincide_jax.models.vlm import VLMConfig

__all__ = ["abstract", "init", "merge"]


def abstract(cfg: VLMConfig, rank: int, targets: Sequence[str]) -> dict:
    """The adapters' parameters; A as PEFT draws it (variance 1/(3·inputs)), B zero: at first nothing is changed.

    Raises:
      UserError: a target that is no product of the decoder.
    """
    size, depth, tree = decoder.sizes(cfg.decoder), cfg.decoder.depth, {}
    for name in targets:
        if name not in decoder.PROJECTIONS:
            raise unknown("LoRA target", name, decoder.PROJECTIONS)
        inputs, outputs = (
            {decoder.AXES[letter]: size[letter] for letter in letters} for letters in decoder.PROJECTIONS[name]
        )
        source = f"base_model.model.{decoder.SOURCE}.layers.{{layer}}.{decoder.NAMES[name]}"
        fan_in = 1
        for count in inputs.values():
            fan_in *= count
        tree[name] = {
            "a": matrix(inputs, {"rank": rank}, f"{source}.lora_A.weight", std=(3 * fan_in) ** -0.5, layers=depth),
            "b": matrix({"rank": rank}, outputs, f"{source}.lora_B.weight", std=0.0, layers=depth),
        }
    return tree


def merge(params: dict, adapters: dict, scale: float) -> dict:
    """Parameters whose plain forward pass is that of `params` with the adapters (without dropout)."""
    blocks = dict(params["decoder"]["blocks"])
    for name, pair in adapters.items():
        inputs, outputs = decoder.PROJECTIONS[name]
        change = jnp.einsum(
            f"l{inputs}r,lr{outputs}->l{inputs}{outputs}", pair["a"], pair["b"], precision=jax.lax.Precision.HIGHEST
        )
        blocks[name] = blocks[name] + scale * change
    return params | {"decoder": params["decoder"] | {"blocks": blocks}}
