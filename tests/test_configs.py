"""Every config key is read somewhere; published configs lower abstractly."""

import importlib
import pathlib
import re

import pytest

from coincide_jax import pipeline
from configs import common

PACKAGE = pathlib.Path(pipeline.__file__).parent


def test_every_key_is_read_by_some_file():
    source = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    leaves = {key.rsplit(".", 1)[-1] for key in pipeline.flatten(common.defaults())}
    unread = {leaf for leaf in leaves if not re.search(rf"\.{leaf}\b|[\"']{leaf}[\"']|\b{leaf}:", source)}
    assert not unread


@pytest.mark.parametrize("name", ["demo", "llava_json", "llava15", "vision_flan"])
def test_config_has_only_known_keys_and_every_stage_finds_its_own(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    assert pipeline.flatten(config).keys() == pipeline.flatten(common.defaults()).keys()
    for stage in pipeline.STAGES:
        assert pipeline.flatten(pipeline.subset(config, stage.keys))


def test_a_stage_cannot_read_a_key_it_does_not_declare():
    view = pipeline.subset(common.defaults(), ("select.fraction", "dataset"))
    assert view.select.fraction == 0.2
    with pytest.raises(AttributeError):
        _ = view.select.tau
