"""What every tower is made of: the description of a parameter, norms, rotary positions, attention.

Letters of the products: b rows, t and s positions, n rows and positions as one axis, w model width, k key/value heads,
g queries of one key/value head, d head dimension, m MLP columns, r LoRA rank, l layers.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from coincide_jax.core import axes

UNROLL_UP_TO = 8  # layers; a shallow stack is unrolled whole: XLA then fuses across layers, for a longer compilation
MASKED = -1e30  # score of a key that may not be seen; finite, so that a row without any key stays finite


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter. Initialisation, sharding and the exchange with Hugging Face files all derive from it.

    A stacked leaf has the logical axis 'layer' first; `source` then holds "{layer}". Our layout is inputs before
    outputs; a file's is outputs before inputs: the first `inputs` dimensions (the layer aside) go last, then the file's
    shape `source_shape` is taken.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names, one a dimension
    init: str  # normal | zeros | ones
    std: float  # of 'normal'
    source: str  # tensor name in a Hugging Face file
    inputs: int
    source_shape: tuple[int, ...]


def matrix(
    inputs: dict[str, int], outputs: dict[str, int], source: str, std: float | None = None, layers: int = 0
) -> Leaf:
    """A product's weight, f32[inputs…, outputs…] (`layers` of them stacked, if not 0), named by logical axis.

    Its standard deviation is 1/√inputs unless given."""
    sizes = (*inputs.values(), *outputs.values())
    fan_in, fan_out = math.prod(inputs.values()), math.prod(outputs.values())
    std = fan_in**-0.5 if std is None else std
    names = (*inputs, *outputs)
    return stack(Leaf(sizes, names, "normal", std, source, len(inputs), (fan_out, fan_in)), layers)


def vector(sizes: dict[str, int], init: str, source: str, layers: int = 0) -> Leaf:
    """A scale or bias, f32[sizes…]."""
    shape = tuple(sizes.values())
    return stack(Leaf(shape, tuple(sizes), init, 0.0, source, 0, (math.prod(shape),)), layers)


def stack(leaf: Leaf, layers: int) -> Leaf:
    """`layers` such leaves as one, or the leaf itself for 0."""
    if not layers:
        return leaf
    return dataclasses.replace(leaf, shape=(layers, *leaf.shape), axes=("layer", *leaf.axes))


def norm(width: int, bias: bool, source: str, layers: int = 0) -> dict[str, Leaf]:
    """The parameters of an RMS norm (scale) or of a layer norm (scale and bias)."""
    leaves = {"scale": vector({"width": width}, "ones", f"{source}.weight", layers)}
    if bias:
        leaves["bias"] = vector({"width": width}, "zeros", f"{source}.bias", layers)
    return leaves


def is_leaf(node) -> bool:
    """For `jax.tree.map(..., is_leaf=is_leaf)` over an abstract tree."""
    return isinstance(node, Leaf)


def abstract_arrays(abstract, mesh: Mesh):
    """The abstract tree as `jax.ShapeDtypeStruct`s with their shardings."""

    def array(leaf: Leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=axes.sharding(mesh, leaf.axes, leaf.shape))

    return jax.tree.map(array, abstract, is_leaf=is_leaf)


def init(abstract, key: jax.Array, mesh: Mesh):
    """Parameters drawn as the abstract tree says, each made where it lies; the numbers do not depend on the mesh."""

    def draw(key: jax.Array):
        def one(path, leaf: Leaf) -> jax.Array:
            if leaf.init == "normal":
                own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
                return jax.random.normal(own, leaf.shape, jnp.float32) * leaf.std
            return {"zeros": jnp.zeros, "ones": jnp.ones}[leaf.init](leaf.shape, jnp.float32)

        return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_leaf)

    shardings = jax.tree.map(lambda array: array.sharding, abstract_arrays(abstract, mesh))
    return jax.jit(draw, out_shardings=shardings)(key)


def widen(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with leading axes of size 1, as many as `like` has: rank promotion is written out, never implied."""
    return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def rms_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, in float32; the result has the type of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * widen(params["scale"], x)).astype(x.dtype)


def layer_norm(x: jax.Array, params: dict, eps: float) -> jax.Array:
    """Layer norm over the last axis, in float32; the result has the type of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * widen(params["scale"], x) + widen(params["bias"], x)).astype(x.dtype)


def activate(x: jax.Array, name: str) -> jax.Array:
    """The GELU variants of vision towers, under their Hugging Face names."""
    if name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate={"gelu": False, "gelu_pytorch_tanh": True}[name])


def rope_table(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary positions (RoFormer, arXiv 2104.09864), f32[b, t, head_dim / 2] for i32[b, t]."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle), jnp.sin(angle)


def rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + d/2) of the last axis, as Hugging Face LLaMA does. x: [b, t, …, d]."""
    shape = (*table[0].shape[:2], *(1,) * (x.ndim - 3), table[0].shape[2])
    cos, sin = (part.astype(x.dtype).reshape(shape) for part in table)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Softmax attention, scores in float32. q: [b, t, k, g, d], k and v: [b, s, k, d], bias: f32[t, s]; result as q."""
    scores = jnp.einsum("btkgd,bskd->bkgts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias[None, None, None]
    return jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)


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
