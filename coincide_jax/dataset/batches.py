"""Batches of fixed shapes, read by Grain's threads: in order for extraction and questions, after a plan for training.

A batch is a dict of arrays, B rows of T positions (T is one of the buckets), images of side S:

    tokens int32[B, T] · lengths int32[B] (positions, image included; 1 in a padding row, so that no softmax is empty)
    image_start int32[B] (-1: no image) · images uint8[B, S, S, 3] · labels bool[B, T] · text bool[B, T]
    index int32[B] (row in the data set file; -1: padding row) · valid bool[B]

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
    dataset: "Dataset", plan: np.ndarray, *, micro: int, start_step: int = 0, threads: int
) -> Iterator[list[Batch]]:
    """One list of micro-batches for each row of `plan` int32[S, B] (record indices, -1 = empty) from `start_step` on.

    A step's records are sorted by length (stable; empty slots first) and cut into B/micro micro-batches, each padded to
    the bucket of its longest row. `slot` int32[micro] is the column of the plan that a row came from.
    """
    plan = np.asarray(plan)
    if plan.shape[1] % micro:
        raise UserError(f"a batch of {plan.shape[1]} records cannot be cut into micro-batches of {micro}")

    def build(step: int) -> list[Batch]:
        found = [dataset.row(int(index)) for index in plan[step]]
        sizes = np.asarray([0 if isinstance(row, int) else len(row[1].tokens) for row in found])
        order = np.argsort(sizes, kind="stable").astype(np.int32)
        batches = []
        for at in range(0, len(order), micro):
            slots = order[at : at + micro]
            length = dataset.bucket(int(sizes[slots].max()))
            batch = assemble([found[slot] for slot in slots], length, dataset.image_size)
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
