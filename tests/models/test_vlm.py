"""The whole model: meshes, taps, padding, loss, configuration."""

import ast
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coincide_jax.models
from coincide_jax.core.axes import batch_sharding as batch_rows
from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision
from coincide_jax.models import decoder, vision, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")


def mean_nll(params, batch, cfg, **keys):
    """The training loss."""
    hidden = vlm.forward(params, batch, cfg, **keys).hidden
    return vlm.token_nll(params, batch, cfg, hidden).sum() / batch["labels"].sum().astype(jnp.float32)


def plain_nll(params, batch, cfg):
    """The same by logits of every position."""
    logits = vlm.logits(params, vlm.forward(params, batch, cfg).hidden, cfg)
    target = jax.nn.one_hot(batch["tokens"][:, 1:], cfg.decoder.vocab)
    nll = -jnp.sum(jax.nn.log_softmax(logits[:, :-1], axis=-1) * target, axis=-1)
    return jnp.where(batch["labels"][:, 1:], nll, 0.0)


def on_mesh(tiny, devices, model_parallel):
    """Loss, gradients, logits, taps on one mesh."""
    cfg, mesh = tiny.cfg, tiny.mesh(devices, model_parallel)
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)

        @jax.jit
        def run(params, batch):
            out = vlm.forward(params, batch, cfg, tap=lambda x: x.mean(axis=1))
            loss, grads = jax.value_and_grad(mean_nll)(params, batch, cfg)
            return loss, vlm.logits(params, out.hidden, cfg), out.taps, grads

        result = run(params, batch)
        for grad, param in zip(jax.tree.leaves(result[3]), jax.tree.leaves(params), strict=True):
            assert grad.sharding.is_equivalent_to(param.sharding, param.ndim)
        return jax.device_get(result)


@pytest.fixture(scope="module")
def single(tiny):
    """On one device."""
    return on_mesh(tiny, 1, 1)


@pytest.mark.parametrize(("devices", "model_parallel"), [(8, 1), (8, 2), (8, 4)])
def test_same_numbers_on_any_mesh(tiny, single, devices, model_parallel):
    # with 4 on 'model' the two key/value heads do not divide and are replicated
    found = on_mesh(tiny, devices, model_parallel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found[:3], single[:3])
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(single[3]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), found[3], single[3])


def test_loss_equals_log_softmax(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)

        def ours(p):
            found = vlm.token_nll(p, batch, tiny.cfg, vlm.forward(p, batch, tiny.cfg).hidden)
            return (found[:, 1:] ** 2).sum(), found

        def plain(p):
            found = plain_nll(p, batch, tiny.cfg)
            return (found**2).sum(), found

        both = [jax.jit(jax.grad(f, has_aux=True))(params) for f in (ours, plain)]
        grads, (found, expected) = zip(*both, strict=True)
        np.testing.assert_allclose(found[:, 1:], expected, rtol=1e-5, atol=1e-5)
        assert not np.any(np.asarray(found)[~np.asarray(batch["labels"])])
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads[1]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * scale), *grads)


def test_tied_head(tiny):
    cfg = dataclasses.replace(tiny.cfg, decoder=dataclasses.replace(tiny.cfg.decoder, tied=True))
    assert "head" not in vlm.abstract(cfg)["decoder"]
    found = []
    for devices, model_parallel in ((1, 1), (8, 2)):
        mesh = tiny.mesh(devices, model_parallel)
        with jax.set_mesh(mesh):
            params, batch = tiny.params(mesh, cfg), tiny.batch(mesh)
            hidden = jax.device_put(
                np.linspace(-1, 1, 8 * 24 * 32, dtype=np.float32).reshape(8, 24, 32), batch_rows(mesh)
            )
            found.append((vlm.logits(params, hidden, cfg), vlm.token_nll(params, batch, cfg, hidden)))
            h = np.asarray(decoder.final_norm(params["decoder"], hidden, cfg.decoder))
            expected = h @ np.asarray(params["decoder"]["embed"]).T
            np.testing.assert_allclose(found[-1][0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


def test_remat_changes_nothing(tiny, single):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        loss, grads = jax.jit(jax.value_and_grad(lambda p: mean_nll(p, batch, tiny.cfg, remat=True)))(params)
    assert float(loss) == pytest.approx(float(single[0]), rel=1e-6)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(single[3]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale), grads, single[3])


def test_padding_and_neighbours_do_not_change_a_row(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        lengths = np.asarray(batch["lengths"])
        real = np.arange(batch["tokens"].shape[1])[None] < lengths[:, None]
        forward = jax.jit(lambda b: vlm.forward(params, b, tiny.cfg).hidden)
        hidden = np.asarray(forward(batch))
        noisy = batch | {"tokens": jnp.where(real, batch["tokens"], 9)}
        np.testing.assert_array_equal(np.asarray(forward(noisy))[real], hidden[real])
        longer = batch | {key: jnp.pad(batch[key], ((0, 0), (0, 8))) for key in ("tokens", "labels")}
        wide = np.asarray(forward(longer))[:, : real.shape[1]]
        np.testing.assert_allclose(wide[real], hidden[real], rtol=1e-5, atol=1e-5)


def test_image_enters_at_its_positions_only(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        x = np.asarray(vlm.embed(params, batch, tiny.cfg))
        features = vision.forward(params["vision"], batch["images"], tiny.cfg.vision, jnp.dtype("float32"))
        image = np.asarray(vlm.project(params["projector"], features))
    words = np.asarray(params["decoder"]["embed"])[np.asarray(batch["tokens"])]
    for row, start in enumerate(np.asarray(batch["image_start"])):
        expected = words[row].copy()
        if start >= 0:
            expected[start : start + 4] = image[row]
        np.testing.assert_array_equal(x[row], expected)


def test_bfloat16_is_near(tiny, single):
    cfg = dataclasses.replace(tiny.cfg, precision=Precision("bfloat16"))
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        assert jax.eval_shape(lambda p: vlm.forward(p, batch, cfg).hidden, params).dtype == jnp.float32
        loss = jax.jit(mean_nll, static_argnums=2)(params, batch, cfg)
        grads = jax.eval_shape(jax.grad(lambda p: mean_nll(p, batch, cfg)), params)
        exact = float(single[0])
        assert float(loss) != exact and float(loss) == pytest.approx(exact, rel=0.05)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_compiles_once_a_shape(tiny):
    mesh = tiny.mesh(8, 2)
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return mean_nll(params, batch, tiny.cfg)

    with jax.set_mesh(mesh):
        params = tiny.params(mesh)
        for seed in range(3):
            run(params, tiny.batch(mesh, seed=seed))
        run(params, tiny.batch(mesh, rows=16))
    assert len(traces) == 2


def test_config_round_trip(tiny):
    assert vlm.VLMConfig.from_dict(tiny.cfg.to_dict()) == tiny.cfg
    assert hash(tiny.cfg) == hash(vlm.VLMConfig.from_dict(tiny.cfg.to_dict()))
    broken = tiny.cfg.to_dict()
    del broken["decoder"]["rope_theta"]
    with pytest.raises(UserError, match="part 'decoder' lacks or does not know: rope_theta"):
        vlm.VLMConfig.from_dict(broken)


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("vision", "patch", 7, "dataset.image_size is 16; expected a multiple of model.vision.patch"),
        ("decoder", "kv_heads", 3, "model.decoder.heads is 4; expected a multiple of model.decoder.kv_heads"),
        ("decoder", "heads", 5, "model.decoder.width is 32"),
    ],
)
def test_sizes_that_do_not_divide(part, key, value, message):
    model = {
        "vision": {"patch": 8, "width": 16, "depth": 2, "heads": 2, "mlp": 24},
        "decoder": {"width": 32, "depth": 3, "heads": 4, "kv_heads": 2, "mlp": 40},
    }
    model[part][key] = value
    with pytest.raises(UserError, match=message):
        vlm.VLMConfig.tiny(model, 16, 64)


def test_every_config_field_is_read_and_has_no_default():
    folder = pathlib.Path(coincide_jax.models.__file__).parent
    read = set()
    for name in ("layers.py", "vision.py", "decoder.py", "vlm.py", "generate.py", "lora.py", "rope.py"):
        tree = ast.parse((folder / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    for kind in (vision.VisionConfig, decoder.DecoderConfig, vlm.VLMConfig):
        for field in dataclasses.fields(kind):
            assert field.name in read, f"{kind.__name__}.{field.name} is never read"
            assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
