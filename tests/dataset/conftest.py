"""A small drawn data set, made once for all tests of the data layer."""

import json
import pathlib
import types

import pytest

from coincide_jax import dataset
from configs import common


@pytest.fixture
def config():
    """The default keys with short sequences and a small drawn data set."""
    return small()


def small():
    """See `config`."""
    found = common.defaults()
    found.dataset.update(records="drawn", system="Be brief.", vocab=512, max_length=96, buckets=(48, 64, 96))
    found.dataset.drawn.update(records=300, heldout=48, base=120)
    return found


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The stage run on the drawn data: its folder, summary, split, config, and `open` → `Dataset`."""
    out, keys = tmp_path_factory.mktemp("dataset"), small()
    summary = dataset.run(keys, {}, out, None)
    split = json.loads((out / "split.json").read_text())

    def open_dataset(part: str = "records", **changes) -> dataset.Dataset:
        settings = keys.dataset.copy_and_resolve_references()
        settings.update(changes)
        return dataset.Dataset.open(
            split,
            part,
            tokenizer_path=out / "tokenizer.json",
            settings=settings,
            image_size=48,
            image_tokens=16,
            template=settings.template,
            mean=(0.5, 0.5, 0.5),
        )

    return types.SimpleNamespace(
        out=pathlib.Path(out), summary=summary, split=split, config=keys, open=open_dataset, data=open_dataset()
    )
