"""Batches of fixed shapes, read by Grain's threads: in order for extraction and questions, after a plan for training.

A batch is a dict of arrays, B rows of T positions (T is one of the buckets), images of side S:

    tokens int32[B, T] · lengths int32[B] (positions, image included; 1 in a padding row, so that no softmax is empty)
    image_start int32[B] (-1: no image) · images uint8[B, S, S, 3] · labels bool[B, T] · text bool[B, T]
    index int32[B] (row in the data set file; -1: padding row) · valid bool[B]

A packed batch (`pack`) holds B records in R ≤ B rows of T positions, one behind the other. What is said of a record
keeps its B rows (lengths, image_start from the record's own first position, images, index, valid); what is said of a
position has R, and two fields say whose it is:

    tokens int32[R, T] · labels bool[R, T] (false at a record's first position, which nothing predicts)
    record int32[R, T] (0 … B - 1; -1: padding) · position int32[R, T] (within the record; 0 in padding)
    place int32[B] (row · T + column of the record's first position)

A row that cannot be read any more (its image vanished) has its index and valid=false. One Grain element is one step,
so Grain's work does not grow with the records, and nothing is ever raised inside its `map`: an exception there would
put its saved position one step off.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grain
import numpy as np

from coincide_jax.core.errors import UserError
from coincide_jax.dataset.conversation import Encoded

if TYPE_CHECKING:
    from coincide_jax.dataset import Dataset

Batch = dict[str, np.ndarray]
AHEAD = 4  # steps read ahead
ROW_COUNTS = 16  # of packed batches: a micro-batch of B records has one of so many numbers of rows, so of shapes
Row = tuple[int, Encoded, np.ndarray | None]  # index, sequence, u8[S, S, 3] or None (no image)


def assemble(rows: Sequence[Row | int], length: int, image_size: int) -> Batch:
    """Stacks rows into a batch of `length` positions. An int instead of a row is an empty one with that index."""
    count = len(rows)
    batch = dict(
        tokens=np.zeros((count, length), np.int32),
        lengths=np.ones(count, np.int32),
        image_start=np.full(count, -1, np.int32),
        images=np.zeros((count, image_size, image_size, 3), np.uint8),
        labels=np.zeros((count, length), bool),
        text=np.zeros((count, length), bool),
        index=np.full(count, -1, np.int32),
        valid=np.zeros(count, bool),
    )
    for position, row in enumerate(rows):
        if isinstance(row, int):
            batch["index"][position] = row
            continue
        index, encoded, pixels = row
        size = len(encoded.tokens)
        batch["tokens"][position, :size] = encoded.tokens
        batch["labels"][position, :size] = encoded.labels
        batch["text"][position, :size] = encoded.text
        batch["lengths"][position] = size
        batch["image_start"][position] = encoded.image_start
        batch["index"][position] = index
        batch["valid"][position] = True
        if pixels is not None:
            batch["images"][position] = pixels
    return batch


def pack(rows: Sequence[Row | int], length: int, image_size: int, share: int = 1) -> Batch:
    """A packed batch of rows of `length` positions; R is a multiple of `share` (devices that share the rows), which
    divides the number of records."""
    count = len(rows)
    alone = assemble(rows, length, image_size)
    sizes = np.where(alone["valid"], alone["lengths"], 0)
    row, column, used = fit_rows(sizes, length)
    step = share * -(-count // (ROW_COUNTS * share))
    used = min(-(-max(used, 1) // step) * step, count)
    batch = {key: alone[key] for key in ("lengths", "image_start", "images", "index", "valid")} | dict(
        tokens=np.zeros((used, length), np.int32),
        labels=np.zeros((used, length), bool),
        record=np.full((used, length), -1, np.int32),
        position=np.zeros((used, length), np.int32),
        place=(row * length + column).astype(np.int32),
    )
    for number in np.flatnonzero(sizes):
        size, here = sizes[number], (row[number], slice(column[number], column[number] + sizes[number]))
        batch["tokens"][here] = alone["tokens"][number, :size]
        batch["labels"][here] = alone["labels"][number, :size]
        batch["labels"][row[number], column[number]] = False
        batch["record"][here] = number
        batch["position"][here] = np.arange(size)
    return batch


def fit_rows(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Row and first column of each record int64[B], and the number of rows used: best fit, longest first.

    sizes: int[B], each at most `length`; 0: no record, which takes no room. Ties go to the first record, the first row.
    """
    row, column, room = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64), []
    for number in np.argsort(-sizes, kind="stable"):
        size = int(sizes[number])
        if not size:
            break
        fits = [index for index, left in enumerate(room) if left >= size]
        best = min(fits, key=lambda index: room[index], default=len(room))
        if best == len(room):
            room.append(length)
        row[number], column[number] = best, length - room[best]
        room[best] -= size
    return row, column, len(room)


def ordered(dataset: "Dataset", indices: np.ndarray, rows: int, *, threads: int) -> Iterator[Batch]:
    """Every record once: by bucket, then by index; `rows` of one bucket a batch, the tail padded.

    A record's bucket depends on that record alone, so its row sees the same shapes whatever else is read.
    """
    indices = np.sort(np.asarray(indices, np.int64))
    groups = _groups(indices, dataset.lengths(indices), dataset)

    def build(number: int) -> Batch:
        length, members = groups[number]
        return assemble(_padded([dataset.row(int(i)) for i in members], rows), length, dataset.image_size)

    groups = [(length, part[at : at + rows]) for length, part in groups for at in range(0, len(part), rows)]
    yield from _read(build, 0, len(groups), threads)


def planned(
    dataset: "Dataset", plan: np.ndarray, *, micro: int, start_step: int = 0, threads: int,
    packing: bool = False, as_drawn: bool = False, share: int = 1,
) -> Iterator[list[Batch]]:  # fmt: skip
    """One list of micro-batches for each row of `plan` int32[S, B] (record indices, -1 = empty) from `start_step` on.

    A step's records are sorted by length (stable; empty slots first) and cut into B/micro micro-batches, each padded to
    the bucket of its longest row. `slot` int32[micro] is the column of the plan that a record came from.

    With `packing` the records sorted by length are dealt out instead, so that every micro-batch has long and short
    ones, and packed into rows of the last bucket (see `pack`). `as_drawn` leaves both sorting and dealing out:
    micro-batches are the plan's records in their order, where the loss depends on who is with whom.
    """
    plan = np.asarray(plan)
    if plan.shape[1] % micro:
        raise UserError(f"a batch of {plan.shape[1]} records cannot be cut into micro-batches of {micro}")

    def build(step: int) -> list[Batch]:
        found = [dataset.row(int(index)) for index in plan[step]]
        sizes = np.asarray([0 if isinstance(row, int) else len(row[1].tokens) for row in found])
        order = (np.arange(len(sizes)) if as_drawn else np.argsort(sizes, kind="stable")).astype(np.int32)
        count = len(order) // micro
        batches = []
        for number in range(count):
            slots = order[number::count] if packing and not as_drawn else order[number * micro :][:micro]
            chosen = [found[slot] for slot in slots]
            if packing:
                batch = pack(chosen, dataset.buckets[-1], dataset.image_size, share)
            else:
                batch = assemble(chosen, dataset.bucket(int(sizes[slots].max())), dataset.image_size)
            batches.append(batch | {"slot": slots})
        return batches

    yield from _read(build, start_step, len(plan), threads)


def prompts(
    dataset: "Dataset", questions: Sequence[tuple[str, str | None]], rows: int, *, threads: int
) -> Iterator[Batch]:
    """Generation prompts of (question, image path or None), by bucket, then in order; index = question number."""
    encoded = [dataset.template.prompt(text, image is not None) for text, image in questions]
    lengths = np.asarray([len(e.tokens) for e in encoded], np.int64)
    groups = _groups(np.arange(len(questions)), lengths, dataset)
    groups = [(length, part[at : at + rows]) for length, part in groups for at in range(0, len(part), rows)]

    def build(number: int) -> Batch:
        length, members = groups[number]
        found = [dataset.row_of(int(i), encoded[i], questions[i][1]) for i in members]
        return assemble(_padded(found, rows), length, dataset.image_size)

    yield from _read(build, 0, len(groups), threads)


def _groups(indices: np.ndarray, lengths: np.ndarray, dataset: "Dataset") -> list[tuple[int, np.ndarray]]:
    """(bucket, its members in order) of every bucket that has members, short ones first."""
    buckets = np.asarray([dataset.bucket(int(length)) for length in lengths], np.int64)
    return [(int(bucket), indices[buckets == bucket]) for bucket in np.unique(buckets)]


def _padded(rows: list, count: int) -> list:
    return rows + [-1] * (count - len(rows))


def _read(build: Callable, start: int, stop: int, threads: int) -> Iterator:
    """`build(start)`, …, `build(stop - 1)` in order, made ahead by Grain's reading threads."""
    if start >= stop:
        return
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
    # Grain's map gets plain ints; `range` is its source, `build` is where the work is.
    iterator = iter(grain.MapDataset.range(start, stop).map(lambda step: build(int(step))).to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()
