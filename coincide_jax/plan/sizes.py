"""How many records a run has and how large its models are, as far as files or the config's `plan` say."""

import functools
import pathlib
from typing import NamedTuple

from jax.sharding import AbstractMesh, AxisType

from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.core.precision import Precision, choose
from coincide_jax.core.store import open_features
from coincide_jax.dataset import source
from coincide_jax.extract.activations import choose_taps
from coincide_jax.models import clip, hf
from coincide_jax.models.vlm import VLMConfig
from coincide_jax.plan import training
from coincide_jax.plan.devices import Devices


class Sizes(NamedTuple):
    """What costs are counted from."""

    records: int  # N, of the data set file
    pool: int  # n
    base: int
    questions: int
    width: int  # D
    length: int  # positions of a record on average, for the time
    file: float  # bytes of the records file; 0 where it is not here
    target: VLMConfig | None  # None: arrays alone
    reference: VLMConfig | clip.CLIPConfig | None
    mesh: AbstractMesh


def find(config, devices: Devices, arrays: bool) -> Sizes:
    """The sizes of a run; `arrays`: it has features made elsewhere and no records.

    Raises:
      UserError: nothing says how many records there are; features that cannot be read; devices that do not divide.
    """
    wide = config.device.model_parallel
    if devices.count % wide:
        raise UserError(f"device.model_parallel is {wide}; expected a divisor of the {devices.count} devices")
    mesh = AbstractMesh((devices.count // wide, wide), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    given = config.extract.features
    n, width = open_features(pathlib.Path(given)).shape if given else (_records(config), 0)
    if arrays:
        return Sizes(n, n, 0, 0, width, 0, 0.0, None, None, mesh)
    named = config.device.precision
    precision = choose(devices.speed.compute if named == "auto" else named)
    target, keys = training.model_config(config, precision), config.dataset
    reference = _reference(config, precision, target)
    asked, path = pathlib.Path(config.evaluate.questions), pathlib.Path(keys.records)
    share = 0.0 if config.evaluate.questions else keys.share_heldout
    questions = round(share * n)
    if config.evaluate.questions and asked.is_dir():
        questions = sum(len(artifacts.read_jsonl(file)) for file in asked.glob("*.jsonl"))
    base = 0.0 if config.target.path or keys.base_records else keys.base_share
    pool, of_base = round(n * (1 - share - keys.share_dev - base)), round(n * base)
    if keys.records == "drawn":  # base and questions are drawn beside the records
        pool, of_base, questions = round(n * (1 - keys.share_dev)), keys.drawn.base, keys.drawn.heldout
    return Sizes(
        records=n,
        pool=pool,
        base=of_base,
        questions=questions,
        width=width if given else _width(config, reference),
        length=config.plan.length or keys.buckets[0],
        file=float(path.stat().st_size) if path.is_file() else 0.0,
        target=target,
        reference=reference,
        mesh=mesh,
    )


def _records(config) -> int:
    """N: of the records file, if it is here; of the drawn data; else `plan.records`."""
    keys, n = config.dataset, config.plan.records
    if keys.records == "drawn":
        n = keys.drawn.records
    elif keys.records and pathlib.Path(keys.records).is_file():
        n = _counted(keys.records, pathlib.Path(keys.records).stat().st_mtime_ns)
    if not n:
        raise UserError(
            f"dataset.records '{keys.records}' is not here and plan.records is 0; give --config.plan.records=N"
        )
    return min(n, keys.limit or n)


@functools.lru_cache(maxsize=8)
def _counted(path: str, changed: int) -> int:
    """Records of a file: every row of a table asks for them."""
    return len(source.load(path))


def _reference(config, precision: Precision, target: VLMConfig) -> VLMConfig | clip.CLIPConfig:
    """The reference's sizes: from its folder, else from `plan.reference`; the target's where it is tuned from it."""
    folder, sizes = pathlib.Path(config.reference.path), config.plan.reference
    if not config.reference.path:
        return target
    if folder.exists():
        return hf.describe(folder, precision.compute)[0]
    if not sizes.decoder.width:
        return target
    return VLMConfig.tiny(sizes, sizes.image_size, sizes.vocab, precision)


def _width(config, reference) -> int:
    """D of the features that the reference gives."""
    if isinstance(reference, clip.CLIPConfig):
        return 2 * reference.text.projection
    return 2 * len(choose_taps(config.extract, reference.decoder.depth)) * reference.decoder.width
