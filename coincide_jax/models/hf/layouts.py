"""Which checkpoint a folder is: our configuration of it, its card, and what its tensors are called with us.

Known: llava-hf (prefixes of transformers before and since 5), liuhaotian/llava-v1.5, a language model with a
`mm_projector.bin`, TinyLLaVA's bench and factory checkpoints, and plain LLaMA, StableLM, Phi, Qwen2, OpenELM, CLIP,
SigLIP, DINOv2 and BERT folders. A vision tower that is not in the checkpoint itself is a folder of its own, which the
checkpoint's config.json names (`mm_vision_tower`).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Any

from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision
from coincide_jax.models import clip, decoder, text, vision, vlm
from coincide_jax.models.clip import CLIPConfig
from coincide_jax.models.hf import constants
from coincide_jax.models.hf.constants import Keys
from coincide_jax.models.vlm import VLMConfig

SYSTEM = (  # what LLaVA-1.5 and TinyLLaVA were tuned with
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEMPLATES = {"llama": "vicuna_v1", "qwen2": "phi", "stablelm": "phi", "phi": "phi", "openelm": "vicuna_v1"}
PROJECTORS = ("mm_projector.safetensors", "mm_projector.bin")
TOWER = "vision_tower"  # a folder of this name inside the checkpoint's is its tower
LANGUAGE = "language_model.model"
# file's name → ours, the first pattern that matches the whole name; {tower} is the root of the tower's names
MODEL_NAMES = (
    # liuhaotian and the TinyLLaVA bench repeat "vision_tower", the factory writes it with an underline
    (r"(?:model\.)?vision_tower\.(?:_?vision_tower\.)*(?:vision_model\.)?(.+)", r"{tower}.\1"),
    (r"(?:model\.)?(?:mm_projector|connector\._connector)\.0\.(.+)", r"multi_modal_projector.linear_1.\1"),
    (r"(?:model\.)?(?:mm_projector|connector\._connector)\.2\.(.+)", r"multi_modal_projector.linear_2.\1"),
    (r"(?:model\.)?multi_modal_projector\.(.+)", r"multi_modal_projector.\1"),
    (r"(?:language_model\.)?lm_head\.(.+)", r"language_model.lm_head.\1"),
    (r"(?:model\.)?language_model\.(?:model\.|transformer\.)?(.+)", rf"{LANGUAGE}.\1"),
    (r"(?:model|transformer)\.(.+)", rf"{LANGUAGE}.\1"),
    (r"((?:embed_tokens|layers|norm|final_layernorm)\..+)", rf"{LANGUAGE}.\1"),
)
TOWER_NAMES = (
    (r"(?:vision_model\.)?((?:embeddings|encoder|pre_layrnorm|post_layernorm|layernorm|head)\..+)", r"{tower}.\1"),
)
CLIP_NAMES = (
    (r"vision_model\.(.+)", r"{tower}.\1"),
    (r"((?:text_model|text_projection|visual_projection)\..+)", r"\1"),
)
TEXT_NAMES = (
    (r"(?:text_model\.)?((?:embeddings|encoder|final_layer_norm)\..+)", r"text_model.\1"),
    (r"(text_projection\..+)", r"\1"),
)
BERT_NAMES = ((r"(?:bert\.)?((?:embeddings|encoder)\..+)", r"\1"),)
# tensors that may be there although nothing reads them; patterns of whole names, the file's or ours
HARMLESS = (
    r".*rotary_emb\.\w+",  # tables that follow from the constants
    r".*(?:position_ids|token_type_ids)",  # ranges
    r".*mask_token",  # of DINOv2's training
    r"logit_(?:scale|bias)",
)
TOWER_HARMLESS = (  # where only patch features are read
    r"text_model\..*",
    r"(?:text|visual)_projection\.weight",
    r"vision_tower\.(?:vision_model\.)?(?:post_layernorm|layernorm|head)\..*",
)
WHOLE_TOWER_HARMLESS = (*TOWER_HARMLESS[:2], r"vision_tower\.vision_model\.head\..*")
BERT_HARMLESS = (r"(?:bert\.)?pooler\..*", r"cls\..*")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a folder holds.

    cfg: our configuration; card: what stages want to know of the model; abstract: tree of `layers.Leaf`, every layer
    and the head included; folders: where the tensors are, later ones read only for what the earlier ones lack; rename:
    a file's name → ours, None if there is none; harmless: whether a tensor may be there unread, by either name.
    """

    cfg: Any
    card: dict
    abstract: dict
    folders: tuple[pathlib.Path, ...]
    rename: Callable[[str], str | None]
    harmless: Callable[[str], bool]


def find(folder: pathlib.Path, precision: Precision) -> Layout:
    """The layout of a Hugging Face folder, from its config.json; no tensor is read.

    Raises:
      UserError: no config.json, a model type or variant that is not built, a vision tower that is nowhere.
    """
    folder = pathlib.Path(folder)
    values, where = constants.read(folder), folder / "config.json"
    kind = values.get("model_type", "llama")
    if "text_config" in values and kind not in ("clip", "siglip"):
        return composed(folder, values, where, precision)
    if "mm_vision_tower" in values or any((folder / name).is_file() for name in PROJECTORS):
        return flat(folder, values, where, precision)
    if kind == "clip":
        return joint(folder, values, where, precision)
    if kind in constants.VISIONS:
        cfg = constants.vision(values, where)
        tree, names = vision.abstract(cfg), (TOWER_NAMES, WHOLE_TOWER_HARMLESS)
    elif kind in ("bert", "clip_text_model"):
        with_projection = "CLIPTextModelWithProjection" in (values.get("architectures") or ())
        cfg = constants.text(values, where)
        cfg = cfg if with_projection else dataclasses.replace(cfg, projection=0)
        tree = text.abstract(cfg)
        names = (BERT_NAMES, BERT_HARMLESS) if kind == "bert" else (TEXT_NAMES, ())
    else:
        cfg = constants.decoder(values, where)
        tree, names = decoder.abstract(cfg), (MODEL_NAMES, tied_head(cfg))
    return layout(cfg, dataclasses.asdict(cfg), tree, (folder,), *names)


def composed(folder: pathlib.Path, values: dict, where: pathlib.Path, precision: Precision) -> Layout:
    """text_config and vision_config side by side: llava-hf, TinyLLaVA's factory, and what `write.export` leaves, which
    says the template and system prompt of its model."""
    keys = Keys(values, {}, where)
    factory = values.get("model_type") == "tinyllava"
    eye = {"model_type": "clip_vision_model"} | (values.get("vision_config") or {})
    if eye["model_type"] == "clip_vision_model":
        eye = constants.LLAVA_TOWER | eye
    tied = values.get("tie_word_embeddings") or values["text_config"].get("tie_word_embeddings")
    language = constants.decoder(values["text_config"], where, tied=bool(tied))
    tower = constants.vision(eye, where, layer=keys.get("vision_feature_layer", -2))
    if factory:
        # its SigLIP tower keeps every patch whatever the strategy says (TinyLLaVA_Factory#203)
        keys.refuse("connector_type", "mlp2x_gelu")
        keys.refuse("vision_feature_select_strategy", *(("patch",) if tower.class_token else ("patch", "cls_patch")))
    else:
        keys.refuse("projector_hidden_act", "gelu")
        keys.refuse("multimodal_projector_bias", True)
        strategy = keys.get("vision_feature_select_strategy", "default")
        if strategy != ("default" if tower.class_token else "full"):
            raise UserError(
                f"{where}: vision_feature_select_strategy is '{strategy}' with a {tower.family} tower; expected "
                f"{'default' if tower.class_token else 'full'}: all patches and no class token"
            )
    found = whole(VLMConfig(tower, language, precision), (folder,))
    return dataclasses.replace(found, card=found.card | values.get(constants.CONVERSATION, {}))


def flat(folder: pathlib.Path, values: dict, where: pathlib.Path, precision: Precision) -> Layout:
    """The language model's config with LLaVA's mm_… keys: liuhaotian/llava-v1.5, TinyLLaVA's bench, and a language
    model that an mm_projector.bin was laid beside."""
    keys = Keys(values, {}, where)
    keys.refuse("mm_projector_type", "mlp2x_gelu")
    keys.refuse("mm_vision_select_feature", "patch")
    keys.refuse("mm_use_im_start_end", False)
    keys.refuse("mm_use_im_patch_token", False)
    tower = tower_folder(folder, values.get("mm_vision_tower"), where)
    eye = constants.vision(constants.read(tower), tower / "config.json", layer=keys.get("mm_vision_select_layer", -2))
    language = constants.decoder(values, where)
    return whole(VLMConfig(eye, language, precision), (folder, tower))


def tower_folder(folder: pathlib.Path, name: str | None, where: pathlib.Path) -> pathlib.Path:
    """The folder of the vision tower that a checkpoint names: a path, or the last part of a hub id, inside the
    checkpoint's folder or beside it."""
    last = pathlib.PurePosixPath(name).name if name else TOWER
    tried = [folder / TOWER, folder / last, folder.parent / last]
    if name:
        tried = [pathlib.Path(name), folder / name, folder.parent / name, *tried]
    for candidate in tried:
        if (candidate / "config.json").is_file():
            return candidate
    named = f"names the vision tower '{name}', which is no folder here" if name else "has no key 'mm_vision_tower'"
    raise UserError(f"{where} {named}; put that tower's files (config.json, model.safetensors) into {folder / last}")


def joint(folder: pathlib.Path, values: dict, where: pathlib.Path, precision: Precision) -> Layout:
    """CLIP with both towers."""
    tower = values.get("vision_config") or {}, values.get("text_config") or {}
    older = (
        values.get("vision_config_dict") or {},
        values.get("text_config_dict") or {},
    )  # these win, as in transformers
    eye, words = (a | b for a, b in zip(tower, older, strict=True))
    joint_width = Keys(values, {"projection_dim": 512}, where)["projection_dim"]
    cfg = CLIPConfig(
        constants.vision(eye | {"model_type": "clip_vision_model"}, where),
        constants.text(words | {"model_type": "clip_text_model", "projection_dim": joint_width}, where),
        precision,
    )
    config = {"vision": dataclasses.asdict(cfg.vision), "text": dataclasses.asdict(cfg.text)}
    return layout(cfg, config, clip.abstract(cfg), (folder,), CLIP_NAMES, ())


def whole(cfg: VLMConfig, folders: tuple[pathlib.Path, ...]) -> Layout:
    """A vision-language model; the tower's own folder, if it comes, knows other names."""
    dropped = (*TOWER_HARMLESS, *tied_head(cfg.decoder), *later_layers(cfg.vision))
    return layout(cfg, cfg.to_dict(), vlm.abstract(cfg), folders, (*MODEL_NAMES, *TOWER_NAMES), dropped)


def tied_head(cfg) -> tuple[str, ...]:
    """A head that repeats the embedding is not read."""
    return (r"language_model\.lm_head\.weight",) if cfg.tied else ()


def later_layers(cfg) -> tuple[str, ...]:
    """Blocks of the tower after the last one held."""
    numbers = "|".join(str(number) for number in range(cfg.depth, cfg.depth + 100))
    return (rf"vision_tower\.(?:vision_model\.)?encoder\.layers?\.(?:{numbers})\..*",)


def layout(cfg, config: dict, tree: dict, folders, names, dropped: tuple[str, ...]) -> Layout:
    """The layout whose tensor names follow `names`."""
    eye = cfg if isinstance(cfg, vision.VisionConfig) else getattr(cfg, "vision", None)
    words = getattr(cfg, "decoder", None) or getattr(cfg, "text", None) or cfg
    root = vision.SOURCES[eye.family] if eye else ""
    patterns = [(re.compile(pattern), result.replace("{tower}", root)) for pattern, result in names]
    allowed = re.compile("|".join((*HARMLESS, *dropped)))

    def rename(name: str) -> str | None:
        for pattern, result in patterns:
            if found := pattern.fullmatch(name):
                return found.expand(result)
        return None

    card = {
        "config": config,
        "image_size": eye.image_size if eye else 0,
        "vocab": getattr(words, "vocab", 0),
        "template": TEMPLATES.get(words.family, ""),
        "system": SYSTEM,
        "mean": list(eye.mean) if eye else [],
    }
    return Layout(cfg, card, tree, folders, rename, lambda name: bool(allowed.fullmatch(name)))
