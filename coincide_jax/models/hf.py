"""Models in and out: our model folders, and a folder that Hugging Face's `LlavaForConditionalGeneration` loads.

Tensor names are those of the published llava-hf checkpoints.
"""

import pathlib

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save_file

from coincide_jax.core import checkpoint, precision
from coincide_jax.core.artifacts import atomic, write_json
from coincide_jax.core.errors import UserError
from coincide_jax.models import vlm
from coincide_jax.models.layers import Leaf, is_leaf
from coincide_jax.models.vision import SOURCE as VISION
from coincide_jax.models.vlm import VLMConfig


def load(folder: pathlib.Path, mesh: Mesh, name: str) -> tuple[dict, VLMConfig, dict]:
    """Reads a model folder (`core/checkpoint.py`) onto the mesh; `name` is `config.device.precision`.

    Returns:
      Parameters, configuration, and the card: config, image_size, vocab, template, system.

    Raises:
      UserError: unknown precision; a folder that is missing, incomplete, of other shapes or changed on disk.
    """
    chosen = precision.choose(name)
    params, card = checkpoint.load_model(
        folder, mesh, lambda card: vlm.abstract(VLMConfig.from_dict(card["config"], chosen))
    )
    return params, VLMConfig.from_dict(card["config"], chosen), card


def to_source(leaf: Leaf, array: np.ndarray) -> dict[str, np.ndarray]:
    """One of our parameters as the file's tensors: unstacked, outputs before inputs."""
    stacked = leaf.axes[0] == "layer"
    tensors = {}
    for layer, part in enumerate(array if stacked else array[None]):
        order = (*range(leaf.inputs, part.ndim), *range(leaf.inputs))
        name = leaf.source.format(layer=layer)
        tensors[name] = np.ascontiguousarray(part.transpose(order).reshape(leaf.source_shape), dtype=np.float32)
    return tensors


def tensors(params: dict, cfg: VLMConfig) -> dict[str, np.ndarray]:
    """Every tensor of the file, float32, by name."""
    leaves = jax.tree.leaves(vlm.abstract(cfg), is_leaf=is_leaf)
    found = {}
    for leaf, array in zip(leaves, jax.tree.leaves(params), strict=True):
        found |= to_source(leaf, np.asarray(jax.device_get(array)))
    # CLIP's closing norm is in the file but not in the way of the features
    found[f"{VISION}.post_layernorm.weight"] = np.ones(cfg.vision.width, np.float32)
    found[f"{VISION}.post_layernorm.bias"] = np.zeros(cfg.vision.width, np.float32)
    return found


def config_json(cfg: VLMConfig, image_token_id: int) -> dict:
    """config.json of a LlavaForConditionalGeneration that computes what `vlm.forward` computes."""
    eye, text = cfg.vision, cfg.decoder
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token_id,
        "image_seq_length": cfg.image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": text.tied,
        "dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": eye.width,
            "intermediate_size": eye.mlp,
            "num_hidden_layers": eye.depth,
            "num_attention_heads": eye.heads,
            "image_size": eye.image_size,
            "patch_size": eye.patch,
            "hidden_act": eye.activation,
            "layer_norm_eps": eye.norm_eps,
            "projection_dim": eye.width,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab,
            "hidden_size": text.width,
            "intermediate_size": text.mlp,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": text.tied,
        },
    }


def export(params: dict, cfg: VLMConfig, out: pathlib.Path, *, image_token_id: int = 0) -> None:
    """Writes `out`/model.safetensors and `out`/config.json.

    image_token_id: the id that stands at the image's positions; ours is the padding id, so prompts are to be handed
    over unpadded or another id given.

    Raises:
      UserError: a vision tower that CLIP's classes cannot hold.
    """
    if not cfg.vision.class_token:
        raise UserError("a vision tower without class token cannot be exported as CLIP; expected class_token=True")
    with atomic(pathlib.Path(out) / "model.safetensors") as path:
        save_file(tensors(params, cfg), path, metadata={"format": "pt"})
    write_json(pathlib.Path(out) / "config.json", config_json(cfg, image_token_id))
