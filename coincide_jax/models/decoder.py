"""Decoder: one body for LLaMA (arXiv 2302.13971) with grouped-query attention, StableLM-2 (2402.17834), Phi-2
(2309.05463), Qwen2 (2407.10671) and OpenELM (2404.14619). Blocks stacked at rest, run under one scan.

`PROJECTIONS` describes the seven products of a block once; shapes, sharding, the forward pass, LoRA and its merging
derive from it. Where layers differ in shape, `params["blocks"]` is a tuple of such stacks, one a run of equal layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from coincide_jax.core.axes import row_sharding, use
from coincide_jax.models import rope as ropes
from coincide_jax.models.layers import (
    MASKED,
    Leaf,
    activate,
    attention,
    causal_attention,
    is_leaf,
    layer_norm,
    matrix,
    norm,
    rms_norm,
    rope,
    rope_table,
    run_blocks,
    vector,
)

SOURCE = "language_model.model"
HEAD = "language_model.lm_head"
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
# what `run` can show of a layer: the output of its attention's output projection, before the residual sum (COINCIDE,
# eq. 1 and the authors' hook); that of its MLP, before the sum too; the residual stream that it hands on
TAPS = ("attention", "mlp", "block")
AXES = {"w": "embed", "k": "heads", "g": "group", "d": "head_dim", "m": "mlp"}
LLAMA = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "embed": "embed_tokens",
    "norm": "norm",
}
# family → our name → the file's: of a block under "<SOURCE>.layers.<number>.", of the rest under "<SOURCE>."
NAMES = {
    "llama": LLAMA,
    "stablelm": LLAMA,
    "qwen2": LLAMA,
    "phi": LLAMA | {"wo": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2", "norm": "final_layernorm"},
    "openelm": {
        **dict.fromkeys(("wq", "wk", "wv"), "attn.qkv_proj"),
        "wo": "attn.out_proj",
        **dict.fromkeys(("gate", "up"), "ffn.proj_1"),
        "down": "ffn.proj_2",
        "norm1": "attn_norm",
        "norm2": "ffn_norm",
        "q_norm": "attn.q_norm",
        "k_norm": "attn.k_norm",
        "embed": "token_embeddings",
        "norm": "norm",
    },
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Constants that a checkpoint owns."""

    family: str  # llama | stablelm | phi | qwen2 | openelm: chooses tensor names only
    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    norm: str  # rms | layer (with bias)
    norm_eps: float
    activation: str  # silu | gelu | gelu_pytorch_tanh | quick_gelu
    gated: bool  # down(act(gate) · up), else down(act(up))
    parallel: bool  # attention and MLP read one norm, both are added
    biases: tuple[str, ...]  # the projections that have one, stored as "<name>_bias"
    head_bias: bool
    rotary: int  # rotated dimensions of a head, the first ones; even
    rope_theta: float
    rope_scaling: tuple[tuple[str, Any], ...]  # sorted items of the checkpoint's rope parameters; () = none
    positions: int  # that the checkpoint was made for
    qk_norm: bool  # RMS norm over each head of queries and keys
    tied: bool  # the head is the transposed embedding
    layer_shapes: tuple[tuple[int, int, int], ...]  # heads, kv_heads, mlp of each layer where they differ, else ()


class Run(NamedTuple):
    """Layers first … first + count - 1, of one shape."""

    first: int
    count: int
    heads: int
    kv_heads: int
    mlp: int


class Output(NamedTuple):
    """Of a pass: residual stream [b, t, w], what `tap` returned [l, …], new keys and values ([l, b, t, k, d] each; a
    tuple of such pairs where the blocks are a tuple of stacks)."""

    x: jax.Array
    taps: Any
    cache: Any


def runs(cfg: DecoderConfig) -> list[Run]:
    """The runs of equal layers: one, if `layer_shapes` is empty."""
    if not cfg.layer_shapes:
        return [Run(0, cfg.depth, cfg.heads, cfg.kv_heads, cfg.mlp)]
    found = []
    for layer, shape in enumerate(cfg.layer_shapes):
        if found and found[-1][2:] == shape:
            found[-1] = found[-1]._replace(count=found[-1].count + 1)
        else:
            found.append(Run(layer, 1, *shape))
    return found


def per_run(cfg: DecoderConfig, make):
    """`make(run)`, as blocks and their adapters are held: alone if every layer has one shape, else in a tuple."""
    return tuple(make(run) for run in runs(cfg)) if cfg.layer_shapes else make(runs(cfg)[0])


def first_layers(blocks, count: int):
    """The first `count` layers of a tree held as `params["blocks"]` is (cut outside jit, where it costs no copy a
    call)."""
    if not isinstance(blocks, tuple):
        return jax.tree.map(lambda leaf: leaf[:count], blocks)
    held = []
    for stack in blocks:
        if count > 0:
            held.append(first_layers(stack, count))
        count -= depth_of(stack)
    return tuple(held)


def depth_of(blocks) -> int:
    """Layers held."""
    stacks = blocks if isinstance(blocks, tuple) else (blocks,)
    return sum(jax.tree.leaves(stack)[0].shape[0] for stack in stacks)


def projections(cfg: DecoderConfig) -> tuple[str, ...]:
    """The names of `PROJECTIONS` that a block has."""
    return tuple(name for name in PROJECTIONS if cfg.gated or name != "gate")


def sizes(cfg: DecoderConfig, run: Run) -> dict[str, int]:
    """Size of each letter of `PROJECTIONS`' weights."""
    group = run.heads // run.kv_heads
    return {"w": cfg.width, "k": run.kv_heads, "g": group, "d": cfg.head_dim, "m": run.mlp}


def named_sizes(cfg: DecoderConfig, run: Run, name: str) -> tuple[dict[str, int], dict[str, int]]:
    """Logical axes and sizes of a projection's inputs and outputs."""
    size = sizes(cfg, run)
    inputs, outputs = ({AXES[letter]: size[letter] for letter in letters} for letters in PROJECTIONS[name])
    return inputs, outputs


def rows_of(cfg: DecoderConfig, run: Run, name: str) -> tuple[int, int] | None:
    """Where OpenELM's file fuses projections: this one's rows of the tensor."""
    if cfg.family != "openelm":
        return None
    q, k, m = run.heads * cfg.head_dim, run.kv_heads * cfg.head_dim, run.mlp
    return {"wq": (0, q), "wk": (q, q + k), "wv": (q + k, q + 2 * k), "gate": (0, m), "up": (m, 2 * m)}.get(name)


def abstract(cfg: DecoderConfig) -> dict:
    """The decoder's parameters."""
    names = NAMES[cfg.family]

    def block(run: Run) -> dict:
        source, leaves = f"{SOURCE}.layers.{{layer}}", {}
        for name in projections(cfg):
            inputs, outputs = named_sizes(cfg, run, name)
            leaves[name] = matrix(inputs, outputs, f"{source}.{names[name]}.weight", layers=run.count)
            leaves[name] = leaves[name].replace(part=rows_of(cfg, run, name))
            if name in cfg.biases:
                outputs = {"width": cfg.width} if PROJECTIONS[name][1] == "w" else outputs
                leaves[f"{name}_bias"] = vector(outputs, "zeros", f"{source}.{names[name]}.bias", run.count)
        bias = cfg.norm == "layer"
        for name in ("norm1",) if cfg.parallel else ("norm1", "norm2"):
            leaves[name] = norm(cfg.width, bias, f"{source}.{names[name]}", run.count)
        for name in ("q_norm", "k_norm") if cfg.qk_norm else ():
            leaves[name] = norm(cfg.head_dim, False, f"{source}.{names[name]}", run.count)
        return jax.tree.map(lambda leaf: leaf.replace(first=run.first), leaves, is_leaf=is_leaf)

    table = (cfg.vocab, cfg.width)
    leaves = {
        "embed": Leaf(table, ("vocab", "embed"), "normal", 0.02, f"{SOURCE}.{names['embed']}.weight", 0, table),
        "blocks": per_run(cfg, block),
        "norm": norm(cfg.width, cfg.norm == "layer", f"{SOURCE}.{names['norm']}"),
    }
    if not cfg.tied:
        leaves["head"] = matrix({"embed": cfg.width}, {"vocab": cfg.vocab}, f"{HEAD}.weight", std=0.02)
    if cfg.head_bias:
        leaves["head_bias"] = vector({"vocab": cfg.vocab}, "zeros", f"{HEAD}.bias")
    return leaves


def embed(params: dict, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Token ids i32[b, t] → embeddings [b, t, w]."""
    return use(params["embed"], dtype).at[tokens].get(out_sharding=row_sharding(tokens, 3))


def head(params: dict, cfg: DecoderConfig, dtype: jnp.dtype) -> jax.Array:
    """The head [w, v], ready for a product."""
    return use(params["embed"], dtype).T if cfg.tied else use(params["head"], dtype)


def head_bias(params: dict, cfg: DecoderConfig) -> jax.Array | None:
    """What the head adds to the logits, f32[v], or None."""
    return params["head_bias"].astype(jnp.float32) if cfg.head_bias else None


def normed(x: jax.Array, params: dict, cfg: DecoderConfig) -> jax.Array:
    """The family's norm over the width."""
    return (rms_norm if cfg.norm == "rms" else layer_norm)(x, params, cfg.norm_eps)


def final_norm(params: dict, x: jax.Array, cfg: DecoderConfig) -> jax.Array:
    """The norm before the head."""
    return normed(x, params["norm"], cfg)


def causal_bias(length: int) -> jax.Array:
    """f32[t, s]: 0 where key s is at or before query t. Padding stands at the right end, so a real query never sees it
    and lengths need not be read; what padding positions compute is read by nobody."""
    seen = jnp.arange(length)[:, None] >= jnp.arange(length)[None]
    return jnp.where(seen, 0.0, MASKED)


def project(name: str, x: jax.Array, weights: dict, lora, key) -> jax.Array:
    """One of `PROJECTIONS` of x [n, inputs…]: x W + bias, and + scale · dropout(x) A B if it has a LoRA (arXiv
    2106.09685), whose products are in the type of x and whose sums are float32.

    lora: (adapters of this layer, scale, dropout) or None; key: of this layer's dropout, or None.
    """
    inputs, outputs = PROJECTIONS[name]
    # 'model' may share what is summed over, never what a result of the model width holds
    whole = row_sharding(x, 2) if outputs == "w" else None
    y = jnp.einsum(f"n{inputs},{inputs}{outputs}->n{outputs}", x, weights[name], out_sharding=whole)
    if f"{name}_bias" in weights:
        y = y + weights[f"{name}_bias"][None]
    if lora is None or name not in lora[0]:
        return y
    adapter, scale, dropout = lora[0][name], lora[1], lora[2]
    if dropout > 0.0 and key is not None:
        key = jax.random.fold_in(key, list(PROJECTIONS).index(name))
        keep = jax.random.bernoulli(key, 1.0 - dropout, x.shape, out_sharding=jax.typeof(x).sharding)
        x = jnp.where(keep, x / (1.0 - dropout), jnp.zeros_like(x))
    low = jnp.einsum(f"n{inputs},{inputs}r->nr", x, adapter["a"], out_sharding=row_sharding(x, 2))
    change = jnp.einsum(
        f"nr,r{outputs}->n{outputs}", low, adapter["b"], out_sharding=whole, preferred_element_type=jnp.float32
    )
    return (y.astype(jnp.float32) + scale * change).astype(y.dtype)


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
    tap_from: str = "attention",
    remat: bool = False,
    keep_cache: bool = False,
) -> Output:
    """Runs the blocks on embeddings x [b, t, w] at positions i32[b or 1, t].

    `attend(q, k, v, past of this layer)` is the attention; `tap` sees in each layer what `tap_from` names (`TAPS`), and
    is reduced inside the scan.
    """
    adapters, scale, dropout = lora if lora is not None else (None, 0.0, 0.0)
    count = depth_of(params["blocks"])
    keys = None if dropout_key is None or dropout == 0.0 else jax.random.split(dropout_key, count)
    rows, length, width = x.shape
    slots = 0 if past is None else jax.tree.leaves(past)[0].shape[2]
    frequency, factor = ropes.frequencies(cfg, slots + length)
    table = rope_table(positions, frequency, factor)

    def block(x, layer, own):
        (layer, adapter), (key, kept) = layer, own
        weights = use({name: leaf for name, leaf in layer.items() if not isinstance(leaf, dict)}, x.dtype)
        local = None if adapter is None else (use(adapter, x.dtype), scale, dropout)

        def mlp(h):
            up = project("up", h, weights, local, key)
            if not cfg.gated:
                return project("down", activate(up, cfg.activation), weights, local, key)
            gate = activate(project("gate", h, weights, local, key), cfg.activation)
            return project("down", gate * up, weights, local, key)

        h = normed(x, layer["norm1"], cfg)
        q, k, v = (project(name, h, weights, local, key) for name in ("wq", "wk", "wv"))
        q, k, v = (split_rows(part, rows, length) for part in (q, k, v))
        if cfg.qk_norm:
            q, k = rms_norm(q, layer["q_norm"], cfg.norm_eps), rms_norm(k, layer["k_norm"], cfg.norm_eps)
        q, k = rope(q, table), rope(k, table)
        mixed = attend(q, k, v, kept)
        out = project("wo", mixed.reshape(rows * length, *mixed.shape[2:]), weights, local, key)
        x = x + out
        fed = mlp(h if cfg.parallel else normed(x, layer["norm2"], cfg))
        x = x + fed
        seen = {"attention": out, "mlp": fed, "block": x}[tap_from]
        tapped = None if tap is None else tap(seen.reshape(rows, length, width))
        return x, (tapped, (k, v) if keep_cache else None)

    # rows and positions as one axis: the gradient of a weight is then a plain product of two matrices, without which
    # XLA transposes every activation (measured on a CPU: 1.6 times the time)
    flat = jnp.reshape(x, (rows * length, width), out_sharding=row_sharding(x, 2))
    if not isinstance(params["blocks"], tuple):
        flat, (taps, cache) = run_blocks(block, flat, (params["blocks"], adapters), (keys, past), remat=remat)
        return Output(split_rows(flat, rows, length), taps, cache)
    first, taps, caches = 0, [], []
    for index, stack in enumerate(params["blocks"]):
        stacked = (stack, None if adapters is None else adapters[index])
        last = first + depth_of(stack)
        per_layer = (None if keys is None else keys[first:last], None if past is None else past[index])
        flat, (tapped, cache) = run_blocks(block, flat, stacked, per_layer, remat=remat)
        first, taps, caches = last, [*taps, tapped], [*caches, cache]
    taps = jax.tree.map(lambda *parts: jnp.concatenate(parts), *taps)
    return Output(split_rows(flat, rows, length), taps, tuple(caches) if keep_cache else None)


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


def full_attention(bias: jax.Array | None = None):
    """`attend` for whole sequences: a query sees what `bias` f32[t, s] leaves, by default every key up to its own."""
    if bias is None:
        return lambda q, k, v, _: causal_attention(q, k, v)
    return lambda q, k, v, _: attention(q, k, v, bias)


def packed_attention(record: jax.Array):
    """`attend` for rows of several records: a query sees the keys of its own record up to its own. record: i32[b, t].
    Padding is a record too, so that no query is without a key."""
    return lambda q, k, v, _: causal_attention(q, k, v, record)
