"""Vision tower: CLIP's ViT (arXiv 2103.00020). Images uint8 → features of every patch.

Patch embedding is a reshape and a product (a convolution whose stride is its kernel). The features are the output of
the last block held, before CLIP's closing norm, class token dropped: what LLaVA reads.
"""

import dataclasses

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding, use
from coincide_jax.models.layers import Leaf, activate, attention, layer_norm, matrix, norm, run_blocks, vector

SOURCE = "vision_tower.vision_model"


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Constants that a checkpoint owns."""

    image_size: int  # pixels
    patch: int  # pixels
    width: int
    depth: int
    heads: int
    mlp: int
    activation: str  # quick_gelu | gelu | gelu_pytorch_tanh
    norm_eps: float
    class_token: bool
    mean: tuple[float, float, float]  # of the channels, of images in [0, 1]
    std: tuple[float, float, float]

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2


def abstract(cfg: VisionConfig) -> dict:
    """The tower's parameters."""
    layers, source = cfg.depth, f"{SOURCE}.encoder.layers.{{layer}}"
    width, heads = {"embed": cfg.width}, {"heads": cfg.heads, "head_dim": cfg.width // cfg.heads}
    mlp, own = {"mlp": cfg.mlp}, {"width": cfg.width}
    blocks = {
        "norm1": norm(cfg.width, True, f"{source}.layer_norm1", layers),
        "norm2": norm(cfg.width, True, f"{source}.layer_norm2", layers),
        "wo": matrix(heads, width, f"{source}.self_attn.out_proj.weight", layers=layers),
        "bo": vector(own, "zeros", f"{source}.self_attn.out_proj.bias", layers),
        "up": matrix(width, mlp, f"{source}.mlp.fc1.weight", layers=layers),
        "up_bias": vector(mlp, "zeros", f"{source}.mlp.fc1.bias", layers),
        "down": matrix(mlp, width, f"{source}.mlp.fc2.weight", layers=layers),
        "down_bias": vector(own, "zeros", f"{source}.mlp.fc2.bias", layers),
    }
    for name in "qkv":
        blocks[f"w{name}"] = matrix(width, heads, f"{source}.self_attn.{name}_proj.weight", layers=layers)
        blocks[f"b{name}"] = vector(heads, "zeros", f"{source}.self_attn.{name}_proj.bias", layers)
    patch = (3, cfg.patch, cfg.patch, cfg.width)
    tokens = cfg.tokens + cfg.class_token
    embeddings = f"{SOURCE}.embeddings"
    leaves = {
        "patch": Leaf(
            patch,
            ("patch", "patch", "patch", "embed"),
            "normal",
            (3 * cfg.patch**2) ** -0.5,
            f"{embeddings}.patch_embedding.weight",
            3,
            (patch[-1], *patch[:-1]),
        ),
        "position": Leaf(
            (tokens, cfg.width),
            ("position", "width"),
            "normal",
            0.02,
            f"{embeddings}.position_embedding.weight",
            0,
            (tokens, cfg.width),
        ),
        "pre_norm": norm(cfg.width, True, f"{SOURCE}.pre_layrnorm"),
        "blocks": blocks,
    }
    if cfg.class_token:
        leaves["class"] = Leaf(
            (cfg.width,), ("width",), "normal", 0.02, f"{embeddings}.class_embedding", 0, (cfg.width,)
        )
    return leaves


def patches(images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """uint8[b, s, s, 3] → normalised patches [b, rows, patch, columns, patch, 3]."""
    count, side = images.shape[0], cfg.image_size // cfg.patch
    mean, std = (jnp.array(part, jnp.float32)[None, None, None] for part in (cfg.mean, cfg.std))
    pixels = ((images.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)
    # a convolution leaves out the pixels that fill no patch
    pixels = pixels[:, : side * cfg.patch, : side * cfg.patch]
    pixels = pixels.reshape(count, side, cfg.patch, side * cfg.patch, 3)
    return pixels.reshape(count, side, cfg.patch, side, cfg.patch, 3)


def forward(params: dict, images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype, *, remat: bool = False) -> jax.Array:
    """Images uint8[b, s, s, 3] → patch features [b, tokens, w] of type `dtype`."""
    x = jnp.einsum("biyjxc,cyxw->bijw", patches(images, cfg, dtype), use(params["patch"], dtype))
    x = x.reshape(x.shape[0], cfg.tokens, cfg.width)
    position = params["position"]
    if cfg.class_token:
        # the class token joins through the table of positions: row 0 of x is nothing but position 0 and the class
        x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
        position = position + jnp.pad(params["class"][None], ((0, cfg.tokens), (0, 0)))
    x = layer_norm(x + position.astype(dtype)[None], params["pre_norm"], cfg.norm_eps)

    rows, tokens, width = x.shape

    def block(x, layer, _):
        weights = use(layer, dtype)
        h = layer_norm(x, layer["norm1"], cfg.norm_eps)
        q, k, v = (jnp.einsum("nw,wkd->nkd", h, weights[f"w{name}"]) + weights[f"b{name}"][None] for name in "qkv")
        q, k, v = (part.reshape(rows, tokens, *part.shape[1:]) for part in (q, k, v))
        mixed = attention(q[:, :, :, None], k, v, None)[:, :, :, 0]
        mixed = mixed.reshape(rows * tokens, *mixed.shape[2:])
        whole = row_sharding(x, 2)
        x = x + jnp.einsum("nkd,kdw->nw", mixed, weights["wo"], out_sharding=whole) + weights["bo"][None]
        h = layer_norm(x, layer["norm2"], cfg.norm_eps)
        h = activate(jnp.einsum("nw,wm->nm", h, weights["up"]) + weights["up_bias"][None], cfg.activation)
        x = x + jnp.einsum("nm,mw->nw", h, weights["down"], out_sharding=whole) + weights["down_bias"][None]
        return x, None

    x, _ = run_blocks(block, x.reshape(rows * tokens, width), params["blocks"], None, remat=remat)
    x = x.reshape(rows, tokens, width)
    return x[:, 1:] if cfg.class_token else x
