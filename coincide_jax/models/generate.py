"""Decoding with a static cache: the likeliest token, or one drawn at a temperature.

The cache has a slot for each position of the prompts (right-padded, rows of any length together) and then one for each
new token. New tokens of all rows share a slot number, so that one slice is written a step; a row's own position, which
rotates its keys, goes on from its own length, and the padding between is never seen. The first token comes from the
pass over the prompts, every further one from a pass over one position a row.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from coincide_jax.core.errors import UserError
from coincide_jax.models import decoder, vlm
from coincide_jax.models.layers import MASKED
from coincide_jax.models.vlm import VLMConfig

KEYS = ("tokens", "lengths", "image_start", "images")  # what is read of a batch


def greedy(
    params: dict,
    batch: dict,
    cfg: VLMConfig,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    left_padded: bool = False,
) -> jax.Array:
    """The likeliest next token, again and again; the smallest id wins ties.

    Args:
      batch: prompts: tokens i32[b, t], lengths i32[b], image_start i32[b], images u8[b, s, s, 3].
      max_new_tokens: how many at most, at least 1.
      eos_id: the id that ends a row, or several.
      left_padded: the `lengths` real tokens of a row are its last ones, not its first ones.

    Returns:
      i32[b, max_new_tokens]: the new tokens, the end included, -1 after it. Stops when every row has ended; compiled
      once a shape.
    """
    prompts = _prompts(batch, left_padded)
    return _decode(params, prompts, None, None, cfg, max_new_tokens, _ends(eos_id))


def sample(
    params: dict,
    batch: dict,
    cfg: VLMConfig,
    *,
    max_new_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float,
    key: jax.Array,
    left_padded: bool = False,
) -> jax.Array:
    """As `greedy`, each token drawn from softmax(logits / temperature); the same key gives the same tokens.

    Raises:
      UserError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; expected a positive number (greedy decoding draws nothing)")
    prompts = _prompts(batch, left_padded)
    return _decode(params, prompts, key, jnp.float32(temperature), cfg, max_new_tokens, _ends(eos_id))


def right_padded(batch: dict) -> dict:
    """A left-padded batch of prompts as a right-padded one: every row is moved to the front, its image with it."""
    tokens, lengths = batch["tokens"], batch["lengths"]
    width = tokens.shape[1]
    shift = width - lengths
    source = (jnp.arange(width)[None] + shift[:, None]) % width
    start = jnp.where(batch["image_start"] >= 0, batch["image_start"] - shift, -1)
    return batch | {"tokens": jnp.take_along_axis(tokens, source, axis=1), "image_start": start}


def _prompts(batch: dict, left_padded: bool) -> dict:
    """What is read of a batch, right-padded."""
    batch = {key: batch[key] for key in KEYS}
    return right_padded(batch) if left_padded else batch


def _ends(eos_id: int | Sequence[int]) -> tuple[int, ...]:
    """Hashable, so that one program serves a set of ends."""
    return tuple(np.atleast_1d(eos_id).tolist())


@partial(jax.jit, static_argnums=(4, 5, 6))
def _decode(
    params: dict,
    batch: dict,
    key: jax.Array | None,
    temperature: jax.Array | None,
    cfg: VLMConfig,
    max_new_tokens: int,
    ends: tuple[int, ...],
) -> jax.Array:
    lengths, width = batch["lengths"], batch["tokens"].shape[1]

    def choose(x: jax.Array, step: jax.Array) -> jax.Array:
        """i32[b] from the residual stream [b, 1, w]."""
        scores = vlm.logits(params, x.astype(jnp.float32), cfg)[:, 0]
        if key is not None:
            noise = jax.random.gumbel(
                jax.random.fold_in(key, step), scores.shape, out_sharding=jax.typeof(scores).sharding
            )
            scores = scores / temperature + noise  # the largest is then a draw from the softmax
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)

    def ended(token: jax.Array) -> jax.Array:
        return jnp.any(token[:, None] == jnp.array(ends, jnp.int32)[None], axis=1)

    # the prompts
    x = vlm.embed(params, batch, cfg)
    positions = jnp.arange(width)[None]
    out = decoder.run(params["decoder"], x, positions, decoder.full_attention(), cfg.decoder, keep_cache=True)
    last = jnp.maximum(lengths - 1, 0)[:, None, None]
    token = choose(jnp.take_along_axis(out.x, last, axis=1), jnp.int32(0))
    more = max_new_tokens - 1  # the last token is not read again
    cache = jax.tree.map(lambda part: jnp.pad(part, ((0, 0), (0, 0), (0, more), (0, 0), (0, 0))), out.cache)
    slot = jnp.arange(width + more)[None]
    prompt = slot < lengths[:, None]
    answer = jnp.where(jnp.arange(max_new_tokens)[None] == 0, token[:, None], -1)

    def unfinished(state):
        step, _, done, _, _ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def advance(state):
        step, token, done, answer, cache = state
        seen = prompt | ((slot >= width) & (slot < width + step - 1))
        attend = decoder.cached_attention(jnp.where(seen, 0.0, MASKED))
        x = decoder.embed(params["decoder"], token[:, None], cfg.precision.dtype)
        positions = (lengths + step - 1)[:, None]
        out = decoder.run(params["decoder"], x, positions, attend, cfg.decoder, past=cache, keep_cache=True)
        cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, width + step - 1, axis=2), cache, out.cache
        )
        token = choose(out.x, step)
        here = jnp.where(done, -1, token)[:, None]
        answer = jax.lax.dynamic_update_slice_in_dim(answer, here, step, axis=1)
        return step + 1, token, done | ended(token), answer, cache

    state = (jnp.int32(1), token, ended(token), answer, cache)
    return jax.lax.while_loop(unfinished, advance, state)[3]
