"""Models out: a folder that transformers' `LlavaForConditionalGeneration` loads, and a LoRA folder that PEFT loads.

Tensor names are those of the published llava-hf checkpoints.
"""

import math
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from safetensors.numpy import save_file

from coincide_jax.core import processes
from coincide_jax.core.artifacts import atomic, remove, write_json
from coincide_jax.core.axes import fetch
from coincide_jax.core.errors import UserError
from coincide_jax.models import decoder, lora, vlm
from coincide_jax.models.decoder import DecoderConfig
from coincide_jax.models.hf.constants import CONVERSATION
from coincide_jax.models.layers import Leaf, is_leaf
from coincide_jax.models.vision import SOURCE as VISION
from coincide_jax.models.vision import VisionConfig
from coincide_jax.models.vlm import VLMConfig

SHARD_BYTES = 4 << 30  # of one file; the host holds one file's tensors at a time
VISION_KEYS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def unexportable(cfg: VLMConfig) -> str:
    """Why transformers' LLaVA cannot hold a model, one sentence; '' if it can."""
    eye, text = cfg.vision, cfg.decoder
    if eye.family not in VISION_KEYS:
        return f"transformers' LLaVA does not read a {eye.family} tower as we do; expected clip or siglip"
    if text.family == "openelm":
        return "transformers has no OpenELM; expected a llama, stablelm or qwen2 decoder"
    if text.head_bias:
        return f"the head of a {text.family} decoder has a bias, which transformers' LLaVA leaves out"
    return ""


def to_source(leaf: Leaf, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """One of our parameters as the file's tensors, float32: unstacked, outputs before inputs."""
    stacked = leaf.axes[0] == "layer"
    for name, part in zip(leaf.names(), array if stacked else array[None], strict=True):
        order = (*range(leaf.inputs, part.ndim), *range(leaf.inputs))
        yield name, np.ascontiguousarray(part.transpose(order).reshape(leaf.source_shape), dtype=np.float32)


def closing_norm(cfg: VLMConfig) -> dict[str, np.ndarray]:
    """The tower's closing norm, which is in the file but not in the way of the features."""
    ones, zeros = np.ones(cfg.vision.width, np.float32), np.zeros(cfg.vision.width, np.float32)
    return {f"{VISION}.post_layernorm.weight": ones, f"{VISION}.post_layernorm.bias": zeros}


def leaves_of(cfg: VLMConfig) -> list[Leaf]:
    """The descriptions of a model's parameters, in the order of its leaves."""
    return jax.tree.leaves(vlm.abstract(cfg), is_leaf=is_leaf)


def export(
    params: dict, cfg: VLMConfig, out: pathlib.Path, *, image_token_id: int = 0, card: dict | None = None
) -> None:
    """Writes `out`/config.json and `out`/model.safetensors, or shards of up to 4 GiB with their index, in float32.

    image_token_id: the id that stands at the image's positions; ours is the padding id, so prompts are to be handed
    over unpadded or another id given; card: of the model (`hf.load`), whose template and system prompt config.json then
    holds under `CONVERSATION`, since a family's folders elsewhere have others.

    Raises:
      UserError: a model that transformers' LLaVA cannot hold.
    """
    if reason := unexportable(cfg):
        raise UserError(f"the model cannot be exported: {reason}")
    out, shards = pathlib.Path(out), [[]]
    size = 0
    for pair in zip(leaves_of(cfg), jax.tree.leaves(params), strict=True):
        bytes_ = 4 * math.prod(pair[0].shape)
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(pair)
        size += bytes_
    for old in out.glob("model*.safetensors*"):
        remove(old)
    files = {}
    for number, shard in enumerate(shards):
        alone = len(shards) == 1
        name = "model.safetensors" if alone else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        found = {} if number else closing_norm(cfg)
        for leaf, array in shard:
            found |= dict(to_source(leaf, fetch(array)))
        _write(out / name, found)
        files |= dict.fromkeys(found, name)
    if len(shards) > 1:
        total = 4 * sum(math.prod(leaf.shape) for leaf in leaves_of(cfg))
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    said = {CONVERSATION: {key: card[key] for key in ("template", "system") if key in card}} if card else {}
    write_json(out / "config.json", config_json(cfg, image_token_id) | said)
    image = {"image_mean": list(cfg.vision.mean), "image_std": list(cfg.vision.std)}
    write_json(out / "preprocessor_config.json", preprocessor_json(cfg) | image)


def _write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file whole; of several processes the one that leads does, and all know whether it could."""

    def write() -> None:
        with atomic(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    processes.led(write)


def config_json(cfg: VLMConfig, image_token_id: int) -> dict:
    """config.json of a LlavaForConditionalGeneration that computes what `vlm.forward` computes."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "image_seq_length": cfg.image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if cfg.vision.class_token else "full",
        "tie_word_embeddings": cfg.decoder.tied,
        "dtype": "float32",
        "vision_config": vision_json(cfg.vision),
        "text_config": text_json(cfg.decoder),
    }


def vision_json(eye: VisionConfig) -> dict:
    """vision_config; the tower ends at the last block held."""
    values = {
        "model_type": VISION_KEYS[eye.family],
        "hidden_size": eye.width,
        "intermediate_size": eye.mlp,
        "num_hidden_layers": eye.depth,
        "num_attention_heads": eye.heads,
        "image_size": eye.image_size,
        "patch_size": eye.patch,
        "hidden_act": eye.activation,
        "layer_norm_eps": eye.norm_eps,
    }
    return values | ({"projection_dim": eye.width} if eye.family == "clip" else {"vision_use_head": False})


def text_json(text: DecoderConfig) -> dict:
    """text_config."""
    values = {
        "model_type": text.family,
        "vocab_size": text.vocab,
        "hidden_size": text.width,
        "intermediate_size": text.mlp,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "hidden_act": text.activation,
        "max_position_embeddings": text.positions,
        "rope_theta": text.rope_theta,
        "partial_rotary_factor": text.rotary / text.head_dim,
        "tie_word_embeddings": text.tied,
        "rms_norm_eps" if text.norm == "rms" else "layer_norm_eps": text.norm_eps,
    }
    if text.head_dim * text.heads != text.width or text.family == "llama":
        values["head_dim"] = text.head_dim
    if text.rope_scaling:
        values["rope_scaling"] = dict(text.rope_scaling)
    if text.family == "llama":
        values |= {"attention_bias": "wo" in text.biases, "mlp_bias": "up" in text.biases}
    if text.family == "stablelm":
        values["use_qkv_bias"] = "wq" in text.biases
    return values


def preprocessor_json(cfg: VLMConfig) -> dict:
    """preprocessor_config.json, colours aside; images are padded to a square first, as LLaVA does."""
    side = {"height": cfg.vision.image_size, "width": cfg.vision.image_size}
    kind = "CLIPImageProcessor" if cfg.vision.family == "clip" else "SiglipImageProcessor"
    return {"image_processor_type": kind, "size": side, "crop_size": side, "do_convert_rgb": True, "resample": 3}


def export_adapter(
    adapters,
    cfg: VLMConfig,
    out: pathlib.Path,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    base: str,
    projector: dict | None = None,
) -> None:
    """Writes `out`/adapter_config.json and `out`/adapter_model.safetensors for `peft.PeftModel.from_pretrained` over a
    `LlavaForConditionalGeneration`.

    adapters: the tree of `lora.abstract(cfg, rank, targets)`; base: path of the model that they adapt; projector: the
    projector's parameters if it was trained as well (PEFT calls that a module to save).

    Raises:
      UserError: a model that transformers' LLaVA cannot hold.
    """
    if reason := unexportable(cfg):
        raise UserError(f"the adapter cannot be exported: {reason}")
    tree = lora.abstract(cfg, rank, targets)
    found = {}
    for leaf, array in zip(jax.tree.leaves(tree, is_leaf=is_leaf), jax.tree.leaves(adapters), strict=True):
        found |= dict(to_source(leaf, fetch(array)))
    if projector is not None:
        own = jax.tree.leaves(vlm.abstract(cfg)["projector"], is_leaf=is_leaf)
        for leaf, array in zip(own, jax.tree.leaves(projector), strict=True):
            found |= {f"base_model.model.{k}": v for k, v in to_source(leaf, fetch(array))}
    # in memory, transformers 5 has "model.language_model." where its files have "language_model.model."
    memory = ((decoder.SOURCE, "model.language_model"), ("model.multi_modal", "model.model.multi_modal"))
    for old, new in memory:
        found = {name.replace(old, new): array for name, array in found.items()}
    names = decoder.NAMES[cfg.decoder.family]
    tails = "|".join(names[name].rsplit(".", 1)[-1] for name in lora.choose_targets(cfg.decoder, targets))
    _write(pathlib.Path(out) / "adapter_model.safetensors", found)
    write_json(
        pathlib.Path(out) / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            # a pattern, since a vision tower has products of the same names
            "target_modules": rf".*language_model\..*\.({tails})",
            "modules_to_save": None if projector is None else ["multi_modal_projector"],
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )
