"""Every config key is read somewhere; published configs lower abstractly."""

import importlib
import pathlib
import re

import pytest

from coincide_jax import pipeline
from coincide_jax.core.errors import UserError
from configs import common

PACKAGE = pathlib.Path(pipeline.__file__).parent.parent


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


@pytest.mark.parametrize("name", ["demo", "llava_json", "llava15"])
@pytest.mark.parametrize("sampler", ["progress", "coincide_plus", "skill_it", "exp3"])
def test_an_argument_names_a_curriculum(name, sampler):
    config = importlib.import_module(f"configs.{name}").get_config(f"curriculum={sampler}").unlock()
    assert (config.curriculum.name, config.curriculum.pool) == (sampler, "all")
    config.dataset.records = config.dataset.records or "records.json"
    pipeline.check(config.lock())


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("curriculum=progres", "unknown curriculum.name 'progres'; did you mean 'progress'"),
        ("progress", "unknown argument of configs/demo.py:progress 'progress'"),
        ("curriculum=exp3,curriculum=odm", "names the curricula exp3 and odm; expected one"),
    ],
)
def test_an_argument_that_names_none(argument, sentence):
    with pytest.raises(UserError, match=sentence):
        pipeline.check(importlib.import_module("configs.demo").get_config(argument))


def test_a_stage_cannot_read_a_key_it_does_not_declare():
    view = pipeline.subset(common.defaults(), ("select.fraction", "dataset"))
    assert view.select.fraction == 0.2
    with pytest.raises(AttributeError):
        _ = view.select.tau
