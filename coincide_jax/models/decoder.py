"""Decoder: LLaMA (arXiv 2302.13971) with grouped-query attention. Blocks stacked at rest, run under one scan.

`PROJECTIONS` describes the seven products of a block once; shapes, sharding, the forward pass, LoRA and its merging
derive from it.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding, use
from coincide_jax.models.layers import MASKED, Leaf, attention, matrix, norm, rms_norm, rope, rope_table, run_blocks

SOURCE = "language_model.model"
# name → letters of the weight's inputs and outputs
PROJECTIONS = {
    "wq": ("w", "kgd"),
    "wk": ("w", "kd"),
    "wv": ("w", "kd"),
    "wo": ("kgd", "w"),
    "gate": ("w", "m"),
    "up": ("w", "m"),
    "down": ("m", "w"),
}
AXES = {"w": "embed", "k": "heads", "g": "group", "d": "head_dim", "m": "mlp"}
NAMES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Constants that a checkpoint owns."""

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm_eps: float
    rope_theta: float
    tied: bool  # the head is the transposed embedding


class Output(NamedTuple):
    """Of a pass: residual stream [b, t, w], what `tap` returned [l, …], new keys and values ([l, b, t, k, d] each)."""

    x: jax.Array
    taps: Any
    cache: Any


def sizes(cfg: DecoderConfig) -> dict[str, int]:
    """Size of each letter of `PROJECTIONS`' weights."""
    group = cfg.heads // cfg.kv_heads
    return {"w": cfg.width, "k": cfg.kv_heads, "g": group, "d": cfg.head_dim, "m": cfg.mlp}


def abstract(cfg: DecoderConfig) -> dict:
    """The decoder's parameters."""
    size, source, blocks = sizes(cfg), f"{SOURCE}.layers.{{layer}}", {}
    for name, (inputs, outputs) in PROJECTIONS.items():
        ins, outs = ({AXES[letter]: size[letter] for letter in letters} for letters in (inputs, outputs))
        blocks[name] = matrix(ins, outs, f"{source}.{NAMES[name]}.weight", layers=cfg.depth)
    blocks["norm1"] = norm(cfg.width, False, f"{source}.input_layernorm", cfg.depth)
    blocks["norm2"] = norm(cfg.width, False, f"{source}.post_attention_layernorm", cfg.depth)
    table = (cfg.vocab, cfg.width)
    leaves = {
        "embed": Leaf(table, ("vocab", "embed"), "normal", 0.02, f"{SOURCE}.embed_tokens.weight", 0, table),
        "blocks": blocks,
        "norm": norm(cfg.width, False, f"{SOURCE}.norm"),
    }
    if not cfg.tied:
        leaves["head"] = matrix({"embed": cfg.width}, {"vocab": cfg.vocab}, "language_model.lm_head.weight", std=0.02)
    return leaves


def embed(params: dict, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Token ids i32[b, t] → embeddings [b, t, w]."""
    return use(params["embed"], dtype).at[tokens].get(out_sharding=row_sharding(tokens, 3))


def head(params: dict, cfg: DecoderConfig, dtype: jnp.dtype) -> jax.Array:
    """The head [w, v], ready for a product."""
    return use(params["embed"], dtype).T if cfg.tied else use(params["head"], dtype)


def final_norm(params: dict, x: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """The norm before the head."""
    return rms_norm(x, params["norm"], cfg.norm_eps)


def causal_bias(length: int) -> jax.Array:
    """f32[t, s]: 0 where key s is at or before query t. Padding stands at the right end, so a real query never sees it
    and lengths need not be read; what padding positions compute is read by nobody."""
    seen = jnp.arange(length)[:, None] >= jnp.arange(length)[None]
    return jnp.where(seen, 0.0, MASKED)


def project(name: str, x: jax.Array, weights: dict, lora, key) -> jax.Array:
    """One of `PROJECTIONS` of x [n, inputs…]: x W, and + scale · dropout(x) A B if it has a LoRA (arXiv 2106.09685).

    lora: (adapters of this layer, scale, dropout) or None; key: of this layer's dropout, or None.
    """
    inputs, outputs = PROJECTIONS[name]
    # 'model' may share what is summed over, never what a result of the model width holds
    whole = row_sharding(x, 2) if outputs == "w" else None
    y = jnp.einsum(f"n{inputs},{inputs}{outputs}->n{outputs}", x, weights[name], out_sharding=whole)
    if lora is None or name not in lora[0]:
        return y
    adapter, scale, dropout = lora[0][name], lora[1], lora[2]
    if dropout > 0.0 and key is not None:
        key = jax.random.fold_in(key, list(PROJECTIONS).index(name))
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape, out_sharding=jax.typeof(x).sharding)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
    low = jnp.einsum(f"n{inputs},{inputs}r->nr", x, adapter["a"], out_sharding=row_sharding(x, 2))
    return y + scale * jnp.einsum(f"nr,r{outputs}->n{outputs}", low, adapter["b"], out_sharding=whole)


def run(
    params: dict,
    x: jax.Array,
    positions: jax.Array,
    attend,
    cfg: DecoderConfig,
    *,
    past=None,
    lora=None,
    dropout_key: jax.Array | None = None,
    tap=None,
    remat: bool = False,
    keep_cache: bool = False,
) -> Output:
    """Runs the blocks on embeddings x [b, t, w] at positions i32[b or 1, t].

    `attend(q, k, v, past of this layer)` is the attention; `tap` sees the output of each layer's output projection
    before it is added to the residual stream (COINCIDE, eq. 1 and the authors' hook), and is reduced inside the scan.
    """
    table = rope_table(positions, cfg.head_dim, cfg.rope_theta)
    adapters, scale, dropout = lora if lora is not None else (None, 0.0, 0.0)
    count = jax.tree.leaves(params["blocks"])[0].shape[0]
    keys = None if dropout_key is None or dropout == 0.0 else jax.random.split(dropout_key, count)
    rows, length, width = x.shape

    def block(x, layer, own):
        (layer, adapter), (key, kept) = layer, own
        weights = use({name: layer[name] for name in PROJECTIONS}, x.dtype)
        local = None if adapter is None else (use(adapter, x.dtype), scale, dropout)
        h = rms_norm(x, layer["norm1"], cfg.norm_eps)
        q, k, v = (project(name, h, weights, local, key) for name in ("wq", "wk", "wv"))
        q, k, v = (split_rows(part, rows, length) for part in (q, k, v))
        q, k = rope(q, table), rope(k, table)
        mixed = attend(q, k, v, kept)
        out = project("wo", mixed.reshape(rows * length, *mixed.shape[2:]), weights, local, key)
        x = x + out
        h = rms_norm(x, layer["norm2"], cfg.norm_eps)
        h = jax.nn.silu(project("gate", h, weights, local, key)) * project("up", h, weights, local, key)
        x = x + project("down", h, weights, local, key)
        tapped = None if tap is None else tap(out.reshape(rows, length, width))
        return x, (tapped, (k, v) if keep_cache else None)

    # rows and positions as one axis: the gradient of a weight is then a plain product of two matrices, without which
    # XLA transposes every activation (measured on a CPU: 1.6 times the time)
    flat = jnp.reshape(x, (rows * length, width), out_sharding=row_sharding(x, 2))
    stacked = (params["blocks"], adapters)
    flat, (taps, cache) = run_blocks(block, flat, stacked, (keys, past), remat=remat)
    return Output(split_rows(flat, rows, length), taps, cache)


def split_rows(part: jax.Array, rows: int, length: int) -> jax.Array:
    """[b · t, …] → [b, t, …], sharded as before; that is said because a dimension of one would lose its sharding."""
    here = jax.typeof(part).sharding
    where = None if here.mesh.empty else jax.P(here.spec[0], None, *here.spec[1:])
    return jnp.reshape(part, (rows, length, *part.shape[1:]), out_sharding=where)


def cached_attention(bias: jax.Array):
    """`attend` for one new position a row. bias: f32[b, s] over the slots of the cache; past: the layer's keys and
    values, [b, s, k, d] each. The new key and value take part beside the cache, which is only read."""

    def attend(q, k, v, past):
        q = q * q.shape[-1] ** -0.5
        old, new = (
            jnp.einsum("btkgd,bskd->bkgts", q, keys, preferred_element_type=jnp.float32) for keys in (past[0], k)
        )
        scores = jnp.concatenate([old + bias[:, None, None, None], new], axis=-1)
        weight = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        old = jnp.einsum("bkgts,bskd->btkgd", weight[..., :-1], past[1])
        return old + jnp.einsum("bkgts,bskd->btkgd", weight[..., -1:], v)

    return attend


def full_attention(bias: jax.Array):
    """`attend` for whole sequences."""
    return lambda q, k, v, _: attention(q, k, v, bias)
