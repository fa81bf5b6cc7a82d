"""Export: parameters as a Hugging Face folder in the published llava-hf layout. The only file of `models/` that touches disk.

Every leaf says its tensor's name and shape; stacked leaves are cut into layers, inputs go behind outputs.
"""

import json
import math
import os
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from coincide_jax.models import vlm
from coincide_jax.models.layers import Leaf, is_leaf


def tensors(params: dict, cfg: vlm.VLMConfig) -> dict[str, np.ndarray]:
    """`{Hugging Face name: float32 array}` of a whole tree."""
    described = jax.tree.leaves(vlm.abstract(cfg), is_leaf=is_leaf)
    arrays = jax.tree.leaves(jax.device_get(params))
    out = {}
    for leaf, array in zip(described, arrays, strict=True):
        if leaf.axes[:1] == ("layer",):
            for layer, part in enumerate(array):
                out[leaf.source.format(layer=layer)] = _turned(leaf, part)
        else:
            out[leaf.source] = _turned(leaf, array)
    return out


def _turned(leaf: Leaf, array: np.ndarray) -> np.ndarray:
    """Inputs behind outputs, then the file's shape."""
    ins = math.prod(array.shape[: leaf.inputs])
    flat = array.reshape(ins, -1).T if leaf.inputs else array
    return np.ascontiguousarray(flat.reshape(leaf.source_shape))


def configuration(cfg: vlm.VLMConfig) -> dict:
    """What `config.json` of a LlavaForConditionalGeneration folder says."""
    eye, text = cfg.vision, cfg.decoder
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_seq_length": cfg.image_tokens,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if eye.class_token else "full",
        "image_token_index": text.vocab,  # one past the vocabulary: no text token stands for an image here
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
            "tie_word_embeddings": text.tied,
        },
        "tie_word_embeddings": text.tied,
        "torch_dtype": "float32",
    }


def export(params: dict, cfg: vlm.VLMConfig, out: pathlib.Path) -> None:
    """Writes model.safetensors and config.json into `out`, each whole or not at all."""
    temporary = out / ".model.safetensors.tmp"
    save_file(tensors(params, cfg), temporary, metadata={"format": "pt"})
    os.replace(temporary, out / "model.safetensors")
    temporary = out / ".config.json.tmp"
    temporary.write_text(json.dumps(configuration(cfg), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out / "config.json")
