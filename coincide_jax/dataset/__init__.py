"""Stage 0: records and images → a checked, split data set; `Dataset` turns its records into sequences and pixels.

The stage writes `split.json`, `tokenizer.json`, `quarantine.jsonl`, `questions/` (when held-out records are asked),
`dev/` (questions of the dev part, for choosing settings) and `drawn/` (when `dataset.records` is 'drawn'). Nothing is
trained before it has ended, so held-out rows are in no model.
"""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.dataset import annotate, batches, conversation, drawn, images, questions, source
from coincide_jax.dataset import split as splitting
from coincide_jax.dataset import tokenizer as tokenizers

STAGE_VERSION = 2
KEYS = (
    "dataset.records",
    "dataset.images",
    "dataset.base_records",
    "dataset.share_heldout",
    "dataset.share_dev",
    "dataset.base_share",
    "dataset.limit",
    "dataset.max_bad",
    "dataset.unique_ids",
    "dataset.seed",
    "dataset.system",
    "dataset.vocab",
    "dataset.tokenizer_text",
    "dataset.threads",
    "dataset.drawn",
    "target.path",
    "evaluate.questions",
)
READING = (  # the keys that `Dataset.of_model` reads
    "dataset.template",
    "dataset.system",
    "dataset.max_length",
    "dataset.buckets",
    "dataset.threads",
    "dataset.cache_mib",
)
TOKEN_CACHE_BYTES = 256 << 20
REASONS_SHOWN = 3
TEXTS = ("all", "questions")


class Dataset:
    """The valid records of one file as sequences and images. Rows that are in no part of the split are None."""

    def __init__(
        self, records: Sequence[source.Record | None], folder: pathlib.Path, tokenizer, settings,
        image_size: int, image_tokens: int, template: str | Callable, mean: Sequence[float], frame: str = "pad",
    ):  # fmt: skip
        self.records, self.folder, self.tokenizer = records, folder, tokenizer
        self.image_size, self.image_tokens, self.threads = image_size, image_tokens, settings.threads
        self.background, self.frame = tuple(int(255 * channel) for channel in mean), frame
        self.buckets = _checked_buckets(settings.buckets, settings.max_length)
        if isinstance(template, str):
            self.template = conversation.Template(
                template, tokenizer, settings.system, image_tokens, settings.max_length
            )
        else:
            self.template = template(tokenizer)
        self.eos_id, self.pad_id, self.vocab_size = self.template.eos_id, 0, tokenizer.vocab_size
        self._sequences, self._pixels = images.Cache(TOKEN_CACHE_BYTES), images.Cache(settings.cache_mib << 20)
        self._told: set[int] = set()
        self._turns: Callable = lambda record: record.turns

    @classmethod
    def open(
        cls, split: dict, part_file: str, *, tokenizer_path: pathlib.Path, settings,
        image_size: int, image_tokens: int, template: str | Callable, mean: Sequence[float], frame: str = "pad",
    ) -> "Dataset":  # fmt: skip
        """Opens the records that a split names.

        Args:
          split: what `split.json` holds.
          part_file: 'records', or 'base_records' when the split names a second file.
          tokenizer_path: `tokenizer.json`, or where it would be (`Tokenizer.load`).
          settings: `config.dataset` (system, max_length, buckets, threads, cache_mib).
          image_size: pixels of the model's square input.
          image_tokens: positions that an image takes.
          template: name of the model's conversations, or tokenizer → what encodes a record in their place.
          mean: of the model's channels, of images in [0, 1]; padding takes its colour.
          frame: how an image becomes a square (`images.load`).

        Raises:
          UserError: unreadable records or tokenizer; buckets or max_length that do not fit.
        """
        records, _ = source.parse(source.load(split[part_file])[: split["n"] if part_file == "records" else None])
        parts = ["base"] if part_file == "base_records" else ["pool", "dev", "heldout"]
        if not split["base_records"]:
            parts.append("base")
        kept = {index for part in parts for index in split[part]}
        records = [record if index in kept else None for index, record in enumerate(records)]
        tokenizer = tokenizers.Tokenizer.load(tokenizer_path)
        folder = pathlib.Path(split["images"])
        return cls(records, folder, tokenizer, settings, image_size, image_tokens, template, mean, frame)

    @classmethod
    def of_model(
        cls, split: dict, folder: pathlib.Path, card: dict, image_tokens: int, settings, *,
        template: Callable | None = None, frame: str = "pad",
    ) -> "Dataset":  # fmt: skip
        """The split's records as the model of a folder reads them: its tokenizer, image size, template and mean.

        The template is the model's own, since a run may read its reference with one and its target with another;
        `dataset.template` is that of the models made here. A model without conversations brings a `template`, as `open`
        takes it.

        Raises:
          UserError: unreadable records or tokenizer; a tokenizer with more entries than the model has.
        """
        if template is None:
            template = card["template"]
            if template != settings.template:
                say("dataset", f"{folder} is read with its own template, {template}")
            if card.get("system", settings.system) != settings.system:
                say("dataset", f"{folder} was tuned with another system prompt than dataset.system")
        data = cls.open(
            split, "records", tokenizer_path=folder / "tokenizer.json", settings=settings,
            image_size=card["image_size"], image_tokens=image_tokens, template=template, mean=card["mean"], frame=frame,
        )  # fmt: skip
        if data.vocab_size > card["vocab"]:
            raise UserError(
                f"the tokenizer of {folder} has {data.vocab_size} entries, but the model only {card['vocab']}; "
                f"expected the tokenizer that the model was trained with"
            )
        return data

    def withhold(self, turns: Callable[[source.Record], tuple] | None = None) -> None:
        """Forgets every answer; sequences are then of questions alone, or of what `turns(record)` says
        (`annotate.Annotator.turns`).

        So a record's bucket depends on image and question until it is trained on. There it is chosen when the record
        is read, which is after its answer was asked for; nothing before that looks at it.
        """
        self.records = annotate.without_answers(self.records)
        self._turns, self._sequences = turns or self._turns, images.Cache(TOKEN_CACHE_BYTES)

    def encode(self, index: int) -> conversation.Encoded:
        """The training sequence of a valid record."""
        record = self.records[index]

        def make() -> conversation.Encoded:
            return self.template.encode(self._turns(record), record.image is not None)

        return self._sequences.get(index, make, lambda encoded: 6 * len(encoded.tokens) + 600)

    def lengths(self, indices: Sequence[int]) -> np.ndarray:
        """Positions of each record, image included: int32[len(indices)]."""
        return np.asarray([len(self.encode(int(index)).tokens) for index in indices], np.int32)

    def bucket(self, length: int) -> int:
        """The shortest padded length that holds `length` positions."""
        return next(bucket for bucket in self.buckets if length <= bucket)

    def image(self, path: str) -> np.ndarray:
        """Pixels u8[S, S, 3] of a path inside the images folder; raises what Pillow raises."""

        def make() -> np.ndarray:
            return images.load(self.folder / path, self.image_size, self.background, self.frame)

        return self._pixels.get(path, make, lambda pixels: pixels.nbytes)

    def row(self, index: int) -> batches.Row | int:
        """Sequence and pixels of a record, or the bare index if there is none to be had (never an exception)."""
        if index < 0 or self.records[index] is None:
            return index
        return self.row_of(index, self.encode(index), self.records[index].image)

    def row_of(self, index: int, encoded: conversation.Encoded, image: str | None) -> batches.Row | int:
        """A sequence with the pixels of its image; the bare index, and a line on the screen, if they cannot be read."""
        try:
            return index, encoded, None if image is None else self.image(image)
        except Exception as error:  # a reading thread must not raise; what Pillow raises is not one class
            if index not in self._told:
                self._told.add(index)
                say("dataset", f"row {index} left out: image {image} cannot be read any more: {error}")
            return index


def _checked_buckets(buckets: Sequence[int], max_length: int) -> tuple[int, ...]:
    buckets = tuple(int(bucket) for bucket in buckets)
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1 or buckets[-1] != max_length:
        raise UserError(
            f"dataset.buckets is {buckets}; expected rising lengths, the last of them dataset.max_length = {max_length}"
        )
    return buckets


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """The stage: check, split, train the tokenizer. Reads no other stage's folder and runs nothing on devices.

    Raises:
      UserError: unreadable files, too many bad records, no record left for the pool, broken questions.
    """
    del inputs, mesh
    keys = config.dataset
    if keys.tokenizer_text not in TEXTS:
        raise unknown("dataset.tokenizer_text", keys.tokenizer_text, TEXTS)
    asked_folder = pathlib.Path(config.evaluate.questions).absolute() if config.evaluate.questions else None
    records_path, images_folder, base_path = pathlib.Path(keys.records), pathlib.Path(keys.images), keys.base_records
    if keys.records == "drawn":
        folder = drawn.draw(out / "drawn", keys.drawn)
        records_path, images_folder = folder / "train.json", folder / "images"
        base_path = base_path or ("" if config.target.path else str(folder / "base.json"))
        asked_folder = asked_folder or (folder / "eval").absolute()
    if not keys.records:
        raise UserError(
            "dataset.records is not set; expected a LLaVA JSON or JSONL file, or 'drawn'; to select from arrays alone "
            "set extract.features"
        )
    records, quarantine, digests = _read("records", records_path, images_folder, keys)
    asked = 0, set()
    if asked_folder:
        asked = questions.check_folder(asked_folder, images_folder, keys.threads)
    own_base = bool(base_path or config.target.path)
    parts = splitting.split(
        records,
        digests,
        heldout=0.0 if asked_folder else keys.share_heldout,
        dev=keys.share_dev,
        base=0.0 if own_base else keys.base_share,
        seed=keys.seed,
        asked=asked[1],
    )
    base_records: Sequence[source.Record | None] = records
    bad = len(quarantine)
    if base_path:
        base_records, base_bad, base_digests = _read("base_records", pathlib.Path(base_path), images_folder, keys)
        quarantine += [row | {"file": "base_records"} for row in base_bad]
        parts["base"] = splitting.unseen(base_records, base_digests, records, digests, asked[1])
        if not parts["base"]:
            raise UserError(f"dataset.base_records: every record of {base_path} shares its image with another part")
    if not asked_folder and parts["heldout"]:
        rows = questions.heldout_questions([records[index] for index in parts["heldout"]])
        asked_folder = (out / "questions").absolute()
        questions.write_folder(asked_folder, rows)
        asked = len(rows), set()
    questions.write_folder(out / "dev", questions.heldout_questions([records[index] for index in parts["dev"]]))
    of_pool = [records[index] for index in parts["pool"]]
    of_pool = annotate.without_answers(of_pool) if keys.tokenizer_text == "questions" else of_pool
    texts = of_pool + [base_records[index] for index in parts["base"]]
    vocab = _tokenizer(config.target.path, texts, keys, out / "tokenizer.json")
    artifacts.write_jsonl(out / "quarantine.jsonl", quarantine)
    split = {
        "records": str(records_path.absolute()),
        "images": str(images_folder.absolute()),
        "base_records": str(pathlib.Path(base_path).absolute()) if base_path else "",
        "questions": str(asked_folder) if asked_folder else "",
        "n": len(records),
        "quarantined": bad,
    }
    artifacts.write_json(out / "split.json", split | parts, indent=None)
    summary = {name: len(rows) for name, rows in parts.items()} | {
        "records": len(records),
        "quarantined": bad,
        "images": len(set(digests.values())),
        "tasks": len({record.task for record in records if record}),
        "questions": asked[0],
        "vocab": vocab,
    }
    _tell(summary, bool(asked_folder))
    return summary


def _read(name: str, path: pathlib.Path, folder: pathlib.Path, keys):
    """Records, quarantine and image digests of one file, with the share of bad records checked."""
    raw = source.load(path)
    if name == "records" and keys.limit:
        raw = raw[: keys.limit]
    given = folder.is_dir() and (keys.images or keys.records == "drawn")
    if any(isinstance(value, dict) and value.get("image") for value in raw) and not given:
        found = f"{keys.images} is not a folder" if keys.images else "it is not set"
        raise UserError(f"dataset.images: {found}; expected the folder that the image paths of {path} start from")
    records, quarantine, digests = source.validate(raw, folder, keys.threads, keys.unique_ids)
    first = "; ".join(f"row {row['index']}: {row['reason']}" for row in quarantine[:REASONS_SHOWN])
    if len(quarantine) == len(raw):
        raise UserError(f"all {len(raw)} records of {path} are quarantined: {first}")
    if len(quarantine) > keys.max_bad * len(raw):
        raise UserError(
            f"{len(quarantine)} of {len(raw)} records of {path} are bad, more than dataset.max_bad = {keys.max_bad:g} "
            f"allows: {first}"
        )
    if quarantine:
        say("dataset", f"{len(quarantine)} of {len(raw)} {name} quarantined (quarantine.jsonl): {first}")
    return records, quarantine, digests


def _tokenizer(target: str, records: list[source.Record], keys, path: pathlib.Path) -> int:
    """Writes the target's tokenizer or trains one on the text of `records`; returns its number of entries."""
    if target:
        found = tokenizers.Tokenizer.load(pathlib.Path(target) / "tokenizer.json")
        found.save(path)
        return found.vocab_size
    texts = (
        text for record in records for text in conversation.render(record.turns, record.image is not None, keys.system)
    )
    trained = tokenizers.train(texts, keys.vocab)
    trained.save(path)
    return trained.vocab_size


def _tell(summary: dict, asked: bool) -> None:
    say("dataset", "{records} records · {images} images · {tasks} tasks · {quarantined} quarantined".format(**summary))
    say("dataset", "pool {pool} · dev {dev} · held out {heldout} · base {base}".format(**summary))
    tail = f"{summary['questions']} questions" if asked else "no questions: dataset.share_heldout is 0"
    say("dataset", f"tokenizer of {summary['vocab']} entries · {tail}")
