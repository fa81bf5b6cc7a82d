"""Adapters: nothing at first, merged equals beside, gradients only where they belong, dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weights

from coincide_jax.core.errors import UserError
from coincide_jax.models import decoder, lora, vlm

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


def test_unknown_target(tiny):
    with pytest.raises(UserError, match="unknown LoRA target 'wqq'"):
        lora.abstract(tiny.cfg, 4, ("wqq",))
