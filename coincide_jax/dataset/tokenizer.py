"""The tokenizer: byte-level BPE trained on the pool's and the base's text, or the one a checkpoint brings.

Byte-level BPE and Llama's sentencepiece split a text before each blank that starts a word, so pieces that begin with a
blank or a newline can be tokenised separately with the same result; sentencepiece's blank before a whole text is left
out of the pieces that go on (`continued`).
"""

import base64
import importlib
import itertools
import json
import pathlib
from collections.abc import Iterable

import tokenizers

from coincide_jax.core.artifacts import atomic
from coincide_jax.core.errors import UserError

SPECIAL = ("<pad>", "<bos>", "</s>", "<|endoftext|>")  # ids 0, 1, 2, 3
SMALLEST = len(SPECIAL) + 256  # the special tokens and one token a byte
BOS_NAMES = ("<bos>", "<s>")
# StableLM-2's Arcade100k (tokenization_arcade100k.py): how a text is split, and the special tokens from 100257 on
ARCADE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ARCADE_SPECIAL = (
    "<|endoftext|>",
    *(f"<|fim_{name}|>" for name in ("prefix", "middle", "suffix", "pad")),
    *("<gh_stars>", "<filename>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>"),
    *("<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>", "<commit_before>", "<commit_msg>"),
    *("<commit_after>", "<reponame>", "<|endofprompt|>", "<|im_start|>", "<|im_end|>", "<|pause|>"),
    *(f"<|reg{number}|>" for number in range(8)),
    "<|extra0|>",
)


class Tokenizer:
    """Text to token ids and back; no token is added, and special tokens written in a text are plain text."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self.backend = backend
        backend.encode_special_tokens = True  # a record that says "</s>" must not end its own answer
        backend.no_truncation()
        backend.no_padding()
        self._continued = _without_prefix(backend)
        self.bos_id = next((id_ for name in BOS_NAMES if (id_ := backend.token_to_id(name)) is not None), None)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, or converts what stands in its place: sentencepiece's `tokenizer.model` (Llama),
        ranks in a `.tiktoken` file (StableLM-2).

        Raises:
          UserError: there is none, it is broken, or sentencepiece is not installed and needed.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            model, ranks = path.with_name("tokenizer.model"), sorted(path.parent.glob("*.tiktoken"))
            if model.is_file():
                return cls(_from_sentencepiece(model))
            if ranks:
                return cls(_from_ranks(ranks[0]))
            raise UserError(f"tokenizer {path} does not exist")
        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception on a file that it cannot parse
            raise UserError(f"tokenizer {path} cannot be read: {error}") from error

    def save(self, path: pathlib.Path) -> None:
        """Writes `tokenizer.json` whole."""
        with atomic(path) as temporary:
            self.backend.save(str(temporary))

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """Token ids of a text; `continued`: of one that goes on from other text, without sentencepiece's blank before
        the first word."""
        backend = self._continued if continued else self.backend
        return backend.encode(text, add_special_tokens=False).ids

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


def _without_prefix(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer that puts no blank before a text; itself if it never does."""
    table = json.loads(backend.to_str())
    changed = False

    def strip(part: dict | None) -> dict | None:
        nonlocal changed
        if part is None:
            return None
        part = dict(part)
        for name in ("normalizers", "pretokenizers"):
            if name in part:
                part[name] = [kept for one in part[name] if (kept := strip(one)) is not None]
        if part["type"] == "Prepend":
            changed = True
            return None
        if part["type"] == "Metaspace" and part.get("prepend_scheme") != "never":
            changed, part["prepend_scheme"] = True, "never"
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            changed, part["add_prefix_space"] = True, False
        return part

    for name in ("normalizer", "pre_tokenizer"):
        table[name] = strip(table[name])
    if not changed:
        return backend
    plain = tokenizers.Tokenizer.from_str(json.dumps(table))
    plain.encode_special_tokens = True
    return plain


def _from_sentencepiece(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Llama's tokenizer.model, converted by transformers (which reads it with sentencepiece)."""
    try:
        for name in ("sentencepiece", "transformers"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{path} has no tokenizer.json beside it, and converting it needs {error.name}; install the extra: "
            f"pip install 'coincide-jax[convert]'"
        ) from error
    try:
        llama = importlib.import_module("transformers").LlamaTokenizer
        return llama.from_pretrained(path.parent, legacy=False).backend_tokenizer
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {path} cannot be read: {(str(error).splitlines() or [''])[0]}") from error


def _from_ranks(path: pathlib.Path) -> tokenizers.Tokenizer:
    """StableLM-2's ranks of byte sequences (a line each: base64, rank), as byte-level BPE: a token's merge is that of
    the two parts which lower ranks alone make of it."""
    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    except ValueError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error}") from error
    shown = _byte_letters()

    def letters(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joined = [ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            at = min(range(len(joined)), key=joined.__getitem__)
            if joined[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append((letters(parts[0]), letters(parts[1])))
    vocab = {letters(token): rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    pre = tokenizers.pre_tokenizers
    split = pre.Split(tokenizers.Regex(ARCADE_SPLIT), "isolated")
    backend.pre_tokenizer = pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(ARCADE_SPECIAL))
    return backend


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level BPE: itself where it prints, else one from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    found = {byte: chr(byte) for byte in printing}
    for number, byte in enumerate(byte for byte in range(256) if byte not in found):
        found[byte] = chr(256 + number)
    return found
