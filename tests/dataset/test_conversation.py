"""Templates, label masks, the image's place, prompts as prefixes.

Records come from the folder that COINCIDE_DATA names (train.json), else from the drawn data.
"""

import json
import os
import pathlib

import numpy as np
import pytest

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


def arithmetic(words, turns, has_image, template, image_tokens):
    """LLaVA's masking by arithmetic on the joined string (for a tokenizer whose BOS stands outside the text)."""
    end = conversation.TERMINATORS[template]
    string = SYSTEM + " "
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if has_image and number == 0 else ""
        string += f"USER: {mark}{question} ASSISTANT: {answer}{end}"

    def count(text):
        parts = text.split("<image>")
        return sum(len(words.encode(part)) for part in parts) + image_tokens * (len(parts) - 1)

    mask, cur = [False], 1
    for part in string.split(end):
        if not part:
            break
        asked = part.split(" ASSISTANT: ")
        assert len(asked) == 2
        instruction, whole = count(asked[0] + " ASSISTANT: ") - 1, count(part) + 1
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
