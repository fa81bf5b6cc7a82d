"""Reading: every fault in one message, pickles, types, the layers asked for, and how much memory it takes."""

import builtins
import json
import pathlib
import subprocess
import sys

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from coincide_jax.core import axes, checkpoint
from coincide_jax.core.errors import UserError
from coincide_jax.models import hf


@pytest.fixture(scope="module")
def mesh():
    """Eight devices, rows and heads shared."""
    return axes.make_mesh(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sound checkpoint."""
    return checkpoints.write_llava_hf(tmp_path_factory.mktemp("sound") / "x", checkpoints.llava())


def load(folder, mesh, **how):
    with jax.set_mesh(mesh):
        return hf.load(folder, mesh, how.pop("precision", "float32"), **how)


def copy(folder: pathlib.Path, to: pathlib.Path, change) -> pathlib.Path:
    """The checkpoint with its tensors changed by `change(dict)`."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


LAYER = "language_model.model.layers.1"


def test_one_message_lists_every_fault(folder, mesh, tmp_path):
    def change(tensors):
        del tensors[f"{LAYER}.mlp.up_proj.weight"], tensors["multi_modal_projector.linear_2.bias"]
        tensors[f"{LAYER}.self_attn.q_proj.weight"] = torch.zeros(64, 63)
        tensors["language_model.model.norm.weight"] = torch.zeros(65)
        tensors["language_model.model.embed_tokens.weight"] = torch.zeros((400, 64), dtype=torch.int32)
        tensors[f"{LAYER}.self_attn.extra.weight"] = torch.zeros(3)
        tensors["strange"] = torch.zeros(3)
        tensors["model.language_model.layers.0.input_layernorm.weight"] = torch.ones(64)
        # allowed: buffers and what lies behind the features
        tensors[f"{LAYER}.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["vision_tower.vision_model.embeddings.position_ids"] = torch.zeros(17, dtype=torch.int64)

    with pytest.raises(UserError) as told:
        load(copy(folder, tmp_path / "x", change), mesh)
    for part in (
        f"2 missing: {LAYER}.mlp.up_proj.weight, multi_modal_projector.linear_2.bias",
        "2 misshapen: ",
        "language_model.model.norm.weight (65,) instead of (64,)",
        f"{LAYER}.self_attn.q_proj.weight (64, 63) instead of (64, 64)",
        "1 of a type that is not read: language_model.model.embed_tokens.weight I32",
        f"2 unknown: {LAYER}.self_attn.extra.weight, strange",
        "1 there twice: ",
        "language_model.model.layers.0.input_layernorm.weight",
    ):
        assert part in str(told.value), part
    assert "inv_freq" not in str(told.value) and "position_ids" not in str(told.value)


def test_a_cut_file_names_the_tensors_behind_the_cut(folder, mesh, tmp_path):
    path = copy(folder, tmp_path / "x", lambda tensors: None) / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    keep = sorted(entry["data_offsets"][1] for entry in header.values())[-4]
    path.write_bytes(data[: 8 + length + keep])
    lost = [name for name, entry in header.items() if entry["data_offsets"][1] > keep]
    read = [name for name in lost if "post_layernorm" not in name and ".layers.2." not in name.partition("vision")[2]]
    with pytest.raises(UserError, match="cut off by the end of the file") as told:
        load(path.parent, mesh)
    assert read and all(name in str(told.value) for name in read)
    path.write_bytes(data[: length // 2])
    with pytest.raises(UserError, match=r"no whole safetensors header"):
        load(path.parent, mesh)


def test_missing_files(folder, mesh, tmp_path):
    shards = checkpoints.write_llava_hf(tmp_path / "shards", checkpoints.llava(), shards=2)
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors does not exist"):
        load(shards, mesh)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither model\.json nor config\.json"):
        hf.describe(tmp_path / "empty", "float32")
    (tmp_path / "empty" / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"has no model\.safetensors, no pytorch_model\.bin"):
        load(tmp_path / "empty", mesh)


def test_a_pickle_without_torch_is_one_sentence(mesh, tmp_path, monkeypatch):
    folder = checkpoints.write_flat(tmp_path / "x", checkpoints.llava(), "llava", "clip-vit", pickle=True)
    checkpoints.write_tower(tmp_path / "clip-vit", checkpoints.llava(), whole=False)
    real = builtins.__import__

    def without(name, *args, **more):
        if name.partition(".")[0] == "torch":
            raise ImportError("no torch here", name="torch")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, .* safetensors.torch.save_file\(torch.load"):
        load(folder, mesh)


class Trap:
    """Runs something when it is unpickled."""

    def __reduce__(self):
        return print, ("sprung",)


def test_a_pickle_runs_nothing(folder, mesh, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save({"x": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path, mesh)
    assert "sprung" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pickle", [False, True])
def test_every_type_is_cast_on_the_way(folder, mesh, tmp_path, kind, pickle):
    model = checkpoints.llava().to(kind)
    made = checkpoints.write_llava_hf(tmp_path / "x", model, pickle=pickle)
    whole, half = load(made, mesh)[0], load(made, mesh, precision="bfloat16", storage="compute")[0]
    down = model.model.language_model.layers[1].mlp.down_proj.weight.detach().float().numpy().T
    np.testing.assert_array_equal(whole["decoder"]["blocks"]["down"][1], down)
    assert {leaf.dtype for leaf in jax.tree.leaves(whole)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(half["decoder"]["blocks"]["down"][1], down.astype(jnp.bfloat16))


def test_only_what_is_asked_for_is_read(folder, mesh, tmp_path, monkeypatch):
    """Faults are found everywhere, but bytes are read of the first layers only; a model folder is cut alike."""
    whole, cfg, card = load(folder, mesh)
    opened = []
    real = np.memmap

    def counted(path, dtype, mode, offset, shape):
        opened.append(offset)
        return real(path, dtype, mode, offset, shape)

    monkeypatch.setattr(np, "memmap", counted)
    part, short, same_card = load(folder, mesh, layers=1, head=False)
    few = len(set(opened))
    load(folder, mesh)
    assert few < len(set(opened)) - 18  # two layers of nine tensors, and the head
    assert (short.decoder.depth, cfg.decoder.depth, same_card) == (1, 3, card)
    assert "head" not in part["decoder"] and part["decoder"]["blocks"]["wq"].shape[0] == 1
    with jax.set_mesh(mesh):
        checkpoint.save_model(tmp_path / "own", whole, card)
    own, own_cfg, own_card = load(tmp_path / "own", mesh, layers=1, head=False)
    assert own_cfg == short and own_card["vocab"] == card["vocab"]
    assert hf.describe(tmp_path / "own", "float32")[0] == cfg == hf.describe(folder, "float32")[0]
    for a, b in zip(jax.tree.leaves(part), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(UserError, match="unknown storage 'half'"):
        load(folder, mesh, storage="half")


PROGRAM = """
import os, sys, threading, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
from coincide_jax.core import axes
from coincide_jax.models import hf
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
mesh, peak, done = axes.make_mesh(2), [0], threading.Event()
jax.block_until_ready(jax.numpy.zeros(8))
before = resident()
def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], resident())
watcher = threading.Thread(target=watch); watcher.start()
begin = time.monotonic()
with jax.set_mesh(mesh):
    params, cfg, _ = hf.load(sys.argv[1], mesh, "bfloat16", storage="compute")
    jax.block_until_ready(params)
done.set(); watcher.join()
print(max(peak[0], resident()) - before, sum(x.nbytes for x in jax.tree.leaves(params)), time.monotonic() - begin)
"""


@pytest.mark.long
def test_memory_of_two_gibibytes(tmp_path):
    """A 2 GiB checkpoint onto 4 x 2 devices: resident memory grows by at most 1.4 times its size, result included."""
    width, mlp, depth, vocab = 2048, 5632, 22, 16000
    shapes = {"embed_tokens.weight": (vocab, width), "norm.weight": (width,)}
    for layer in range(depth):
        block = {f"self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        block |= {"mlp.gate_proj.weight": (mlp, width), "mlp.up_proj.weight": (mlp, width)}
        block |= {"mlp.down_proj.weight": (width, mlp)}
        block |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block.items()}
    names = [*(f"model.{name}" for name in shapes), "lm_head.weight"]
    sizes = [*shapes.values(), (vocab, width)]
    table = {}
    for number in range(8):
        file = f"model-{number}.safetensors"
        part = {
            n: torch.randn(s, dtype=torch.bfloat16) for n, s in zip(names[number::8], sizes[number::8], strict=True)
        }
        save_file(part, tmp_path / file)
        table |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    config = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
              "num_attention_heads": 32, "vocab_size": vocab}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    growth, size, seconds = map(float, found.stdout.split())
    print(f"growth {growth / size:.2f} x of {size / 2**30:.2f} GiB in {seconds:.1f} s")
    assert size > 2 * 2**30
    assert growth <= 1.4 * size
