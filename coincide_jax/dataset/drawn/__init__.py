"""The embedded data set: small pictures and questions about them, drawn from a seed with NumPy and Pillow.

Files, in LLaVA format and the question form that every run reads:

    train.json · base.json (drawn from another seed) · images/<part>/<number>.png · eval/<task>.jsonl
    drawn.json (what was asked for)

The train part has unequal tasks, near-duplicates and a few wrong answers in it, as collected data have; `origin` tells
them, for audits only. Up to three records share a picture.
"""

import pathlib
import shutil
import zlib
from collections.abc import Iterator

import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.core.metrics import say
from coincide_jax.dataset.drawn import tasks
from coincide_jax.dataset.drawn.pictures import Picture, scene
from coincide_jax.dataset.drawn.pictures import draw as draw_picture

VERSION = 1
NEAR_DUPLICATES = 0.04  # share of the train records that repeat another one, the picture drawn anew
WRONG = 0.02  # share of the train records with another record's answer
COUNTS = (1, 1, 1, 1, 2, 2, 3)  # shapes of a scene that nobody counts


def draw(folder: pathlib.Path, keys) -> pathlib.Path:
    """Draws the data set into `folder` unless it already holds what `keys` (records, heldout, base, seed) ask for."""
    wanted = {"version": VERSION} | {name: int(keys[name]) for name in ("records", "heldout", "base", "seed")}
    if (folder / "drawn.json").exists() and artifacts.read_json(folder / "drawn.json") == wanted:
        return folder
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that was killed while it drew
        shutil.rmtree(leftover)
    shutil.rmtree(folder, ignore_errors=True)
    with artifacts.atomic(folder) as temporary:
        said = set()
        for part, count in (("train", keys.records), ("base", keys.base), ("heldout", keys.heldout)):
            rows = _records(part, int(count), int(keys.seed), temporary / "images", said)
            if part == "heldout":
                _write_questions(rows, temporary / "eval")
            else:
                artifacts.write_json(temporary / f"{part}.json", rows)
        artifacts.write_json(temporary / "drawn.json", wanted)
    say("dataset", f"drew {keys.records} records, {keys.base} for the base, {keys.heldout} held-out questions")
    return folder


def _records(part: str, count: int, seed: int, folder: pathlib.Path, said: set[str]) -> list[dict]:
    """Records of one part, its pictures written. `said` collects the text-only questions of all parts."""
    rng = np.random.default_rng([seed, zlib.crc32(part.encode())])
    (folder / part).mkdir(parents=True)
    repeats = round(NEAR_DUPLICATES * count) if part == "train" else 0
    found: list[tuple[str, Picture | None, tasks.Asked, str]] = []  # task, picture, question, image path
    number = 0
    for picture, group in _groups(part, _queue(part, count - repeats, rng), rng, said):
        path = _save(picture, folder, part, number, rng) if picture else ""
        number += bool(picture)
        found += [(task, picture, asked, path) for task, asked in group]
    rows = [_row(part, index, *entry) for index, entry in enumerate(found)]
    for _ in range(repeats):
        task, picture, asked, path = found[int(rng.integers(len(found)))]
        path = _save(picture, folder, part, number, rng) if picture else ""
        number += bool(picture)
        rows.append(_row(part, len(rows), task, picture, asked, path) | {"origin": "near_duplicate"})
    if part == "train":
        _spoil(rows, rng)
    return [rows[i] for i in rng.permutation(len(rows))]


def _queue(part: str, count: int, rng: np.random.Generator) -> list[str]:
    """`count` task names in random order: by share, or for held-out questions as evenly as can be."""
    shares = {"train": tasks.TRAIN_SHARES, "base": tasks.BASE_SHARES}.get(part) or dict.fromkeys(tasks.EVAL_TASKS, 1)
    exact = np.asarray(list(shares.values()), float) / sum(shares.values()) * count
    sizes = np.floor(exact).astype(int)
    sizes[np.argsort(sizes - exact, kind="stable")[: count - sizes.sum()]] += 1  # largest remainders first
    names = [name for name, size in zip(shares, sizes, strict=True) for _ in range(size)]
    return [names[i] for i in rng.permutation(len(names))]


def _groups(
    part: str, queue: list[str], rng: np.random.Generator, said: set[str]
) -> Iterator[tuple[Picture | None, list[tuple[str, tasks.Asked]]]]:
    """Pictures, each with (task, question) of the one to three different tasks that are asked about it."""
    shared = [task for task in queue if task in tasks.ON_SCENES]
    for task in queue:
        if task not in tasks.ON_SCENES:
            yield _alone(task, part, rng, said)
    while shared:
        group, size = [], 1 + int(rng.integers(3))
        while shared and len(group) < size and shared[-1] not in group:
            group.append(shared.pop())
        count = 1 + int(rng.integers(4)) if "count" in group else COUNTS[int(rng.integers(len(COUNTS)))]
        picture = scene(rng, count)
        yield picture, [(task, tasks.ask(task, picture, rng)) for task in group]


def _alone(task: str, part: str, rng: np.random.Generator, said: set[str]):
    """A record with its own picture or none; no text-only question of the held-out part is one that was said before."""
    while True:
        picture, asked = tasks.alone(task, part, rng)
        question = asked.turns[0][0]
        if picture is not None or part != "heldout" or question not in said:
            break
    if picture is None:
        said.add(question)
    return picture, [(task, asked)]


def _save(picture: Picture, folder: pathlib.Path, part: str, number: int, rng: np.random.Generator) -> str:
    name = f"{part}/{number:05d}.png"
    draw_picture(picture, rng).save(folder / name, compress_level=1)
    return name


def _row(part: str, index: int, task: str, picture: Picture | None, asked: tasks.Asked, path: str) -> dict:
    """A record in LLaVA format; of the held-out part, a question row."""
    source = "text" if picture is None else "scenes" if picture.items else "digits" if picture.text == "" else "words"
    labels = dict(task=task, concept=asked.concept, skill=asked.skill, source=source, origin="template")
    name = {"id": f"drawn-{part}-{index:06d}"} | ({"image": path} if path else {})
    if part == "heldout":
        question, answer = asked.turns[0]
        choices = {"choices": list(asked.choices)} if asked.choices else {}
        return name | dict(question=question, answers=[answer], metric=asked.metric) | choices | labels
    said = []
    for turn, (question, answer) in enumerate(asked.turns):
        mark = "<image>\n" if path and turn == 0 else ""
        said += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return name | dict(conversations=said) | labels


def _spoil(rows: list[dict], rng: np.random.Generator) -> None:
    """Gives some records the answer of another record with the same skill."""
    spoilt = 0
    for index in rng.permutation(len(rows)):
        if spoilt >= WRONG * len(rows):
            break
        row = rows[index]
        answer = row["conversations"][1]["value"]
        others = sorted({r["conversations"][1]["value"] for r in rows if r["skill"] == row["skill"]} - {answer})
        if others and row["origin"] == "template":
            row["conversations"][1]["value"] = others[int(rng.integers(len(others)))]
            row["origin"] = "wrong_answer"
            spoilt += 1


def _write_questions(rows: list[dict], folder: pathlib.Path) -> None:
    folder.mkdir()
    for task in tasks.EVAL_TASKS:
        artifacts.write_jsonl(folder / f"{task}.jsonl", [row for row in rows if row["task"] == task])
