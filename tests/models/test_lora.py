"""Adapters: nothing at first, merged equals beside, gradients only where they belong, dropout."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from coincide_jax.core import precision
from coincide_jax.core.errors import UserError
from coincide_jax.models import decoder, lora, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")

TARGETS = tuple(decoder.PROJECTIONS)


def hidden(params, batch, cfg, **keys):
    """The residual stream after the last layer."""
    return jax.jit(lambda p, b, k: vlm.forward(p, b, cfg, **k).hidden)(params, batch, keys)


def adapters_on(mesh, cfg, strong: bool):
    """Adapters of rank 4 on every target, as they begin (B is zero) or with B drawn too."""
    return weights.draw(lora.abstract(cfg, 4, TARGETS), mesh, seed=3, std=0.12 if strong else None)


@pytest.mark.parametrize(("devices", "model_parallel"), [(1, 1), (8, 2)])
def test_adapters(tiny, devices, model_parallel):
    mesh = tiny.mesh(devices, model_parallel)
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        adapters = adapters_on(mesh, tiny.cfg, strong=False)
        plain = hidden(params, batch, tiny.cfg)
        forward = jax.jit(lambda p, a: vlm.forward(p, batch, tiny.cfg, lora=(a, 2.0, 0.0)).hidden)
        np.testing.assert_allclose(forward(params, adapters), plain, rtol=1e-5, atol=3e-5)
        adapters = adapters_on(mesh, tiny.cfg, strong=True)
        beside = forward(params, adapters)
        assert np.abs(np.asarray(beside - plain)).max() > 0.1
        merged = jax.jit(lambda p, a: lora.merge(p, a, 2.0))(params, adapters)
        np.testing.assert_allclose(hidden(merged, batch, tiny.cfg), beside, rtol=1e-4, atol=1e-4)
        wq = merged["decoder"]["blocks"]["wq"]
        assert wq.sharding.is_equivalent_to(params["decoder"]["blocks"]["wq"].sharding, wq.ndim)
        grads = jax.jit(jax.grad(lambda a: (forward(params, a) ** 2).mean()))(adapters)
        assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))


def test_dropout_needs_a_key_and_is_the_same_on_any_mesh(tiny):
    found = []
    for devices in (1, 8):
        mesh = tiny.mesh(devices)
        with jax.set_mesh(mesh):
            params, batch = tiny.params(mesh), tiny.batch(mesh)
            adapters = adapters_on(mesh, tiny.cfg, strong=True)
            forward = jax.jit(lambda p, b, a, k: vlm.forward(p, b, tiny.cfg, lora=(a, 2.0, 0.5), dropout_key=k).hidden)
            dropped = forward(params, batch, adapters, jax.random.key(1))
            other = forward(params, batch, adapters, jax.random.key(2))
            none = forward(params, batch, adapters, None)
            assert np.abs(np.asarray(dropped - other)).max() > 0.1
            assert np.abs(np.asarray(dropped - none)).max() > 0.1
            found.append(np.asarray(dropped))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_targets_by_any_name(tiny):
    cfg = tiny.cfg.decoder
    assert lora.choose_targets(cfg, ("all-linear",)) == TARGETS
    assert lora.choose_targets(cfg, ("down_proj", "wq", "q_proj")) == ("wq", "down")
    phi = families.config("phi")
    assert lora.choose_targets(phi, ("all-linear",)) == ("wq", "wk", "wv", "wo", "up", "down")
    assert lora.choose_targets(phi, ("dense", "fc1")) == ("wo", "up")
    assert lora.choose_targets(families.config("openelm"), ("qkv_proj",)) == ("wq", "wk", "wv")


def test_unknown_target(tiny):
    with pytest.raises(UserError, match="unknown LoRA target 'wqq'"):
        lora.abstract(tiny.cfg, 4, ("wqq",))
    with pytest.raises(UserError, match="unknown LoRA target 'gate'"):
        lora.choose_targets(families.config("phi"), ("gate",))


def test_drawn_as_peft_draws_them(tiny, key):
    drawn = lora.init(lora.abstract(tiny.cfg, 16, ("wq", "down")), key, tiny.mesh())
    for name, fan_in in (("wq", 32), ("down", 40)):
        a, bound = np.asarray(drawn[name]["a"]), fan_in**-0.5
        assert a.shape[-1] == 16 and 0.97 * bound < np.abs(a).max() <= bound
        assert np.std(a) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not np.any(drawn[name]["b"]) and drawn[name]["b"].dtype == jnp.float32


def test_unmerge_undoes_merge_and_keeps_the_stored_type(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, adapters = tiny.params(mesh), adapters_on(mesh, tiny.cfg, strong=True)
        back = lora.unmerge(lora.merge(params, adapters, 2.0), adapters, 2.0)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), back, params)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        merged = lora.merge(half, adapters, 2.0)["decoder"]["blocks"]["wq"]
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
        exact = lora.merge(wide, adapters, 2.0)["decoder"]["blocks"]["wq"]
        assert merged.dtype == jnp.bfloat16
        np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))


def test_float32_adapters_over_a_half_precision_base(tiny):
    """Weights held in the compute type give what float32 masters of the same values give, and float32 gradients."""
    cfg, mesh = dataclasses.replace(tiny.cfg, precision=precision.choose("bfloat16")), tiny.mesh()
    with jax.set_mesh(mesh):
        batch, adapters = tiny.batch(mesh), adapters_on(mesh, cfg, strong=True)
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny.params(mesh))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)

        @jax.jit
        def run(params, adapters):
            return (vlm.forward(params, batch, cfg, lora=(adapters, 2.0, 0.0)).hidden ** 2).mean()

        (a, grads), b = jax.value_and_grad(run, argnums=1)(half, adapters), run(wide, adapters)
    assert float(a) == pytest.approx(float(b), rel=0.02)
    assert all(leaf.dtype == jnp.float32 and np.any(leaf) for leaf in jax.tree.leaves(grads))
