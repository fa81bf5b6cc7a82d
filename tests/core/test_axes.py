"""The mesh, the rule table, and the one rule for dimensions that do not divide."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from coincide_jax.core import axes, precision
from coincide_jax.core.errors import UserError
from coincide_jax.models import layers, text, vision, vlm
from configs import llava15


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


def whole(tree, mesh) -> float:
    """Share of a model's parameters that every device holds."""
    leaves = jax.tree.leaves(tree, is_leaf=layers.is_leaf)
    alone = sum(math.prod(leaf.shape) for leaf in leaves if not any(axes.spec(leaf.axes, leaf.shape, mesh)))
    return alone / sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)])
def test_hardly_anything_is_held_by_every_device(shape):
    mesh = AbstractMesh(shape, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    config = llava15.get_config()
    cfg = vlm.VLMConfig.tiny(config.model, 336, 32000, precision.Precision("float32"))
    assert whole(vlm.abstract(cfg), mesh) < 0.02
    dino = dataclasses.replace(
        cfg.vision,
        family="dinov2",
        image_size=518,
        pre_norm=False,
        closing_norm=True,
        layer_scale=True,
        patch_bias=True,
    )
    assert whole(vision.abstract(dino), mesh) < 0.02
    siglip = dataclasses.replace(
        cfg.vision, family="siglip", image_size=384, width=1152, depth=26, mlp=4304, class_token=False, pre_norm=False,
        patch_bias=True,
    )  # fmt: skip
    assert whole(vision.abstract(siglip), mesh) < 0.02
    minilm = text.TextConfig("bert", 30522, 384, 6, 12, 1536, 512, 2, "gelu", 1e-12, 0, 0)
    assert whole(text.abstract(minilm), mesh) < 0.02
    clip_text = text.TextConfig("clip", 49408, 768, 12, 12, 3072, 77, 0, "quick_gelu", 1e-5, 49407, 768)
    assert whole(text.abstract(clip_text), mesh) < 0.02
