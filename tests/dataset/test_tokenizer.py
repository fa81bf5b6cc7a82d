"""The tokenizer: fixed special ids, deterministic, round trip, special tokens in a text are text."""

import pytest

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


def test_a_missing_or_broken_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizer.Tokenizer.load(tmp_path / "tokenizer.json")
