"""Vision towers: normalised patches, the convolution they stand for, class token and positions; equality with CLIP,
SigLIP and DINOv2 of `transformers` (float32, 256 patches, random weights) on one device and on eight."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import towers
import transformers

from coincide_jax.core import axes
from coincide_jax.models import layers, vision


def drawn(cfg: vision.VisionConfig) -> dict:
    """Parameters with std 0.2, so that attention is far from uniform; scales around 1."""
    rng = np.random.default_rng(4)

    def one(path, leaf: layers.Leaf) -> np.ndarray:
        return (rng.normal(size=leaf.shape) * 0.2 + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, vision.abstract(cfg), is_leaf=layers.is_leaf)


@functools.partial(jax.jit, static_argnums=2)
def forward(params, images, cfg: vision.VisionConfig) -> jax.Array:
    return vision.forward(params, images, cfg, jnp.dtype("float32"))


def run(params, images, cfg: vision.VisionConfig) -> np.ndarray:
    """Patch features f32[b, tokens, w]."""
    return np.asarray(forward(params, images, cfg))


@pytest.fixture
def images():
    """u8[2, 16, 16, 3]"""
    return np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)


def test_patches_are_normalised_pixels_in_place(tiny, images):
    cfg = tiny.cfg.vision
    found = np.asarray(vision.patches(jnp.asarray(images), cfg, jnp.dtype("float32")))
    assert found.shape == (2, 2, 8, 2, 8, 3)
    for row, y, x, channel in ((0, 0, 0, 0), (1, 9, 3, 1), (0, 15, 12, 2)):
        pixel = (images[row, y, x, channel] / 255 - cfg.mean[channel]) / cfg.std[channel]
        assert found[row, y // 8, y % 8, x // 8, x % 8, channel] == pytest.approx(pixel, rel=1e-5, abs=1e-6)


def test_pixels_that_fill_no_patch_are_left_out(tiny, images):
    wide = np.pad(images, ((0, 0), (0, 5), (0, 5), (0, 0)), constant_values=200)
    cfg = dataclasses.replace(tiny.cfg.vision, image_size=21)
    assert cfg.tokens == tiny.cfg.vision.tokens == 4
    dtype = jnp.dtype("float32")
    np.testing.assert_array_equal(
        vision.patches(jnp.asarray(wide), cfg, dtype), vision.patches(jnp.asarray(images), tiny.cfg.vision, dtype)
    )


def test_without_blocks_it_is_the_strided_convolution_and_a_norm(tiny, images):
    """Weights of the blocks' last products are set to zero, so that only the embedding is left."""
    cfg, params = tiny.cfg.vision, drawn(tiny.cfg.vision)
    quiet = {name: np.zeros_like(params["blocks"][name]) for name in ("wo", "bo", "down", "down_bias")}
    found = run(params | {"blocks": params["blocks"] | quiet}, images, cfg)
    pixels = (images / 255.0 - np.array(cfg.mean)) / np.array(cfg.std)
    for row in range(2):
        for token in range(4):
            y, x = 8 * (token // 2), 8 * (token % 2)
            patch = pixels[row, y : y + 8, x : x + 8]
            z = np.einsum("yxc,cyxw->w", patch, params["patch"]) + params["position"][token + 1]
            z = (z - z.mean()) / np.sqrt(z.var() + cfg.norm_eps)
            wanted = z * params["pre_norm"]["scale"] + params["pre_norm"]["bias"]
            np.testing.assert_allclose(found[row, token], wanted, rtol=1e-4, atol=1e-4)


def test_the_class_token_is_seen_by_patches_but_not_handed_out(tiny, images):
    params = drawn(tiny.cfg.vision)
    found = run(params, images, tiny.cfg.vision)
    other = run(params | {"class": -params["class"]}, images, tiny.cfg.vision)
    without = dataclasses.replace(tiny.cfg.vision, class_token=False)
    abstract = vision.abstract(without)
    assert "class" not in abstract and abstract["position"].shape == (4, 16)
    assert found.shape == run(drawn(without), images, without).shape == (2, 4, 16)
    assert np.abs(found - other).max() > 1e-2


def test_every_patch_sees_every_other_of_its_image(tiny, images):
    params, changed = drawn(tiny.cfg.vision), images.copy()
    changed[0, 8:, 8:] = 255 - changed[0, 8:, 8:]  # the last patch of the first image
    difference = np.abs(run(params, images, tiny.cfg.vision) - run(params, changed, tiny.cfg.vision)).max(axis=-1)
    assert np.all(difference[0] > 1e-3) and np.all(difference[1] == 0)


COMMON = dict(image_size=64, patch=4, width=64, depth=2, heads=4, mean=(0.5, 0.4, 0.6), std=(0.3, 0.25, 0.2))
PLAIN = dict(class_token=True, registers=0, pre_norm=False, layer_scale=False, patch_bias=True, gated_mlp=False)
DINO = PLAIN | dict(family="dinov2", activation="gelu", norm_eps=1e-6, layer_scale=True, closing_norm=True, mlp=128)
MASK = ("embeddings.mask_token",)


def sizes(layers: int, **more) -> dict:
    """Arguments of a configuration of `transformers`."""
    own = dict(hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, image_size=64, patch_size=4)
    return own | dict(attn_implementation="eager") | more


def clip():
    """CLIP inside LLaVA-1.5: the last block and the closing norm are not held, `hidden_states[-2]` is read."""
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes(3, intermediate_size=96)))
    own = dict(family="clip", mlp=96, activation="quick_gelu", norm_eps=1e-5, pre_norm=True, patch_bias=False)
    return model, PLAIN | own | dict(closing_norm=False), ("encoder.layers.2.", "post_layernorm")


def siglip(layers: int = 3):
    """SigLIP inside TinyLLaVA: the last block dropped, no closing norm."""
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes(layers, intermediate_size=96)))
    own = dict(family="siglip", mlp=96, activation="gelu_pytorch_tanh", norm_eps=1e-6, class_token=False)
    return model, PLAIN | own | dict(closing_norm=False), ("encoder.layers.2.", "post_layernorm", "head.")


def siglip_alone():
    """SigLIP with every block and its closing norm."""
    model, own, _ = siglip(2)
    return model, own | dict(closing_norm=True), ("head.",)


def dinov2():
    """DINOv2."""
    return transformers.Dinov2Model(transformers.Dinov2Config(**sizes(2, mlp_ratio=2))), DINO, MASK


def dinov2_giant():
    """DINOv2 with the gated MLP of its largest model."""
    config = transformers.Dinov2Config(**sizes(2, mlp_ratio=2, use_swiglu_ffn=True))
    # its MLP has 8 · ⌈128 · 2/3 / 8⌉ columns
    return transformers.Dinov2Model(config), DINO | dict(gated_mlp=True, activation="silu", mlp=88), MASK


def dinov2_registers():
    """DINOv2 with register tokens."""
    config = transformers.Dinov2WithRegistersConfig(**sizes(2, mlp_ratio=2, num_register_tokens=4))
    return transformers.Dinov2WithRegistersModel(config), DINO | dict(registers=4), MASK


def parts(params: dict, images: jax.Array, cfg: vision.VisionConfig) -> dict[str, jax.Array]:
    """What enters the first block, what leaves it, patches, one vector."""
    block = jax.tree.map(lambda leaf: leaf[:1], params["blocks"])
    first = dataclasses.replace(cfg, depth=1, closing_norm=False)
    return {
        "embedding": vision.embed(params, images, cfg, towers.FLOAT32),
        "block": vision.encode(params | {"blocks": block}, images, first, towers.FLOAT32),
        "patches": vision.forward(params, images, cfg, towers.FLOAT32),
        "pooled": vision.pooled(params, images, cfg, towers.FLOAT32),
    }


class Oracle:
    """A tower of `transformers`, and ours with its weights."""

    def __init__(self, build, folder):
        model, own, self.unused = build()
        self.model, self.cfg = towers.randomise(model), vision.VisionConfig(**COMMON, **own)
        self.tensors = towers.saved(self.model, folder)

    def tree(self, mesh) -> dict:
        """The file's tensors as our tree."""
        prefixes = {vision.SOURCE + ".": "", "vision_tower.": ""}
        return towers.tree(vision.abstract(self.cfg), self.tensors, mesh, prefixes, self.unused)

    def images(self, size: int = 64) -> np.ndarray:
        """u8[4, size, size, 3]"""
        return np.random.default_rng(5).integers(0, 256, (4, size, size, 3)).astype(np.uint8)

    def run(self, mesh) -> dict[str, np.ndarray]:
        """Our `parts`."""
        with jax.set_mesh(mesh):
            images = axes.put_batch({"images": self.images()}, mesh)["images"]
            return jax.tree.map(np.asarray, jax.jit(parts, static_argnums=2)(self.tree(mesh), images, self.cfg))

    def torch(self, size: int = 64, **more):
        """The oracle's outputs, hidden states included."""
        pixels = (self.images(size) / 255.0 - np.array(self.cfg.mean)) / np.array(self.cfg.std)
        pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
        with torch.no_grad():
            return self.model(pixel_values=pixels, output_hidden_states=True, **more)


@pytest.fixture(scope="module", params=(clip, siglip, siglip_alone, dinov2, dinov2_giant, dinov2_registers))
def oracle(request, tmp_path_factory) -> Oracle:
    """Each family, as a VLM takes it or alone."""
    return Oracle(request.param, tmp_path_factory.mktemp("tower"))


def test_equals_transformers_on_one_device_and_on_eight(oracle):
    one, eight = (oracle.run(mesh) for mesh in towers.meshes())
    torchs, cfg = oracle.torch(), oracle.cfg
    taken = torchs.last_hidden_state if cfg.closing_norm else torchs.hidden_states[-2]
    patches = taken[:, cfg.extra :]
    expected = {
        "embedding": torchs.hidden_states[0],
        "block": torchs.hidden_states[1],
        "patches": patches,
        "pooled": taken[:, 0] if cfg.class_token else patches.mean(dim=1),
    }
    assert patches.shape == (4, 256, 64)
    for name, value in expected.items():
        assert towers.apart(one[name], value.numpy()) < 1e-4, name
        assert towers.apart(eight[name], one[name]) < 1e-5, name
    if cfg.family == "dinov2":
        assert towers.apart(one["pooled"], torchs.pooler_output.numpy()) < 1e-4


def test_at_most_two_percent_of_a_real_tower_is_held_by_every_device(oracle):
    cfg = dataclasses.replace(oracle.cfg, image_size=384, patch=14, width=1152, depth=26, heads=16, mlp=4304)
    arrays = jax.tree.leaves(layers.abstract_arrays(vision.abstract(cfg), towers.meshes()[1]))
    whole = sum(array.size for array in arrays if not any(array.sharding.spec))
    assert 0 < whole < 0.02 * sum(array.size for array in arrays)


@pytest.mark.parametrize("size", [40, 100])
def test_positions_for_images_of_another_size(oracle, size):
    """The table is for 16 × 16 patches; the images have 10 × 10 and 25 × 25."""
    more = {} if oracle.cfg.family == "dinov2" else {"interpolate_pos_encoding": True}
    expected = oracle.torch(size, **more).hidden_states[0].numpy()
    cfg, mesh = dataclasses.replace(oracle.cfg, image_size=size), towers.meshes()[0]
    with jax.set_mesh(mesh):
        images = axes.put_batch({"images": oracle.images(size)}, mesh)["images"]
        found = jax.jit(vision.embed, static_argnums=(2, 3))(oracle.tree(mesh), images, cfg, towers.FLOAT32)
    assert found.shape == (4, cfg.extra + (size // 4) ** 2, 64)
    assert towers.apart(found, expected) < 1e-4


@pytest.mark.parametrize("sizes", [(37, 16), (16, 37), (37, 37), (24, 24)])
@pytest.mark.parametrize("antialias", [False, True])
def test_bicubic_weights_are_torchs(sizes, antialias):
    old, new = sizes
    rows = torch.eye(old, dtype=torch.float64)[None, :, None, :].expand(1, old, old, old).clone()
    torchs = torch.nn.functional.interpolate(rows, size=(old, new), mode="bicubic", antialias=antialias)
    np.testing.assert_allclose(vision.bicubic(old, new, antialias), torchs[0, :, 0].numpy().T, atol=1e-6)


@pytest.mark.parametrize("size", [16, 24])
def test_half_precision_keeps_the_direction(tiny, size):
    """Computed in bfloat16, and held in it as well; with positions as trained and interpolated."""
    cfg = dataclasses.replace(tiny.cfg.vision, image_size=size)
    params = drawn(tiny.cfg.vision)
    images = np.random.default_rng(2).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    half = jax.jit(lambda p, i: vision.forward(p, i, cfg, jnp.dtype("bfloat16")))
    exact = run(params, images, cfg).ravel()
    for held in (params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)):
        found = half(held, images)
        assert found.dtype == jnp.bfloat16 and found.shape == (2, cfg.tokens, cfg.width)
        found = np.asarray(found, np.float32).ravel()
        assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.999
