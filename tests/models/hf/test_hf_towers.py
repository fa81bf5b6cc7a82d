"""Plain CLIP, SigLIP, DINOv2 and BERT folders, and what config.json says: every constant arrives."""

import json

import checkpoints
import jax
import numpy as np
import pytest
import torch
import transformers

from coincide_jax.core import axes
from coincide_jax.core.errors import UserError
from coincide_jax.models import clip, hf, text, vision
from coincide_jax.models.hf import constants

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = np.dtype(np.float32)
WORDS = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=90)


@pytest.fixture(scope="module")
def mesh():
    return axes.make_mesh(2)


def pixels(cfg, count: int = 4):
    """Images u8 and the same as PyTorch's normalised pixels."""
    images = np.random.default_rng(2).integers(0, 256, (count, cfg.image_size, cfg.image_size, 3)).astype(np.uint8)
    normal = (images / 255.0 - np.array(cfg.mean)) / np.array(cfg.std)
    return images, torch.tensor(normal.transpose(0, 3, 1, 2), dtype=torch.float32)


def close(found, expected) -> None:
    expected = expected.detach().numpy()
    assert expected.std() > 0.1
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * np.abs(expected).max()


def dinov2(kind, config):
    return lambda: kind._from_config(config(**TOWER, mlp_ratio=2, layer_norm_eps=1e-5), attn_implementation="eager")


TOWER = {key: value for key, value in checkpoints.EYE.items() if key != "intermediate_size"}
TOWERS = {
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**checkpoints.EYE)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**checkpoints.EYE)),
    "siglip whole": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config=transformers.SiglipTextConfig(**WORDS).to_dict(),
            vision_config=transformers.SiglipVisionConfig(**checkpoints.EYE).to_dict(),
        )
    ),
    "dinov2": dinov2(transformers.Dinov2Model, transformers.Dinov2Config),
    "registers": dinov2(transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig),
}


@pytest.mark.parametrize("name", TOWERS)
def test_vision_towers(name, mesh, tmp_path):
    model = checkpoints.draw(TOWERS[name](), 4)
    model.save_pretrained(tmp_path)
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(tmp_path, mesh, "float32")
        images, normal = pixels(cfg)
        found = jax.jit(lambda p, b: vision.forward(p, b, cfg, F32))(params, axes.put_batch({"i": images}, mesh)["i"])
    tower = model.vision_model if name == "siglip whole" else model
    with torch.no_grad():
        expected = tower(normal).last_hidden_state
    if name == "clip":  # transformers norms the class token alone
        expected = model.post_layernorm(expected)
    close(jax.device_get(found), expected[:, cfg.extra :])
    assert card["image_size"] == cfg.image_size == checkpoints.IMAGE and card["mean"] == list(cfg.mean)
    assert (cfg.depth, cfg.closing_norm) == (3, True)


def test_clip_whole(mesh, tmp_path):
    words = transformers.CLIPTextConfig(**WORDS, eos_token_id=7, max_position_embeddings=40).to_dict()
    eye = transformers.CLIPVisionConfig(**checkpoints.EYE).to_dict()
    config = transformers.CLIPConfig(text_config=words, vision_config=eye, projection_dim=16)
    model = checkpoints.draw(transformers.CLIPModel(config), 6)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(3).integers(8, 90, (4, 12)).astype(np.int32)
    lengths = np.array([4, 12, 7, 9], np.int32)
    tokens[np.arange(4), lengths - 1] = 7
    with jax.set_mesh(mesh):
        params, cfg, card = hf.load(tmp_path, mesh, "float32")
        images, normal = pixels(cfg.vision)
        batch = axes.put_batch(dict(images=images, tokens=tokens, lengths=lengths), mesh)
        eye = jax.device_get(jax.jit(lambda p, b: clip.embed_images(p, b["images"], cfg))(params, batch))
        said = jax.device_get(jax.jit(lambda p, b: clip.embed_texts(p, b["tokens"], b["lengths"], cfg))(params, batch))
    with torch.no_grad():
        out = model(input_ids=torch.tensor(tokens.astype(np.int64)), pixel_values=normal)
    close(eye, out.image_embeds)
    close(said, out.text_embeds)
    assert (cfg.text.eos_id, cfg.text.projection, card["vocab"]) == (7, 16, 90)


@pytest.mark.parametrize("name", ["bert", "clip text"])
def test_text_encoders(name, mesh, tmp_path):
    if name == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**WORDS, layer_norm_eps=1e-6))
    else:
        model = transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**WORDS, eos_token_id=7, projection_dim=16)
        )
    model = checkpoints.draw(model, 8)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(3).integers(8, 90, (4, 12)).astype(np.int32)
    tokens[:, -1] = 7
    lengths = np.full(4, 12, np.int32)
    with jax.set_mesh(mesh):
        params, cfg, _ = hf.load(tmp_path, mesh, "float32")
        batch = axes.put_batch(dict(tokens=tokens, lengths=lengths), mesh)
        compute = jax.jit(lambda p, b: text.forward(p, b["tokens"], b["lengths"], cfg, F32))
        found = jax.device_get(compute(params, batch))
    ids = torch.tensor(tokens.astype(np.int64))
    with torch.no_grad():
        expected = model.bert(ids).last_hidden_state.mean(1) if name == "bert" else model(ids).text_embeds
    close(found, expected)
    assert cfg.projection == (0 if name == "bert" else 16)


CLASSES = {
    "llama": transformers.LlamaConfig,
    "stablelm": transformers.StableLmConfig,
    "phi": transformers.PhiConfig,
    "qwen2": transformers.Qwen2Config,
    "clip": transformers.CLIPVisionConfig,
    "siglip": transformers.SiglipVisionConfig,
    "dinov2": transformers.Dinov2Config,
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig,
    "clip_text": transformers.CLIPTextConfig,
    "bert": transformers.BertConfig,
}


def test_defaults_are_those_of_the_classes(tmp_path):
    assert CLASSES.keys() == constants.DEFAULTS.keys()
    for name, kind in CLASSES.items():
        known = kind()
        for key, value in constants.DEFAULTS[name].items():
            assert value == getattr(known, key, value), (name, key)
        if name in constants.ROPE_SHARE:
            rope = known.rope_parameters
            assert rope["rope_theta"] == constants.ROPE_THETA
            assert rope.get("partial_rotary_factor", 1.0) == constants.ROPE_SHARE[name]
    tower = transformers.LlavaConfig().vision_config
    assert all(getattr(tower, key) == value for key, value in constants.LLAVA_TOWER.items())


def test_rope_is_read_in_both_forms(tmp_path):
    sizes = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    stretch = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    old = sizes | {"rope_theta": 5e5, "rope_scaling": {"type": "llama3"} | stretch}
    new = sizes | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | stretch}
    one, two = (constants.decoder(values, tmp_path / "config.json") for values in (old, new))
    assert one == two and one.rope_theta == 5e5
    assert dict(one.rope_scaling) == stretch | {"rope_type": "llama3"}
    plain = constants.decoder(sizes | {"rope_scaling": None}, tmp_path / "config.json")
    assert (plain.rope_scaling, plain.rope_theta, plain.rotary) == ((), 10000.0, 16)
    lists = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 4.0]}
    long = constants.decoder(sizes | {"rope_parameters": lists}, tmp_path / "config.json")
    assert dict(long.rope_scaling)["long_factor"] == (2.0, 4.0) and hash(long)
    assert dict(long.rope_scaling)["original_max_position_embeddings"] == 512


def test_openelm_layers_differ(tmp_path):
    values = {
        "model_type": "openelm", "model_dim": 1280, "num_transformer_layers": 3, "head_dim": 64, "vocab_size": 32000,
        "num_query_heads": [12, 12, 16], "num_kv_heads": [3, 3, 4], "ffn_multipliers": [0.5, 0.73, 4.0],
        "ffn_dim_divisor": 256, "activation_fn_name": "swish", "ffn_with_glu": True, "max_context_length": 2048,
        "normalization_layer_name": "rms_norm", "normalize_qk_projections": True, "rope_freq_constant": 10000,
        "share_input_output_layers": True,
    }  # fmt: skip
    cfg = constants.decoder(values, tmp_path / "config.json")
    assert cfg.layer_shapes == ((12, 3, 768), (12, 3, 1024), (16, 4, 5120))
    assert (cfg.activation, cfg.qk_norm, cfg.tied, cfg.rotary) == ("silu", True, True, 64)


def test_colours_of_the_preprocessor(tmp_path):
    config = transformers.CLIPVisionConfig(**checkpoints.EYE).to_dict()
    found = constants.vision(config, tmp_path / "config.json")
    assert found.mean == (0.48145466, 0.4578275, 0.40821073)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    found = constants.vision(config, tmp_path / "config.json")
    assert found.mean == (0.1, 0.2, 0.3) and found.std == (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "mamba"}, "unknown model_type in .*config.json 'mamba'"),
        ({"model_type": "phi", "qk_layernorm": True}, "qk_layernorm is True; expected False"),
        ({"model_type": "stablelm", "use_parallel_residual": True}, "use_parallel_residual is True"),
        ({"model_type": "llama", "hidden_act": "relu6"}, "unknown hidden_act in .* 'relu6'"),
        (
            {"model_type": "llava", "mm_vision_tower": "x", "mm_projector_type": "linear"},
            "mm_projector_type is 'linear'",
        ),
        ({"model_type": "siglip_vision_model", "image_size": [3, 4]}, r"image_size is \[3, 4\]; expected a square"),
        ({"model_type": "openelm"}, "has no key"),
        ({"model_type": "llava", "text_config": {}, "vision_feature_layer": -99}, "layer is -99; expected one of"),
        (
            {"model_type": "llava", "text_config": {}, "vision_feature_select_strategy": "full"},
            "vision_feature_select_strategy is 'full' with a clip tower; expected default",
        ),
    ],
)
def test_what_is_not_built_is_one_sentence(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=said):
        hf.describe(tmp_path, "float32")
