"""PROGRESS from records to weights: answers that nobody asked for have no part in it; every one asked for is noted."""

import json

import jax
import numpy as np
import pytest

from coincide_jax import pipeline
from coincide_jax.core import artifacts, axes, store
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import MEASURED
from coincide_jax.dataset import annotate, drawn, source
from coincide_jax.training import asking
from configs import common, demo

UP_TO_TRAIN = pipeline.NAMES[: pipeline.NAMES.index("train") + 1]
WORDS = ("heron", "anvil", "fjord", "quince", "lantern", "gravel")


def tiny(folder, records):
    """The tiny demo by PROGRESS on a records file, everything that could read an answer turned on: probes of exact
    answers, rounds drawn ahead, a second epoch."""
    config = demo.get_config("tiny,curriculum=progress").unlock()
    config.dataset.update(records=str(records), images=str(folder / "images"))
    config.dataset.base_records = str(folder / "base.json")
    config.evaluate.questions = str(folder / "eval")
    config.base.steps = 2
    config.train.epochs = 2.0
    config.curriculum.update(probe=1, objective="accuracy", lag=1)
    return config.lock()


def run(config, workdir):
    """Folder of every stage up to the training."""
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return pipeline.run_row(
            config, workdir, mesh, shared={}, names=UP_TO_TRAIN, force=None, command=("tests",)
        )  # fmt: skip


def traces(folders):
    """What a run leaves that answers could have changed: `{what: its bits}`."""
    train = folders["train"]

    def untimed(name):
        lines = artifacts.read_jsonl(train / name)
        return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]

    return {
        "tokenizer": (folders["dataset"] / "tokenizer.json").read_bytes(),
        "features": store.open_features(folders["extract"] / "features.zarr")[:].tobytes(),
        "clusters": (folders["cluster"] / "assignment.npy").read_bytes(),
        "warm-up": (folders["select/warmup"] / "indices.npy").read_bytes(),
        "annotations": (train / "annotations.jsonl").read_bytes(),
        "metrics": untimed("metrics.jsonl"),
        "rounds": untimed("curriculum.jsonl"),
        "weights": artifacts.read_json(train / "manifest.json")["summary"]["fingerprint"],
    }


def rewrite(records, rows):
    """The records with random words in place of the answers of `rows`."""
    rng, changed = np.random.default_rng(1), json.loads(json.dumps(records))
    for row in rows:
        for turn in changed[row]["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = " ".join(rng.choice(WORDS, rng.integers(1, 9)))
    return changed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The run on the drawn records, and on the same with other answers wherever none was asked for."""
    top = tmp_path_factory.mktemp("progress")
    folder = drawn.draw(top / "data", demo.get_config("tiny").dataset.drawn)
    records = json.loads((folder / "train.json").read_text())
    first = run(tiny(folder, folder / "train.json"), top / "first")
    asked = [line["index"] for line in artifacts.read_jsonl(first["train"] / "annotations.jsonl")]
    split = artifacts.read_json(first["dataset"] / "split.json")
    never = sorted(set(split["pool"]) - set(asked))
    artifacts.write_json(top / "other.json", rewrite(records, never))
    second = run(tiny(folder, top / "other.json"), top / "second")
    return {"folder": folder, "records": records, "folders": first, "asked": asked, "split": split,
            "never": never, "first": traces(first), "second": traces(second), "top": top}  # fmt: skip


@pytest.mark.parametrize(
    "what", ["tokenizer", "features", "clusters", "warm-up", "annotations", "metrics", "rounds", "weights"]
)
def test_answers_that_nobody_asked_for_change_nothing(made, what):
    assert len(made["never"]) > 150 and made["first"][what] == made["second"][what]


def test_an_answer_that_was_asked_for_changes_the_weights(made):
    """So that the test above can fail: the same training, one answer that it asked for rewritten."""
    top, folders = made["top"], made["folders"]
    probed = [line["index"] for line in artifacts.read_jsonl(folders["train"] / "annotations.jsonl")][-1:]
    artifacts.write_json(top / "changed.json", rewrite(made["records"], probed))
    dataset = top / "changed"
    artifacts.write_json(dataset / "split.json", made["split"] | {"records": str(top / "changed.json")})
    stage = next(stage for stage in pipeline.STAGES if stage.name == "train")
    config, mesh = tiny(made["folder"], top / "changed.json"), axes.make_mesh(devices=jax.devices()[:1])
    inputs = {name: folders[name] for name in pipeline.reads(config, stage) if name != "match"} | {"dataset": dataset}
    out = top / "changed train"
    out.mkdir()
    with jax.set_mesh(mesh):
        summary = stage.run(pipeline.subset(config, stage.keys), inputs, out, mesh)
    assert summary["fingerprint"] != made["first"]["weights"]
    assert set(inputs) == {"dataset", "base", "cluster", "select/warmup"}


def test_every_answer_is_on_the_list_once_and_within_the_budget(made):
    lines = artifacts.read_jsonl(made["folders"]["train"] / "annotations.jsonl")
    summary = artifacts.read_json(made["folders"]["train"] / "manifest.json")["summary"]
    arms = summary["arms"]
    assert summary["budget"] == -(-len(made["split"]["pool"]) // 5) == len(lines) == len(set(made["asked"]))
    assert summary["asked"] == {"probe": arms, "train": len(lines) - arms} and summary["epochs"] == 2
    # as many slots as two epochs of the budget: what the probe holds out of it is drawn again from the others
    assert summary["distinct"] == len(lines) - arms and summary["records"] == 2 * summary["budget"]
    assert [line["purpose"] for line in lines] == ["probe"] * arms + ["train"] * (len(lines) - arms)
    steps = [line["step"] for line in lines[arms:]]
    assert steps == sorted(steps) and np.bincount(steps).max() == 8  # a batch
    assert all(made["records"][line["index"]]["id"] == line["id"] for line in lines)


def test_skill_it_keeps_the_same_budget(made, tmp_path):
    """Two epochs of it are over the same records, and those that it evaluates by are taken from it."""
    config = demo.get_config("tiny,curriculum=skill_it").unlock()
    config.train.epochs = 2.0
    config.curriculum.update(probe=1, graph="identity")
    stage = next(stage for stage in pipeline.STAGES if stage.name == "train")
    mesh, inputs = (
        axes.make_mesh(devices=jax.devices()[:1]),
        {name: made["folders"][name] for name in ("dataset", "base")},
    )
    with jax.set_mesh(mesh):
        summary = stage.run(pipeline.subset(config.lock(), stage.keys), inputs, tmp_path, mesh)
    budget = -(-len(made["split"]["pool"]) // 5)
    assert summary["records"] == 2 * budget and summary["distinct"] + summary["arms"] == budget


def test_the_warm_up_is_asked_for_first(made):
    warm = np.load(made["folders"]["select/warmup"] / "indices.npy")
    arms = artifacts.read_json(made["folders"]["train"] / "manifest.json")["summary"]["arms"]
    trained = made["asked"][arms:]
    assert 0 < len(warm) <= 0.09 * len(made["split"]["pool"])
    assert set(trained[: len(warm)]) == set(warm.tolist())
    assert not (made["folders"]["select/warmup"] / "coreset.json").exists()


def test_nothing_but_questions_is_on_the_way(made):
    """No reference is tuned, no coreset of answers is written."""
    names = set(made["folders"])
    assert names == {"dataset", "base", "extract", "cluster", "cluster/warmup", "select/warmup", "train"}


# ---- budgets and probes, without a model


def draw(**changes):
    """Twenty records in two arms, the first four of which are the warm-up."""
    records = np.arange(20)
    first = np.isin(records, (0, 1, 2, 3))
    return asking.Draw(**{"records": records, "arm": records % 2, "arms": 2, "total": 12, "first": first} | changes)


def test_held_out_records_are_spared_from_the_warm_up_and_charged():
    found = draw()
    asking.hold_out(found, 2, seed=0)
    assert found.probed.shape == (2, 2) and found.total == 8 and len(found.records) == 16
    assert not set(found.probed.ravel()) & set(found.records) and set(range(4)) <= set(found.records.tolist())
    limit = found.limit()
    assert limit.fresh == 8 and limit.first.tolist() == [2, 2] and found.members()["arms"] == 2


@pytest.mark.parametrize(
    ("changes", "probe", "batch", "sentence"),
    [
        ({}, 9, 2, r"curriculum.probe holds out 9 records of each arm, but arm 0 has 8 that can be spared"),
        ({"first": None}, 10, 2, r"holds out 10 records of each arm, but arm 0 has 10"),
        ({}, 2, 9, r"the budget leaves 8 records of 12, after 4 for the probe, to train on; expected at least train.b"),
        ({"total": 3}, 0, 4, r"the budget leaves 3 records to train on; expected at least train.batch = 4"),
        ({"total": 3}, 0, 2, r"the warm-up is 4 records, but the budget leaves 3 to train on"),
    ],
)
def test_budgets_that_do_not_reach(changes, probe, batch, sentence):
    found = draw(**changes)
    with pytest.raises(UserError, match=sentence):
        if probe:
            asking.hold_out(found, probe, seed=0)
        asking.check_budget(found, batch)


def test_seen_probes_are_of_records_trained_on_before(tmp_path):
    raw = [{"id": str(row), "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
           for row in range(20)]  # fmt: skip
    records = source.parse(raw)[0]
    asker = annotate.Annotator(
        tmp_path / "a.jsonl", annotate.without_answers(records), annotate.OwnAnswers(records), 12, {}
    )
    settings = common.defaults().curriculum
    settings.update(probe=2, probe_from="seen")
    seen = asking.probes(draw(), settings, asker, seed=0)
    assert (seen(0) == -1).all()
    asker.ask_round(np.asarray([[0, 2], [4, 1], [6, 8]]), 0)
    assert (seen(1)[1] == -1).all() and set(seen(1)[0].tolist()) == {0, 2}
    three, all_ = seen(2), seen(3)
    assert set(three[0].tolist()) < {0, 2, 4} and three[1].tolist() == [1, -1]
    assert set(all_[0].tolist()) < {0, 2, 4, 6, 8} and asker.count("probe") == 0
    np.testing.assert_array_equal(seen(3), all_)  # the same records whenever it is asked


# ---- mistakes, before anything runs


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"extract.reads": "all"},
            r"extract.reads is 'all', so that the features would be made from every answer; set",
        ),
        ({"dataset.tokenizer_text": "all"}, r"dataset.tokenizer_text is 'all', so that the tokenizer would be made"),
        ({"dataset.tokenizer_text": "some"}, r"unknown dataset.tokenizer_text 'some'|so that the tokenizer"),
        (
            {"curriculum.pool": "coreset"},
            r"'progress' chooses from the whole pool, within a budget; set curriculum.pool",
        ),
        ({"curriculum.warmup": 0.2}, r"curriculum.warmup is 0.2 of the pool, but the budget is 0.2; expected less"),
        ({"curriculum.budget": 1.5}, r"curriculum.budget is 1.5; expected a share of the pool, from 0 to 1"),
        ({"curriculum.warmup_k": 0}, r"curriculum.warmup_k = 0; expected 1 or more"),
        ({"curriculum.answers": "nowhere.jsonl"}, r"curriculum.answers nowhere.jsonl does not exist; expected a JSONL"),
        ({"curriculum.name": "exp3", "curriculum.budget": 0.1}, r"curriculum.budget is 0.1, but 'exp3' has none"),
        ({"curriculum.name": "exp3", "curriculum.probe_from": "seen"}, r"probe_from is 'seen', but curriculum.name is"),
        ({"curriculum.name": "skill_it"}, r"curriculum.graph is 'linear', which is learned from losses .*probe is 0"),
        (
            {"curriculum.name": "skill_it", "curriculum.k": 3},
            r"curriculum.k is 3, but the arms of 'skill_it' are tasks",
        ),
        ({"curriculum.graph": "lineal"}, r"unknown curriculum.graph 'lineal'; did you mean 'linear'"),
        (
            {"extract.image_encoder": "dino"},
            r"extract.image_encoder is dino, alone; expected image_encoder and text_enc",
        ),
        ({"extract.scores": True}, r"extract.scores is set but extract.reads is 'questions'; scores are of answers"),
    ],
)
def test_mistakes_are_sentences(changes, sentence):
    config = demo.get_config("tiny,curriculum=progress").unlock()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        pipeline.check(config.lock())


@pytest.mark.parametrize("key", ["reference.path", "target.path"])
def test_a_checkpoint_that_was_tuned_on_a_pool_is_refused(tmp_path, key):
    artifacts.write_json(tmp_path / "manifest.json", {"stage": "reference"})
    config = demo.get_config("tiny,curriculum=progress").unlock()
    config.update_from_flattened_dict({key: str(tmp_path)})
    with pytest.raises(UserError, match=f"{key} .* was made by the stage 'reference', which trains on answers of a"):
        pipeline.check(config.lock())
