"""Parameter descriptions, norms, rotary positions."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.core import axes
from coincide_jax.models import layers, vlm


def test_init_is_sharded_and_the_same_on_any_mesh(tiny, key):
    single, shared = tiny.mesh(), tiny.mesh(8, 2)
    abstract = vlm.abstract(tiny.cfg)
    a, b = layers.init(abstract, key, single), layers.init(abstract, key, shared)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    expected = layers.abstract_arrays(abstract, shared)
    for array, struct in zip(jax.tree.leaves(b), jax.tree.leaves(expected), strict=True):
        assert array.shape == struct.shape and array.dtype == struct.dtype == jnp.float32
        assert array.sharding.is_equivalent_to(struct.sharding, array.ndim)
    assert b["decoder"]["blocks"]["gate"].sharding.spec == jax.P(None, "data", "model")


def test_init_draws_what_the_leaf_says(key, tiny):
    leaf = layers.matrix({"embed": 64}, {"mlp": 512}, "x", layers=3)
    drawn = layers.init({"w": leaf, "b": layers.vector({"mlp": 8}, "zeros", "y")}, key, tiny.mesh())
    assert np.std(drawn["w"]) == pytest.approx(1 / 8, rel=0.02)
    assert not np.any(drawn["b"])
    assert not np.array_equal(drawn["w"][0], drawn["w"][1])


@pytest.mark.parametrize("size", [40, layers.SMALL + 1])
def test_init_draws_what_jax_draws(key, tiny, size, monkeypatch):
    """Cut from a flat draw or made by a program of its own, the numbers are those of `jax.random`."""
    monkeypatch.setattr(layers, "SMALL", 0 if size > 40 else layers.SMALL)
    leaf = layers.matrix({"embed": 40}, {"mlp": 7}, "x", std=0.3, layers=3)
    found = layers.init({"w": leaf, "a": leaf.replace(init="uniform")}, key, tiny.mesh())
    keys = [jax.random.fold_in(key, zlib.crc32(name)) for name in (b"['w']", b"['a']")]
    normal = jax.jit(lambda key: jax.random.normal(key, leaf.shape) * 0.3)(keys[0])
    np.testing.assert_array_equal(found["w"], normal)
    uniform = jax.random.uniform(keys[1], leaf.shape, minval=-1.0, maxval=1.0) * (0.3 * 3**0.5)
    np.testing.assert_allclose(found["a"], uniform, rtol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_blocks_is_the_plain_one(causal, monkeypatch):
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=shape).astype(np.float32) for shape in ((2, 70, 2, 2, 8), (2, 70, 2, 8), (2, 70, 2, 8)))

    def attend(q, k, v):
        out = layers.causal_attention(q, k, v) if causal else layers.attention(q, k, v, None)
        return out, jnp.sum(jnp.sin(out))

    def run():
        grads = jax.grad(lambda *parts: attend(*parts)[1], argnums=(0, 1, 2))
        return jax.device_get(jax.jit(lambda *parts: (attend(*parts)[0], grads(*parts)))(q, k, v))

    plain = run()
    monkeypatch.setattr(layers, "WHOLE_UP_TO", 16)
    monkeypatch.setattr(layers, "QUERY_BLOCK", 16)
    blocks = run()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max()), blocks, plain)
    fused = layers.fused_attention(q, k, v, causal=causal, implementation="xla")
    np.testing.assert_allclose(fused, plain[0], rtol=0, atol=1e-6)


def test_long_attention_needs_little_memory():
    q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 2048, 4, 1, 8), (1, 2048, 4, 8)))
    used = []
    for attend in (layers.causal_attention, lambda q, k, v: layers.attention(q, k, v, None)):
        step = jax.jit(jax.grad(lambda q, k, v, attend=attend: jnp.sum(attend(q, k, v)), argnums=(0, 1, 2)))
        used.append(step.lower(q, k, k).compile().memory_analysis().temp_size_in_bytes)
    scores = 4 * 2048 * 2048 * 4  # bytes of all of them at once; a plain backward pass holds two such
    assert max(used) < 1.5 * scores


def test_fused_attention_runs_where_rows_and_heads_lie(tiny):
    draw = np.random.default_rng(1)
    q, k = (draw.normal(size=shape).astype(np.float32) for shape in ((8, 20, 2, 2, 8), (8, 20, 2, 8)))
    mesh = tiny.mesh(8, 2)
    with jax.set_mesh(mesh):
        places = [jax.P("data", None, "model", *(None,) * rest) for rest in (2, 1)]
        shared = [
            jax.device_put(part, jax.NamedSharding(mesh, place)) for part, place in zip((q, k), places, strict=True)
        ]
        found = jax.jit(lambda q, k: layers.fused_attention(q, k, k, causal=True, implementation="xla"))(*shared)
        assert found.sharding.spec[0] == "data" and found.sharding.spec[2] == "model"
        found = np.asarray(found)
    np.testing.assert_allclose(found, layers.causal_attention(q, k, k), rtol=0, atol=1e-6)


def test_norms_take_half_precision_scales(key):
    x = jax.random.normal(key, (4, 64))
    params = {"scale": jnp.full(64, 1.5, jnp.bfloat16), "bias": jnp.full(64, 0.25, jnp.bfloat16)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    for norm in (layers.rms_norm, layers.layer_norm):
        np.testing.assert_array_equal(norm(x, params, 1e-5), norm(x, wide, 1e-5))


def test_every_leaf_has_one_source(tiny):
    leaves = jax.tree.leaves(vlm.abstract(tiny.cfg), is_leaf=layers.is_leaf)
    assert len({leaf.source for leaf in leaves}) == len(leaves)
    for leaf in leaves:
        assert len(leaf.axes) == len(leaf.shape)
        assert ("{layer}" in leaf.source) == (leaf.axes[0] == "layer")
        axes.spec(leaf.axes)


def test_rope_keeps_norms_and_depends_on_distance_only(key):
    q, k = jax.random.normal(key, (2, 1, 1, 1, 16))
    norms, products = [], []
    for first in (0, 5, 300):
        frequency = 10000.0 ** (-jnp.arange(0, 16, 2, dtype=jnp.float32) / 16)
        tables = [layers.rope_table(jnp.array([[first + gap]]), frequency) for gap in (0, 9)]
        low, high = layers.rope(q, tables[0]), layers.rope(k, tables[1])
        norms.append(float(jnp.linalg.norm(low)))
        products.append(float(jnp.sum(low * high)))
    np.testing.assert_allclose(norms, np.linalg.norm(q), rtol=1e-5)
    np.testing.assert_allclose(products, products[0], atol=1e-4)
    assert abs(products[0] - float(jnp.sum(q * k))) > 1e-2


def test_norms_are_float32_inside(key):
    x = (jax.random.normal(key, (4, 64)) * 300.0).astype(jnp.bfloat16)
    wide = np.asarray(x, np.float64)
    scale = jnp.linspace(0.5, 1.5, 64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(scale)[None]
    found = layers.rms_norm(x, {"scale": scale}, 1e-5)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=4e-3)
