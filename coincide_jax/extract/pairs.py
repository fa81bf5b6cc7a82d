"""The feature of a record from the two embeddings of CLIP, when that alone is the reference."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import say
from coincide_jax.dataset import Dataset
from coincide_jax.dataset.conversation import Encoded
from coincide_jax.dataset.tokenizer import Tokenizer
from coincide_jax.extract.activations import assemble, stored
from coincide_jax.models import clip

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"


@functools.partial(jax.jit, static_argnames=("cfg",))
def joint_features(params, batch: dict, cfg: clip.CLIPConfig) -> dict[str, jax.Array]:
    """The features of `features` from CLIP's two embeddings; `tokens` hold a text of CLIP's, `image_start` ≥ 0 says
    that there is an image."""
    image = clip.embed_images(params, batch["images"], cfg)
    image = jnp.where((batch["image_start"] >= 0)[:, None], image, 0.0)
    text = clip.embed_texts(params, batch["tokens"], batch["lengths"], cfg)
    return stored(assemble(jnp.stack([image, text], axis=1)[None]))


class Captions:
    """CLIP's texts: questions and answers of a record in order, between the marks that CLIP's tokenizer knows, cut to
    `positions` tokens. Takes the place of `conversation.Template` in a `Dataset`."""

    def __init__(self, tokenizer: Tokenizer, positions: int):
        self.tokenizer, self.positions = tokenizer, positions
        self.start, self.eos_id = (tokenizer.id_of(name) for name in (CLIP_START, CLIP_END))
        if self.start is None or self.eos_id is None:
            raise UserError(f"reference.path: the tokenizer lacks {CLIP_START} or {CLIP_END}; expected that of CLIP")

    def encode(self, turns: tuple[tuple[str, str], ...], has_image: bool) -> Encoded:
        """The text of a record; `image_start` is 0 if there is an image, which takes no position here."""
        ids = self.tokenizer.encode(" ".join(part for turn in turns for part in turn if part is not None))
        ids = np.asarray([self.start, *ids[: self.positions - 2], self.eos_id], np.int32)
        inside = np.ones(len(ids), bool)
        return Encoded(ids, 0 if has_image else -1, inside, inside)


def open_pairs(split: dict, folder: Path, card: dict, cfg: clip.CLIPConfig, config) -> Dataset:
    """The split's records as CLIP reads them: pixels of its size, `Captions` as texts.

    Raises:
      UserError: scores are asked for, which CLIP has none of; a tokenizer that is not CLIP's.
    """
    if config.extract.scores:
        raise UserError(f"extract.scores is set but reference.path {folder} is CLIP, which predicts no answers")
    settings, positions = ConfigDict(config.dataset), cfg.text.positions
    settings.update(max_length=positions, buckets=(positions,))
    texts = functools.partial(Captions, positions=positions)
    data = Dataset.of_model(split, folder, card, 0, settings, template=texts, frame="crop")
    # lengths of questions alone are not known here, and those of answers may not be looked at
    cut = int((data.lengths(split["pool"]) >= positions).sum()) if config.extract.reads == "all" else 0
    if cut:
        say("extract", f"{cut} records have {positions} tokens or more and are cut there")
    return data
