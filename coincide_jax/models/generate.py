"""Greedy decoding with a static cache.

The cache has a slot for each position of the prompts (right-padded, rows of any length together) and then one for each
new token. New tokens of all rows share a slot number, so that one slice is written a step; a row's own position, which
rotates its keys, goes on from its own length, and the padding between is never seen.
"""

from functools import partial

import jax
import jax.numpy as jnp

from coincide_jax.models import decoder, vlm
from coincide_jax.models.layers import MASKED
from coincide_jax.models.vlm import VLMConfig

KEYS = ("tokens", "lengths", "image_start", "images")  # what is read of a batch


def greedy(params: dict, batch: dict, cfg: VLMConfig, *, max_new_tokens: int, eos_id: int) -> jax.Array:
    """The likeliest next token, again and again: i32[b, max_new_tokens], eos included, -1 after it.

    Stops when every row has ended. Compiled once a shape.
    """
    return _greedy(params, {key: batch[key] for key in KEYS}, cfg, max_new_tokens, eos_id)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _greedy(params: dict, batch: dict, cfg: VLMConfig, max_new_tokens: int, eos_id: int) -> jax.Array:
    lengths, width = batch["lengths"], batch["tokens"].shape[1]
    x = vlm.embed(params, batch, cfg)
    attend = decoder.full_attention(decoder.causal_bias(width))
    out = decoder.run(params["decoder"], x, jnp.arange(width)[None], attend, cfg.decoder, keep_cache=True)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    token = _likeliest(params, jnp.take_along_axis(out.x, last, axis=1), cfg)
    # [l, b, slots, k, d]
    cache = jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))), out.cache)
    slot = jnp.arange(width + max_new_tokens)[None]
    prompt = slot < lengths[:, None]

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, token, done, answer, cache = state
        here = jnp.where(done, -1, token)[:, None]
        answer = jax.lax.dynamic_update_slice_in_dim(answer, here, step, axis=1)
        done = done | (token == eos_id)
        seen = prompt | ((slot >= width) & (slot < width + step))
        attend = decoder.cached_attention(jnp.where(seen, 0.0, MASKED))
        x = decoder.embed(params["decoder"], token[:, None], cfg.precision.dtype)
        positions = (lengths + step)[:, None]
        out = decoder.run(params["decoder"], x, positions, attend, cfg.decoder, past=cache, keep_cache=True)
        cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, width + step, axis=2), cache, out.cache
        )
        return step + 1, _likeliest(params, out.x, cfg), done, answer, cache

    answer = jnp.zeros_like(lengths)[:, None] + jnp.full((1, max_new_tokens), -1, jnp.int32)
    state = (jnp.int32(0), token, lengths < 0, answer, cache)
    return jax.lax.while_loop(unfinished, advance, state)[3]


def _likeliest(params: dict, x: jax.Array, cfg: VLMConfig) -> jax.Array:
    """i32[b] from the residual stream [b, 1, w]; the smallest id wins ties."""
    scores = vlm.logits(params, x.astype(jnp.float32), cfg)
    return jnp.argmax(scores[:, 0], axis=-1).astype(jnp.int32)
