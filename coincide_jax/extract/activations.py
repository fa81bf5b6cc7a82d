"""What the activations of a reference model say of a record: feature and scores, in one pass (COINCIDE, Eq. 1-3)."""

import functools

import jax
import jax.numpy as jnp

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.models import decoder, vlm

SQUASHES = ("tanh", "tanh_first", "sign")  # what `pool` makes of a layer's states


def spread_taps(depth: int, count: int) -> tuple[int, ...]:
    """`count` 0-based layers spread over the decoder, the last one left out.

    24 layers, 5 taps → (3, 7, 11, 15, 19), the published choice. A decoder of `count` layers or fewer has all of them
    tapped.
    """
    if depth <= count:
        return tuple(range(depth))
    return tuple((i + 1) * depth // (count + 1) - 1 for i in range(count))


def check(config) -> None:
    """Finds what `config.extract` can get wrong before anything runs.

    Raises:
      UserError: a word without such a choice.
    """
    for name, valid in (("tap_from", decoder.TAPS), ("squash", SQUASHES)):
        if config.extract[name] not in valid:
            raise unknown(f"extract.{name}", config.extract[name], valid)


def choose_taps(keys, depth: int) -> tuple[int, ...]:
    """The tapped layers by config, ascending, each once; a negative one counts from the end.

    Raises:
      UserError: a layer that the decoder does not have.
    """
    if not keys.taps:
        return spread_taps(depth, keys.num_layers)
    if not all(-depth <= tap < depth for tap in keys.taps):
        raise UserError(
            f"extract.taps = {tuple(keys.taps)} names a layer outside the decoder's 0…{depth - 1} (-1 is the last)"
        )
    return tuple(sorted({tap % depth for tap in keys.taps}))


def pool(states: jax.Array, mask: jax.Array, squash: str = "tanh") -> jax.Array:
    """What a layer says of the tokens `bool[B, T]`, from its `f32[B, T, W]`: `f32[B, W]` of unit length.

    `tanh`: tanh of the mean over tokens, as the authors' code has it; `tanh_first`: mean of the tanh, the other reading
    of the paper's text; `sign`: the mean's signs, −1 or 1 (the paper's ablation "booleans"). A row without such tokens
    is zero.
    """
    weight, states = mask.astype(jnp.float32)[:, :, None], states.astype(jnp.float32)
    if squash == "tanh_first":
        states = jnp.tanh(states)
    mean = (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1.0)
    squashed = {"tanh": jnp.tanh, "tanh_first": lambda x: x, "sign": jnp.sign}[squash](mean)
    norm = jnp.sqrt((squashed * squashed).sum(-1, keepdims=True))
    return squashed / jnp.maximum(norm, 1e-12)


def assemble(pooled: jax.Array) -> jax.Array:
    """`f32[L, B, 2, W]` unit or zero parts → `f32[B, 2·L·W]` unit rows: a missing modality is zero, the rest scaled up.

    Layout: layer by layer, visual before text, as the authors have it.
    """
    layers, rows, parts, width = pooled.shape
    flat = jnp.transpose(pooled, (1, 0, 2, 3)).reshape(rows, layers * parts * width)
    norm = jnp.sqrt((flat * flat).sum(-1, keepdims=True))
    return flat / jnp.maximum(norm, 1e-12)


def token_scores(logits: jax.Array, tokens: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
    """Per-record means over supervised tokens, each `f32[B]`: nll, EL2N `‖p − onehot‖₂`, AUM `p_y − max_{v≠y} p_v`
    (as COINCIDE's baselines define them).

    Args: logits `f32[B, T, V]`, tokens `i32[B, T]`, labels `bool[B, T]` (token t is predicted from t−1).
    """
    z, y = logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    weight = labels[:, 1:].astype(jnp.float32)
    total = jax.nn.logsumexp(z, axis=-1)
    # a comparison, since a gather along a shared vocabulary would fetch it whole
    here = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2, out_sharding=jax.typeof(z).sharding) == y[:, :, None]
    z_y = jnp.where(here, z, 0.0).sum(-1)
    others = jnp.where(here, -jnp.inf, z).max(-1)
    p_y = jnp.exp(z_y - total)
    squares = jnp.exp(jax.nn.logsumexp(2.0 * z, axis=-1) - 2.0 * total)
    el2n = jnp.sqrt(jnp.maximum(squares - 2.0 * p_y + 1.0, 0.0))
    count = jnp.maximum(weight.sum(1), 1.0)

    def mean(value: jax.Array) -> jax.Array:
        return (jnp.where(weight > 0, value, 0.0)).sum(1) / count

    return {"nll": mean(total - z_y), "el2n": mean(el2n), "aum": mean(p_y - jnp.exp(others - total))}


@functools.partial(jax.jit, static_argnames=("cfg", "taps", "scores", "tap_from", "squash"))
def features(
    params,
    batch: dict,
    cfg: vlm.VLMConfig,
    taps: tuple[int, ...],
    scores: bool = False,
    tap_from: str = "attention",
    squash: str = "tanh",
) -> dict[str, jax.Array]:
    """One forward pass through the layers that `params` hold: `{'features': f16[B, D], 'repaired': bool[B]}`.

    `tap_from` is one of `decoder.TAPS`, `squash` one of `SQUASHES`. With `scores` (all layers held) also `nll`, `el2n`,
    `aum`, each `f32[B]`.
    """
    length = batch["tokens"].shape[1]
    start = batch["image_start"][:, None]
    position = jnp.arange(length)[None, :]
    visual = (start >= 0) & (position >= start) & (position < start + cfg.image_tokens)

    def tap(states: jax.Array) -> jax.Array:
        return jnp.stack([pool(states, visual, squash), pool(states, batch["text"], squash)], axis=1)

    out = vlm.forward(params, batch, cfg, tap=tap, tap_from=tap_from)
    result = stored(assemble(out.taps[jnp.array(taps)]))
    if scores:
        result |= token_scores(vlm.logits(params, out.hidden, cfg), batch["tokens"], batch["labels"])
    return result


def stored(rows: jax.Array) -> dict[str, jax.Array]:
    """Rows as they go to disk, what is not finite replaced by 0 and said."""
    finite = jnp.isfinite(rows)
    return {
        "features": jnp.where(finite, rows, 0.0).astype(jnp.float16),
        "repaired": (~finite).any(axis=1),
    }
