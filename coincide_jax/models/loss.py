"""Cross entropy of the supervised positions only.

The head is the widest product of a small model, and most positions (system prompt, image, question, padding) are not
supervised. Each row's supervised positions are moved to its front, and the head runs on chunks of them until every row
is served: what is computed follows the number of answers' tokens, and logits exist for one chunk at a time, forward and
backward (the backward pass computes them again).
"""

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding

CHUNK_POSITIONS = 256  # of all rows on a device together; a chunk's logits take this · vocab · 4 bytes


def token_nll(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, bias: jax.Array | None = None
) -> jax.Array:
    """Negative log-likelihood, f32[b, t], of `targets` i32[b, t] under softmax(hidden · head + bias); 0 where not
    `mask`.

    hidden: [b, t, w], normed; head: [w, v]; bias: f32[v] or None; mask: bool[b, t]. Products in the type of `hidden`,
    the rest float32.
    """
    order = jnp.argsort(~mask, axis=1, stable=True)  # supervised positions first
    back = jnp.argsort(order, axis=1, stable=True)
    first = jnp.take_along_axis(hidden, order[..., None], axis=1)
    mine = jnp.take_along_axis(targets, order, axis=1)
    supervised = jnp.take_along_axis(mask, order, axis=1)
    return jnp.take_along_axis(_front_nll(first, head, bias, mine, supervised), back, axis=1)


def _chunks(mask: jax.Array) -> tuple[int, int, jax.Array]:
    """Positions of a row in one chunk, chunks that hold every position, chunks that hold a supervised one."""
    here = jax.typeof(mask).sharding
    rows = mask.shape[0] if here.mesh.empty else here.shard_shape(mask.shape)[0]
    size = min(max(CHUNK_POSITIONS // rows, 1), mask.shape[1])
    most = jnp.max(jnp.sum(mask, axis=1, dtype=jnp.int32))
    return size, -(-mask.shape[1] // size), (most + size - 1) // size


def _chunk(array: jax.Array, index: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis=1)


def _widen(array: jax.Array, size: int, count: int) -> jax.Array:
    """Pads the positions to whole chunks."""
    return jnp.pad(array, ((0, 0), (0, size * count - array.shape[1]), *((0, 0),) * (array.ndim - 2)))


def _logits(hidden: jax.Array, head: jax.Array, bias: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("btw,wv->btv", hidden, head, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias[None, None]


def _is_target(targets: jax.Array, logits: jax.Array) -> jax.Array:
    """bool[b, t, v]: a comparison, since a gather along a shared vocabulary would fetch it whole."""
    here = jax.typeof(logits).sharding
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2, out_sharding=here) == targets[..., None]


@jax.custom_vjp
def _front_nll(hidden, head, bias, targets, mask) -> jax.Array:
    return _forward(hidden, head, bias, targets, mask)[0]


def _forward(hidden, head, bias, targets, mask):
    size, count, needed = _chunks(mask)
    wide = [_widen(array, size, count) for array in (hidden, targets, mask)]

    def body(index, nll):
        h, target, keep = (_chunk(array, index, size) for array in wide)
        logits = _logits(h, head, bias)
        picked = jnp.sum(jnp.where(_is_target(target, logits), logits, 0.0), axis=-1)
        part = jnp.where(keep, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0)
        return jax.lax.dynamic_update_slice_in_dim(nll, part, index * size, axis=1)

    start = jnp.where(wide[2], 0.0, 0.0)  # zeros with the mask's sharding
    nll = jax.lax.fori_loop(0, needed, body, start)
    return nll[:, : mask.shape[1]], (hidden, head, bias, targets, mask)


def _backward(kept, cotangent):
    hidden, head, bias, targets, mask = kept
    size, count, needed = _chunks(mask)
    wide = [_widen(array, size, count) for array in (hidden, targets, jnp.where(mask, cotangent, 0.0))]
    whole = row_sharding(hidden, 3)
    weight = None if whole is None else jax.typeof(head).sharding
    along = None if whole is None or bias is None else jax.typeof(bias).sharding

    def body(index, carry):
        d_hidden, d_head, d_bias = carry
        h, target, scale = (_chunk(array, index, size) for array in wide)
        logits = _logits(h, head, bias)
        p = jax.nn.softmax(logits, axis=-1)
        wide_logits = jnp.where(_is_target(target, logits), p - 1.0, p) * scale[..., None]
        d_logits = wide_logits.astype(h.dtype)
        part = jnp.einsum("btv,wv->btw", d_logits, head, out_sharding=whole)
        d_hidden = jax.lax.dynamic_update_slice_in_dim(d_hidden, part, index * size, axis=1)
        grad = jnp.einsum("btw,btv->wv", h, d_logits, out_sharding=weight, preferred_element_type=jnp.float32)
        if bias is not None:
            d_bias = d_bias + jnp.einsum("btv->v", wide_logits, out_sharding=along)
        return d_hidden, d_head + grad, d_bias

    start = (jnp.zeros_like(wide[0]), jnp.zeros_like(head, dtype=jnp.float32), jax.tree.map(jnp.zeros_like, bias))
    d_hidden, d_head, d_bias = jax.lax.fori_loop(0, needed, body, start)
    return d_hidden[:, : mask.shape[1]], d_head.astype(head.dtype), d_bias, None, None


_front_nll.defvjp(_forward, _backward)
