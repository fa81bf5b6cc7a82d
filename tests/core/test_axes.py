"""The mesh, the rule table, and the one rule for dimensions that do not divide."""

import jax
import numpy as np
import pytest

from coincide_jax.core import axes, precision
from coincide_jax.core.errors import UserError


def test_mesh_shape():
    mesh = axes.make_mesh(2)
    assert dict(mesh.shape) == {"data": 4, "model": 2}
    assert dict(axes.make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "model": 1}


def test_mesh_refuses_a_number_that_does_not_divide():
    with pytest.raises(UserError, match="model_parallel is 3"):
        axes.make_mesh(3)


def test_spec_follows_the_rules():
    assert axes.spec(("layer", "embed", "heads", "group", "head_dim")) == jax.P(None, "data", "model", None, None)


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(ValueError, match="one mesh axis"):
        axes.spec(("heads", "mlp"))


def test_unknown_axis_is_an_error():
    with pytest.raises(KeyError):
        axes.spec(("haeds",))


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = axes.make_mesh(2)
    assert axes.sharding(mesh, ("embed", "heads"), (8, 3)).spec == jax.P("data", None)
    assert axes.sharding(mesh, ("embed", "heads"), (6, 4)).spec == jax.P(None, "model")


def test_put_batch_shares_rows():
    mesh = axes.make_mesh(2)
    batch = axes.put_batch({"a": np.arange(8), "b": np.ones((8, 3, 3))}, mesh)
    assert batch["b"].sharding.shard_shape((8, 3, 3)) == (2, 3, 3)
    np.testing.assert_array_equal(batch["a"], np.arange(8))
    with pytest.raises(UserError, match="a batch has 6 rows; expected a multiple of the 4"):
        axes.put_batch({"a": np.arange(6)}, mesh)


def test_use_gathers_over_data_and_casts():
    mesh = axes.make_mesh(2)
    with jax.set_mesh(mesh):
        weight = jax.device_put(np.ones((8, 4), np.float32), axes.sharding(mesh, ("embed", "mlp")))
        used = jax.jit(lambda w: axes.use({"w": w}, np.dtype("bfloat16")))(weight)["w"]
        assert used.dtype == "bfloat16" and used.sharding.spec == jax.P(None, "model")
        gradient = jax.jit(jax.grad(lambda w: axes.use(w, np.dtype("float32")).sum()))(weight)
        assert gradient.sharding == weight.sharding


class Device:
    """A stand-in for `jax.Device`."""

    def __init__(self, platform: str, compute_capability: str = ""):
        self.platform, self.compute_capability = platform, compute_capability


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (Device("cpu"), "float32"),
        (Device("tpu"), "bfloat16"),
        (Device("gpu", "7.0"), "float32"),
        (Device("gpu", "8.0"), "bfloat16"),
        (Device("gpu", "12.0"), "bfloat16"),
    ],
)
def test_precision_by_device(device, expected):
    assert precision.choose("auto", device).compute == expected
    assert precision.choose("bfloat16", device).compute == "bfloat16"


def test_precision_unknown():
    with pytest.raises(UserError, match="did you mean 'float32'"):
        precision.choose("float23")
