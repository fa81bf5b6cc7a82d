"""What the embedded data set asks: twelve tasks with answers, metrics and audit labels, and two-turn conversations.

Tasks in the spirit of the LLaVA-1.5 mix: short answers, yes/no, multiple choice, reading, captions, boxes, reasoning,
text only.
"""

import dataclasses

import numpy as np

from coincide_jax.dataset.drawn.pictures import (
    COLOURS,
    CORNERS,
    PLACES,
    SHAPES,
    Item,
    Picture,
    digits,
    pick,
    scene,
)
from coincide_jax.dataset.source import LETTER_SUFFIX, SHORT_SUFFIX

WORDS = (
    "ant", "bag", "bat", "bed", "bee", "box", "bus", "cap", "car", "cat",
    "cow", "cup", "dog", "ear", "egg", "eye", "fan", "fig", "fox", "gem",
    "hat", "hen", "ice", "ink", "jam", "jar", "key", "leg", "map", "net",
    "nut", "owl", "pan", "pen", "pig", "pot", "sea", "sun", "tea", "zoo",
)  # fmt: skip
# Records of each task in a hundred, unequal as in life; the base leans to captions, as projector pre-training does.
TRAIN_SHARES = dict(
    color=14, shape=12, existence=12, count=10, position=9, choice=9, read_word=9, digit=7, caption=6, compare=4,
    box=3, text_only=3, conversation=2,
)  # fmt: skip
BASE_SHARES = dict(
    caption=30, color=8, shape=8, existence=7, count=6, position=6, choice=7, read_word=9, digit=7, compare=4,
    box=3, text_only=4, conversation=1,
)  # fmt: skip
INKS = ("white", "yellow", "cyan")  # of words and digits: bright enough to be read on any background
EVAL_TASKS = tuple(sorted(set(TRAIN_SHARES) - {"conversation"}))  # the twelve
ON_SCENES = ("color", "shape", "count", "position", "existence", "choice", "caption", "box", "conversation")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One record to be: (question, answer) turns, the metric of the first answer, labels for audits."""

    turns: tuple[tuple[str, str], ...]
    metric: str
    concept: str
    skill: str
    choices: tuple[str, ...] = ()


def ask(task: str, picture: Picture, rng: np.random.Generator) -> Asked:
    """A question of a task on shapes about a scene."""
    return ASKERS[task](picture.items, pick(rng, picture.items), rng)


def alone(task: str, part: str, rng: np.random.Generator) -> tuple[Picture | None, Asked]:
    """A question with a picture of its own (None: text only). Parts see different handwritten digits."""
    if task == "read_word":
        word = pick(rng, WORDS)
        question = pick(rng, ("What word is written?", "Read the word."))
        return _written(word, rng), Asked(((question, word.upper()),), "ocr", word, "read_text")
    if task == "digit":
        images, labels = digits()
        rest = {"heldout": (0,), "train": (1, 2), "base": (3, 4)}[part]
        row = 5 * int(rng.integers(len(labels) // 5)) + pick(rng, rest)
        question = pick(rng, ("Which digit is written?", "What digit is this?"))
        name = str(labels[row])
        picture = Picture(digit=images[row], colour=pick(rng, INKS))
        return picture, Asked(((question, name),), "number", f"digit {name}", "read_digit")
    if task == "compare":
        return pick(rng, (_same_colour, _bigger, _sum))(rng)
    return None, pick(rng, (_last_word, _bigger_number))(rng)


def _color(items, item: Item, rng) -> Asked:
    question = pick(rng, ("What color is the {}?", "Which color does the {} have?")).format(item.shape)
    if rng.integers(3) == 0:
        question += "\n" + SHORT_SUFFIX
    return Asked(((question, item.colour),), "exact", item.colour, "name_color")


def _named_shape(items, item: Item, rng) -> Asked:
    if len(items) == 1:
        question = pick(rng, ("What shape is this?", "Which shape is shown?"))
    else:
        question = pick(rng, ("What shape is {}?", "Which shape is the {} one?")).format(item.colour)
    return Asked(((question, item.shape),), "exact", item.shape, "name_shape")


def _count(items, item: Item, rng) -> Asked:
    question = pick(rng, ("How many shapes are there?", "Count the shapes."))
    return Asked(((question, str(len(items))),), "number", f"{len(items)} shapes", "count")


def _position(items, item: Item, rng) -> Asked:
    question = pick(rng, ("Where is the {}?", "In which part is the {}?")).format(item.shape)
    return Asked(((question, PLACES[item.cell]),), "exact", item.shape, "locate")


def _existence(items, item: Item, rng) -> Asked:
    yes = bool(rng.integers(2))
    if rng.integers(2):
        name = item.shape if yes else pick(rng, [s for s in SHAPES if s not in {i.shape for i in items}])
        question = f"Is there a {name}?"
    else:
        name = item.colour if yes else pick(rng, [c for c in COLOURS if c not in {i.colour for i in items}])
        question = f"Is anything {name}?"
    return Asked(((question, "yes" if yes else "no"),), "yesno", name, "existence")


def _choice(items, item: Item, rng) -> Asked:
    by_colour = bool(rng.integers(2))
    right, others = (item.colour, COLOURS) if by_colour else (item.shape, SHAPES)
    wrong = [name for name in others if name != right]
    options = [wrong[i] for i in rng.permutation(len(wrong))[:2]]
    at = int(rng.integers(3))
    options.insert(at, right)
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
    asked = f"Which color is the {item.shape}?" if by_colour else f"Which shape is {item.colour}?"
    skill = "choose_color" if by_colour else "choose_shape"
    return Asked(((f"{asked}\n{lines}\n{LETTER_SUFFIX}", "ABC"[at]),), "mc", right, skill, tuple(options))


def _caption(items, item: Item, rng) -> Asked:
    names = [f"a {i.colour} {i.shape}" + (f" at the {PLACES[i.cell]}" if len(items) < 3 else "") for i in items]
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    question = pick(rng, ("Describe the image.", "What does the image show?"))
    return Asked(((question, text[0].upper() + text[1:] + "."),), "caption_f1", items[0].shape, "describe")


def _box(items, item: Item, rng) -> Asked:
    x, y = item.cell
    corners = ", ".join(f"{value / 4:.2f}" for value in (x, y, x + 2, y + 2))
    question = pick(rng, ("Give the box of the {}.", "Which box holds the {}?")).format(item.shape)
    return Asked(((question, f"[{corners}]"),), "exact", item.shape, "ground")


def _conversation(items, item: Item, rng) -> Asked:
    first, second = [pick(rng, ASKED_TWICE[at::2]) for at in (0, 1)]
    turns = first(items, item, rng).turns + second(items, pick(rng, items), rng).turns
    return Asked(turns, "exact", item.shape, "multi_turn")


ASKED_TWICE = (_color, _position, _named_shape, _existence, _count, _color)
ASKERS = dict(
    color=_color, shape=_named_shape, count=_count, position=_position, existence=_existence, choice=_choice,
    caption=_caption, box=_box, conversation=_conversation,
)  # fmt: skip


def _written(text: str, rng: np.random.Generator) -> Picture:
    return Picture(text=text.upper() if text.isalpha() else text, colour=pick(rng, INKS))


def _same_colour(rng) -> tuple[Picture, Asked]:
    first, second = scene(rng, 2).items
    same = bool(rng.integers(2))
    if same:
        second = dataclasses.replace(second, colour=first.colour)
    asked = (("Do both shapes have the same color?", "yes" if same else "no"),)
    return Picture(items=(first, second)), Asked(asked, "yesno", first.colour, "compare_color")


def _bigger(rng) -> tuple[Picture, Asked]:
    large, small = scene(rng, 2).items
    if rng.integers(2):
        large, small = small, large
    cells = [CORNERS[i] for i in rng.permutation(4)[:2]]
    large = dataclasses.replace(large, size=22, cell=cells[0])
    small = dataclasses.replace(small, size=11, cell=cells[1])
    asked = (("Which shape is bigger?", large.shape),)
    return Picture(items=(large, small)), Asked(asked, "exact", large.shape, "compare_size")


def _sum(rng) -> tuple[Picture, Asked]:
    a, b = (int(value) for value in rng.integers(1, 6, size=2))
    return _written(f"{a}+{b}", rng), Asked((("What is the sum?", str(a + b)),), "number", f"sum {a + b}", "add")


def _last_word(rng) -> Asked:
    words = [WORDS[i] for i in rng.permutation(len(WORDS))[:3]]
    last = bool(rng.integers(2))
    question = f"Which word is {'last' if last else 'first'}: {' '.join(words)}?"
    return Asked(((question, words[-1] if last else words[0]),), "exact", "words", "order_words")


def _bigger_number(rng) -> Asked:
    a, b = (int(value) for value in 1 + rng.permutation(30)[:2])
    return Asked(((f"Which is bigger, {a} or {b}?", str(max(a, b))),), "number", "numbers", "compare_numbers")
