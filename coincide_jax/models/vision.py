"""Vision towers: CLIP's ViT (arXiv 2103.00020), SigLIP (2303.15343), DINOv2 (2304.07193; registers 2309.16588).

One body; `VisionConfig` says what differs. Images uint8 → features of every patch. Patch embedding is a reshape and a
product (a convolution whose stride is its kernel). LLaVA-1.5 reads CLIP's `hidden_states[-2]`, TinyLLaVA the last but
one of SigLIP: the config then holds one block fewer than the checkpoint and no closing norm.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.core.axes import row_sharding, use
from coincide_jax.models.layers import Leaf, activate, attention, encoder_blocks, layer_norm, norm, run_blocks, vector

SOURCE = "vision_tower.vision_model"
SOURCES = {"clip": SOURCE, "siglip": SOURCE, "dinov2": "vision_tower"}
CLIP_NAMES = {
    "layer": "encoder.layers.{layer}",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "patch": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding.weight",
    "class": "embeddings.class_embedding",
    "pre_norm": "pre_layrnorm",
    "closing_norm": "post_layernorm",
}
DINOV2_NAMES = {
    "layer": "encoder.layer.{layer}",
    "norm1": "norm1",
    "norm2": "norm2",
    "q": "attention.attention.query",
    "k": "attention.attention.key",
    "v": "attention.attention.value",
    "o": "attention.output.dense",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "gate_up": "mlp.weights_in",
    "gated_down": "mlp.weights_out",
    "patch": "embeddings.patch_embeddings.projection",
    "position": "embeddings.position_embeddings",
    "class": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "closing_norm": "layernorm",
}
NAMES = {"clip": CLIP_NAMES, "siglip": CLIP_NAMES, "dinov2": DINOV2_NAMES}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Constants that a checkpoint owns."""

    family: str  # clip | siglip | dinov2: chooses tensor names, and how DINOv2's positions are interpolated
    image_size: int  # pixels
    patch: int  # pixels
    width: int
    depth: int  # blocks held: LLaVA-1.5 holds 23 of CLIP's 24
    heads: int
    mlp: int  # hidden columns; of a gated MLP, those that reach its last product
    activation: str  # quick_gelu | gelu | gelu_pytorch_tanh; silu of a gated MLP
    norm_eps: float
    class_token: bool
    registers: int  # register tokens after the class token
    pre_norm: bool  # a norm before the first block
    closing_norm: bool  # a norm after the last block held
    layer_scale: bool  # a learnt factor per channel on what a block adds
    patch_bias: bool
    gated_mlp: bool  # down(act(gate) · up): DINOv2 giant
    mean: tuple[float, float, float]  # of the channels, of images in [0, 1]
    std: tuple[float, float, float]

    @property
    def tokens(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch) ** 2

    @property
    def extra(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.class_token + self.registers


def abstract(cfg: VisionConfig) -> dict:
    """The tower's parameters. `cfg.image_size` is here the size that the table of positions was trained for."""
    names, root, own = NAMES[cfg.family], SOURCES[cfg.family], {"width": cfg.width}
    position, patch = (cfg.tokens + cfg.class_token, cfg.width), (3, cfg.patch, cfg.patch, cfg.width)
    # DINOv2's file has tables with a leading axis of one
    rows = (1,) if cfg.family == "dinov2" else ()

    def table(shape: tuple[int, ...], axes: tuple[str, ...], name: str, file_shape: tuple[int, ...]) -> Leaf:
        return Leaf(shape, axes, "normal", 0.02, f"{root}.{names[name]}", 0, file_shape)

    leaves = {
        "patch": Leaf(
            patch,
            ("patch", "patch", "patch", "embed"),
            "normal",
            (3 * cfg.patch**2) ** -0.5,
            f"{root}.{names['patch']}.weight",
            3,
            (patch[-1], *patch[:-1]),
        ),
        "position": table(position, ("position", "width"), "position", (*rows, *position)),
        "blocks": abstract_blocks(cfg, f"{root}.{names['layer']}", names),
    }
    if cfg.patch_bias:
        leaves["patch_bias"] = vector(own, "zeros", f"{root}.{names['patch']}.bias")
    if cfg.class_token:
        leaves["class"] = table((cfg.width,), ("width",), "class", (*rows, *rows, cfg.width))
    if cfg.registers:
        shape = (cfg.registers, cfg.width)
        leaves["registers"] = table(shape, ("position", "width"), "registers", (*rows, *shape))
    for name, present in (("pre_norm", cfg.pre_norm), ("closing_norm", cfg.closing_norm)):
        if present:
            leaves[name] = norm(cfg.width, True, f"{root}.{names[name]}")
    return leaves


def abstract_blocks(cfg: VisionConfig, source: str, names: dict[str, str]) -> dict:
    """Stacked parameters of the blocks; `source` is a block's prefix."""
    up, down = ("gate_up", "gated_down") if cfg.gated_mlp else ("up", "down")
    blocks = encoder_blocks(cfg.width, cfg.heads, cfg.mlp, cfg.depth, source, names, up, down)
    if cfg.layer_scale:
        for name in ("layer_scale1", "layer_scale2"):
            blocks[name] = vector({"width": cfg.width}, "ones", f"{source}.{name}.lambda1", cfg.depth)
    if cfg.gated_mlp:
        # the file has gate and up as one tensor, gate first
        for name in ("up", "up_bias"):
            whole = blocks[name]
            blocks[name.replace("up", "gate")] = dataclasses.replace(whole, part=(0, cfg.mlp))
            blocks[name] = dataclasses.replace(whole, part=(cfg.mlp, 2 * cfg.mlp))
    return blocks


def patches(images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """uint8[b, s, s, 3] → normalised patches [b, rows, patch, columns, patch, 3]."""
    count, side = images.shape[0], cfg.image_size // cfg.patch
    mean, std = (jnp.array(part, jnp.float32)[None, None, None] for part in (cfg.mean, cfg.std))
    pixels = ((images.astype(jnp.float32) / 255.0 - mean) / std).astype(dtype)
    # a convolution leaves out the pixels that fill no patch
    pixels = pixels[:, : side * cfg.patch, : side * cfg.patch]
    pixels = pixels.reshape(count, side, cfg.patch, side * cfg.patch, 3)
    return pixels.reshape(count, side, cfg.patch, side, cfg.patch, 3)


def bicubic(old: int, new: int, antialias: bool) -> np.ndarray:
    """Weights f32[new, old] of torch's bicubic `interpolate(align_corners=False)` along one axis: Keys' kernel with
    a = -0.75, the border repeated; antialiased a = -0.5, the kernel widened where it shrinks, the border cut."""
    step = old / new
    a, wide = (-0.5, max(step, 1.0)) if antialias else (-0.75, 1.0)
    centre = (np.arange(new) + 0.5) * step - 0.5
    reach = int(np.ceil(2 * wide)) + 1
    index = np.floor(centre)[:, None] + np.arange(-reach, reach + 1)[None]
    x = np.abs(index - centre[:, None]) / wide
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, a * (((x - 5) * x + 8) * x - 4)
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    if antialias:
        weight = np.where((index >= 0) & (index < old), weight, 0.0)
        weight /= weight.sum(axis=1, keepdims=True)
    result = np.zeros((new, old))
    np.add.at(result, (np.arange(new)[:, None], np.clip(index, 0, old - 1).astype(int)), weight)
    return result.astype(np.float32)


def positions(table: jax.Array, cfg: VisionConfig) -> jax.Array:
    """The table of positions f32[class + n, w] for `cfg.image_size`: as it is, or if it was trained for another size
    interpolated as transformers does it (antialiased for DINOv2 with registers only)."""
    first = int(cfg.class_token)
    if table.shape[0] == first + cfg.tokens:
        return table
    old, new = round((table.shape[0] - first) ** 0.5), cfg.image_size // cfg.patch
    weight = jnp.asarray(bicubic(old, new, antialias=cfg.registers > 0))
    grid = table[first:].reshape(old, old, cfg.width)
    exact = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("xj,yjw->yxw", weight, jnp.einsum("yi,ijw->yjw", weight, grid, precision=exact), precision=exact)
    return jnp.concatenate([table[:first], grid.reshape(cfg.tokens, cfg.width)])


def embed(params: dict, images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """Images uint8[b, s, s, 3] → what enters the first block, [b, extra + tokens, w]."""
    x = jnp.einsum("biyjxc,cyxw->bijw", patches(images, cfg, dtype), use(params["patch"], dtype))
    x = x.reshape(x.shape[0], cfg.tokens, cfg.width)
    if cfg.patch_bias:
        x = x + params["patch_bias"].astype(dtype)[None, None]
    table = positions(params["position"].astype(jnp.float32), cfg)
    if cfg.class_token:
        # class token and registers join through the table: these rows of x are nothing else
        x = jnp.pad(x, ((0, 0), (cfg.extra, 0), (0, 0)))
        table = table + jnp.pad(params["class"].astype(jnp.float32)[None], ((0, cfg.tokens), (0, 0)))
    if cfg.registers:
        table = jnp.concatenate([table[:1], params["registers"].astype(jnp.float32), table[1:]])
    x = x + table.astype(dtype)[None]
    return layer_norm(x, params["pre_norm"], cfg.norm_eps) if cfg.pre_norm else x


def encode(params: dict, images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype, *, remat: bool = False) -> jax.Array:
    """Images uint8[b, s, s, 3] → all tokens after the last block held and the closing norm, [b, extra + tokens, w]."""
    x = embed(params, images, cfg, dtype)
    rows, tokens, width = x.shape

    def add(x, layer, name, out, bias):
        if cfg.layer_scale:
            return x + (out + bias[None]) * layer[name].astype(dtype)[None]
        return x + out + bias[None]

    def block(x, layer, _):
        weights = use(layer, dtype)
        h = layer_norm(x, layer["norm1"], cfg.norm_eps)
        q, k, v = (jnp.einsum("nw,wkd->nkd", h, weights[f"w{name}"]) + weights[f"b{name}"][None] for name in "qkv")
        q, k, v = (part.reshape(rows, tokens, *part.shape[1:]) for part in (q, k, v))
        mixed = attention(q[:, :, :, None], k, v, None)[:, :, :, 0]
        mixed = mixed.reshape(rows * tokens, *mixed.shape[2:])
        whole = row_sharding(x, 2)
        out = jnp.einsum("nkd,kdw->nw", mixed, weights["wo"], out_sharding=whole)
        x = add(x, layer, "layer_scale1", out, weights["bo"])
        h = layer_norm(x, layer["norm2"], cfg.norm_eps)
        up = jnp.einsum("nw,wm->nm", h, weights["up"]) + weights["up_bias"][None]
        if cfg.gated_mlp:
            gate = jnp.einsum("nw,wm->nm", h, weights["gate"]) + weights["gate_bias"][None]
            h = activate(gate, cfg.activation) * up
        else:
            h = activate(up, cfg.activation)
        out = jnp.einsum("nm,mw->nw", h, weights["down"], out_sharding=whole)
        return add(x, layer, "layer_scale2", out, weights["down_bias"]), None

    x, _ = run_blocks(block, x.reshape(rows * tokens, width), params["blocks"], None, remat=remat)
    x = x.reshape(rows, tokens, width)
    return layer_norm(x, params["closing_norm"], cfg.norm_eps) if cfg.closing_norm else x


def forward(params: dict, images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype, *, remat: bool = False) -> jax.Array:
    """Images uint8[b, s, s, 3] → patch features [b, tokens, w] of type `dtype`. After loading, `cfg.image_size` may be
    replaced by the size of the images at hand (see `positions`)."""
    x = encode(params, images, cfg, dtype, remat=remat)
    return x[:, cfg.extra :] if cfg.extra else x


def pooled(params: dict, images: jax.Array, cfg: VisionConfig, dtype: jnp.dtype) -> jax.Array:
    """One vector an image, f32[b, w]: the class token, or without one (SigLIP, its attention head left out) the mean of
    the patches; after the closing norm if the config holds it, which makes it CLIP's and DINOv2's own pooled output."""
    x = encode(params, images, cfg, dtype)
    if cfg.class_token:
        return x[:, 0].astype(jnp.float32)
    return jnp.mean(x.astype(jnp.float32), axis=1)
