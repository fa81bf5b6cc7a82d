"""The stage: what it writes, what is held out from everything, its errors, a second run, and `Dataset`."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from coincide_jax import dataset
from coincide_jax.core import artifacts
from coincide_jax.core.errors import UserError
from coincide_jax.dataset import tokenizer


@pytest.fixture
def own(tmp_path, config):
    """A data set of 80 records on 40 images of one's own; every record says a word that only it has."""
    rng, rows = np.random.default_rng(0), []
    (tmp_path / "images").mkdir()
    for number in range(80):
        name = f"{number // 2}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": f"{'qwz'[number % 3]}{number:04d}" * 8},
        ]
        rows.append({"id": str(number), "image": name, "conversations": turns, "task": f"t{number % 3}"})
    (tmp_path / "r.json").write_text(json.dumps(rows))
    config.dataset.records, config.dataset.images = str(tmp_path / "r.json"), str(tmp_path / "images")
    config.dataset.update(share_heldout=0.25, share_dev=0.1, base_share=0.2)
    (tmp_path / "out").mkdir()
    return tmp_path, config, rows


def run(tmp_path, config):
    summary = dataset.run(config, {}, tmp_path / "out", None)
    return summary, artifacts.read_json(tmp_path / "out" / "split.json")


def test_held_out_is_in_no_part_and_no_tokenizer(own):
    tmp_path, config, rows = own
    summary, split = run(tmp_path, config)
    parts = {name: set(split[name]) for name in ("pool", "dev", "heldout", "base")}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 80 == split["n"] == summary["records"]
    images = {name: {rows[i]["image"] for i in members} for name, members in parts.items()}
    assert sum(map(len, images.values())) == len(set.union(*images.values()))
    # the tokenizer's text: training it again on pool and base alone gives the same file, whatever held-out and dev say
    for index in parts["heldout"] | parts["dev"]:
        rows[index]["conversations"][1]["value"] = "unheard of words " * 50
    (tmp_path / "r.json").write_text(json.dumps(rows))
    before = (tmp_path / "out" / "tokenizer.json").read_bytes()
    _, again = run(tmp_path, config)
    assert {name: set(again[name]) for name in parts} == parts
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == before
    rows[min(parts["pool"])]["conversations"][1]["value"] = "unheard of words " * 50
    (tmp_path / "r.json").write_text(json.dumps(rows))
    run(tmp_path, config)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() != before


def test_held_out_records_are_asked(own):
    tmp_path, config, rows = own
    _, split = run(tmp_path, config)
    files = sorted((tmp_path / "out" / "questions").glob("*.jsonl"))
    assert split["questions"] == str(tmp_path / "out" / "questions")
    assert {row["id"] for file in files for row in artifacts.read_jsonl(file)} == {
        rows[i]["id"] for i in split["heldout"]
    }


def test_given_questions_hold_their_images_out(own):
    tmp_path, config, _ = own
    copy = tmp_path / "images" / "copy.png"  # the same bytes under another name
    copy.write_bytes((tmp_path / "images" / "5.png").read_bytes())
    asked = [
        {"id": "1", "image": name, "question": "What?", "answers": ["x"], "metric": "exact"}
        for name in ("copy.png", "7.png")
    ]
    artifacts.write_jsonl(tmp_path / "eval" / "t.jsonl", asked)
    config.evaluate.questions = str(tmp_path / "eval")
    _, split = run(tmp_path, config)
    assert split["heldout"] == [10, 11, 14, 15]
    assert split["questions"] == str(tmp_path / "eval")
    assert not (tmp_path / "out" / "questions").exists()


def test_base_records_and_target_take_no_share(own):
    tmp_path, config, rows = own
    base = [row | {"id": f"b{row['id']}"} for row in rows[:10]]
    Image.new("RGB", (9, 9), "red").save(tmp_path / "images" / "new.png")
    base[3]["image"] = "new.png"
    (tmp_path / "b.json").write_text(json.dumps(base))
    config.dataset.base_records = str(tmp_path / "b.json")
    _, split = run(tmp_path, config)
    assert split["base"] == [3]
    assert len(split["pool"]) + len(split["dev"]) + len(split["heldout"]) == 80
    settings = config.dataset
    opened = dataset.Dataset.open(
        split, "base_records", tokenizer_path=tmp_path / "out" / "tokenizer.json", settings=settings,
        image_size=8, image_tokens=4, template="vicuna_v1", mean=(0.5, 0.5, 0.5),
    )  # fmt: skip
    assert [record.id for record in opened.records if record] == ["b3"]
    config.dataset.base_records = ""
    config.target.path = str(tmp_path / "target")
    with pytest.raises(UserError, match=r"tokenizer .*target/tokenizer.json does not exist"):
        run(tmp_path, config)
    tokenizer.train(["some other text"] * 9, 280).save(tmp_path / "target" / "tokenizer.json")
    _, split = run(tmp_path, config)
    assert split["base"] == []
    copied = (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert copied == (tmp_path / "target" / "tokenizer.json").read_bytes()


def test_quarantine_is_told_and_limited(own, capsys):
    tmp_path, config, _ = own
    (tmp_path / "images" / "3.png").unlink()
    summary, split = run(tmp_path, config)
    assert summary["quarantined"] == split["quarantined"] == 2
    assert "2 of 80 records quarantined" in capsys.readouterr().out
    found = artifacts.read_jsonl(tmp_path / "out" / "quarantine.jsonl")
    assert found == [{"index": i, "id": str(i), "reason": "image 3.png does not exist"} for i in (6, 7)]
    assert not {6, 7} & {i for part in ("pool", "dev", "heldout", "base") for i in split[part]}
    config.dataset.max_bad = 0.01
    with pytest.raises(UserError, match=r"2 of 80 records .* more than dataset.max_bad = 0.01 .*row 6: image 3.png"):
        run(tmp_path, config)
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"all 80 records .* are quarantined: row 0: image 0\.png cannot be read"):
        run(tmp_path, config)


def test_limit(own):
    tmp_path, config, _ = own
    config.dataset.limit = 30
    _, split = run(tmp_path, config)
    assert split["n"] == 30
    assert max(i for part in ("pool", "dev", "heldout", "base") for i in split[part]) == 29
    opened = dataset.Dataset.open(
        split, "records", tokenizer_path=tmp_path / "out" / "tokenizer.json", settings=config.dataset,
        image_size=8, image_tokens=4, template="vicuna_v1", mean=(0.5, 0.5, 0.5),
    )  # fmt: skip
    assert len(opened.records) == 30


def test_wrong_paths(own):
    tmp_path, config, _ = own
    config.dataset.images = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"dataset.images: .*nowhere is not a folder"):
        run(tmp_path, config)
    config.dataset.records = ""
    with pytest.raises(UserError, match=r"dataset\.records is not set"):
        run(tmp_path, config)


def test_a_second_run_writes_the_same(made):
    names = ("split.json", "tokenizer.json", "quarantine.jsonl", "drawn/train.json")
    before = {name: hashlib.sha256((made.out / name).read_bytes()).digest() for name in names}
    assert dataset.run(made.config, {}, made.out, None) == made.summary
    assert {name: hashlib.sha256((made.out / name).read_bytes()).digest() for name in names} == before


def test_the_stage_reads_only_its_keys(made, tmp_path, config):
    def read_of(node, prefix, kept):
        for name in list(node):
            path = f"{prefix}{name}"
            if any(path == key or path.startswith(f"{key}.") for key in kept):
                continue
            if any(key.startswith(f"{path}.") for key in kept):
                read_of(node[name], f"{path}.", kept)
            else:
                del node[name]

    read_of(config, "", dataset.KEYS)
    assert "buckets" not in config.dataset
    dataset.run(config, {}, tmp_path, None)
    assert (tmp_path / "tokenizer.json").read_bytes() == (made.out / "tokenizer.json").read_bytes()


def test_dataset_serves_its_rows(made):
    data = made.data
    pool = made.split["pool"]
    lengths = data.lengths(pool)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(data.encode(i).tokens) for i in pool]
    assert [data.bucket(n) for n in (1, 48, 49, 96)] == [48, 48, 64, 96]
    assert (data.pad_id, data.eos_id, data.vocab_size) == (0, 2, 512)
    assert [i for i, r in enumerate(data.records) if r] == sorted(pool + made.split["dev"])
    with pytest.raises(UserError, match=r"dataset.buckets is \(48, 64\)"):
        made.open(buckets=(48, 64))
