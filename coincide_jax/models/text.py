"""Text towers: CLIP's (arXiv 2103.00020), pooled at the end of the text, and BERT's (1810.04805), its real tokens
averaged as sentence-transformers does (1908.10084; all-MiniLM-L6-v2)."""

import dataclasses

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding, use
from coincide_jax.core.errors import UserError
from coincide_jax.models.layers import MASKED, Leaf, activate, encoder_blocks, layer_norm, matrix, norm, run_blocks

OLD_EOS = 2  # eos_id of published CLIP cards, none of their tokens: the text ends at its highest id instead
NAMES = {
    "clip": {
        "layer": "text_model.encoder.layers.{layer}",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
        "embed": "text_model.embeddings.token_embedding.weight",
        "position": "text_model.embeddings.position_embedding.weight",
        "norm": "text_model.final_layer_norm",
    },
    "bert": {
        "layer": "encoder.layer.{layer}",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
        "embed": "embeddings.word_embeddings.weight",
        "position": "embeddings.position_embeddings.weight",
        "type": "embeddings.token_type_embeddings.weight",
        "norm": "embeddings.LayerNorm",
    },
}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Constants that a checkpoint owns."""

    family: str  # clip (causal, norms before, pooled at eos) | bert (norms after, averaged)
    vocab: int
    width: int
    depth: int
    heads: int
    mlp: int
    positions: int  # longest text, tokens
    types: int  # token types (BERT's first is taken), 0 = none
    activation: str  # quick_gelu | gelu | gelu_pytorch_tanh
    norm_eps: float
    eos_id: int  # read for CLIP only
    projection: int  # width of CLIP's joint space, 0 = none


def abstract(cfg: TextConfig) -> dict:
    """The tower's parameters. "norm" is CLIP's closing norm, BERT's norm of the embeddings."""
    names = NAMES[cfg.family]

    def table(name: str, rows: int, axes: tuple[str, str]) -> Leaf:
        return Leaf((rows, cfg.width), axes, "normal", 0.02, names[name], 0, (rows, cfg.width))

    leaves = {
        "embed": table("embed", cfg.vocab, ("vocab", "embed")),
        "position": table("position", cfg.positions, ("position", "width")),
        "norm": norm(cfg.width, True, names["norm"]),
        "blocks": encoder_blocks(cfg.width, cfg.heads, cfg.mlp, cfg.depth, names["layer"], names),
    }
    if cfg.types:
        leaves["type"] = table("type", cfg.types, ("position", "width"))
    if cfg.projection:
        leaves["projection"] = matrix({"embed": cfg.width}, {"width": cfg.projection}, "text_projection.weight")
    return leaves


def embed(params: dict, tokens: jax.Array, cfg: TextConfig, dtype: jnp.dtype) -> jax.Array:
    """Token ids i32[b, t] → what enters the first block, [b, t, w].

    Raises:
      UserError: t is more than the tower's positions.
    """
    if tokens.shape[1] > cfg.positions:
        raise UserError(
            f"texts for the {cfg.family} text tower are {tokens.shape[1]} tokens long; expected at most {cfg.positions}"
        )
    x = use(params["embed"], dtype).at[tokens].get(out_sharding=row_sharding(tokens, 3))
    table = params["position"][: tokens.shape[1]].astype(jnp.float32)
    if cfg.types:
        table = table + params["type"][:1].astype(jnp.float32)
    x = x + table.astype(dtype)[None]
    return layer_norm(x, params["norm"], cfg.norm_eps) if cfg.family == "bert" else x


def attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> jax.Array:
    """Softmax attention, scores in float32. q, k, v: [b, t, k, d], bias: f32[b or 1, t or 1, s]. Texts are short: the
    scores need no blocks."""
    scores = jnp.einsum("btkd,bskd->bkts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    weight = jax.nn.softmax(scores + bias[:, None], axis=-1).astype(v.dtype)
    return jnp.einsum("bkts,bskd->btkd", weight, v)


def encode(params: dict, tokens: jax.Array, lengths: jax.Array, cfg: TextConfig, dtype: jnp.dtype) -> jax.Array:
    """Last hidden state [b, t, w] of texts i32[b, t] with `lengths` i32[b] real tokens each, padding at the right.

    CLIP: causal, so that no real token sees the padding; closing norm included. BERT: only real tokens are seen.
    """
    x = embed(params, tokens, cfg, dtype)
    rows, length, width = x.shape
    position = jnp.arange(length)
    if cfg.family == "clip":
        seen = (position[:, None] >= position[None])[None]
    else:
        seen = (position[None] < lengths[:, None])[:, None]
    bias = jnp.where(seen, 0.0, MASKED)
    before = cfg.family == "clip"  # norms before what they feed, else after each sum

    def block(x, layer, _):
        weights = use(layer, dtype)
        norm1, norm2 = (lambda x, name=name: layer_norm(x, layer[name], cfg.norm_eps) for name in ("norm1", "norm2"))
        h = norm1(x) if before else x
        q, k, v = (jnp.einsum("nw,wkd->nkd", h, weights[f"w{name}"]) + weights[f"b{name}"][None] for name in "qkv")
        mixed = attend(*(part.reshape(rows, length, *part.shape[1:]) for part in (q, k, v)), bias)
        mixed = mixed.reshape(rows * length, *mixed.shape[2:])
        whole = row_sharding(x, 2)
        x = x + jnp.einsum("nkd,kdw->nw", mixed, weights["wo"], out_sharding=whole) + weights["bo"][None]
        h = norm2(x) if before else norm1(x)
        x = x if before else h
        h = activate(jnp.einsum("nw,wm->nm", h, weights["up"]) + weights["up_bias"][None], cfg.activation)
        x = x + jnp.einsum("nm,mw->nw", h, weights["down"], out_sharding=whole) + weights["down_bias"][None]
        return x if before else norm2(x), None

    x, _ = run_blocks(block, x.reshape(rows * length, width), params["blocks"], None)
    x = x.reshape(rows, length, width)
    return layer_norm(x, params["norm"], cfg.norm_eps) if cfg.family == "clip" else x


def forward(params: dict, tokens: jax.Array, lengths: jax.Array, cfg: TextConfig, dtype: jnp.dtype) -> jax.Array:
    """One vector a text, f32[b, w], or f32[b, projection] where CLIP's projection is held; not of unit length.

    tokens: i32[b, t] padded at the right, lengths: i32[b] ≥ 1. CLIP's vector is that of the first eos (the whole text
    must hold one: a tokenizer that truncates keeps it); BERT's is the mean over the real tokens.
    """
    x = encode(params, tokens, lengths, cfg, dtype)
    position = jnp.arange(x.shape[1])[None]
    if cfg.family == "clip":
        end = jnp.argmax(tokens if cfg.eos_id == OLD_EOS else tokens == cfg.eos_id, axis=1)
        weight = (position == end[:, None]).astype(jnp.float32)
    else:
        weight = (position < lengths[:, None]).astype(jnp.float32) / lengths.astype(jnp.float32)[:, None]
    # a product with zeros and ones takes a row exactly, and lies where the rows lie
    pooled = jnp.einsum("bt,btw->bw", weight, x.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    if not cfg.projection:
        return pooled
    projection = use(params["projection"], dtype)
    return jnp.einsum("bw,wp->bp", pooled.astype(dtype), projection, preferred_element_type=jnp.float32)
