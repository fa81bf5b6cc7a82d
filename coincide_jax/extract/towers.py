"""The feature of a record before anybody has answered it: its image and its questions, each by an encoder of its own.

PROGRESS (CVPR 2026, arXiv 2506.01085): DINOv2's pooled output of the image and the sentence embedding of the questions,
side by side, scaled to unit length. `extract.image_encoder` and `extract.text_encoder` name the two folders (the
authors took DINOv2-large and all-MiniLM-L6-v2). Without them the base's own towers serve, which no record of the pool
was shown to: the mean of its patch features and the mean of its token embeddings. A record without an image has a zero
image half and is scaled up.

Where the authors' program differs: it gives DINOv2 the colours of CLIP's mean and deviation, and leaves each half as
long as it comes, so that the image decides nearly alone (`extract.unit_halves=False`).
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coincide_jax.core import artifacts, precision
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.precision import Precision
from coincide_jax.dataset import Dataset
from coincide_jax.dataset.conversation import Encoded
from coincide_jax.dataset.tokenizer import Tokenizer
from coincide_jax.extract.activations import stored
from coincide_jax.models import clip, decoder, hf, text, vision, vlm

READS = ("all", "questions")
ENDINGS = ("\nAnswer with", "\nAnswer the")  # what asks for a form of answer, no part of the question's skill
BERT_START, BERT_END = "[CLS]", "[SEP]"
SENTENCE = 256  # tokens that a sentence encoder reads (all-MiniLM-L6-v2)
SENTENCE_BUCKETS = (32, 64, 128, SENTENCE)
FRAMES = {"siglip": "squeeze"}  # others crop the centre
TUNED = ("reference", "train")  # stages whose models have seen answers of a pool


@dataclasses.dataclass(frozen=True)
class Towers:
    """What `tower_features` computes. text: None = the mean of token embeddings; halves: whether both are made unit."""

    vision: vision.VisionConfig
    text: text.TextConfig | None
    precision: Precision
    halves: bool


def check(config) -> None:
    """Finds what the keys of features without answers can get wrong, before anything runs.

    Raises:
      UserError: an unknown word, keys that contradict each other, a checkpoint that was tuned on a pool.
    """
    keys, reference = config.extract, config.reference.path
    if keys.reads not in READS:
        raise unknown("extract.reads", keys.reads, READS)
    given = [name for name in ("image_encoder", "text_encoder") if keys[name]]
    if given and keys.reads == "all":
        raise UserError(f"extract.{given[0]} is {keys[given[0]]}, but extract.reads is 'all'; expected 'questions'")
    if len(given) == 1:
        raise UserError(f"extract.{given[0]} is {keys[given[0]]}, alone; expected image_encoder and text_encoder")
    if given and reference:
        raise UserError(f"extract.{given[0]} and reference.path {reference} are both set; expected one of them")
    if keys.reads == "all":
        return
    if keys.encoder_size < 1:
        raise UserError(f"extract.encoder_size = {keys.encoder_size}; expected 1 or more")
    if keys.scores:
        raise UserError("extract.scores is set but extract.reads is 'questions'; scores are of answers")
    for name, folder in (("reference.path", reference), ("target.path", config.target.path)):
        for above in (Path(folder), Path(folder).parent) if folder else ():
            path = above / "manifest.json"
            stage = artifacts.read_json(path).get("stage") if path.is_file() else None
            if stage in TUNED:
                raise UserError(
                    f"{name} {folder} was made by the stage '{stage}', which trains on answers of a pool; with "
                    "extract.reads=questions expected a checkpoint that never saw the pool, or none"
                )


@functools.partial(jax.jit, static_argnames=("cfg",))
def tower_features(params, batch: dict, cfg: Towers) -> dict[str, jax.Array]:
    """`{'features': f16[B, D], 'repaired': bool[B]}` from `images`, `tokens` and `lengths` of a batch; `image_start`
    ≥ 0 says that there is an image. D is the sum of both widths."""
    dtype = cfg.precision.dtype
    if cfg.text is None:
        patches = vision.forward(params["vision"], batch["images"], cfg.vision, dtype)
        image = jnp.mean(patches.astype(jnp.float32), axis=1)
        words = decoder.embed(params["decoder"], batch["tokens"], dtype).astype(jnp.float32)
        real = (jnp.arange(words.shape[1])[None] < batch["lengths"][:, None]).astype(jnp.float32)
        said = (words * real[..., None]).sum(1) / jnp.maximum(real.sum(1, keepdims=True), 1.0)
    else:
        image = vision.pooled(params["vision"], batch["images"], cfg.vision, dtype)
        # unit, as sentence-transformers gives it
        said = clip.unit(text.forward(params["text"], batch["tokens"], batch["lengths"], cfg.text, dtype))
    if cfg.halves:
        image, said = clip.unit(image), clip.unit(said)
    image = jnp.where((batch["image_start"] >= 0)[:, None], image, 0.0)
    return stored(clip.unit(jnp.concatenate([image, said], axis=1)))


class Questions:
    """The questions of a record as one text, a line each, without the endings that ask for a form of answer; between
    BERT's marks if `marked`. Takes the place of `conversation.Template` in a `Dataset`; answers are not looked at."""

    def __init__(self, tokenizer: Tokenizer, positions: int, marked: bool):
        self.tokenizer, self.positions = tokenizer, positions
        self.start = self.end = ()
        self.eos_id = 0
        if marked:
            marks = [tokenizer.id_of(name) for name in (BERT_START, BERT_END)]
            if None in marks:
                raise UserError(f"extract.text_encoder: the tokenizer lacks {BERT_START} or {BERT_END}, BERT's marks")
            self.start, self.end = ((mark,) for mark in marks)

    def encode(self, turns: tuple[tuple[str, str | None], ...], has_image: bool) -> Encoded:
        """The text of a record; `image_start` is 0 if there is an image, which takes no position here."""
        lines = [min((question.split(ending)[0] for ending in ENDINGS), key=len) for question, _ in turns]
        ids = self.tokenizer.encode("\n".join(lines))[: self.positions - len(self.start) - len(self.end)]
        ids = np.asarray([*self.start, *ids, *self.end], np.int32)
        inside = np.ones(len(ids), bool)
        return Encoded(ids, 0 if has_image else -1, inside, inside)


def open_towers(split: dict, base: Path | None, config, mesh) -> tuple[Dataset, Callable, int, str]:
    """The split's records as the encoders read them, batch → features, D, and what to tell of it.

    Args:
      base: folder of the model whose towers serve where no encoders are named.

    Raises:
      UserError: a folder that holds another kind of model, a tokenizer that is not BERT's.
    """
    keys, name = config.extract, config.device.precision
    settings = ConfigDict(config.dataset)
    if keys.image_encoder:
        eye_folder, folder = Path(keys.image_encoder), Path(keys.text_encoder)
        eye_params, eye, eye_card = hf.load(eye_folder, mesh, name, storage="compute")
        if not isinstance(eye, vision.VisionConfig):
            raise UserError(f"extract.image_encoder: {eye_folder} holds no vision tower alone; expected DINOv2's files")
        words_params, words, card = hf.load(folder, mesh, name, storage="compute")
        if not isinstance(words, text.TextConfig) or words.family != "bert":
            raise UserError(f"extract.text_encoder: {folder} holds no BERT-class encoder")
        eye = dataclasses.replace(eye, image_size=keys.encoder_size)
        params, width = {"vision": eye_params, "text": words_params}, eye.width + words.width
        card = card | {"image_size": eye.image_size, "mean": eye_card["mean"]}
        longest, frame = min(words.positions, SENTENCE), FRAMES.get(eye.family, "crop")
        buckets = (*(bucket for bucket in SENTENCE_BUCKETS if bucket < longest), longest)
        told = f"{eye.family} of {eye_folder} and BERT of {folder}"
    else:
        folder = base
        params, cfg, card = hf.load(folder, mesh, name, storage="compute", layers=1, head=False)
        if not isinstance(cfg, vlm.VLMConfig):
            raise UserError(f"target.path: {folder} holds no vision-language model, whose towers could serve")
        eye, words, width, frame = cfg.vision, None, cfg.vision.width + cfg.decoder.width, "pad"
        longest, buckets = config.dataset.max_length, config.dataset.buckets
        told = f"vision tower and token embeddings of {folder}"
    settings.update(max_length=longest, buckets=buckets)
    template = functools.partial(Questions, positions=longest, marked=words is not None)
    data = Dataset.of_model(split, folder, card, 0, settings, template=template, frame=frame)
    cfg = Towers(eye, words, precision.choose(name), keys.unit_halves)
    return data, functools.partial(tower_features, params, cfg=cfg), width, told
