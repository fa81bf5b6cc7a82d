"""Frequencies of rotary positions (RoFormer, arXiv 2104.09864) and the published ways to stretch them.

Each way is the one of `transformers` 5 under its name there, from the checkpoint's own numbers: "linear" (position
interpolation, arXiv 2306.15595), "dynamic" (NTK-aware), "yarn" (arXiv 2309.00071), "longrope" (arXiv 2402.13753),
"llama3" (arXiv 2407.21783).
"""

import math

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import unknown


def frequencies(cfg, length: int) -> tuple[jax.Array, float]:
    """Radians a position of each rotated pair, f32[rotary / 2], and the factor of cosines and sines.

    cfg: a `decoder.DecoderConfig`; length: positions that the pass covers, padding included. "dynamic" and "longrope"
    ask for it, as the originals do: the table changes where it passes the length of the pretraining.

    Raises:
      UserError: a scaling that is not among `SCALINGS`.
    """
    plain = cfg.rope_theta ** (-jnp.arange(0, cfg.rotary, 2, dtype=jnp.float32) / cfg.rotary)
    scaling = dict(cfg.rope_scaling)
    name = scaling.get("rope_type", scaling.get("type", "default"))
    if name == "default":
        return plain, 1.0
    if name not in SCALINGS:
        raise unknown("rope scaling", name, SCALINGS)
    return SCALINGS[name](plain, scaling, cfg, length)


def _linear(plain, scaling: dict, cfg, length: int):
    return plain / scaling["factor"], 1.0


def _dynamic(plain, scaling: dict, cfg, length: int):
    """The base grows with the length once it is longer than the pretraining's."""
    factor, reach = scaling["factor"], max(length, cfg.positions) / cfg.positions
    theta = cfg.rope_theta * (factor * reach - (factor - 1)) ** (cfg.rotary / (cfg.rotary - 2))
    return theta ** (-jnp.arange(0, cfg.rotary, 2, dtype=jnp.float32) / cfg.rotary), 1.0


def _llama3(plain, scaling: dict, cfg, length: int):
    """Long waves are stretched, short ones kept, those between blended."""
    factor, low, high = (scaling[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = scaling.get("original_max_position_embeddings", cfg.positions) * plain / (2 * math.pi)
    share = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - share) * plain / factor + share * plain, 1.0


def _yarn(plain, scaling: dict, cfg, length: int):
    """Pairs that turn often are kept, those that hardly turn are stretched, with a ramp between them."""
    original = scaling.get("original_max_position_embeddings", cfg.positions)
    factor = scaling.get("factor") or cfg.positions / original

    def pair(turns: float) -> float:
        """The pair (as a real number) that turns so often over the pretraining's length."""
        return cfg.rotary * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low, high = pair(scaling.get("beta_fast") or 32), pair(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.rotary - 1)
    width = high - low if high != low else 0.001
    stretched = jnp.clip((jnp.arange(cfg.rotary // 2, dtype=jnp.float32) - low) / width, 0.0, 1.0)
    return plain / factor * stretched + plain * (1.0 - stretched), _yarn_factor(scaling, factor)


def _yarn_factor(scaling: dict, factor: float) -> float:
    """Of cosines and sines: as said, or 0.1 ln(factor) + 1 (the paper's eq. 22), or a quotient of two such."""

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return temperature(scaling["mscale"]) / temperature(scaling["mscale_all_dim"])
    return temperature(1.0)


def _longrope(plain, scaling: dict, cfg, length: int):
    """Each pair has a divisor of its own, one set for short and one for long passes."""
    original = scaling.get("original_max_position_embeddings", cfg.positions)
    factor = scaling.get("factor") or cfg.positions / original
    divisors = scaling["long_factor" if length > original else "short_factor"]
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return plain / jnp.array(divisors, jnp.float32), scale


SCALINGS = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
