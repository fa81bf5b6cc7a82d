"""What every tower is made of: the description of a parameter, norms, rotary positions, attention.

Letters of the products: b rows, t and s positions, n rows and positions as one axis, w model width, k key/value heads,
g queries of one key/value head, d head dimension, m MLP columns, r LoRA rank, l layers.
"""

import dataclasses
import functools
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from coincide_jax.core import axes
from coincide_jax.core.axes import row_sharding

UNROLL_UP_TO = 8  # layers; a shallow stack is unrolled whole: XLA then fuses across layers, for a longer compilation
WHOLE_UP_TO = 512  # positions whose scores are made at once
QUERY_BLOCK = 256  # queries whose scores are made at once in longer sequences
MASKED = -1e30  # score of a key that may not be seen; finite, so that a row without any key stays finite


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter. Initialisation, sharding and the exchange with Hugging Face files all derive from it.

    A stacked leaf has the logical axis 'layer' first; `source` then holds "{layer}". Our layout is inputs before
    outputs; a file's is outputs before inputs: the first `inputs` dimensions (the layer aside) go last, then the file's
    shape `source_shape` is taken. Where a file fuses several of our leaves, `part` says which rows [start, stop) of the
    tensor's first axis are this one's, and `source_shape` is the shape of those rows alone.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, one a dimension
    init: str  # normal | uniform | zeros | ones
    std: float  # of 'normal' and of 'uniform' (around 0)
    source: str  # tensor name in a Hugging Face file
    inputs: int
    source_shape: tuple[int, ...]
    part: tuple[int, int] | None = None  # None: the whole tensor
    first: int = 0  # number of the first layer of a stacked leaf

    def names(self) -> list[str]:
        """The file's tensors that hold this leaf, one a layer."""
        if self.axes[0] != "layer":
            return [self.source]
        return [self.source.format(layer=self.first + layer) for layer in range(self.shape[0])]

    def replace(self, **changes) -> "Leaf":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def matrix(
    inputs: dict[str, int],
    outputs: dict[str, int],
    source: str,
    std: float | None = None,
    layers: int = 0,
    init: str = "normal",
) -> Leaf:
    """A product's weight, f32[inputs…, outputs…] (`layers` of them stacked, if not 0), named by logical axis.

    Its standard deviation is 1/√inputs unless given."""
    sizes = (*inputs.values(), *outputs.values())
    fan_in, fan_out = math.prod(inputs.values()), math.prod(outputs.values())
    std = fan_in**-0.5 if std is None else std
    names = (*inputs, *outputs)
    return stack(Leaf(sizes, names, init, std, source, len(inputs), (fan_out, fan_in)), layers)


def vector(sizes: dict[str, int], init: str, source: str, layers: int = 0) -> Leaf:
    """A scale or bias, f32[sizes…]."""
    shape = tuple(sizes.values())
    return stack(Leaf(shape, tuple(sizes), init, 0.0, source, 0, (math.prod(shape),)), layers)


def stack(leaf: Leaf, layers: int) -> Leaf:
    """`layers` such leaves as one, or the leaf itself for 0."""
    if not layers:
        return leaf
    return leaf.replace(shape=(layers, *leaf.shape), axes=("layer", *leaf.axes))


def norm(width: int, bias: bool, source: str, layers: int = 0) -> dict[str, Leaf]:
    """The parameters of an RMS norm (scale) or of a layer norm (scale and bias)."""
    leaves = {"scale": vector({"width": width}, "ones", f"{source}.weight", layers)}
    if bias:
        leaves["bias"] = vector({"width": width}, "zeros", f"{source}.bias", layers)
    return leaves


def encoder_blocks(
    width: int,
    heads: int,
    mlp: int,
    layers: int,
    source: str,
    names: dict[str, str],
    up: str = "up",
    down: str = "down",
) -> dict[str, Leaf]:
    """Parameters of an encoder's stacked blocks, with biases everywhere and layer norms: those of ViTs and of BERT.

    source: prefix of a block in the file; names: the file's name of norm1, norm2, q, k, v, o and of what `up` and
    `down` name there.
    """
    own, columns = {"width": width}, {"mlp": mlp}
    model, head = {"embed": width}, {"heads": heads, "head_dim": width // heads}
    blocks = {
        "norm1": norm(width, True, f"{source}.{names['norm1']}", layers),
        "norm2": norm(width, True, f"{source}.{names['norm2']}", layers),
        "wo": matrix(head, model, f"{source}.{names['o']}.weight", layers=layers),
        "bo": vector(own, "zeros", f"{source}.{names['o']}.bias", layers),
        "up": matrix(model, columns, f"{source}.{names[up]}.weight", layers=layers),
        "up_bias": vector(columns, "zeros", f"{source}.{names[up]}.bias", layers),
        "down": matrix(columns, model, f"{source}.{names[down]}.weight", layers=layers),
        "down_bias": vector(own, "zeros", f"{source}.{names[down]}.bias", layers),
    }
    for name in "qkv":
        blocks[f"w{name}"] = matrix(model, head, f"{source}.{names[name]}.weight", layers=layers)
        blocks[f"b{name}"] = vector(head, "zeros", f"{source}.{names[name]}.bias", layers)
    return blocks


def is_leaf(node) -> bool:
    """For `jax.tree.map(..., is_leaf=is_leaf)` over an abstract tree."""
    return isinstance(node, Leaf)


def abstract_arrays(abstract, mesh: Mesh, dtype=jnp.float32):
    """The abstract tree as `jax.ShapeDtypeStruct`s of one type with their shardings."""

    def array(leaf: Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=axes.sharding(mesh, leaf.axes, leaf.shape))

    return jax.tree.map(array, abstract, is_leaf=is_leaf)


def init(abstract, key: jax.Array, mesh: Mesh):
    """Parameters drawn as the abstract tree says, each made where it lies; the numbers do not depend on the mesh.

    A value follows from its leaf's key and its own place in the leaf alone, so leaves up to `SMALL` values are cut from
    flat draws of a few lengths: one program for all leaves took longer to compile than a toy model trains.
    """

    def one(path, leaf: Leaf, place: jax.ShapeDtypeStruct) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        size = math.prod(leaf.shape)
        if leaf.init in CONSTANTS:
            values = np.full(leaf.shape, CONSTANTS[leaf.init], np.float32)
        elif size > SMALL:
            return _drawer(leaf.init, leaf.shape, leaf.std, place.sharding)(own)
        else:
            length = 4096
            while length < size:
                length *= 4
            values = np.asarray(_drawer(leaf.init, (length,), leaf.std, None)(own))[:size].reshape(leaf.shape)
        return jax.make_array_from_callback(leaf.shape, place.sharding, lambda index: values[index])

    return jax.tree_util.tree_map_with_path(one, abstract, abstract_arrays(abstract, mesh), is_leaf=is_leaf)


CONSTANTS = {"zeros": 0.0, "ones": 1.0}
SMALL = 1 << 22  # values of a leaf that is drawn whole on the host


@functools.lru_cache(maxsize=256)
def _drawer(init: str, shape: tuple[int, ...], std: float, sharding):
    """The compiled function from a key to values of that standard deviation."""

    def draw(key: jax.Array) -> jax.Array:
        if init == "normal":
            return jax.random.normal(key, shape, jnp.float32) * std
        return jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0) * (math.sqrt(3.0) * std)

    return jax.jit(draw, out_shardings=sharding)


def widen(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with leading axes of size 1, as many as `like` has: rank promotion is written out, never implied."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def rms_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32; the result has the type of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * widen(params["scale"].astype(jnp.float32), x)).astype(x.dtype)


def layer_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
    """Layer norm over the last axis, in float32; the result has the type of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale, bias = (widen(params[name].astype(jnp.float32), x) for name in ("scale", "bias"))
    return (wide * scale + bias).astype(x.dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activate(x: jax.Array, name: str) -> jax.Array:
    """One of `ACTIVATIONS`, under its Hugging Face name."""
    return ACTIVATIONS[name](x)


def rope_table(positions: jax.Array, frequency: jax.Array, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary positions (RoFormer, arXiv 2104.09864), times `factor`, f32[b, t, pairs] each.

    positions: i32[b, t]; frequency: f32[pairs], radians a position.
    """
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + pairs) of the last axis, as Hugging Face LLaMA does; what lies after the pairs stays as
    it is. x: [b, t, …, d]."""
    pairs = table[0].shape[2]
    shape = (*table[0].shape[:2], *(1,) * (x.ndim - 3), pairs)
    cos, sin = (part.astype(x.dtype).reshape(shape) for part in table)
    low, high, rest = jnp.split(x, (pairs, 2 * pairs), axis=-1)
    turned = [low * cos - high * sin, high * cos + low * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Softmax attention, scores in float32. q: [b, t, k, g, d], k and v: [b, s, k, d], bias: f32[t, s]; result as q.

    Long sequences go by blocks of queries, one block's scores alive at a time, forward and backward; without a bias in
    half precision cuDNN's fused attention does the same where there is one.
    """
    if bias is None and has_cudnn(q):
        return fused_attention(q, k, v, causal=False)
    if q.shape[1] <= WHOLE_UP_TO:
        return _attention(q, k, v, bias)
    return _by_blocks(q, k, v, lambda places: None if bias is None else bias.at[places].get(mode="clip"))


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None = None) -> jax.Array:
    """`attention` in which a query sees the keys up to its own; of its own segment, if i32[b, t] says whose each is."""
    if has_cudnn(q):
        return fused_attention(q, k, v, causal=True, segments=segments)
    keys = jnp.arange(q.shape[1])

    def bias(places: jax.Array) -> jax.Array:
        seen = places[:, None] >= keys[None]
        if segments is not None:
            own = segments.at[:, places].get(mode="clip", out_sharding=row_sharding(segments, 2))
            seen = seen[None] & (own[:, :, None] == segments[:, None])
        return jnp.where(seen, 0.0, MASKED)

    return _attention(q, k, v, bias(keys)) if q.shape[1] <= WHOLE_UP_TO else _by_blocks(q, k, v, bias)


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """All scores at once. In its gradient the softmax's sum over keys is taken as out · d_out, over the head dimension
    (FlashAttention, arXiv 2205.14135, appendix B.2): reduced over [t, s] it took as long as the rest (CPU, 512
    positions)."""
    return _attend(q, k, v, bias)[0]


def _attend(q, k, v, bias):
    scores = jnp.einsum("btkgd,bskd->bkgts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + (bias[None] if bias.ndim == 2 else bias)[:, None, None]
    weight = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weight.astype(v.dtype), v)
    return out, (q, k, v, weight, out)


def _attention_backward(kept, grad):
    q, k, v, weight, out = kept
    d_v = jnp.einsum("bkgts,btkgd->bskd", weight.astype(v.dtype), grad)
    d_weight = jnp.einsum("btkgd,bskd->bkgts", grad, v, preferred_element_type=jnp.float32)
    mean = jnp.einsum("btkgd,btkgd->bkgt", grad, out, preferred_element_type=jnp.float32)
    d_scores = (weight * (d_weight - mean[..., None])).astype(q.dtype)
    scale = q.shape[-1] ** -0.5
    d_q = jnp.einsum("bkgts,bskd->btkgd", d_scores, k) * scale
    return d_q, jnp.einsum("bkgts,btkgd->bskd", d_scores, q * scale), d_v, None


_attention.defvjp(_attend, _attention_backward)


def _by_blocks(q: jax.Array, k: jax.Array, v: jax.Array, bias) -> jax.Array:
    """`bias(places of a block's queries) -> f32[block, s]`, f32[b, block, s] or None; the backward pass
    computes the scores again.

    A loop on the device: XLA may run blocks that are written out side by side, and then keeps the scores of them all.
    """
    length, count = q.shape[1], -(-q.shape[1] // QUERY_BLOCK)
    whole = jnp.pad(q, ((0, 0), (0, count * QUERY_BLOCK - length), (0, 0), (0, 0), (0, 0)))
    run = jax.checkpoint(lambda part, k, v, places: _attention(part, k, v, bias(places)))

    def block(start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(whole, start, QUERY_BLOCK, axis=1)
        return run(part, k, v, start + jnp.arange(QUERY_BLOCK))

    out = jnp.moveaxis(jax.lax.map(block, QUERY_BLOCK * jnp.arange(count)), 0, 1)  # [b, blocks, block, k, g, d]
    return out.reshape(whole.shape)[:, :length]


def has_cudnn(q: jax.Array) -> bool:
    """Whether cuDNN attends to such queries: half precision, a GPU of capability 8.0 or more, a head it supports."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    device = jax.devices()[0]
    return device.platform == "gpu" and float(device.compute_capability) >= 8.0


def attention_used(head_dim: int, length: int, dtype) -> str:
    """Which attention rows of so many positions get on the first device: 'cudnn', 'whole' (all scores at once) or
    'blocks' (those of `QUERY_BLOCK` queries)."""
    if has_cudnn(jax.ShapeDtypeStruct((1, length, 1, 1, head_dim), dtype)):
        return "cudnn"
    return "whole" if length <= WHOLE_UP_TO else "blocks"


def fused_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool,
    segments: jax.Array | None = None,
    implementation: str = "cudnn",
) -> jax.Array:
    """`attention` by `jax.nn.dot_product_attention`, each device its own rows and heads (no sum crosses them). Segments
    cost a mask [b, t, s], which cuDNN takes as a bias: one number a pair of positions, whatever the heads."""

    def own(q, k, v, *segments):
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
        mask = [(part[:, :, None] == part[:, None])[:, None] for part in segments]
        mixed = jax.nn.dot_product_attention(
            heads, k, v, mask=mask[0] if mask else None, is_causal=causal, implementation=implementation
        )
        return mixed.reshape(q.shape)

    parts = (q, k, v) if segments is None else (q, k, v, segments)
    shardings = [jax.typeof(part).sharding for part in parts]
    if shardings[0].mesh.empty:
        return own(*parts)
    specs = tuple(sharding.spec for sharding in shardings)
    return jax.shard_map(own, in_specs=specs, out_specs=specs[0], check_vma=False)(*parts)


def run_blocks(block, x: jax.Array, stacked, per_layer, *, remat: bool = False):
    """Runs stacked blocks. `block(x, layer of stacked, its part of per_layer) -> (x, out)`; returns (x, stacked outs).

    Every layer that `stacked` holds runs: who wants fewer holds fewer (cut outside jit, where it costs no copy a call).
    """

    def body(x, entry):
        return block(x, *entry)

    if remat:
        body = jax.checkpoint(body, prevent_cse=False)
    count = jax.tree.leaves(stacked)[0].shape[0]
    return jax.lax.scan(body, x, (stacked, per_layer), unroll=count if count <= UNROLL_UP_TO else 1)
