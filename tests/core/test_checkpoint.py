"""Checkpoints: typed keys, other meshes, donated arrays, flipped bytes; model folders whole or refused."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.core import axes, checkpoint
from coincide_jax.core.errors import UserError


def some_state(mesh):
    values = jax.random.normal(jax.random.key(1), (256, 64))
    return {
        "w": jax.device_put(values, axes.sharding(mesh, ("embed", "mlp"), values.shape)),
        "half": jax.device_put(values.astype(jnp.bfloat16), axes.sharding(mesh, ("batch", None), values.shape)),
        "nothing": (),
        "step": jax.device_put(jnp.int32(3), jax.NamedSharding(mesh, jax.P())),
        "key": jax.device_put(jax.random.key(7), jax.NamedSharding(mesh, jax.P())),
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def corrupt(folder: pathlib.Path):
    """Flips one bit of the largest array file."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
    path = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def test_round_trip_onto_other_devices(tmp_path):
    with jax.set_mesh(axes.make_mesh(2)) as _:
        state = some_state(axes.make_mesh(2))
        store = checkpoint.Checkpoints(tmp_path, keep=2)
        for step in (1, 2, 3):
            store.save(step, state, {"seen": step})
        store.close()
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 3]
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        step, found, meta = checkpoint.Checkpoints(tmp_path, keep=2).restore(abstract(some_state(mesh)))
    assert (step, meta) == (3, {"seen": 3}) and found["w"].sharding.mesh == mesh and found["nothing"] == ()
    assert jax.random.bits(found["key"]) == jax.random.bits(jax.random.key(7))
    np.testing.assert_array_equal(found["w"], state["w"])
    assert found["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize("devices", [1, 8])
def test_arrays_donated_right_after_the_save_are_saved_as_they_were(tmp_path, devices):
    mesh = axes.make_mesh(devices=jax.devices()[:devices])
    grow = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.arange(2.0**20).reshape(1024, 1024), axes.sharding(mesh, ("embed", None), (1024, 1024)))
        form, before = abstract({"x": x}), np.array(x)
        store = checkpoint.Checkpoints(tmp_path, keep=1)
        store.save(1, {"x": x}, {})
        for _ in range(5):
            x = grow(x)
        jax.block_until_ready(x)
        store.close()
        _, found, _ = checkpoint.Checkpoints(tmp_path, keep=1).restore(form)
    np.testing.assert_array_equal(found["x"], before)


def test_a_flipped_byte_is_noticed_and_the_step_before_taken(tmp_path, capsys):
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        state = some_state(mesh)
        store = checkpoint.Checkpoints(tmp_path, keep=3)
        store.save(1, state, {"seen": 1})
        store.save(2, state, {"seen": 2})
        store.close()
        corrupt(tmp_path / "2")
        store = checkpoint.Checkpoints(tmp_path, keep=3)
        step, found, meta = store.restore(abstract(state))
        np.testing.assert_array_equal(found["w"], state["w"])
        assert (step, meta) == (1, {"seen": 1})
        assert "step 2" in capsys.readouterr().out
        store.save(2, state, {"seen": "again"})  # the broken one is out of the way
        assert store.restore(abstract(state))[2] == {"seen": "again"}
        store.close()


def test_nothing_to_restore(tmp_path):
    with jax.set_mesh(axes.make_mesh()):
        assert checkpoint.Checkpoints(tmp_path, keep=1).restore({}) is None


def test_fingerprint_does_not_depend_on_the_layout_but_on_every_element():
    wide, alone = axes.make_mesh(2), axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(wide):
        many = checkpoint.fingerprint(some_state(wide))
    with jax.set_mesh(alone):
        state = some_state(alone)
        assert checkpoint.fingerprint(state) == many
        assert (
            checkpoint.fingerprint(state | {"w": state["w"].at[5, 3].add(1e-5, out_sharding=jax.P(None, None))}) != many
        )
        assert checkpoint.fingerprint(state | {"w": state["w"][::-1]}) != many


@dataclasses.dataclass(frozen=True)
class Description:
    shape: tuple
    axes: tuple


TREE = {"a": {"w": Description((256, 64), ("embed", "mlp"))}, "b": Description((4,), ("width",))}


def saved_model(tmp_path, mesh):
    params = {"a": {"w": jax.random.normal(jax.random.key(2), (256, 64))}, "b": jnp.ones(4)}
    (tmp_path / "tok.json").write_text("{}")
    folder = tmp_path / "model"
    checkpoint.save_model(folder, params, {"width": 4}, tmp_path / "tok.json")
    return folder, params


def test_model_folder_round_trip_keeps_other_files(tmp_path):
    mesh = axes.make_mesh(2)
    with jax.set_mesh(mesh):
        folder, params = saved_model(tmp_path, mesh)
        (folder / "started.json").write_text("{}")
        saved_model(tmp_path, mesh)
        found, model = checkpoint.load_model(folder, mesh, lambda model: TREE)
    assert model == {"width": 4} and (folder / "tokenizer.json").exists() and (folder / "started.json").exists()
    np.testing.assert_array_equal(found["a"]["w"], params["a"]["w"])
    assert found["a"]["w"].sharding.spec == jax.P("data", "model")


def test_broken_model_folders_are_one_sentence(tmp_path):
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        with pytest.raises(UserError, match=r"nowhere has no model.json"):
            checkpoint.load_model(tmp_path / "nowhere", mesh, lambda model: TREE)
        folder, _ = saved_model(tmp_path, mesh)
        with pytest.raises(UserError, match=r"cannot be read"):
            checkpoint.load_model(folder, mesh, lambda model: TREE | {"c": Description((2,), ("width",))})
        corrupt(folder)
        with pytest.raises(UserError, match=r"changed on disk|cannot be read"):
            checkpoint.load_model(folder, mesh, lambda model: TREE)
