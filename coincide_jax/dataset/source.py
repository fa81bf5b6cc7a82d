"""Records of a data set in LLaVA format: read, told apart by task, checked; the bad ones are quarantined with a reason.

A file is one JSON array or JSON lines, plain or gzip. A record has an id, at most one image (a path inside the
images folder), and turns that alternate human, gpt; `<image>` stands once, in the first human turn.
"""

import concurrent.futures
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import pathlib
import posixpath
import zlib

from PIL import Image

from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress

IMAGE_MARK = "<image>"
SHORT_SUFFIX = "Answer the question using a single word or phrase."
LETTER_SUFFIX = "Answer with the option's letter from the given choices directly."
# Question endings of the LLaVA-1.5 mix that tell what form of answer is asked for; the first that occurs counts.
FORMS = (
    (LETTER_SUFFIX, "choice"),
    (SHORT_SUFFIX, "short"),
    ("Provide a short description for this region.", "region"),
    ("bounding box coordinate of the region", "region"),
    ("Provide a one-sentence caption", "caption"),
)
# The same mix keeps several tasks in one image folder, and one task in others: (folder, form or "*") -> task.
LLAVA_TASKS = {
    ("coco", "choice"): "aokvqa",
    ("coco", "short"): "vqav2",
    ("coco", "region"): "refcoco",
    ("coco", "conversation"): "llava_conv",
    ("coco", "detail"): "llava_detail",
    ("coco", "open"): "llava_reason",
    ("vg", "*"): "vg",
    ("gqa", "*"): "gqa",
    ("ocr_vqa", "*"): "ocr_vqa",
    ("textvqa", "*"): "textcaps",
}
DETAIL_WORDS = ("describe", "description", "elaborate", "what do you see", "analyze the image", "what's going on")


@dataclasses.dataclass(frozen=True)
class Record:
    """One valid record. `index` is its row in the data set file; `turns` are (question without `<image>`, answer), the
    answers None in a view without them (`annotate.without_answers`)."""

    index: int
    id: str
    image: str | None
    turns: tuple[tuple[str, str | None], ...]
    task: str
    raw: dict


class BadRecordError(Exception):
    """Why a record is quarantined."""


def load(path: pathlib.Path | str) -> list[dict]:
    """Reads all records of a LLaVA JSON or JSONL file, `.gz` of both; stages of one run share what was read.

    Raises:
      UserError: no such file, a folder, not gzip or UTF-8 where it should be, empty, broken JSON (line, column).
    """
    path = pathlib.Path(path)
    state = path.stat() if path.is_file() else None
    return _load(path, state and (state.st_mtime_ns, state.st_size))


@functools.lru_cache(maxsize=2)  # the records and those of the base
def _load(path: pathlib.Path, state) -> list[dict]:
    text = read_text(path).lstrip("\ufeff")
    body = text.lstrip()
    if not body:
        raise UserError(f"{path} is empty; expected records in LLaVA format (a JSON array or JSON lines)")
    if body[0] == "[":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
            ) from error
    return [value for _, value in json_lines(text, path)]


def read_text(path: pathlib.Path) -> str:
    """Text of a file or of a gzip file; raises `UserError` if it cannot be had."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a JSON or JSONL file of records")
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        elif path.suffix == ".gz":
            raise UserError(f"{path} ends in .gz but is not a gzip file")
        return data.decode("utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; expected a JSON or JSONL file of records") from error
    except (EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start}: {error.reason}") from error


def json_lines(text: str, path: pathlib.Path) -> list[tuple[int, object]]:
    """(line number, value) of every line that is not blank; raises `UserError` with line and column."""
    values = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path} is not valid JSON: line {number}, column {error.colno}: {error.msg}"
                ) from error
    return values


def parse(raw: list[dict], unique_ids: bool = False) -> tuple[list[Record | None], list[dict]]:
    """Checks everything but the image files; with `unique_ids` the second record of an id is bad.

    Returns:
      One `Record` (or None) a row, and a quarantine row {index, id, reason} for every None.
    """
    records, quarantine, seen = [], [], {}
    for index, value in enumerate(raw):
        try:
            record = _record(index, value)
            if unique_ids and record.id in seen:
                raise BadRecordError(f"id '{record.id}' is already that of row {seen[record.id]}")
            seen[record.id] = index
            records.append(record)
        except BadRecordError as bad:
            records.append(None)
            name = str(value.get("id", "")) if isinstance(value, dict) else ""
            quarantine.append({"index": index, "id": name, "reason": str(bad)})
    return records, quarantine


def validate(raw: list[dict], images: pathlib.Path, threads: int, unique_ids: bool = True):
    """Checks records and opens and decodes every image.

    Returns:
      (records, quarantine rows in row order, {image path: SHA-256 of its bytes} of the readable images).
    """
    records, quarantine = parse(raw, unique_ids)
    digests, reasons = check_images({record.image for record in records if record and record.image}, images, threads)
    for index, record in enumerate(records):
        if record and record.image in reasons:
            quarantine.append({"index": index, "id": record.id, "reason": reasons[record.image]})
            records[index] = None
    return records, sorted(quarantine, key=lambda row: row["index"]), digests


def check_images(paths: set[str], images: pathlib.Path, threads: int) -> tuple[dict[str, str], dict[str, str]]:
    """Reads, hashes and decodes every path under `images`. Returns ({path: digest}, {path: what is wrong})."""

    def check(path: str) -> tuple[str, str]:
        try:
            data = (images / path).read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            return hashlib.sha256(data).hexdigest(), ""
        except FileNotFoundError:
            return "", f"image {path} does not exist"
        except Exception as error:  # Pillow raises many kinds on broken files; each of them means: not an image
            return "", f"image {path} cannot be read: {error}".replace("\n", " ")

    ordered, found = sorted(paths), {}
    with (
        concurrent.futures.ThreadPoolExecutor(max(threads, 1)) as pool,
        Progress("dataset", len(ordered), "images") as progress,
    ):
        for path, result in zip(ordered, pool.map(check, ordered), strict=True):
            found[path] = result
            progress.advance(1)
    return {p: d for p, (d, why) in found.items() if not why}, {p: why for p, (_, why) in found.items() if why}


def _record(index: int, value) -> Record:
    if not isinstance(value, dict):
        raise BadRecordError(f"the record is {type(value).__name__}, not an object")
    name = value.get("id")
    if not isinstance(name, str | int) or name == "":
        raise BadRecordError("no id")
    image = inside(value["image"]) if value.get("image") is not None else None
    said = _conversation(value.get("conversations"))
    marks = [number for number, text in enumerate(said) for _ in range(text.count(IMAGE_MARK))]
    if image is None and marks:
        raise BadRecordError(f"an {IMAGE_MARK} mark but no image")
    if image is not None and not marks:
        raise BadRecordError(f"image {image} but no {IMAGE_MARK} mark")
    if len(marks) > 1:
        raise BadRecordError(f"{len(marks)} {IMAGE_MARK} marks; expected one")
    if marks and marks[0] > 0:
        raise BadRecordError(f"the {IMAGE_MARK} mark stands in turn {marks[0] + 1}, not in the first human turn")
    said = [text.replace(IMAGE_MARK, "").strip() for text in said]
    for number, text in enumerate(said, start=1):
        if not text:
            raise BadRecordError(f"turn {number} is empty")
    turns = tuple(zip(said[0::2], said[1::2], strict=True))
    task = value.get("task")
    return Record(
        index, str(name), image, turns, task if isinstance(task, str) and task else derive(image, turns), value
    )


def inside(path) -> str:
    """The normal form of an image path; raises `BadRecordError` if it is no path or leaves the images folder."""
    if not isinstance(path, str) or not path:
        raise BadRecordError("image is not a path; expected one relative path")
    normal = posixpath.normpath(path)
    if posixpath.isabs(normal) or normal == ".." or normal.startswith("../") or "\0" in normal:
        raise BadRecordError(f"image path {path!r} leaves the images folder")
    return normal


def _conversation(turns) -> list[str]:
    """Texts of the turns: human, gpt, human, gpt, …; a first turn that is not human is dropped (as LLaVA does)."""
    if not isinstance(turns, list) or not turns:
        raise BadRecordError("no conversations")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRecordError(f"turn {number} has no text")
    if turns[0].get("from") != "human":
        turns = turns[1:]
    for number, turn in enumerate(turns, start=1):
        expected = "human" if number % 2 else "gpt"
        if turn.get("from") != expected:
            raise BadRecordError(f"roles out of order: turn {number} is {turn.get('from')!r}, expected '{expected}'")
    if len(turns) % 2 or not turns:
        raise BadRecordError("the last question has no answer")
    return [turn["value"] for turn in turns]


def derive(image: str | None, turns: tuple[tuple[str, str], ...]) -> str:
    """Task of a record that names none, from image folder and question ending (the LLaVA-1.5 mix has no task field)."""
    if image is None:
        return "text_only"
    question = turns[0][0]
    form = next((form for ending, form in FORMS if ending in question), "")
    if not form:
        detail = any(word in question.lower() for word in DETAIL_WORDS)
        form = "conversation" if len(turns) > 1 else "detail" if detail else "open"
    folder = image.split("/")[0] if "/" in image else ""
    named = LLAVA_TASKS.get((folder, form)) or LLAVA_TASKS.get((folder, "*"))
    return named or (f"{folder}_{form}" if folder else form)
