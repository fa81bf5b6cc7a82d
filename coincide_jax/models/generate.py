"""Greedy decoding with a static cache: one pass over the prompts, then one token of every row at a time.

Prompts are padded at the right to T positions. A new token's key goes to slot T + j of the cache whatever the row's length; its
rotary position is the row's own, length + j, and a row sees its own prompt and the new slots only.
"""

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding
from coincide_jax.models import decoder, vlm
from coincide_jax.models.layers import MASKED


def greedy(params: dict, batch: dict, cfg: vlm.VLMConfig, *, max_new_tokens: int, eos_id: int) -> jax.Array:
    """The likeliest next token, again and again: i32[b, max_new_tokens], −1 after the row's end token.

    Stops early when every row has ended.
    """
    rows, length = batch["tokens"].shape
    dtype, lengths = cfg.precision.dtype, batch["lengths"]
    x = vlm.embed(params, batch, cfg)
    attend = decoder.full_attention(decoder.causal_bias(length))
    out = decoder.run(params["decoder"], x, jnp.arange(length)[None], attend, cfg.decoder, keep_cache=True)
    last = (jnp.arange(length)[None] == lengths[:, None] - 1).astype(out.x.dtype)
    first = pick(params, jnp.einsum("bt,btw->bw", last, out.x, precision="highest")[:, None], cfg)
    cache = jax.tree.map(lambda kept: jnp.pad(kept, ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))), out.cache)
    slots = jnp.arange(length + max_new_tokens)[None]
    prompt = slots < jnp.minimum(lengths, length)[:, None]

    def step(carry):
        j, token, ended, cache, written = carry
        shown = jnp.where(ended, -1, token)
        written = jax.lax.dynamic_update_slice_in_dim(written, shown[:, None], j, axis=1)
        ended = ended | (token == eos_id)
        seen = prompt | ((slots >= length) & (slots <= length + j))

        def attend(q, k, v, kept):
            keys, values = (insert(old, new, length + j, 1) for old, new in zip(kept, (k, v), strict=True))
            scores = jnp.einsum("btkgd,bskd->bkgts", q * q.shape[-1] ** -0.5, keys, preferred_element_type=jnp.float32)
            scores = scores + jnp.where(seen, 0.0, MASKED)[:, None, None, None]
            return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), values)

        x = decoder.embed(params["decoder"], token[:, None], dtype)
        position = (lengths + j)[:, None]
        out = decoder.run(params["decoder"], x, position, attend, cfg.decoder, past=cache, keep_cache=True)
        cache = jax.tree.map(lambda old, new: insert(old, new, length + j, 2), cache, out.cache)
        return j + 1, pick(params, out.x, cfg), ended, cache, written

    def going(carry):
        return (carry[0] < max_new_tokens) & ~jnp.all(carry[2])

    empty = jnp.broadcast_to(jnp.where(first == first, -1, -1)[:, None], (rows, max_new_tokens))
    carry = (jnp.int32(0), first, first < 0, cache, empty)
    return jax.lax.while_loop(going, step, carry)[4]


def insert(cache: jax.Array, new: jax.Array, at: jax.Array, axis: int) -> jax.Array:
    """The cache with the keys or values of one new position at slot `at`."""
    where = jax.typeof(cache).sharding
    new = new if where.mesh.empty else jax.reshard(new, where.spec)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, at, axis=axis)


def pick(params: dict, x: jax.Array, cfg: vlm.VLMConfig) -> jax.Array:
    """The likeliest token i32[b] after the residual stream [b, 1, w]."""
    logits = vlm.logits(params, x.astype(jnp.float32), cfg)
    return jnp.argmax(jax.reshard(logits, row_sharding(x, 3)) if row_sharding(x, 3) else logits, axis=-1)[:, 0].astype(jnp.int32)
