"""The stage on a tiny untrained model: every question answered once and scored beside its blind floor."""

import json

import jax
import numpy as np
import pytest
import weights
from ml_collections import ConfigDict
from PIL import Image

from coincide_jax import dataset, evaluation
from coincide_jax.core import artifacts, axes, checkpoint
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import tokenizer
from coincide_jax.evaluation import relative
from coincide_jax.models import vlm
from configs import common

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small data set through its stage, and a model folder of random weights, as training leaves it."""
    root = tmp_path_factory.mktemp("data")
    records = []
    for number in range(48):
        colour = COLOURS[number % 4]
        Image.new("RGB", (20 + number, 24), colour).save(root / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat colour is it?"}, {"from": "gpt", "value": colour}]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns, "task": "colour"})
    text = [{"from": "human", "value": "What is 1 plus 1?"}, {"from": "gpt", "value": "2"}]
    records += [{"id": f"t{number}", "conversations": text, "task": "sums"} for number in range(12)]
    (root / "records.json").write_text(json.dumps(records))
    config = common.defaults()
    config.dataset.update(records=str(root / "records.json"), images=str(root), share_heldout=0.4, base_share=0.1)
    config.dataset.update(vocab=320, system="", image_size=24, share_dev=0.08, max_length=64, buckets=(32, 64))
    config.model.update(
        ConfigDict(
            {
                "vision": {"patch": 12, "width": 16, "depth": 1, "heads": 2, "mlp": 32},
                "decoder": {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp": 32},
            }
        )
    )
    config.evaluate.update(rows=8, max_new_tokens=5)
    folders = {name: root / name for name in ("dataset", "train")}
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        folders["dataset"].mkdir()
        dataset.run(config, {}, folders["dataset"], mesh)
        vocab = tokenizer.Tokenizer.load(folders["dataset"] / "tokenizer.json").vocab_size
        cfg = vlm.VLMConfig.tiny(config.model, 24, vocab)
        params = weights.draw(vlm.abstract(cfg), mesh)
        card = {"config": cfg.to_dict(), "image_size": 24, "vocab": vocab, "template": "vicuna_v1", "system": ""}
        checkpoint.save_model(folders["train"] / "model", params, card, folders["dataset"] / "tokenizer.json")
        out = root / "evaluate"
        out.mkdir()
        summary = evaluation.run(config, folders, out, mesh)
    return {"config": config, "folders": folders, "mesh": mesh, "out": out, "summary": summary, "root": root}


def test_every_question_is_answered_once(made):
    split = artifacts.read_json(made["folders"]["dataset"] / "split.json")
    rows = artifacts.read_jsonl(made["out"] / "answers.jsonl")
    assert len(rows) == len(split["heldout"]) == made["summary"]["questions"] > 8
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["task"] for row in rows} == {"colour", "sums"}
    fields = {"id", "task", "image", "question", "prediction", "answers", "metric", "score", "blind_prediction"}
    assert all(row.keys() == fields | {"blind_score"} for row in rows)
    assert all("<image>" not in row["question"] for row in rows)


def test_blind_floor_knows_the_pool(made):
    rows = artifacts.read_jsonl(made["out"] / "answers.jsonl")
    sums = [row for row in rows if row["task"] == "sums"]
    assert {row["blind_prediction"] for row in sums} == {"2"}
    assert {row["blind_score"] for row in sums} == {1.0}


def test_scores_are_the_means_of_the_answers(made):
    rows = artifacts.read_jsonl(made["out"] / "answers.jsonl")
    scores = artifacts.read_json(made["out"] / "scores.json")
    for task, found in scores.items():
        own = [row for row in rows if row["task"] == task]
        assert found["n"] == len(own)
        assert found["score"] == pytest.approx(np.mean([row["score"] for row in own]), abs=1e-6)
        low, high = found["interval"]
        assert low <= found["score"] <= high
        assert found["blind_by"] in ("question", "constant")
        assert found["blind"] == pytest.approx(np.mean([row["blind_score"] for row in own]), abs=1e-6)
    assert scores.keys() == made["summary"]["scores"].keys()


def test_intervals_are_those_of_the_table(made):
    rows = artifacts.read_jsonl(made["out"] / "answers.jsonl")
    settings = made["config"].evaluate
    table = relative.compare({"full": [rows]}, resamples=settings.bootstrap, seed=settings.seed)
    scores = artifacts.read_json(made["out"] / "scores.json")
    of_table = {task: found["interval"] for task, found in table["rows"]["full"]["scores"].items()}
    assert {task: found["interval"] for task, found in scores.items()} == of_table


def test_no_resamples_is_found_before_anything_runs():
    with pytest.raises(UserError, match=r"evaluate\.bootstrap is 0; expected 1"):
        evaluation.check(ConfigDict({"bootstrap": 0, "questions": "", "part": "heldout"}))


def test_no_questions_is_one_sentence(made):
    with pytest.raises(UserError, match="there are no questions"):
        evaluation.ask(made["config"].evaluate, {"questions": ""}, made["root"])


def test_the_dev_part_is_asked_on_request(made):
    settings = made["config"].evaluate.copy_and_resolve_references()
    settings.part = "dev"
    split = artifacts.read_json(made["folders"]["dataset"] / "split.json")
    asked = evaluation.ask(settings, split, made["folders"]["dataset"])
    ids = [record["id"] for record in json.loads((made["root"] / "records.json").read_text())]
    assert {question.id for question in asked} == {ids[index] for index in split["dev"]} != set()
    with pytest.raises(UserError, match=r"there are no questions: dataset\.share_dev is 0"):
        evaluation.ask(settings, split, made["root"])


def test_nothing_is_ranked_on_the_dev_part(made):
    rows = artifacts.read_jsonl(made["out"] / "answers.jsonl")
    table = relative.compare({"full": [[row | {"score": 1.0, "blind_score": 0.0} for row in rows]]}, minimum=1)
    assert table["ranked"] and not table["sentence"]
    table = relative.compare(
        {"full": [[row | {"score": 1.0, "blind_score": 0.0} for row in rows]]}, minimum=1, part="dev"
    )
    assert not table["ranked"] and "dev part" in table["sentence"]


def test_an_unknown_part_is_one_sentence():
    with pytest.raises(UserError, match=r"unknown evaluate\.part 'test'"):
        evaluation.check(ConfigDict({"bootstrap": 1, "questions": "", "part": "test"}))


def test_the_stage_reads_no_key_that_it_does_not_declare(made):
    view = ConfigDict({"evaluate": {}, "dataset": {}, "device": {}})
    for key in evaluation.KEYS:
        part, name = key.split(".")
        view[part][name] = made["config"][part][name]
    out = made["root"] / "declared"
    out.mkdir()
    with jax.set_mesh(made["mesh"]):
        evaluation.run(view.lock(), made["folders"], out, made["mesh"])
    assert (out / "answers.jsonl").read_bytes() == (made["out"] / "answers.jsonl").read_bytes()
