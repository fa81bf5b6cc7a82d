"""Parameter descriptions, norms, rotary positions."""

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
        tables = [layers.rope_table(jnp.array([[first + gap]]), 16, 10000.0) for gap in (0, 9)]
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
