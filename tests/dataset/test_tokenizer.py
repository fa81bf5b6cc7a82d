"""The tokenizer: fixed special ids, deterministic, round trip, special tokens in a text are text."""

import base64
import importlib
import itertools

import pytest
import regex
import sentencepiece

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import tokenizer

TEXTS = ["USER: what is this? ASSISTANT: a red circle", "two dogs and 0.25", "naïve 🐶\nline"] * 20


def test_special_ids_and_round_trip(tmp_path):
    made = tokenizer.train(TEXTS, 300)
    assert [made.id_of(name) for name in ("<pad>", "<bos>", "</s>", "<|endoftext|>")] == [0, 1, 2, 3]
    assert made.bos_id == 1
    made.save(tmp_path / "tokenizer.json")
    loaded = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
    for text in [*TEXTS[:3], "never seen: Ω</s>\t<pad>"]:
        ids = loaded.encode(text)
        assert ids == made.encode(text)
        assert loaded.decode(ids) == text
        assert min(ids) > 3


def test_training_is_deterministic_and_respects_the_size(tmp_path):
    one, two = tokenizer.train(TEXTS, 290), tokenizer.train(iter(TEXTS), 290)
    assert one.backend.to_str() == two.backend.to_str()
    assert one.vocab_size == 290
    with pytest.raises(UserError, match=r"dataset\.vocab is 100"):
        tokenizer.train(TEXTS, 100)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A folder with sentencepiece's tokenizer.model alone, as liuhaotian/llava-v1.5 has it."""
    folder = tmp_path_factory.mktemp("llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    return folder


def test_sentencepiece_is_converted(llama_folder, tmp_path):
    words = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
    made = tokenizer.Tokenizer.load(llama_folder / "tokenizer.json")
    assert (made.bos_id, made.id_of("</s>")) == (1, 2)
    blank = made.id_of("▁")
    for text in ("USER: what is this?", "\nred circle", "0.25 é🐶", "a red"):
        assert made.encode(text) == words.encode(text)
        # what goes on from other text is the same behind a blank of its own
        assert made.encode(" " + text, continued=True) == words.encode(text)
        assert made.decode(made.encode(text)) == text
    assert made.encode("\nred")[0] == blank and made.encode("\nred", continued=True)[0] != blank
    made.save(tmp_path / "tokenizer.json")
    again = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.encode("what is this", continued=True) == made.encode("what is this", continued=True)


def test_without_sentencepiece_one_sentence_says_what_to_install(llama_folder, monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name == "sentencepiece":
            raise ImportError("none here", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        UserError, match=r"needs sentencepiece; install the extra: pip install 'coincide-jax\[convert\]'"
    ):
        tokenizer.Tokenizer.load(llama_folder / "tokenizer.json")


def test_ranks_are_converted(tmp_path):
    """StableLM-2's ranks: the ids of merging the lowest rank again and again, special tokens after them."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in (b"th", b"at", b"he", b" t", b"the", b" the", b"hat", b"that", b" that", b"..", b"\n\n", b" \xf0\x9f"):
        ranks[token] = len(ranks)
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (tmp_path / "arcade100k.tiktoken").write_text("\n".join(lines))
    made = tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")

    def slow(text: str) -> list[int]:
        found = []
        for piece in regex.findall(tokenizer.ARCADE_SPLIT, text):
            parts = [bytes([byte]) for byte in piece.encode()]
            while True:
                joined = [ranks.get(a + b, 1 << 30) for a, b in itertools.pairwise(parts)]
                if not joined or min(joined) == 1 << 30:
                    break
                at = joined.index(min(joined))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            found += [ranks[part] for part in parts]
        return found

    for text in ("that's the hat, Theatre...", " 2024\n\n 🐶 the", "<|endoftext|>", "atthethat  \n x"):
        assert made.encode(text) == made.encode(text, continued=True) == slow(text)
        assert made.decode(made.encode(text)) == text
    assert made.id_of("<|endoftext|>") == len(ranks) and made.bos_id is None
    assert made.vocab_size == len(ranks) + 32


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
