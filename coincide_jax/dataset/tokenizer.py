"""The tokenizer: byte-level BPE trained on the pool's and the base's text, or the one a target brings.

Byte-level BPE splits a text before each blank that starts a word, so pieces that begin with a blank or a newline can be
tokenised separately with the same result.
"""

import pathlib
from collections.abc import Iterable

import tokenizers

from coincide_jax.core.artifacts import atomic
from coincide_jax.core.errors import UserError

SPECIAL = ("<pad>", "<bos>", "</s>", "<|endoftext|>")  # ids 0, 1, 2, 3
SMALLEST = len(SPECIAL) + 256  # the special tokens and one token a byte
BOS_NAMES = ("<bos>", "<s>")


class Tokenizer:
    """Text to token ids and back; no token is added, and special tokens written in a text are plain text."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        backend.encode_special_tokens = True  # a record that says "</s>" must not end its own answer
        backend.no_truncation()
        backend.no_padding()
        self.bos_id = next((id_ for name in BOS_NAMES if (id_ := backend.token_to_id(name)) is not None), None)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Tokenizer":
        """Reads a `tokenizer.json`; raises `UserError` if there is none or it is broken."""
        if not pathlib.Path(path).is_file():
            raise UserError(f"tokenizer {path} does not exist")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on a file that it cannot parse
            raise UserError(f"tokenizer {path} cannot be read: {error}") from error

    def save(self, path: pathlib.Path) -> None:
        """Writes `tokenizer.json` whole."""
        with atomic(path) as temporary:
            self.backend.save(str(temporary))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.backend.decode([int(id_) for id_ in ids], skip_special_tokens=True)

    def id_of(self, token: str) -> int | None:
        """Id of a token, None if there is no such token."""
        return self.backend.token_to_id(token)


def train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains byte-level BPE with at most `vocab` entries; the same texts in the same order give the same tokenizer."""
    if vocab < SMALLEST:
        raise UserError(f"dataset.vocab is {vocab}; expected at least {SMALLEST} (special tokens and bytes)")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)
