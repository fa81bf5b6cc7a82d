"""Memory of training: parts by arithmetic, totals against what XLA says of the compiled step and merge."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax import plan
from coincide_jax.core import axes, precision
from coincide_jax.core.errors import UserError
from coincide_jax.kernels import bandits
from coincide_jax.models import layers, lora, vlm
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.state import Recipe
from configs import common, llava15, vision_flan

BASE = 6_738_415_616 + 20_979_712 + 290_909_184  # LLaMA-7B, projector, 23 blocks of ViT-L/14-336 (see test_llava15)
ADAPTERS, PROJECTOR = 319_815_680, 20_979_712


def test_7b_lora_on_one_80_gb_gpu_by_arithmetic():
    found = plan.memory(llava15.get_config(), "1xH100-80GB")
    trained = ADAPTERS + PROJECTOR
    assert found.parameters == pytest.approx(2 * BASE + 4 * trained, rel=1e-3)
    assert found.gradients == 8 * trained and found.optimizer == 8 * trained
    residual = 32 * 2 * 16 * 2048 * 4096  # layers, bfloat16, micro-batch, positions, width
    assert residual < found.activations < 6 * residual
    assert found.steps == sum(found[:5]) < 0.75 * 80e9
    # merging: the blocks once more, and the largest projection of all layers in float32, four at a time
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    merge = found.parameters + 16 * trained + 2 * blocks + 4 * 4 * 32 * 4096 * 11008
    assert found.ending == pytest.approx(merge, rel=1e-3) and found.total == max(found.steps, found.ending)


def test_four_v100_hold_a_quarter_each():
    one, four = (plan.memory(llava15.get_config(), text) for text in ("1xH100-80GB", "4xV100-32GB"))
    assert four.parameters < 0.31 * one.parameters and four.activations < 0.27 * one.activations
    assert four.total < 0.75 * 32e9


def small(mode: str, remat: bool):
    """A config whose step is dominated by what large ones are dominated by."""
    config = common.defaults()
    config.dataset.update(max_length=256, vocab=1024, image_size=56)
    config.model.vision = dict(patch=14, width=64, depth=9, heads=2, mlp=128)
    config.model.decoder = dict(width=192, depth=9, heads=4, kv_heads=2, mlp=512)
    config.train = common.recipe(mode=mode, batch=8, micro_batch=8, remat=remat)
    config.device.precision = "float32"
    return config


@pytest.mark.parametrize(("mode", "remat"), [("lora", True), ("full", True), ("lora", False)])
def test_xla_agrees_within_15_percent(mode, remat):
    config, mesh = small(mode, remat), axes.make_mesh(devices=jax.devices()[:1])
    cfg, recipe = plan.model_config(config, precision.choose("float32")), Recipe.from_config(config.train, "train")
    with jax.set_mesh(mesh):
        params, frozen = layers.abstract_arrays(vlm.abstract(cfg), mesh), {}
        if mode == "lora":
            frozen = {top: tree for top, tree in params.items() if top != "projector"}
            adapters = layers.abstract_arrays(lora.abstract(cfg, recipe.rank, recipe.targets), mesh)
            params = {"lora": adapters, "projector": params["projector"]}
        state = jax.eval_shape(lambda tree: states.start(tree, recipe, bandits.UNIFORM, 1, 1, 2), params)
        accumulator = jax.eval_shape(lambda tree: compiled.empty(tree, recipe.batch), params)
        kinds = {"tokens": ((8, 256), jnp.int32), "images": ((8, 56, 56, 3), jnp.uint8), "labels": ((8, 256), bool)}
        kinds |= {"image_start": ((8,), jnp.int32), "slot": ((8,), jnp.int32), "valid": ((8,), bool)}
        place = axes.batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct(*kind, sharding=place) for name, kind in kinds.items()}
        micro = compiled.compile_steps(cfg, recipe, bandits.UNIFORM).micro
        said = micro.lower(params, frozen, accumulator, batch, state.key, state.step, 0).compile().memory_analysis()
    used = said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes - said.alias_size_in_bytes
    found = plan.memory(config, "1xCPU-16GB")
    # the micro-batch's program holds neither the optimiser nor the start that is kept beside the trained copy
    trained = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
    start = trained if mode == "full" else 4 * cfg.decoder.width * (64 + cfg.decoder.width + 2)
    assert found.steps - found.optimizer - start == pytest.approx(used, rel=0.15)
    assert found.optimizer == 2 * trained and found.gradients == 2 * trained


def test_sizes_are_those_of_the_target_folder_if_it_is_here(tmp_path):
    config = small("full", True)
    larger = common.defaults()
    larger.model.decoder = dict(width=384, depth=9, heads=4, kv_heads=2, mlp=512)
    cfg = vlm.VLMConfig.tiny(larger.model, 48, 1024, precision.Precision("float32"))
    (tmp_path / "model.json").write_text(json.dumps({"config": cfg.to_dict()}))
    config.target.path = str(tmp_path)
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.abstract(cfg), is_leaf=layers.is_leaf))
    assert plan.memory(config, "1xCPU-16GB").parameters == 8 * size
    config.target.path = str(tmp_path / "gone")
    assert plan.memory(config, "1xCPU-16GB").parameters < 8 * size
    (tmp_path / "gone").mkdir()
    with pytest.raises(UserError):
        plan.memory(config, "1xCPU-16GB")


def test_vision_flan_is_the_recipe_of_llava15_with_its_own_budget():
    one, other = llava15.get_config(), vision_flan.get_config()
    assert other.train == one.train and other.target == one.target
    assert (other.cluster.k, other.select.fraction) == (5_000, 0.167)
    steps, _ = Recipe.from_config(other.train, "train").length(round(186_103 * other.select.fraction))
    assert steps == 243
