"""Tiny random checkpoints of every layout that the loader knows, and the PyTorch models they hold.

`llava` makes a transformers model; `write_…` lay its weights out as the published checkpoints have them.
"""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

VOCAB, IMAGE, PATCH = 400, 56, 14
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB)
EYE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE,
           patch_size=PATCH)  # fmt: skip
TEXTS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-4, rope_theta=5000.0),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=2, rms_norm_eps=1e-4),
    "stablelm": lambda: transformers.StableLmConfig(**SIZES, num_key_value_heads=4, use_qkv_bias=True),
    "phi": lambda: transformers.PhiConfig(**SIZES, partial_rotary_factor=0.5, layer_norm_eps=1e-4),
}
EYES = {
    "clip": lambda: transformers.CLIPVisionConfig(**EYE, layer_norm_eps=1e-4),
    "siglip": lambda: transformers.SiglipVisionConfig(**EYE, vision_use_head=False),
}


def draw(model: torch.nn.Module, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """Every parameter normal, around 1 for scales; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            scale = name.endswith("weight") and value.ndim == 1
            value.copy_(torch.randn(value.shape, generator=generator) * std + float(scale))
    return model.eval()


def llava(text: str = "llama", eye: str = "clip", seed: int = 0) -> torch.nn.Module:
    """A LlavaForConditionalGeneration, float32, whose image token is the last of the vocabulary."""
    config = transformers.LlavaConfig(
        vision_config=EYES[eye](),
        text_config=TEXTS[text](),
        image_token_index=VOCAB - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if eye == "clip" else "full",
        image_seq_length=(IMAGE // PATCH) ** 2,
        attn_implementation="eager",
    )
    model = transformers.LlavaForConditionalGeneration(config)
    if text == "phi":  # which transformers' wrapper leaves out
        model.lm_head = torch.nn.Linear(SIZES["hidden_size"], VOCAB, bias=True)
    return draw(model.float(), seed)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights under the names of the published llava-hf checkpoints."""
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("model.")
        for old, new in (("vision_tower.", "vision_tower.vision_model."), ("language_model.", "language_model.model."),
                         ("lm_head.", "language_model.lm_head.")):  # fmt: skip
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        renamed[name] = value.detach().clone().contiguous()
    return renamed


def flat_name(name: str) -> str:
    """llava-hf's name → liuhaotian's."""
    for old, new in (("language_model.model.", "model."), ("language_model.lm_head", "lm_head"),
                     ("multi_modal_projector.linear_1", "model.mm_projector.0"),
                     ("multi_modal_projector.linear_2", "model.mm_projector.2"),
                     ("vision_tower.", "model.vision_tower.vision_tower.")):  # fmt: skip
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def factory_name(name: str) -> str:
    """llava-hf's name → that of TinyLLaVA's factory."""
    for old, new in (("multi_modal_projector.linear_1", "connector._connector.0"),
                     ("multi_modal_projector.linear_2", "connector._connector.2"),
                     ("vision_tower.", "vision_tower._vision_tower.")):  # fmt: skip
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def memory_name(name: str) -> str:
    """llava-hf's name → that of a transformers 5 model in memory."""
    name = name.replace("vision_tower.vision_model.", "vision_tower.").replace("language_model.model", "language_model")
    return "lm_head" + name[len("language_model.lm_head") :] if "lm_head" in name else f"model.{name}"


def save(folder: pathlib.Path, tensors: dict, config: dict, shards: int = 1, pickle: bool = False) -> pathlib.Path:
    """Writes weights and config.json, as one file or as shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix, write = "model", ".safetensors", save_file
    if pickle:
        stem, suffix, write = "pytorch_model", ".bin", torch.save
    names = sorted(tensors)
    if shards == 1:
        write(tensors, folder / f"{stem}{suffix}")
        return folder
    table = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: tensors[name] for name in names[number::shards]}
        write(part, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": table}))
    return folder


def text_of(model: torch.nn.Module) -> dict:
    """The text part's constants, as a flat config.json has them; written the way of transformers before 5."""
    values = model.config.text_config.to_dict()
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        values["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return values | {"architectures": ["x"]}


def write_llava_hf(folder, model, rename: Callable[[str], str] = str, **how):
    """llava-hf; `rename` for the names since transformers 5."""
    return save(folder, {rename(name): value for name, value in state(model).items()}, model.config.to_dict(), **how)


def write_tower(folder, model, whole: bool):
    """The vision tower's own folder: alone, or CLIP with both towers, as the hub has it."""
    tensors = {n.removeprefix("vision_tower."): v for n, v in state(model).items() if n.startswith("vision_tower.")}
    config = model.config.vision_config.to_dict()
    if whole:
        text = transformers.CLIPTextConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=2, vocab_size=99,
                                           num_attention_heads=2)  # fmt: skip
        clip = draw(
            transformers.CLIPModel(
                transformers.CLIPConfig(text_config=text.to_dict(), vision_config=config, projection_dim=16)
            ),
            3,
        )
        tensors = clip.state_dict() | tensors
        config = clip.config.to_dict()
    return save(folder, {name: value.contiguous() for name, value in tensors.items()}, config)


def write_flat(folder, model, kind: str, tower: str, inside: bool = True, **how):
    """liuhaotian/llava-v1.5 and TinyLLaVA's bench: the tower's weights inside, or only in its own folder."""
    tensors = {flat_name(name): value for name, value in state(model).items()}
    if not inside:
        tensors = {name: value for name, value in tensors.items() if "vision_tower" not in name}
    config = text_of(model) | {"model_type": kind, "mm_vision_tower": tower, "mm_projector_type": "mlp2x_gelu",
                               "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}  # fmt: skip
    return save(folder, tensors, config, **how)


def write_vicuna(folder, model, tower: str):
    """A plain language model with the pretrained projector laid beside."""
    tensors = {flat_name(name): value for name, value in state(model).items()}
    projector = {name: value for name, value in tensors.items() if "mm_projector" in name}
    language = {name: value for name, value in tensors.items() if "mm_" not in name and "vision_tower" not in name}
    save(folder, language, text_of(model) | {"mm_vision_tower": tower}, shards=2)
    torch.save(projector, folder / "mm_projector.bin")
    return folder


def write_factory(folder, model):
    """TinyLLaVA's factory."""
    config = {"model_type": "tinyllava", "connector_type": "mlp2x_gelu", "vision_feature_layer": -2,
              "vision_feature_select_strategy": "patch", "text_config": text_of(model),
              "vision_config": model.config.vision_config.to_dict()}  # fmt: skip
    return save(folder, {factory_name(name): value for name, value in state(model).items()}, config)


def logits(model: torch.nn.Module, tokens: np.ndarray, start: int, pixels: np.ndarray) -> np.ndarray:
    """f32[t, vocab] of one row of ids i64[t] with the image from `start` on; pixels f32[s, s, 3], normalised."""
    ids = tokens.astype(np.int64)
    ids[start : start + (IMAGE // PATCH) ** 2] = VOCAB - 1
    with torch.no_grad():
        values = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        return model(input_ids=torch.tensor(ids[None]), pixel_values=values).logits[0].numpy()
