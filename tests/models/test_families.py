"""Every decoder family against PyTorch `transformers` on random weights, part by part, and on one and eight devices."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from towers import apart, meshes, tree

from coincide_jax.core import axes
from coincide_jax.core.precision import choose
from coincide_jax.models import decoder, layers, lora, loss, rope, vlm

pytestmark = pytest.mark.usefixtures("quick_compile")

TORCH = [family for family in families.OURS if family != "openelm"]
PREFIXES = {"language_model.": ""}
RANK, SCALE, ROWS = 3, 1.5, 4


def batch(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """Tokens i32[b, t], and which are supervised."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(3, families.VOCAB, (rows, families.LENGTH)).astype(np.int32)
    return tokens, draw.random(tokens.shape) < 0.3


def adapters(cfg, seed: int = 4):
    """LoRA on every product, A and B drawn; NumPy."""
    draw = np.random.default_rng(seed)
    whole = dataclasses.replace(vlm.VLMConfig.tiny(TINY, 16, 8, choose("float32")), decoder=cfg)
    made = lora.abstract(whole, RANK, ("all-linear",))
    return made, jax.tree.map(
        lambda leaf: (draw.standard_normal(leaf.shape) * 0.1).astype(np.float32), made, is_leaf=layers.is_leaf
    )


TINY = {
    "vision": {"patch": 8, "width": 16, "depth": 1, "heads": 2, "mlp": 24},
    "decoder": {"width": 32, "depth": 1, "heads": 4, "kv_heads": 2, "mlp": 40},
}


def everything(params, tokens, labels, own, cfg) -> dict:
    """Every part named in the tests, of one pass."""
    x = decoder.embed(params, tokens, jnp.dtype("float32"))
    place, attend = jnp.arange(x.shape[1])[None], decoder.full_attention()
    blocks = params["blocks"]
    stack = blocks[0] if isinstance(blocks, tuple) else blocks
    layer = jax.tree.map(lambda leaf: leaf[0], axes.use(stack, x.dtype))
    norm = decoder.normed(x, layer["norm1"], cfg)
    flat = jnp.reshape(norm, (-1, cfg.width), out_sharding=axes.row_sharding(norm, 2))
    q, k, v = (
        decoder.split_rows(decoder.project(name, flat, layer, None, None), *x.shape[:2]) for name in families.QKV
    )
    if cfg.qk_norm:
        q, k = (layers.rms_norm(part, layer[f"{name}_norm"], cfg.norm_eps) for part, name in ((q, "q"), (k, "k")))
    table = layers.rope_table(place, *rope.frequencies(cfg, x.shape[1]))
    mixed = attend(layers.rope(q, table), layers.rope(k, table), v, None)
    short = params | {"blocks": decoder.first_layers(blocks, 1)}
    runs = {
        name: decoder.run(params, x, place, attend, cfg, tap=lambda states: states, tap_from=name)
        for name in decoder.TAPS
    }
    final = decoder.final_norm(params, runs["block"].x, cfg)
    head, bias = decoder.head(params, cfg, x.dtype), decoder.head_bias(params, cfg)
    logits = jnp.einsum("btw,wv->btv", final, head)

    def mean_nll(own):
        hidden = decoder.run(params, x, place, attend, cfg, lora=(own, SCALE, 0.0)).x
        nll = loss.token_nll(decoder.final_norm(params, hidden, cfg), head, tokens, labels, bias)
        return nll.sum() / labels.sum().astype(jnp.float32)

    value, grads = jax.value_and_grad(mean_nll)(own)
    return {
        "embedding": x,
        "norm": norm,
        "attention": mixed,
        "block": decoder.run(short, x, place, attend, cfg).x,
        "taps": {name: run.taps for name, run in runs.items()},
        "final": final,
        "logits": logits if bias is None else logits + bias[None, None],
        "loss": value,
        "grads": grads,
    }


def computed(cfg, tensors, mesh) -> dict:
    """`everything` of the file's tensors on a mesh."""
    tokens, labels = batch()
    with jax.set_mesh(mesh):
        params = tree(decoder.abstract(cfg), tensors, mesh, PREFIXES, unused=("lm_head.",) if cfg.tied else ())
        made, own = adapters(cfg)
        places = layers.abstract_arrays(made, mesh)
        own = jax.tree.map(lambda array, place: jax.device_put(array, place.sharding), own, places)
        rows = axes.put_batch({"tokens": tokens, "labels": labels}, mesh)
        run = jax.jit(everything, static_argnums=4)
        return jax.device_get(run(params, rows["tokens"], rows["labels"], own, cfg))


def expected(family: str, model, cfg) -> dict:
    """The same parts from PyTorch, by forward hooks; LoRA as a hook that adds scale · x Aᵀ Bᵀ."""
    names, seen, hooks = decoder.NAMES[family], {}, []
    root = "model"

    def keep(name):
        def hook(module, inputs, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return hook

    blocks = model.get_submodule(f"{root}.layers")
    hooks += [model.get_submodule(f"{root}.{names['embed']}").register_forward_hook(keep("embedding"))]
    hooks += [blocks[0].get_submodule(names["norm1"]).register_forward_hook(keep("norm"))]
    hooks += [blocks[0].register_forward_hook(keep("block"))]
    first = blocks[0].get_submodule(names["wo"])
    hooks += [first.register_forward_pre_hook(lambda m, i: seen.update(attention=i[0].detach().numpy()))]
    for number, block in enumerate(blocks):
        hooks += [block.get_submodule(names["wo"]).register_forward_hook(keep(f"attention{number}"))]
        hooks += [block.get_submodule(names["down"]).register_forward_hook(keep(f"mlp{number}"))]
        hooks += [block.register_forward_hook(keep(f"block{number}"))]
    hooks += [model.get_submodule(f"{root}.{names['norm']}").register_forward_hook(keep("final"))]
    tokens, labels = batch()
    ids = torch.tensor(tokens, dtype=torch.long)
    with torch.no_grad():
        seen["logits"] = model(input_ids=ids).logits.numpy()
    for hook in hooks:
        hook.remove()
    seen["taps"] = {name: np.stack([seen[f"{name}{number}"] for number in range(len(blocks))]) for name in decoder.TAPS}

    _, own = adapters(cfg)
    leaves = {}
    for name, pair in own.items():
        for number, block in enumerate(blocks):
            a, b = pair["a"][number], pair["b"][number]
            a, b = (torch.tensor(side, requires_grad=True) for side in (a.reshape(-1, RANK), b.reshape(RANK, -1)))
            leaves[name, number] = (a, b)
            block.get_submodule(names[name]).register_forward_hook(
                lambda m, i, output, a=a, b=b: output + SCALE * (i[0] @ a) @ b
            )
    logits = model(input_ids=ids).logits
    nll = torch.nn.functional.cross_entropy(logits.reshape(-1, families.VOCAB), ids.reshape(-1), reduction="none")
    value = nll[torch.tensor(labels.reshape(-1))].mean()
    value.backward()
    seen["loss"] = value.detach().numpy()
    seen["grads"] = {
        name: {
            side: np.stack([leaves[name, number][index].grad.numpy() for number in range(len(blocks))])
            for index, side in enumerate("ab")
        }
        for name in own
    }
    return seen


@pytest.fixture(scope="module")
def found() -> dict:
    """What each family computed on one device, kept for the comparison with eight."""
    return {}


@pytest.mark.parametrize("family", TORCH)
def test_parity_with_transformers(family, found):
    cfg, model = families.config(family), families.oracle(family)
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    got = found[family] = computed(cfg, tensors, meshes()[0])
    want = expected(family, model, cfg)
    for name in ("embedding", "norm", "attention", "block", "final", "logits"):
        assert apart(got[name].reshape(want[name].shape), want[name]) <= 1e-4, name
    for name in decoder.TAPS:
        for layer in range(cfg.depth):
            assert apart(got["taps"][name][layer], want["taps"][name][layer]) <= 1e-4, (name, layer)
    assert float(got["loss"]) == pytest.approx(float(want["loss"]), rel=1e-5)
    for name, pair in want["grads"].items():
        for side, grad in pair.items():
            mine = got["grads"][name][side].reshape(grad.shape)
            assert np.abs(grad).max() > 1e-6
            assert np.abs(mine - grad).max() <= 1e-4 * np.abs(grad).max(), (name, side)


@pytest.mark.parametrize("family", list(families.OURS))
def test_eight_devices_compute_the_same(family, found):
    cfg = families.config(family)
    if family == "openelm":
        tensors = random_tensors(cfg)
    else:
        tensors = {name: value.numpy() for name, value in families.oracle(family).state_dict().items()}
    one, eight = meshes()
    single = found.get(family) or computed(cfg, tensors, one)
    shared = computed(cfg, tensors, eight)

    def near(a, b):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()

    jax.tree.map(near, shared, single)


def random_tensors(cfg) -> dict[str, np.ndarray]:
    """A file's tensors (fused ones whole) with std 0.2 around 1 for scales."""
    draw, shapes = np.random.default_rng(9), {}
    for leaf in jax.tree.leaves(decoder.abstract(cfg), is_leaf=layers.is_leaf):
        for name in leaf.names():
            rows = leaf.part[1] if leaf.part else leaf.source_shape[0]
            held = shapes.get(name, (0, *leaf.source_shape[1:]))
            shapes[name] = (max(held[0], rows), *held[1:])
    return {
        name.removeprefix("language_model."): (
            0.2 * draw.standard_normal(shape) + (name.endswith("norm.weight"))
        ).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }


@pytest.mark.parametrize("family", list(families.OURS))
def test_hardly_anything_is_replicated_at_published_sizes(family):
    abstract = decoder.abstract(families.config(family, **families.PUBLISHED[family]))
    for model_parallel in (1, 2):
        arrays = jax.tree.leaves(layers.abstract_arrays(abstract, axes.make_mesh(model_parallel)))
        total = sum(array.size for array in arrays)
        whole = sum(array.size for array in arrays if array.sharding.is_fully_replicated)
        assert total > 3e8 and whole <= 0.02 * total
