"""CLIP whole (arXiv 2103.00020): images and texts as unit vectors of one joint space.

For features from CLIP alone and for CLIP scores: the cosine of an image and a text is the product of their vectors.
"""

import dataclasses

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import use
from coincide_jax.core.precision import Precision
from coincide_jax.models import text, vision
from coincide_jax.models.layers import matrix
from coincide_jax.models.text import TextConfig
from coincide_jax.models.vision import VisionConfig


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Constants that a checkpoint owns, and the precision of the device it runs on."""

    vision: VisionConfig  # with its closing norm and every block
    text: TextConfig  # with the joint space's width as `projection`
    precision: Precision


def abstract(cfg: CLIPConfig) -> dict:
    """The parameters of both towers and of the projections into the joint space."""
    projection = matrix({"embed": cfg.vision.width}, {"width": cfg.text.projection}, "visual_projection.weight")
    return {"vision": vision.abstract(cfg.vision), "text": text.abstract(cfg.text), "projection": projection}


def embed_images(params: dict, images: jax.Array, cfg: CLIPConfig) -> jax.Array:
    """Images uint8[b, s, s, 3] → unit vectors f32[b, joint]."""
    dtype = cfg.precision.dtype
    pooled = vision.pooled(params["vision"], images, cfg.vision, dtype).astype(dtype)
    return unit(jnp.einsum("bw,wp->bp", pooled, use(params["projection"], dtype), preferred_element_type=jnp.float32))


def embed_texts(params: dict, tokens: jax.Array, lengths: jax.Array, cfg: CLIPConfig) -> jax.Array:
    """Texts i32[b, t] of `lengths` i32[b] real tokens → unit vectors f32[b, joint]."""
    return unit(text.forward(params["text"], tokens, lengths, cfg.text, cfg.precision.dtype))


def unit(x: jax.Array) -> jax.Array:
    """Rows f32[b, p] scaled to length 1; a zero row stays zero."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0.0, length, 1.0)
