"""The vision-language model: vision tower, two-layer projector, decoder (LLaVA-1.5, arXiv 2310.03744).

One body for every size. A batch is a dict as the data layer makes it; what is read here: tokens i32[b, t],
image_start i32[b] (-1 = text only), images u8[b, s, s, 3], and for the loss labels bool[b, t]. A packed batch has
several records in a row: tokens and labels are [r, t], record i32[r, t] and position i32[r, t] say whose and which
position each is, place i32[b] where (row · t + column) each record begins.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.core import precision as precisions
from coincide_jax.core.axes import row_sharding, use
from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision
from coincide_jax.models import decoder, loss, vision
from coincide_jax.models.decoder import DecoderConfig
from coincide_jax.models.layers import matrix, vector
from coincide_jax.models.vision import VisionConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """Constants that a checkpoint owns, and the precision of the device it runs on (not part of `to_dict`)."""

    vision: VisionConfig
    decoder: DecoderConfig
    precision: Precision

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes in the sequence."""
        return self.vision.tokens

    def to_dict(self) -> dict:
        """Plain values, for model.json."""
        return {"vision": dataclasses.asdict(self.vision), "decoder": dataclasses.asdict(self.decoder)}

    @classmethod
    def from_dict(cls, values: dict, precision: Precision | None = None) -> "VLMConfig":
        """The opposite of `to_dict`; precision: the device's own by default.

        Raises:
          UserError: a constant is missing or unknown.
        """
        parts = {}
        for name, kind in (("vision", VisionConfig), ("decoder", DecoderConfig)):
            found, expected = set(values[name]), {field.name for field in dataclasses.fields(kind)}
            if found != expected:
                wrong = ", ".join(sorted(found ^ expected))
                raise UserError(f"the model configuration's part '{name}' lacks or does not know: {wrong}")
            parts[name] = kind(**{key: _hashable(value) for key, value in values[name].items()})
        return cls(parts["vision"], parts["decoder"], precision or precisions.choose())

    @classmethod
    def tiny(cls, model, image_size: int, vocab: int, precision: Precision | None = None) -> "VLMConfig":
        """A model trained here, from the keys of `config.model`.

        Raises:
          UserError: sizes that do not divide.
        """
        eye, text = model["vision"], model["decoder"]
        for what, size, part, by in (
            ("dataset.image_size", image_size, "model.vision.patch", eye["patch"]),
            ("model.vision.width", eye["width"], "model.vision.heads", eye["heads"]),
            ("model.decoder.width", text["width"], "2 * model.decoder.heads", 2 * text["heads"]),
            ("model.decoder.heads", text["heads"], "model.decoder.kv_heads", text["kv_heads"]),
        ):
            if size % by:
                raise UserError(f"{what} is {size}; expected a multiple of {part} ({by})")
        return cls(
            VisionConfig(
                family="clip",
                image_size=image_size,
                **{key: eye[key] for key in ("patch", "width", "depth", "heads", "mlp")},
                activation="quick_gelu",
                norm_eps=1e-5,
                class_token=True,
                registers=0,
                pre_norm=True,
                closing_norm=False,
                layer_scale=False,
                patch_bias=False,
                gated_mlp=False,
                mean=CLIP_MEAN,
                std=CLIP_STD,
            ),
            DecoderConfig(
                vocab=vocab,
                **{key: text[key] for key in ("width", "depth", "heads", "kv_heads", "mlp")},
                family="llama",
                head_dim=text["width"] // text["heads"],
                norm="rms",
                norm_eps=1e-5,
                activation="silu",
                gated=True,
                parallel=False,
                biases=(),
                head_bias=False,
                rotary=text["width"] // text["heads"],
                rope_theta=10000.0,
                rope_scaling=(),
                positions=4096,
                qk_norm=False,
                tied=False,
                layer_shapes=(),
            ),
            precision or precisions.choose(),
        )


def _hashable(value):
    """Lists as tuples, at any depth."""
    return tuple(_hashable(part) for part in value) if isinstance(value, list | tuple) else value


class Forward(NamedTuple):
    """hidden: f32[b, t, w], the residual stream after the last layer run (before the closing norm, which `logits` and
    `token_nll` apply); taps: what `tap` returned for each layer run, [l, …], or None."""

    hidden: jax.Array
    taps: Any


def abstract(cfg: VLMConfig) -> dict:
    """Every parameter as a `layers.Leaf`."""
    width, eye = cfg.decoder.width, cfg.vision.width
    source = "multi_modal_projector"
    projector = {
        "w1": matrix({"embed": eye}, {"mlp": width}, f"{source}.linear_1.weight"),
        "b1": vector({"mlp": width}, "zeros", f"{source}.linear_1.bias"),
        "w2": matrix({"mlp": width}, {"embed": width}, f"{source}.linear_2.weight"),
        "b2": vector({"width": width}, "zeros", f"{source}.linear_2.bias"),
    }
    return {"vision": vision.abstract(cfg.vision), "projector": projector, "decoder": decoder.abstract(cfg.decoder)}


def project(params: dict, features: jax.Array) -> jax.Array:
    """Patch features [b, n, w_vision] → image tokens [b, n, w]: linear, GELU, linear."""
    weights, whole = use(params, features.dtype), row_sharding(features, 3)
    h = jnp.einsum("bnw,wm->bnm", features, weights["w1"]) + weights["b1"][None, None]
    h = jax.nn.gelu(h, approximate=False)
    return jnp.einsum("bnm,mw->bnw", h, weights["w2"], out_sharding=whole) + weights["b2"][None, None]


def embed(params: dict, batch: dict, cfg: VLMConfig, *, remat: bool = False) -> jax.Array:
    """Embeddings [b, t, w]: tokens, with each image's tokens at image_start … + image_tokens."""
    dtype = cfg.precision.dtype
    x = decoder.embed(params["decoder"], batch["tokens"], dtype)
    features = vision.forward(params["vision"], batch["images"], cfg.vision, dtype, remat=remat)
    image = project(params["projector"], features)
    if "record" in batch:
        return place_packed(x, image, batch)
    offset = jnp.arange(x.shape[1])[None] - batch["image_start"][:, None]
    inside = (offset >= 0) & (offset < cfg.image_tokens) & (batch["image_start"] >= 0)[:, None]
    # a product with zeros and ones moves rows exactly, forward and backward, and needs no scatter
    here = (offset[..., None] == jnp.arange(cfg.image_tokens)[None, None]).astype(dtype)
    moved = jnp.einsum("btn,bnw->btw", here, image, precision=jax.lax.Precision.HIGHEST)
    return jnp.where(inside[..., None], moved, x)


def place_packed(x: jax.Array, image: jax.Array, batch: dict) -> jax.Array:
    """The tokens' embeddings x [r, t, w] of a packed batch with the image tokens [b, n, w] of its records in them."""
    count, record = image.shape[1], batch["record"]
    starts, places = jax.reshard((batch["image_start"], batch["place"]), jax.P(None))
    start = starts.at[jnp.maximum(record, 0)].get(out_sharding=row_sharding(record, 2))
    offset = batch["position"] - start
    inside = (record >= 0) & (start >= 0) & (offset >= 0) & (offset < count)
    source = jnp.where(inside, record * count + offset, 0)
    target = (places + starts)[:, None] + jnp.arange(count)[None]
    target = jnp.where((starts >= 0)[:, None], target, x.shape[0] * x.shape[1])  # beyond the end: in no row
    return jnp.where(inside[..., None], _move(image, source, target), x)


@jax.custom_vjp
def _move(image: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
    """Row `source` i32[r, t] of image [b · n, w] at each position. `target` i32[b, n] is the way back, so that the
    gradient is read where it lies as well: a scatter's sums would have no order. Between devices all rows are fetched.
    """
    flat = jax.reshard(image, jax.P(None, None, None)).reshape(-1, image.shape[-1])
    return flat.at[source].get(out_sharding=row_sharding(source, 3))


def _move_forward(image, source, target):
    return _move(image, source, target), (image[:, 0, 0], target)  # the first for its sharding alone


def _move_backward(kept, cotangent):
    rows, target = kept
    flat = jax.reshard(cotangent, jax.P(None, None, None)).reshape(-1, cotangent.shape[-1])
    back = flat.at[target].get(mode="fill", fill_value=0, out_sharding=row_sharding(rows, 3))
    return back, None, None


_move.defvjp(_move_forward, _move_backward)


def forward(
    params: dict,
    batch: dict,
    cfg: VLMConfig,
    *,
    lora=None,
    dropout_key: jax.Array | None = None,
    tap=None,
    tap_from: str = "attention",
    remat: bool = False,
) -> Forward:
    """Runs the model on a batch.

    lora: (adapters, scale, dropout rate) of `lora.py`, dropout only with a `dropout_key`. tap: [b, t, w] → anything
    small, called in every layer on what `tap_from`, one of `decoder.TAPS`, names.
    remat: keep only the residual stream of each layer for the backward pass.
    """
    x = embed(params, batch, cfg, remat=remat)
    packed = "record" in batch
    out = decoder.run(
        params["decoder"],
        x,
        batch["position"] if packed else jnp.arange(x.shape[1])[None],
        decoder.packed_attention(batch["record"]) if packed else decoder.full_attention(),
        cfg.decoder,
        lora=lora,
        dropout_key=dropout_key,
        tap=tap,
        tap_from=tap_from,
        remat=remat,
    )
    return Forward(out.x.astype(jnp.float32), out.taps)


def logits(params: dict, hidden: jax.Array, cfg: VLMConfig) -> jax.Array:
    """f32[b, t, v] from the hidden of `forward` (f32[b, t, w]): closing norm, head. The vocabulary lies on 'model':
    reductions over it are fine, a gather along it is not (compare with an iota instead, as `loss.py` does)."""
    dtype = cfg.precision.dtype
    h = decoder.final_norm(params["decoder"], hidden, cfg.decoder).astype(dtype)
    weight, bias = (
        decoder.head(params["decoder"], cfg.decoder, dtype),
        decoder.head_bias(params["decoder"], cfg.decoder),
    )
    scores = jnp.einsum("btw,wv->btv", h, weight, preferred_element_type=jnp.float32)
    return scores if bias is None else scores + bias[None, None]


def token_nll(params: dict, batch: dict, cfg: VLMConfig, hidden: jax.Array) -> jax.Array:
    """f32[b, t]: negative log-likelihood (nats) of token t given those before it; 0 where not labels, and at t = 0."""
    dtype = cfg.precision.dtype
    h = decoder.final_norm(params["decoder"], hidden, cfg.decoder).astype(dtype)
    weight, bias = (
        decoder.head(params["decoder"], cfg.decoder, dtype),
        decoder.head_bias(params["decoder"], cfg.decoder),
    )
    # position t - 1 predicts token t; what rolls from the front to the end is nobody's target
    supervised = batch["labels"] & (jnp.arange(h.shape[1]) > 0)[None]
    nll = loss.token_nll(h, weight, jnp.roll(batch["tokens"], -1, axis=1), jnp.roll(supervised, -1, axis=1), bias)
    return jnp.roll(nll, 1, axis=1)
