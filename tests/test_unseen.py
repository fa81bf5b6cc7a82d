"""What no stage may look at: held-out and dev records in any of them; labels, ids and paths in those that choose.

A data set is split; base, reference, features, clusters, selection and targets are made from it, and made again after a
change to its files. What the change must not reach has to come out bitwise the same.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from coincide_jax import curriculum, pipeline
from coincide_jax.core import artifacts, axes, store
from coincide_jax.core.metrics import MEASURED
from configs import common

STAGES = {stage.name: stage for stage in pipeline.STAGES}
# one of each file of curriculum/: those of a file are handed the same
SAMPLERS = ("uniform", "easy_to_hard", "coincide_plus", "exp3_ix", "tsallis_inf", "odm", "progress")
OF_TASKS = ("skill_it",)  # whose arms are tasks
MADE = ("tokenizer", "base", "reference", "features", "centroids", "assignment", "selection")
COLOURS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange")
FORBIDDEN = ("task", "concept", "skill", "source", "origin", "id")


def tiny_config(folder: pathlib.Path):
    """All keys, for a model of width 16 on the data set in `folder`."""
    config = common.defaults()
    config.dataset.update(records=str(folder / "records.json"), images=str(folder / "images"), system="", vocab=300)
    config.dataset.update(share_heldout=0.2, share_dev=0.15, base_share=0.25, image_size=16)
    config.dataset.update(max_length=32, buckets=(32,), template="vicuna_v1")
    config.model.vision.update(patch=8, width=16, depth=1, heads=2, mlp=16)
    config.model.decoder.update(width=16, depth=2, heads=2, kv_heads=1, mlp=16)
    for recipe in (config.base, config.reference.train, config.train):
        recipe.update(batch=8, micro_batch=8, steps=4, learning_rate=1e-2)
    config.extract.update(num_layers=2, rows_per_device=16)
    config.cluster.update(k=6, iterations=10)
    config.select.fraction = 0.4
    config.curriculum.update(pool="all", round_steps=2)
    return config


def write_data(folder: pathlib.Path) -> None:
    """96 records: two on each of 40 images, 16 without one; every audit label is there."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(40):
        write_image(folder / "images" / f"{number}.png", rng)
    records = []
    for index in range(96):
        image = {"image": f"{index // 2}.png"} if index < 80 else {}
        mark = "<image>\n" if image else ""
        one, two = rng.choice(COLOURS, 2)
        turns = [("human", f"{mark}Is it {one} {index % 7}?"), ("gpt", f"{two} {index % 11} {one}" * (1 + index % 2))]
        labels = {name: f"{name}{rng.integers(4)}" for name in FORBIDDEN[:-1]}
        said = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": f"r{index}", **image, "conversations": said, **labels})
    artifacts.write_json(folder / "records.json", records)


def write_image(path: pathlib.Path, rng: np.random.Generator) -> None:
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)


def read_records(folder: pathlib.Path) -> list[dict]:
    return json.loads((folder / "records.json").read_text())


def rewrite(folder: pathlib.Path, rows: list[int], pictures: bool = True) -> None:
    """Gives these records other answers, and other pixels in their images."""
    records, rng = read_records(folder), np.random.default_rng(99)
    for row in rows:
        records[row]["conversations"][1]["value"] = "quite something else zz" + "qx" * (row % 5)
        if pictures and "image" in records[row]:
            write_image(folder / "images" / records[row]["image"], rng)
    artifacts.write_json(folder / "records.json", records)


def permute_forbidden(folder: pathlib.Path) -> None:
    """Shuffles labels, ids and the names of the image files; texts and pictures stay where they are."""
    records, rng = read_records(folder), np.random.default_rng(7)
    order = rng.permutation(len(records))
    names = sorted(path.name for path in (folder / "images").iterdir())
    renamed = dict(zip(names, rng.permutation(names).tolist(), strict=True))
    pixels = {name: (folder / "images" / name).read_bytes() for name in names}
    for name in names:
        (folder / "images" / renamed[name]).write_bytes(pixels[name])
    changed = []
    for record, other in zip(records, order, strict=True):
        image = {"image": renamed[record["image"]]} if "image" in record else {}
        changed.append(record | image | {name: records[other][name] for name in FORBIDDEN})
    assert all(sum(a[n] != b[n] for a, b in zip(records, changed, strict=True)) > 20 for n in FORBIDDEN)
    artifacts.write_json(folder / "records.json", changed)


def make(config, name: str, folder: pathlib.Path, **inputs) -> tuple[pathlib.Path, dict]:
    """Runs one stage into `folder/name`; returns that folder and the stage's summary."""
    stage, out = STAGES[name], folder / name
    out.mkdir(parents=True)
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return out, stage.run(pipeline.subset(config, stage.keys), inputs, out, mesh)


def make_all(config, folder: pathlib.Path, dataset: pathlib.Path, samplers=("coincide_plus",)) -> dict:
    """Every stage up to the selection, then a target for each of the samplers: `{what: its bits}`."""
    base, of_base = make(config, "base", folder, dataset=dataset)
    reference, of_reference = make(config, "reference", folder, dataset=dataset, base=base)
    extract, _ = make(config, "extract", folder, dataset=dataset, reference=reference)
    cluster, _ = make(config, "cluster", folder, dataset=dataset, extract=extract)
    select, _ = make(config, "select", folder, dataset=dataset, extract=extract, cluster=cluster)
    found = {
        "base": of_base["fingerprint"],
        "reference": of_reference["fingerprint"],
        "features": store.open_features(extract / "features.zarr")[:].tobytes(),
        "centroids": (cluster / "centroids.npy").read_bytes(),
        "assignment": (cluster / "assignment.npy").read_bytes(),
        "selection": (select / "indices.npy").read_bytes(),
    }
    for sampler in samplers:
        config.curriculum.update(name=sampler, pool="coreset" if sampler == "static" else "all", warmup=0.0)
        inputs = {"dataset": dataset, "base": base, "cluster": cluster, "select": select}
        train, of_target = make(config, "train", folder / sampler, **inputs)
        steps = artifacts.read_jsonl(train / "metrics.jsonl")
        losses = [{key: value for key, value in step.items() if key not in MEASURED} for step in steps]
        found[sampler] = (train / "curriculum.jsonl").read_bytes(), losses, of_target["fingerprint"]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What comes of a data set (`before`), of the same with the forbidden fields permuted, and of the same with all
    records of a part rewritten: the unseen ones, the pool, the base."""
    top = tmp_path_factory.mktemp("unseen")
    write_data(top / "data")
    config = tiny_config(top / "data")
    dataset, _ = make(config, "dataset", top)
    split = artifacts.read_json(dataset / "split.json")
    assert min(len(split[part]) for part in ("pool", "dev", "heldout", "base")) > 5
    unseen, original = split["heldout"] + split["dev"], (top / "data" / "records.json").read_bytes()

    def tokenizer(rows: list[int], name: str) -> bytes:
        """Of the data stage run anew on the records so rewritten (their pictures decide about the split and stay)."""
        rewrite(top / "data", rows, pictures=False)
        again, _ = make(config, "dataset", top / name)
        parts = artifacts.read_json(again / "split.json")
        assert all(parts[part] == split[part] for part in ("pool", "dev", "heldout", "base"))
        (top / "data" / "records.json").write_bytes(original)
        return (again / "tokenizer.json").read_bytes()

    def anew(name: str) -> None:
        """Puts the changed data set aside and writes it as it was."""
        (top / "data").rename(top / f"{name} data")
        write_data(top / "data")

    found = {"before": make_all(config, top / "before", dataset, SAMPLERS)}
    found["before"]["tokenizer"] = (dataset / "tokenizer.json").read_bytes()
    permute_forbidden(top / "data")
    found["permuted"] = make_all(config, top / "permuted", dataset, SAMPLERS)
    anew("permuted")
    for name, rows in (("unseen", unseen), ("pool", split["pool"])):
        words = tokenizer(rows, f"{name} words")
        rewrite(top / "data", rows)
        found[name] = make_all(config, top / name, dataset) | {"tokenizer": words}
        anew(name)
    rewrite(top / "data", split["base"])
    found["base"] = {"base": make(config, "base", top / "other base", dataset=dataset)[1]["fingerprint"]}
    return found


@pytest.mark.parametrize("what", [*MADE, "coincide_plus"])
def test_held_out_and_dev_records_are_in_nothing(made, what):
    assert made["unseen"][what] == made["before"][what]


@pytest.mark.parametrize("what", [*MADE, "coincide_plus"])
def test_the_pool_is_in_everything_but_the_base(made, what):
    """So that the test above can fail."""
    assert (made["pool"][what] == made["before"][what]) == (what == "base")


def test_the_base_has_its_own_records(made):
    assert made["base"]["base"] != made["before"]["base"]


@pytest.mark.parametrize("what", [*MADE[1:], *SAMPLERS])
def test_labels_ids_and_paths_change_nothing(made, what):
    """Picks, plans, probabilities, losses and weights are those of the same records under other names."""
    assert made["permuted"][what] == made["before"][what]


def test_every_file_of_samplers_is_tried():
    assert curriculum.OF_TASKS == OF_TASKS
    assert {curriculum.SAMPLERS[name].__module__ for name in SAMPLERS + OF_TASKS} == {
        sampler.__module__ for sampler in curriculum.SAMPLERS.values()
    }
