"""`configs/llava15.py` without its weights: every compiled program of the pipeline is built abstractly at the recipe's
sizes, on meshes of eight devices that share rows and weights, or heads as well."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax import curriculum, pipeline
from coincide_jax.core import axes, precision
from coincide_jax.extract import activations, towers
from coincide_jax.kernels import plan
from coincide_jax.models import generate, layers, lora, text, vision, vlm
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.state import Recipe, Schedule
from configs import llava15

CONFIG = llava15.get_config()
RECORDS = 665_298  # of llava_v1_5_mix665k.json


KINDS = {"8x1 float32": (1, "float32"), "4x2 bfloat16": (2, "bfloat16"), "8x1 float16": (1, "float16")}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS)
def built(request):
    """A mesh, the model's configuration, its abstract parameters."""
    model_parallel, name = request.param
    mesh = axes.make_mesh(model_parallel)
    cfg = vlm.VLMConfig.tiny(CONFIG.model, CONFIG.dataset.image_size, CONFIG.dataset.vocab, precision.choose(name))
    return mesh, cfg, layers.abstract_arrays(vlm.abstract(cfg), mesh)


def abstract_batch(mesh, cfg, rows: int, length: int, **more) -> dict:
    """What the data layer would hand over, rows shared by 'data'."""
    size = cfg.vision.image_size
    kinds = {
        "tokens": ((rows, length), jnp.int32),
        "lengths": ((rows,), jnp.int32),
        "image_start": ((rows,), jnp.int32),
        "images": ((rows, size, size, 3), jnp.uint8),
        "labels": ((rows, length), jnp.bool_),
        "text": ((rows, length), jnp.bool_),
        "index": ((rows,), jnp.int32),
        "valid": ((rows,), jnp.bool_),
    }
    sharding = axes.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in (kinds | more).items()
    }


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def form(tree) -> list:
    """Shape, type and place of every leaf; what is whole on every device has no place."""

    def place(leaf) -> list[tuple[int, str]]:
        return [] if leaf.sharding is None else [(axis, name) for axis, name in enumerate(leaf.sharding.spec) if name]

    return [(leaf.shape, leaf.dtype, place(leaf)) for leaf in jax.tree.leaves(tree)]


def test_the_parameters_are_those_of_the_published_model(built):
    _, cfg, params = built
    assert cfg.image_tokens == 576 and CONFIG.dataset.buckets[0] > cfg.image_tokens
    assert count(params["decoder"]) == 6_738_415_616  # LLaMA-7B
    assert count(params["projector"]) == 20_979_712  # 1024 → 4096 → 4096, with biases
    block, rest = 12_596_224, 3 * 14**2 * 1024 + 1024 + 577 * 1024 + 2 * 1024  # ViT-L/14-336, closing norm aside
    assert count(params["vision"]) == 23 * block + rest
    share = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))
    assert share < 1.02 * count(params) / 8  # hardly anything is held by every device


@pytest.mark.parametrize("length", CONFIG.dataset.buckets)
def test_features_of_five_layers(built, length):
    mesh, cfg, params = built
    taps = activations.choose_taps(CONFIG.extract, cfg.decoder.depth)
    rows = CONFIG.extract.rows_per_device * mesh.shape["data"]
    with jax.set_mesh(mesh):
        batch = abstract_batch(mesh, cfg, rows, length)
        found = jax.eval_shape(lambda params, batch: activations.features(params, batch, cfg, taps), params, batch)
    assert len(taps) == 5 and taps[-1] < cfg.decoder.depth - 1
    assert found["features"].shape == (rows, 2 * 5 * 4096) and found["features"].dtype == jnp.float16
    assert found["features"].sharding.spec[0] == "data"


def test_a_lora_step_in_every_bucket_and_a_round_of_the_curriculum(built):
    mesh, cfg, params = built
    recipe, settings = Recipe.from_config(CONFIG.train, "train"), CONFIG.curriculum
    sampler, arms = curriculum.make(settings), CONFIG.cluster.k
    total = int(CONFIG.select.fraction * RECORDS)
    steps, slots = recipe.length(total)
    assert recipe.mode == "lora" and recipe.packing and steps == 1040  # one epoch of a fifth, 128 at a time
    with jax.set_mesh(mesh):
        adapters = layers.abstract_arrays(lora.abstract(cfg, recipe.rank, recipe.targets), mesh)
        trained = {"lora": adapters, "projector": params["projector"]}
        held = layers.abstract_arrays(vlm.abstract(cfg), mesh, cfg.precision.dtype)  # the base, as it is computed with
        frozen = {top: tree for top, tree in held.items() if top != "projector"}
        scaled = cfg.precision.loss_scale
        run = compiled.compile_steps(cfg, recipe, sampler)
        state = jax.eval_shape(
            lambda trained: states.start(
                trained, recipe, sampler, arms, 1 + settings.lag, settings.round_steps, loss_scale=scaled
            ),
            trained,
        )
        members = plan.Members(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (RECORDS, RECORDS, arms + 1)))
        drawn, p = jax.eval_shape(run.draw, state, members, np.int32(0), np.int32(slots))
        accumulator = jax.eval_shape(lambda params: compiled.empty(params, recipe.batch), state.params)
        micro, longest = recipe.micro_batch, CONFIG.dataset.buckets[-1]
        slot = {"slot": ((micro,), jnp.int32)}
        rows = {name: ((8, longest), jnp.int32) for name in ("tokens", "record", "position")}
        packed = rows | {"labels": ((8, longest), jnp.bool_), "place": ((micro,), jnp.int32)}
        shapes = [(length, slot) for length in CONFIG.dataset.buckets] + [(longest, slot | packed)]
        for length, more in shapes:
            batch = abstract_batch(mesh, cfg, micro, length, **more)
            where = (state.key, state.step, 0, *((state.scale.scale,) if scaled else ()))
            summed = jax.eval_shape(run.micro, state.params, frozen, accumulator, batch, *where)
        after, empty, metrics = jax.eval_shape(run.apply, drawn, summed, Schedule.of(recipe, steps))
    assert count(adapters) == 319_815_680  # rank 128 on all seven products of 32 layers
    assert p.shape == (arms,) and drawn.plan.records.shape == (1, settings.round_steps, recipe.batch)
    assert form(after) == form(drawn) and form(empty) == form(accumulator)
    assert form(summed.grads) == form(accumulator.grads) and summed.losses.shape == (recipe.batch,)
    assert metrics["loss"].shape == () and metrics["loss"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(after.params)) and ("skipped" in metrics) == scaled


@pytest.mark.parametrize("name", ["coincide_plus", "progress"])
def test_a_round_of_the_curricula_compiles(name):
    """Rounds drawn from all records, with the arms of the recipe, beside the state of the 7B model."""
    config, mesh = llava15.get_config(f"curriculum={name}"), axes.make_mesh(1)
    settings, recipe = config.curriculum, Recipe.from_config(config.train, "train")
    cfg = vlm.VLMConfig.tiny(config.model, config.dataset.image_size, config.dataset.vocab, precision.choose("float32"))
    records = np.arange(RECORDS)
    clusters = settings.k or config.cluster.k
    sampler, _ = curriculum.prepare(settings, records, records % clusters, clusters)
    arms, limit = {"coincide_plus": 500, "progress": 1000}[name], None
    if name == "progress":
        sampler = sampler._replace(shuffle=False)
        limit = plan.Limit(np.int32(config.select.fraction * RECORDS), np.full(arms, 60, np.int32))
    with jax.set_mesh(mesh):
        params = layers.abstract_arrays(vlm.abstract(cfg), mesh)
        adapters = layers.abstract_arrays(lora.abstract(cfg, recipe.rank, recipe.targets), mesh)
        trained = {"lora": adapters, "projector": params["projector"]}
        run = compiled.compile_steps(cfg, recipe, sampler)
        state = jax.eval_shape(
            lambda trained: states.start(trained, recipe, sampler, arms, 1 + settings.lag, settings.round_steps),
            trained,
        )
        members = plan.Members(*(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (RECORDS, RECORDS, arms + 1)))
        drawn = run.draw.lower(state, members, np.int32(0), np.int32(RECORDS), limit)
        assert drawn.out_info[1].shape == (arms,) and form(drawn.out_info[0]) == form(state)
        assert drawn.compile() is not None
        if name == "progress":
            learned = run.learn.lower(state.sampler, jax.ShapeDtypeStruct((clusters,), jnp.float32))
            assert learned.compile() is not None and form(learned.out_info) == form(state.sampler)


@pytest.mark.long
def test_a_lora_step_compiles():
    """Forward and backward of one micro-batch, and the optimiser's step, to programs for eight devices."""
    mesh, recipe = axes.make_mesh(1), Recipe.from_config(CONFIG.train, "train")
    cfg = vlm.VLMConfig.tiny(
        CONFIG.model, CONFIG.dataset.image_size, CONFIG.dataset.vocab, precision.choose("bfloat16")
    )
    settings = llava15.get_config("curriculum=coincide_plus").curriculum
    run = compiled.compile_steps(cfg, recipe, curriculum.make(settings))
    with jax.set_mesh(mesh):
        params = layers.abstract_arrays(vlm.abstract(cfg), mesh)
        held = layers.abstract_arrays(vlm.abstract(cfg), mesh, cfg.precision.dtype)
        adapters = layers.abstract_arrays(lora.abstract(cfg, recipe.rank, recipe.targets), mesh)
        trained = {"lora": adapters, "projector": params["projector"]}
        frozen = {top: tree for top, tree in held.items() if top != "projector"}
        state = jax.eval_shape(
            lambda trained: states.start(trained, recipe, curriculum.make(settings), 500, 1, settings.round_steps),
            trained,
        )
        accumulator = jax.eval_shape(lambda params: compiled.empty(params, recipe.batch), state.params)
        batch = abstract_batch(mesh, cfg, recipe.micro_batch, 768, slot=((recipe.micro_batch,), jnp.int32))
        micro = run.micro.lower(state.params, frozen, accumulator, batch, state.key, state.step, np.int32(0))
        assert micro.compile().memory_analysis().temp_size_in_bytes > 0
        apply = run.apply.lower(state, accumulator, Schedule.of(recipe, 1040))
        assert form(apply.out_info[0]) == form(state) and apply.compile() is not None


def test_features_of_the_encoders_of_progress():
    """DINOv2-large and all-MiniLM-L6-v2: 1,024 + 384."""
    constants = dict(norm_eps=1e-6, mean=vlm.CLIP_MEAN, std=vlm.CLIP_STD)
    eye = vision.VisionConfig(
        family="dinov2", image_size=518, patch=14, width=1024, depth=24, heads=16, mlp=4096, activation="gelu",
        class_token=True, registers=0, pre_norm=False, closing_norm=True, layer_scale=True, patch_bias=True,
        gated_mlp=False, **constants,
    )  # fmt: skip
    words = text.TextConfig(
        family="bert", vocab=30522, width=384, depth=6, heads=12, mlp=1536, positions=512, types=2, activation="gelu",
        norm_eps=1e-12, eos_id=0, projection=0,
    )  # fmt: skip
    mesh = axes.make_mesh(1)
    size = llava15.get_config("curriculum=progress").extract.encoder_size
    cfg = towers.Towers(dataclasses.replace(eye, image_size=size), words, precision.choose("float32"), False)
    with jax.set_mesh(mesh):
        params = {"vision": layers.abstract_arrays(vision.abstract(eye), mesh),
                  "text": layers.abstract_arrays(text.abstract(words), mesh)}  # fmt: skip
        sharding = axes.batch_sharding(mesh)
        kinds = {"images": ((64, size, size, 3), jnp.uint8), "tokens": ((64, 128), jnp.int32),
                 "lengths": ((64,), jnp.int32), "image_start": ((64,), jnp.int32)}  # fmt: skip
        batch = {key: jax.ShapeDtypeStruct(*kind, sharding=sharding) for key, kind in kinds.items()}
        found = jax.eval_shape(lambda params, batch: towers.tower_features(params, batch, cfg), params, batch)
    assert found["features"].shape == (64, 1408) and found["features"].dtype == jnp.float16


def test_answers(built):
    mesh, cfg, params = built
    rows, longest = CONFIG.evaluate.rows, CONFIG.dataset.buckets[-1]
    new = CONFIG.evaluate.max_new_tokens
    with jax.set_mesh(mesh):
        batch = abstract_batch(mesh, cfg, rows, longest)
        found = jax.eval_shape(
            lambda params, batch: generate.greedy(params, batch, cfg, max_new_tokens=new, eos_id=2), params, batch
        )
    assert found.shape == (rows, new) and found.dtype == jnp.int32


def test_every_stage_is_in_the_run():
    """Base and reference are brought along; every other stage finds its keys."""
    run = [stage.name for stage in pipeline.STAGES if pipeline.needed(CONFIG, stage.name)]
    assert run == [name for name in pipeline.NAMES if name not in ("base", "reference", *pipeline.WARMUP)]
    pipeline.check(CONFIG)


def test_progress_takes_no_reference_and_no_coreset():
    config = llava15.get_config("curriculum=progress")
    run = [stage.name for stage in pipeline.STAGES if pipeline.needed(config, stage.name)]
    assert run == [name for name in pipeline.NAMES if name not in ("base", "reference", "select")]
    pipeline.check(config)
