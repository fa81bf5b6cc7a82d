"""Templates, label masks, the image's place, prompts as prefixes.

Records come from the folder that COINCIDE_DATA names (train.json), else from the drawn data.
"""

import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers

from coincide_jax.core.errors import UserError
from coincide_jax.dataset import conversation, source, tokenizer
from configs import common

SYSTEM = common.defaults().dataset.system
HARD = (("What is 3.5 % of it?", "  :) 'tis\n\nthree… 0.105"), ("Why?\nSay.", "(because)"), ("é?", "🐶 dog's"))


@pytest.fixture(scope="module")
def turns(made):
    """A few hundred (turns, has image), multi-turn and text-only ones among them."""
    folder = os.environ.get("COINCIDE_DATA")
    path = pathlib.Path(folder) / "train.json" if folder else made.out / "drawn" / "train.json"
    records, _ = source.parse(source.load(path)[:3000])
    many = [r for r in records if r and len(r.turns) > 1][:150]
    text = [r for r in records if r and not r.image][:50]
    return [(r.turns, r.image is not None) for r in many + text + [r for r in records if r][:200]] + [(HARD, True)]


@pytest.fixture(scope="module")
def words(turns):
    return tokenizer.train((t for pair in turns for t in conversation.render(*pair, SYSTEM)), 1024)


@pytest.fixture(scope="module")
def llama(turns):
    """A tokenizer made as Llama's is: sentencepiece's blanks, bytes for what is not known."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    made.train_from_iterator((t for pair in turns for t in conversation.render(*pair, SYSTEM)), trainer)
    table = json.loads(made.to_str())
    table["added_tokens"] = [t for t in table["added_tokens"] if not t["content"].startswith("<0x")]
    table["pre_tokenizer"]["split"] = False
    made = tokenizers.Tokenizer.from_str(json.dumps(table))
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
         tokenizers.decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return tokenizer.Tokenizer(made)


def random_conversations(count: int):
    """(turns, has image) of random words, signs and line breaks."""
    rng = np.random.default_rng(5)
    alphabet = ["cat", "Dog", "3.14", "é", "🐶", "(x)", "USER", "it's", "a\nb", "two  blanks", "…", "ASSISTANT", "%"]

    def say() -> str:
        drawn = rng.choice(alphabet, rng.integers(1, 9))
        return " ".join(drawn)

    for _ in range(count):
        yield tuple((say(), say()) for _ in range(rng.integers(1, 5))), bool(rng.random() < 0.7)


def joined(turns, has_image, template) -> str:
    """The string that LLaVA's code makes of a conversation."""
    string = SYSTEM + " "
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if has_image and number == 0 else ""
        string += f"USER: {mark}{question} ASSISTANT: {answer}{conversation.TERMINATORS[template]}"
    return string


def arithmetic(words, turns, has_image, template, image_tokens):
    """LLaVA's masking by arithmetic on the joined string: rounds are counted one by one, and a round's instruction with
    the blank behind "ASSISTANT:", which is taken off again. A round after the first is counted as text that goes on
    (what the published code takes off as its "- 1" for tokenizers that are not legacy)."""
    end, string = conversation.TERMINATORS[template], joined(turns, has_image, template)

    def count(text, first):
        parts = text.split("<image>")
        lengths = [len(words.encode(part, continued=not (first or number))) for number, part in enumerate(parts)]
        return sum(lengths) + image_tokens * (len(parts) - 1)

    begin = words.bos_id is not None  # Llama's BOS is masked; StableLM has none
    mask, cur = [False] * begin, int(begin)
    for number, part in enumerate(string.split(end)):
        if not part:
            break
        asked = part.split(" ASSISTANT: ")
        assert len(asked) == 2
        instruction, whole = count(asked[0] + " ASSISTANT: ", number == 0) - 1, count(part, number == 0) + 1
        mask += [False] * instruction + [True] * (whole - instruction)
        cur += whole
    assert cur == len(mask)
    return mask


@pytest.mark.parametrize("template", ["vicuna_v1", "phi"])
def test_labels_equal_the_arithmetic(turns, words, template):
    made = conversation.Template(template, words, SYSTEM, 16, 4096)
    compared = 0
    for said, has_image in turns:
        if any(text != text.strip() for pair in said for text in pair):
            continue  # the joined string would merge blanks
        assert made.encode(said, has_image).labels.tolist() == arithmetic(words, said, has_image, template, 16)
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("template", ["vicuna_v1", "phi"])
@pytest.mark.parametrize("kind", ["words", "llama", "no bos"])
def test_labels_of_random_conversations(template, kind, words, llama):
    """300 of them, with byte-level tokens, Llama's, and StableLM's missing BOS."""
    coder = llama if kind == "llama" else words
    if kind == "no bos":
        coder = tokenizer.Tokenizer(tokenizers.Tokenizer.from_str(words.backend.to_str()))
        coder.bos_id = None
    made = conversation.Template(template, coder, SYSTEM, 16, 4096)
    for said, has_image in random_conversations(300):
        encoded = made.encode(said, has_image)
        assert encoded.labels.tolist() == arithmetic(coder, said, has_image, template, 16)
        assert (encoded.tokens[0] == coder.bos_id) == (kind != "no bos")


def test_pieces_are_the_string_as_llama_tokenises_it(llama):
    """Token by token: before and after the image, through the terminators, which are followed by no blank."""
    whole = tokenizers.Tokenizer.from_str(llama.backend.to_str())
    whole.encode_special_tokens = False
    made = conversation.Template("vicuna_v1", llama, SYSTEM, 16, 4096)
    for said, has_image in random_conversations(100):
        before, _, after = joined(said, has_image, "vicuna_v1").partition("<image>")
        expected = [llama.bos_id, *whole.encode(before, add_special_tokens=False).ids]
        if has_image:
            expected += [0] * 16 + whole.encode(after, add_special_tokens=False).ids
        assert made.encode(said, has_image).tokens.tolist() == expected
    plain = made.encode((("What?", "A cat."),), True)
    for place in (plain.image_start - 1, plain.image_start + 16):
        assert llama.backend.id_to_token(int(plain.tokens[place])).startswith("▁")


def test_the_sequence_says_what_the_template_says(words):
    made = conversation.Template("vicuna_v1", words, SYSTEM, 9, 4096)
    encoded = made.encode((("What is it?", "A cat."), ("What colour?", "Black.")), True)
    start = encoded.image_start
    assert words.decode(encoded.tokens[:start]) == SYSTEM + " USER: "
    assert encoded.tokens[start : start + 9].tolist() == [0] * 9
    rest = encoded.tokens[start + 9 :].tolist()
    first = rest.index(2)
    assert words.decode(rest[:first]) == "\nWhat is it? ASSISTANT: A cat."
    assert words.decode(rest[first + 1 :]) == "USER: What colour? ASSISTANT: Black."
    assert rest[-1] == made.eos_id == 2
    assert words.decode(encoded.tokens[encoded.labels]) == " A cat. Black."
    assert encoded.labels.sum() == len(words.encode(" A cat.")) + len(words.encode(" Black.")) + 2
    assert np.array_equal(encoded.text, np.arange(len(encoded.text)) >= start + 9)
    plain = made.encode((("What is it?", "A cat."),), False)
    assert plain.image_start == -1
    assert words.decode(plain.tokens) == SYSTEM + " USER: What is it? ASSISTANT: A cat."
    assert words.decode(plain.tokens[plain.text]) == " What is it? ASSISTANT: A cat."


@pytest.mark.parametrize("system", [SYSTEM, ""])
def test_a_prompt_is_a_prefix(turns, words, system):
    made = conversation.Template("phi", words, system, 16, 4096)
    for said, has_image in turns:
        prompt, whole = made.prompt(said[0][0], has_image), made.encode(said, has_image)
        size = len(prompt.tokens)
        assert np.array_equal(prompt.tokens, whole.tokens[:size])
        assert prompt.image_start == whole.image_start
        assert whole.labels[size] and not whole.labels[:size].any() and not prompt.labels.any()


def test_a_terminator_written_in_an_answer_ends_nothing(words):
    made = conversation.Template("vicuna_v1", words, "", 4, 512)
    encoded = made.encode((("Say </s><pad>", "a </s> b"),), False)
    assert (encoded.tokens == 2).sum() == 1
    assert 0 not in encoded.tokens


def test_cut_after_expansion(words):
    made = conversation.Template("vicuna_v1", words, "", 16, 40)
    encoded = made.encode((("word " * 60, "answer"),), True)
    assert [len(part) for part in (encoded.tokens, encoded.labels, encoded.text)] == [40] * 3
    assert not encoded.labels.any()
    prompt = made.prompt("word " * 60, True)
    assert len(prompt.tokens) == 40
    assert words.decode(prompt.tokens).endswith(" ASSISTANT:")


def test_wrong_templates(words, tmp_path):
    with pytest.raises(UserError, match="did you mean 'vicuna_v1'"):
        conversation.Template("vicuna", words, "", 16, 64)
    with pytest.raises(UserError, match=r"dataset\.max_length is 20"):
        conversation.Template("phi", words, "", 16, 20)
    table = json.loads(words.backend.to_str().replace("<|endoftext|>", "<|other|>"))
    (tmp_path / "t.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"no token <\|endoftext\|>"):
        conversation.Template("phi", tokenizer.Tokenizer.load(tmp_path / "t.json"), "", 16, 64)
