"""What the report reads: artefacts of the headline run and of the other rows. An absent one is named, never guessed."""

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from coincide_jax.core import artifacts
from coincide_jax.dataset import source


class MissingError(Exception):
    """An artefact that is not there; the message is its path below the workdir."""


class Artefacts:
    """Reads on demand and once. `inputs`: stage → folder of the headline run; `rows`: row → run folders."""

    def __init__(self, inputs: dict[str, pathlib.Path], rows: dict[str, Sequence[pathlib.Path]]):
        self.inputs = {name: pathlib.Path(folder) for name, folder in inputs.items() if folder is not None}
        self.rows = {name: [pathlib.Path(folder) for folder in folders] for name, folders in rows.items()}

    def path(self, stage: str, name: str) -> pathlib.Path:
        """Path of a file of the headline run; raises `MissingError`."""
        if stage not in self.inputs or not (self.inputs[stage] / name).exists():
            raise MissingError(f"{stage}/{name}")
        return self.inputs[stage] / name

    @functools.cached_property
    def split(self) -> dict:
        """dataset/split.json."""
        return artifacts.read_json(self.path("dataset", "split.json"))

    @functools.cached_property
    def records(self) -> list[dict]:
        """The records of the data set file, as they stand there."""
        if not pathlib.Path(self.split["records"]).exists():
            raise MissingError(self.split["records"])
        return source.load(pathlib.Path(self.split["records"]))

    @functools.cached_property
    def tasks(self) -> np.ndarray:
        """Task of each record, str[N]."""
        try:
            scores = artifacts.read_parquet(self.path("extract", "scores.parquet"))
            names = np.full(self.split["n"], "", object)
            names[scores["index"]] = scores["task"]
        except MissingError:
            names = np.array([str(self.record(index).get("task", "")) for index in range(self.split["n"])], object)
        return np.where(names == "", "no task", names)

    @functools.cached_property
    def pool(self) -> np.ndarray:
        """Indices of the records that may be picked."""
        return np.asarray(self.split["pool"], np.int64)

    @functools.cached_property
    def coreset(self) -> np.ndarray:
        """select/indices.npy, in selection order."""
        return np.load(self.path("select", "indices.npy"))

    @functools.cached_property
    def assignment(self) -> np.ndarray:
        """Cluster of each record, int32[N], −1 = none."""
        return np.load(self.path("cluster", "assignment.npy"))

    @functools.cached_property
    def clusters(self) -> dict[str, np.ndarray]:
        """select/clusters.parquet."""
        return artifacts.read_parquet(self.path("select", "clusters.parquet"))

    @functools.cached_property
    def quality(self) -> dict:
        """cluster/quality.json."""
        return artifacts.read_json(self.path("cluster", "quality.json"))

    @functools.cached_property
    def cosines(self) -> np.ndarray:
        """Mean within-cluster cosine, f64[K]."""
        return np.asarray(self.quality["within_cosine"]["per_cluster"], float)

    def manifest(self, folder: pathlib.Path) -> dict | None:
        """A stage folder's manifest, None when there is none."""
        path = folder / "manifest.json"
        return artifacts.read_json(path) if path.exists() else None

    def lines(self, folder: pathlib.Path, name: str) -> list[dict]:
        """Lines of train/<name> of one run folder; raises `MissingError`."""
        path = folder / "train" / name
        if not path.exists():
            raise MissingError(f"{folder.name}/train/{name}")
        return artifacts.read_jsonl(path)

    def record(self, index: int) -> dict:
        """A record as it stands in the file; {} for what is none."""
        return self.records[index] if isinstance(self.records[index], dict) else {}

    def question(self, index: int) -> tuple[str, str]:
        """First question without <image>, and first answer, of a record."""
        turns = [str(turn.get("value", "")) for turn in self.record(index).get("conversations", [])]
        first = turns[0].replace("<image>", "").strip() if turns else ""
        return first, (turns[1].strip() if len(turns) > 1 else "")

    def image(self, index: int) -> pathlib.Path | None:
        """Image file of a record, None for text only."""
        name = self.record(index).get("image")
        return pathlib.Path(self.split["images"]) / name if name else None
