"""Relevancy maps (COINCIDE, EMNLP 2024, Eq. 8; after Chefer et al., ICCV 2021): where layers look for an output token.

With the attention weights A_l of layer l and y the logit of the token, Ā_l = mean over heads of ∂y/∂A_l ⊙ A_l, without
a ReLU. From R_0 = I, R_l = R_{l-1} + Ā_l R_{l-1}, and the map of layer l is the row of Ā_l R_{l-1} at the position that
predicts the token.

Two identities keep this small. Ā_l is the gradient of y with respect to s [t, t], where layer l attends with
A_l ⊙ (1 + s / heads) and s = 0, so gradients of single heads never leave a layer. And a map is a row vector times
(I + Ā_{l-1}) … (I + Ā_1), which can be multiplied from the left: one sweep from the last layer to the first holds the
residual streams, the rows so far and the attention weights of one layer, computed again there.
"""

from functools import partial

import jax
import jax.numpy as jnp

from coincide_jax.models import decoder, vlm
from coincide_jax.models.decoder import DecoderConfig
from coincide_jax.models.vlm import VLMConfig

KEYS = ("tokens", "image_start", "images")  # what is read of a batch


def maps(params: dict, batch: dict, cfg: VLMConfig, *, position: jax.Array, token: jax.Array) -> jax.Array:
    """f32[l, b, t]: of every layer, the relevancy of each position for one output token a row.

    Args:
      batch: right-padded: tokens i32[b, t] (the prompt, and the answer up to the token), image_start i32[b],
        images u8[b, s, s, 3].
      position: i32[b], the place whose output predicts the token: the last one of the prompt for the first token.
      token: i32[b], whose logit is asked about.

    Every layer of the decoder has to be held. Compiled once a shape.
    """
    return _maps(params, {key: batch[key] for key in KEYS}, position, token, cfg)


def grid(relevancy: jax.Array, image_start: jax.Array, cfg: VLMConfig) -> jax.Array:
    """Maps f32[l, b, t] at the image's positions: f32[l, b, side, side], rows of patches from the top; zero for rows
    without an image."""
    place = jnp.maximum(image_start, 0)[:, None] + jnp.arange(cfg.image_tokens)[None]
    picked = jnp.take_along_axis(relevancy, jnp.broadcast_to(place[None], (len(relevancy), *place.shape)), axis=2)
    picked = jnp.where((image_start >= 0)[None, :, None], picked, 0.0)
    side = cfg.vision.image_size // cfg.vision.patch
    return picked.reshape(*picked.shape[:2], side, side)


@partial(jax.jit, static_argnums=4)
def _maps(params: dict, batch: dict, position: jax.Array, token: jax.Array, cfg: VLMConfig) -> jax.Array:
    x = vlm.embed(params, batch, cfg)
    here = (position[:, None] == jnp.arange(x.shape[1])[None]).astype(jnp.float32)  # [b, t], one 1 a row
    blocks = params["decoder"]["blocks"]
    stacks = blocks if isinstance(blocks, tuple) else (blocks,)
    entered = []
    for stack in stacks:
        x, streams = forward(stack, x, cfg.decoder)
        entered.append(streams)

    def logit(x: jax.Array) -> jax.Array:
        """The tokens' logits, summed over rows: the gradient of a row is its own."""
        states = (x.astype(jnp.float32) * here[:, :, None]).sum(axis=1, keepdims=True)
        scores = vlm.logits(params, states, cfg)[:, 0]
        # a comparison, since a gather along a shared vocabulary would fetch it whole
        ids = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1, out_sharding=jax.typeof(scores).sharding)
        return jnp.where(ids == token[:, None], scores, 0.0).sum()

    cotangent = jax.grad(logit)(x)
    depth = decoder.depth_of(blocks)
    rows = jnp.zeros_like(here)[None] + jnp.zeros((depth, 1, 1))
    for stack, streams in zip(reversed(stacks), reversed(entered), strict=True):
        depth -= decoder.depth_of(stack)  # now the number of the stack's first layer
        cotangent, rows = backward(stack, depth, streams, cotangent, rows, here, cfg.decoder)
    return rows


def one_layer(layer: dict, x: jax.Array, attend, cfg: DecoderConfig) -> jax.Array:
    """The decoder with this layer alone, on [b, t, w]."""
    blocks = jax.tree.map(lambda leaf: leaf[None], layer)
    return decoder.run({"blocks": blocks}, x, jnp.arange(x.shape[1])[None], attend, cfg).x


def forward(stack: dict, x: jax.Array, cfg: DecoderConfig) -> tuple[jax.Array, jax.Array]:
    """The residual stream after a stack of layers, and what entered each of them, [l, b, t, w]."""
    return jax.lax.scan(lambda x, layer: (one_layer(layer, x, decoder.full_attention(), cfg), x), x, stack)


def backward(
    stack: dict,
    first: int,
    entered: jax.Array,
    cotangent: jax.Array,
    rows: jax.Array,
    here: jax.Array,
    cfg: DecoderConfig,
) -> tuple[jax.Array, jax.Array]:
    """The sweep through a stack whose first layer is number `first`, last layer first.

    entered: what entered each layer, [l, b, t, w]. cotangent: ∂y/∂x behind the stack. rows: f32[layers, b, t], of each
    layer behind this point its row vector so far. here: f32[b, t], 1 at the position. Returns cotangent and rows before
    the stack.
    """
    zeros = jnp.zeros_like(here)
    flat = zeros[:, :, None] + zeros[:, None]  # s of every row, f32[b, t, t]

    def step(state, entry):
        cotangent, rows = state
        layer, number, x = entry
        _, pull = jax.vjp(lambda x, s: one_layer(layer, x, scaled_attention(s), cfg), x, flat)
        cotangent, weighted = pull(cotangent)  # Ā of this layer, f32[b, t, s]
        highest = jax.lax.Precision.HIGHEST
        rows = rows + jnp.einsum("lbt,bts->lbs", rows, weighted, precision=highest)
        own = jnp.einsum("bt,bts->bs", here, weighted, precision=highest)
        this = (jnp.arange(len(rows)) == number)[:, None, None]
        return (cotangent, jnp.where(this, own[None], rows)), None

    numbers = first + jnp.arange(decoder.depth_of(stack))
    return jax.lax.scan(step, (cotangent, rows), (stack, numbers, entered), reverse=True)[0]


def scaled_attention(s: jax.Array):
    """`attend` of whole sequences with the weights held and multiplied by 1 + s / heads; s: f32[b, t, s], the same for
    all heads."""

    def attend(q, k, v, _):
        heads, bias = q.shape[2] * q.shape[3], decoder.causal_bias(q.shape[1])
        scores = jnp.einsum("btkgd,bskd->bkgts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
        weight = jax.nn.softmax(scores + bias[None, None, None], axis=-1)
        weight = weight * (1.0 + s / heads)[:, None, None]
        return jnp.einsum("bkgts,bskd->btkgd", weight.astype(v.dtype), v)

    return attend
