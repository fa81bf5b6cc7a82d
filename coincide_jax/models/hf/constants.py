"""config.json → our configurations. Every constant is the checkpoint's own.

transformers does not write what equals the default of its configuration class; `DEFAULTS` holds those defaults of
transformers 5 (a test compares them). A key that neither the file nor the class knows is an error.
"""

import pathlib

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.models.decoder import DecoderConfig
from coincide_jax.models.text import TextConfig
from coincide_jax.models.vision import VisionConfig

# model_type of a config.json → family of our decoder
DECODERS = {
    **dict.fromkeys(("llama", "llava", "llava_llama", "tiny_llava_llama", "tinyllama"), "llama"),
    **dict.fromkeys(("stablelm", "stablelm_epoch", "tiny_llava_stablelm", "llava_stablelm"), "stablelm"),
    **dict.fromkeys(("phi", "tiny_llava_phi", "llava_phi"), "phi"),
    **dict.fromkeys(("qwen2", "tiny_llava_qwen2", "llava_qwen", "llava_qwen2"), "qwen2"),
    "openelm": "openelm",
}
VISIONS = {
    **dict.fromkeys(("clip", "clip_vision_model"), "clip"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "siglip"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "dinov2"),
}
CONVERSATION = "coincide_conversation"  # key of config.json under which `write.export` puts template and system prompt
DEFAULTS = {
    "llama": dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=False,
        attention_bias=False, mlp_bias=False,
    ),
    "stablelm": dict(
        vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, hidden_act="silu", max_position_embeddings=4096, layer_norm_eps=1e-5,
        tie_word_embeddings=False, use_qkv_bias=False, qk_layernorm=False, use_parallel_residual=False,
    ),
    "phi": dict(
        vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        hidden_act="gelu_new", max_position_embeddings=2048, layer_norm_eps=1e-5, tie_word_embeddings=False,
        qk_layernorm=False,
    ),
    "qwen2": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, hidden_act="silu", max_position_embeddings=32768, rms_norm_eps=1e-6,
        tie_word_embeddings=False, use_sliding_window=False,
    ),
    "clip": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
        patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
    "siglip": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
        patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    ),
    "dinov2": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, image_size=224, patch_size=14,
        hidden_act="gelu", layer_norm_eps=1e-6, use_swiglu_ffn=False, qkv_bias=True,
    ),
    "dinov2_with_registers": dict(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, mlp_ratio=4, image_size=224, patch_size=16,
        hidden_act="gelu", layer_norm_eps=1e-6, use_swiglu_ffn=False, qkv_bias=True, num_register_tokens=4,
    ),
    "clip_text": dict(
        vocab_size=49408, hidden_size=512, intermediate_size=2048, projection_dim=512, num_hidden_layers=12,
        num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5,
        eos_token_id=49407,
    ),
    "bert": dict(
        vocab_size=30522, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        hidden_act="gelu", max_position_embeddings=512, type_vocab_size=2, layer_norm_eps=1e-12,
        position_embedding_type="absolute",
    ),
}  # fmt: skip
# a LLaVA config that names no size of its tower means CLIP ViT-L/14-336
LLAVA_TOWER = dict(
    model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
    num_attention_heads=16, image_size=336, patch_size=14,
)  # fmt: skip
ROPE_THETA = 10000.0  # of every decoder class
ROPE_SHARE = {"llama": 1.0, "stablelm": 0.25, "phi": 0.5, "qwen2": 1.0}  # partial_rotary_factor of the classes
STRETCHED_FROM = ("llama3", "yarn", "longrope")  # scalings that know the length of the pretraining
ACTIVATIONS = {
    **{name: name for name in ("silu", "gelu", "quick_gelu", "gelu_pytorch_tanh")},
    **{"swish": "silu", "gelu_new": "gelu_pytorch_tanh", "gelu_fast": "gelu_pytorch_tanh", "gelu_python": "gelu"},
}
COLOURS = {  # mean and deviation where a folder has no preprocessor_config.json: those of the processors' classes
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # ImageNet's, as published beside the weights
}


class Keys:
    """The keys of one config.json (or of a part of it), completed by the defaults of their class."""

    def __init__(self, values: dict, defaults: dict, where: pathlib.Path):
        self.values, self.defaults, self.where = values, defaults, where

    def get(self, key: str, otherwise=None):
        """The value; None in the file counts as absent."""
        found = self.values.get(key)
        return self.defaults.get(key, otherwise) if found is None else found

    def __getitem__(self, key: str):
        found = self.get(key)
        if found is None:
            raise UserError(f"{self.where} has no key '{key}', which its model type needs")
        return found

    def refuse(self, key: str, *allowed) -> None:
        """Raises unless the value is absent or one of `allowed`: what else it asks for is not built."""
        found = self.get(key)
        if found is not None and found not in allowed:
            raise UserError(f"{self.where}: {key} is {found!r}; expected {' or '.join(map(repr, allowed))}")


def read(folder: pathlib.Path) -> dict:
    """config.json of a folder."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has neither model.json nor config.json; expected a model folder or a checkpoint's")
    return artifacts.read_json(path)


def decoder(values: dict, where: pathlib.Path, tied: bool | None = None) -> DecoderConfig:
    """The decoder that a config (or its text_config) describes. tied: of the whole model, if it says so.

    Raises:
      UserError: a model type or a variant of one that is not built.
    """
    kind = values.get("model_type", "llama")
    if kind not in DECODERS:
        raise unknown(f"model_type in {where}", kind, DECODERS)
    family = DECODERS[kind]
    if family == "openelm":
        return openelm(Keys(values, {}, where))
    keys = Keys(values, DEFAULTS[family], where)
    for key in ("qk_layernorm", "use_parallel_residual", "use_sliding_window"):
        keys.refuse(key, False)
    heads, width = keys["num_attention_heads"], keys["hidden_size"]
    head_dim = keys.get("head_dim", width // heads)
    layered = family in ("stablelm", "phi")
    # StableLM's first config class called it norm_eps
    eps = keys.values.get("norm_eps", keys["layer_norm_eps"]) if layered else keys["rms_norm_eps"]
    theta, share, scaling = rope(keys, family)
    return DecoderConfig(
        family=family,
        vocab=keys["vocab_size"],
        width=width,
        depth=keys["num_hidden_layers"],
        heads=heads,
        kv_heads=keys.get("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp=keys["intermediate_size"],
        norm="layer" if layered else "rms",
        norm_eps=float(eps),
        activation=activation(keys),
        gated=family != "phi",
        parallel=family == "phi",
        biases=biases(keys, family),
        head_bias=family == "phi",
        rotary=int(head_dim * share),
        rope_theta=float(theta),
        rope_scaling=scaling,
        positions=keys["max_position_embeddings"],
        qk_norm=False,
        tied=bool(keys["tie_word_embeddings"] if tied is None else tied),
        layer_shapes=(),
    )


def biases(keys: Keys, family: str) -> tuple[str, ...]:
    """The products with a bias."""
    qkv = ("wq", "wk", "wv")
    if family == "phi":
        return (*qkv, "wo", "up", "down")
    if family == "qwen2":
        return qkv
    if family == "stablelm":
        return qkv if keys["use_qkv_bias"] else ()
    return (*((*qkv, "wo") if keys["attention_bias"] else ()), *(("gate", "up", "down") if keys["mlp_bias"] else ()))


def activation(keys: Keys, key: str = "hidden_act") -> str:
    """The activation under the one name we have for it."""
    if keys[key] not in ACTIVATIONS:
        raise unknown(f"{key} in {keys.where}", keys[key], ACTIVATIONS)
    return ACTIVATIONS[keys[key]]


def rope(keys: Keys, family: str) -> tuple[float, float, tuple]:
    """Base, rotated share of a head, and sorted scaling items, from `rope_parameters` (transformers 5) or from
    `rope_theta`, `partial_rotary_factor` or `rope_pct`, and `rope_scaling` (before)."""
    given = keys.values.get("rope_scaling") or keys.values.get("rope_parameters") or {}
    theta = given.get("rope_theta") or keys.values.get("rope_theta") or ROPE_THETA
    outer = keys.values.get("partial_rotary_factor") or keys.values.get("rope_pct") or ROPE_SHARE[family]
    share = given.get("partial_rotary_factor") or outer
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind == "default":
        return theta, share, ()
    aside = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    items = {key: value for key, value in given.items() if key not in aside and value is not None}
    if kind in STRETCHED_FROM:
        items.setdefault("original_max_position_embeddings", keys["max_position_embeddings"])
        if keys.values.get("original_max_position_embeddings"):
            items["original_max_position_embeddings"] = keys.values["original_max_position_embeddings"]
    items["rope_type"] = kind
    tidy = {key: tuple(value) if isinstance(value, list) else value for key, value in items.items()}
    return theta, share, tuple(sorted(tidy.items()))


def openelm(keys: Keys) -> DecoderConfig:
    """Apple's OpenELM (arXiv 2404.14619): heads and MLP columns differ from layer to layer."""
    keys.refuse("normalization_layer_name", "rms_norm")
    keys.refuse("ffn_with_glu", True)
    depth, width, divisor = keys["num_transformer_layers"], keys["model_dim"], keys["ffn_dim_divisor"]
    queries, groups, multipliers = keys["num_query_heads"], keys["num_kv_heads"], keys["ffn_multipliers"]

    def whole(value: float) -> int:
        """Rounded to the divisor, never down by more than a tenth (the published rule)."""
        rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * value else rounded

    columns = [whole(multiplier * width) for multiplier in multipliers]
    shapes = tuple(zip(queries, groups, columns, strict=True))
    if len(shapes) != depth:
        raise UserError(f"{keys.where}: num_query_heads has {len(shapes)} entries; expected one for each of {depth}")
    return DecoderConfig(
        family="openelm",
        vocab=keys["vocab_size"],
        width=width,
        depth=depth,
        heads=max(queries),
        kv_heads=max(groups),
        head_dim=keys["head_dim"],
        mlp=max(columns),
        norm="rms",
        norm_eps=1e-6,  # fixed in the published code, no key
        activation=activation(keys, "activation_fn_name"),
        gated=True,
        parallel=False,
        biases=(),
        head_bias=False,
        rotary=keys["head_dim"],
        rope_theta=float(keys["rope_freq_constant"]),
        rope_scaling=(),
        positions=keys["max_context_length"],
        qk_norm=bool(keys["normalize_qk_projections"]),
        tied=bool(keys["share_input_output_layers"]),
        layer_shapes=shapes,
    )


def vision(values: dict, where: pathlib.Path, layer: int | None = None) -> VisionConfig:
    """The vision tower of a config (or of its vision_config).

    layer: index into hidden_states whose features are read (LLaVA's vision_feature_layer): blocks after it and the
    closing norm are not held. None: the whole tower.

    Raises:
      UserError: a model type that is not built, a layer that the tower has not.
    """
    kind = values.get("model_type", "clip_vision_model")
    if kind not in VISIONS:
        raise unknown(f"model_type in {where}", kind, VISIONS)
    values = {"model_type": kind} | values["vision_config"] if "vision_config" in values else values
    family = VISIONS[kind]
    keys = Keys(values, DEFAULTS[kind if kind in DEFAULTS else family], where)
    keys.refuse("qkv_bias", True)
    blocks, width = keys["num_hidden_layers"], keys["hidden_size"]
    if not isinstance(layer, int | None):
        raise UserError(f"{where}: the features' layer is {layer}; expected one number, as -2")
    held = blocks if layer is None else layer if layer > 0 else blocks + 1 + layer
    if not 1 <= held <= blocks:
        raise UserError(f"{where}: the features' layer is {layer}; expected one of the tower's {blocks}, as -2")
    dino, gated = family == "dinov2", bool(keys.get("use_swiglu_ffn", False))
    columns = int(width * keys["mlp_ratio"]) if dino else keys["intermediate_size"]
    if gated:
        columns = (columns * 2 // 3 + 7) // 8 * 8  # as Dinov2SwiGLUFFN rounds
    mean, std = colours(where.parent, family)
    return VisionConfig(
        family=family,
        image_size=one(keys, "image_size"),
        patch=one(keys, "patch_size"),
        width=width,
        depth=held,
        heads=keys["num_attention_heads"],
        mlp=columns,
        activation="silu" if gated else activation(keys),
        norm_eps=float(keys["layer_norm_eps"]),
        class_token=family != "siglip",
        registers=keys.get("num_register_tokens", 0),
        pre_norm=family == "clip",
        closing_norm=layer is None,
        layer_scale=dino,
        patch_bias=family != "clip",
        gated_mlp=gated,
        mean=mean,
        std=std,
    )


def one(keys: Keys, name: str) -> int:
    """A size that may be written as [s, s]."""
    found = keys[name]
    sides = set(found) if isinstance(found, list) else {found}
    if len(sides) != 1:
        raise UserError(f"{keys.where}: {name} is {found}; expected a square")
    return sides.pop()


def colours(folder: pathlib.Path, family: str) -> tuple[tuple, tuple]:
    """Mean and deviation of the channels: those of preprocessor_config.json, else of the family."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return COLOURS[family]
    values = artifacts.read_json(path)
    found = (values.get("image_mean"), values.get("image_std"))
    return tuple(tuple(map(float, a or b)) for a, b in zip(found, COLOURS[family], strict=True))


def text(values: dict, where: pathlib.Path) -> TextConfig:
    """A text encoder: BERT, or CLIP's text tower (of a text_config too)."""
    clip = values.get("model_type") != "bert"
    keys = Keys(values, DEFAULTS["clip_text" if clip else "bert"], where)
    keys.refuse("position_embedding_type", "absolute")
    return TextConfig(
        family="clip" if clip else "bert",
        vocab=keys["vocab_size"],
        width=keys["hidden_size"],
        depth=keys["num_hidden_layers"],
        heads=keys["num_attention_heads"],
        mlp=keys["intermediate_size"],
        positions=keys["max_position_embeddings"],
        types=0 if clip else keys["type_vocab_size"],
        activation=activation(keys),
        norm_eps=float(keys["layer_norm_eps"]),
        eos_id=keys["eos_token_id"] if clip else 0,
        projection=keys["projection_dim"] if clip else 0,
    )
