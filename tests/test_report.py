"""The report page of a small made-up run: every section, missing artefacts named, nothing from the network."""

import json
import pathlib
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from coincide_jax import report
from coincide_jax.core import artifacts
from coincide_jax.evaluation import relative
from coincide_jax.kernels import kmeans
from coincide_jax.report import curricula, rounds, tables
from coincide_jax.report.sources import Artefacts

TASKS = ("colour", "count", "existence", "reading", "caption", "text_only")
QUESTIONS = (
    "What colour is the {c} shape?\nAnswer the question using a single word or phrase.",
    "How many {c} squares are there?\nAnswer the question with a number.",
    "Is there a {c} circle in the image?\nAnswer the question with yes or no.",
    "What text is written in the {c} box?",
    "Describe the {c} picture in one sentence.",
    "What is <b>{c}</b> plus blue? & why",
)
COLOURS = ("red", "green", "navy", "orange", "purple", "gray")
N, K = 360, 12


def write_run(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """A made-up headline run of all stages; returns stage → folder."""
    rng = np.random.default_rng(0)
    folders = {
        name: workdir / name
        for name in ("dataset", "base", "reference", "extract", "cluster", "select", "train", "evaluate")
    }
    images = workdir / "images"
    images.mkdir(parents=True)
    for number in range(24):
        picture = Image.new("RGB", (60 + 3 * number, 96), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 50, 80), fill=COLOURS[number % 6])
        picture.save(images / f"{number}.png")
    task = rng.choice(6, N, p=[0.3, 0.2, 0.2, 0.15, 0.1, 0.05])
    records = []
    for index in range(N):
        question = QUESTIONS[task[index]].format(c=COLOURS[index % 6])
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": COLOURS[(index + 1) % 6]}]
        record = {"id": f"r{index}", "image": f"{index % 24}.png", "conversations": turns, "task": TASKS[task[index]]}
        if task[index] == 5:
            del record["image"]
            turns[0]["value"] = question
        records.append(record)
    artifacts.write_json(workdir / "records.json", records)
    pool = np.arange(30, N)
    split = {"records": str(workdir / "records.json"), "images": str(images), "base_records": "", "questions": "",
             "pool": pool.tolist(), "dev": [0, 1], "heldout": list(range(2, 20)), "base": list(range(20, 30)),
             "quarantined": 2, "n": N}  # fmt: skip
    artifacts.write_json(folders["dataset"] / "split.json", split)
    artifacts.write_jsonl(
        folders["dataset"] / "quarantine.jsonl",
        [{"index": i, "id": f"bad{i}", "reason": f"image 'x{i}.jpg' is missing"} for i in (400, 401)],
    )
    names = [TASKS[t] for t in task]
    artifacts.write_parquet(
        folders["extract"] / "scores.parquet", {"index": np.arange(N), "task": names, "valid": np.arange(N) >= 30}
    )
    assignment = np.full(N, -1, np.int32)
    assignment[pool] = (2 * task[pool] + rng.integers(0, 2, len(pool))) % K
    artifacts.write_npy(folders["cluster"] / "assignment.npy", assignment)
    artifacts.write_npy(folders["cluster"] / "centroids.npy", np.eye(K, 16, dtype=np.float32))
    history = {
        "objective": [0.6, 0.71, 0.74, 0.745],
        "imbalance": [2.2, 1.8, 1.6, 1.6],
        "empties": [3, 1, 0, 0],
        "moved": [330, 90, 8, 0],
    }
    artifacts.write_json(folders["cluster"] / "history.json", history | {"dropped": 0})
    labels = {
        "task": {"records": 330, "classes": 6, "purity": 0.91, "purity_random": 0.31, "nmi": 0.7, "nmi_random": 0.05}
    }
    cosines = np.linspace(0.9, 0.5, K)
    quality = {
        "within_cosine": {"overall": 0.745, "per_cluster": cosines.tolist()},
        "between_centroids": 0.2,
        "labels": labels,
    }
    artifacts.write_json(folders["cluster"] / "quality.json", quality)
    sizes = np.bincount(assignment[pool], minlength=K)
    quota = np.maximum(1, sizes // 5)
    picks = np.concatenate([np.flatnonzero(assignment == cluster)[: quota[cluster]] for cluster in range(K)])
    columns = {"cluster": np.arange(K), "size": sizes, "transferability": rng.random(K) * 0.4, "density": rng.random(K)}
    columns |= {"score": rng.random(K), "probability": quota / quota.sum(), "quota": quota, "picked": quota}
    artifacts.write_parquet(folders["select"] / "clusters.parquet", columns)
    artifacts.write_npy(folders["select"] / "indices.npy", picks.astype(np.int64))
    for position, (name, folder) in enumerate(folders.items()):
        recorded = {
            "seconds": 2.5 + position,
            "attempts": 1 + (name == "train"),
            "device": "8 x cpu",
            "revision": "abc123",
            "command": ["coincide", "--config=configs/demo.py"],
            "versions": {"jax": "0.10.2"},
        }
        manifest = {
            "stage": name,
            "version": 1,
            "identity": "f00d" * 8,
            "config": {f"{name}.seed": 7},
            "recorded": recorded,
        }
        artifacts.write_json(folder / "manifest.json", manifest)
    return folders


def write_train(run: pathlib.Path, seed: int, curriculum: bool) -> None:
    """Training lines of one row and seed; the last round of a curriculum was drawn ahead and never trained. Arm k is
    learned in round k; the first arm is forgotten at the end, the second was and has recovered."""
    rng = np.random.default_rng(seed)
    steps = np.arange(1, 121)
    loss = 3 * np.exp(-steps / 40) + 0.6 + 0.1 * rng.random(120)
    lines = [
        {"step": int(s), "loss": float(v), "learning_rate": 1e-3 * (1 - s / 120)}
        for s, v in zip(steps, loss, strict=True)
    ]
    artifacts.write_jsonl(run / "train" / "metrics.jsonl", lines)
    if curriculum:
        weights = rng.random(K)
        rounds = [np.exp(weights * t / 6) / np.exp(weights * t / 6).sum() for t in range(13)]
        lines = [
            {"round": t, "drawn_at": 10 * max(t - 1, 0), "draws": [1] * K, "probabilities": p.tolist()}
            for t, p in enumerate(rounds)
        ]
        artifacts.write_json(run / "train" / "run.json", {"round_steps": 10, "lag": 1})
        artifacts.write_jsonl(run / "train" / "curriculum.jsonl", lines)
        falls = [[1.0 if t <= arm else 0.2 for arm in range(K)] for t in range(13)]
        falls[12][0] = falls[6][1] = 0.9
        falls[5][7] = None
        watch = {"nll": [2.0 - 0.1 * i for i in range(10)], "exact": [0.0] * 10}
        lines = [
            {"step": 10 * t, "losses": falls[t], "seconds": {"watch": 0.5},
             "watch": watch if t < 12 else {"nll": [1.0] * 10, "exact": [float(i % 2) for i in range(10)]}}
            for t in range(13)
        ]  # fmt: skip
        artifacts.write_jsonl(run / "train" / "arms.jsonl", lines)
        artifacts.write_npy(run / "train" / "watched.npy", np.arange(10))


def answers(skill: float, seed: int) -> list[dict]:
    """Made-up answer lines: `skill` is the chance of a right one, the blind floor lies at 0.2."""
    rng = np.random.default_rng(seed)
    return [
        {"id": str(i), "task": TASKS[i % 6], "image": f"im{i // 3}", "metric": "exact",
         "score": float(rng.random() < skill), "blind_score": float(i % 5 == 0)}
        for i in range(600)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """The made-up run, its rows, its table and the rendered page."""
    workdir = tmp_path_factory.mktemp("run")
    inputs = write_run(workdir)
    rows = {"coincide": [workdir], "full": [], "random": [], "coincide_plus": []}
    write_train(workdir, 1, curriculum=False)
    for row in ("full", "random", "coincide_plus"):
        for seed in range(2):
            run = workdir / "rows" / row / f"seed{seed}"
            write_train(run, seed, curriculum=row == "coincide_plus")
            if row == "coincide_plus":
                artifacts.write_npy(
                    run / "train" / "arms" / "records.npy", np.load(inputs["cluster"] / "assignment.npy")
                )
            if row != "coincide_plus":
                summary = {"steps": 1200, "distinct": 330 if row == "full" else 60 + seed}
                artifacts.write_json(run / "train" / "manifest.json", {"summary": summary})
            rows[row].append(run)
    skills = {"coincide": 0.6, "full": 0.7, "random": 0.5, "coincide_plus": 0.62}
    table = relative.compare(
        {row: [answers(skills[row], s) for s in range(len(rows[row]))] for row in rows}, resamples=200
    )
    out = workdir / "report"
    summary = report.run(ConfigDict({"name": "demo"}), inputs, out, None, rows=rows, table=table)
    return {"inputs": inputs, "rows": rows, "table": table, "out": out, "summary": summary, "workdir": workdir}


def page(out: pathlib.Path) -> str:
    return (out / "report.html").read_text()


def test_every_section_stands(made):
    text = page(made["out"])
    assert made["summary"]["left_out"] == []
    assert "Left out" not in text
    for section in (
        "results",
        "coreset",
        "clusters",
        "gallery",
        "training",
        "curriculum",
        "cost",
        "data",
        "provenance",
    ):
        assert f'<h2 id="{section}"' in text
    assert text.count("<svg ") == 12
    assert all(f">{task}<" in text for task in TASKS)


def test_nothing_comes_from_the_network(made):
    text = page(made["out"])
    plain = re.sub(r"base64,[^\"]*", "", text)
    assert re.findall(r"https?:|src=\"//|@import|url\((?!#)", plain) == []
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources and all(source.startswith(("data:image/", "#")) for source in sources)


def test_ids_are_unique_and_links_have_targets(made):
    text = page(made["out"])
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    links = set(re.findall(r'href="#([^"]*)"', text)) | set(re.findall(r"url\(#([^)]*)\)", text))
    assert links <= set(ids)


def test_svg_text_is_text(made):
    text = page(made["out"])
    assert ">optimiser step</text>" in text and "var(--ink)" in text


def test_text_of_records_is_escaped(made):
    text = page(made["out"])
    assert "<b>" not in text
    assert "&amp; why" in text


def test_same_artefacts_give_the_same_bytes(made):
    again = made["workdir"] / "again"
    report.run(ConfigDict({"name": "demo"}), made["inputs"], again, None, rows=made["rows"], table=made["table"])
    assert page(again) == page(made["out"])


def test_first_line_is_the_verdict(made):
    body = page(made["out"]).split("<main>")[1].lstrip()
    assert body.startswith('<p class="verdict">Relative to the row tuned on all data')


def test_first_line_says_that_nothing_can_be_ranked(made):
    table = relative.compare({"coincide": [answers(0.5, 0)]}, resamples=50)
    out = made["workdir"] / "unranked"
    report.run(
        ConfigDict({"name": "demo"}), made["inputs"], out, None, rows={"coincide": [made["workdir"]]}, table=table
    )
    body = page(out).split("<main>")[1].lstrip()
    assert body.startswith('<p class="verdict warn">Nothing can be ranked: there is no row')
    assert (out / "table.md").read_text().startswith("Nothing can be ranked")
    assert "train/curriculum.jsonl of a row with more than one arm" in page(out)


def test_rows_say_what_they_were_trained_on(made):
    """From the summaries of the manifests; the headline and coincide_plus have none, seeds of random differ."""
    lines = (made["out"] / "table.md").read_text().splitlines()
    assert "| distinct records | | | | – | 330 | 60–61 | – |" in lines
    assert "| steps | | | | – | 1,200 | 1,200 | – |" in lines
    assert '<tr><td colspan="4">distinct records</td><td>–</td><td>330</td><td>60–61</td>' in page(made["out"])
    assert tables.seen(Artefacts(made["inputs"], {}), made["table"]) == []


def test_without_results_the_rest_stands(made):
    table, out = relative.compare({}), made["workdir"] / "unasked"
    report.run(
        ConfigDict({"name": "demo"}), made["inputs"], out, None, rows={"coincide": [made["workdir"]]}, table=table
    )
    text = page(out)
    assert text.split("<main>")[1].lstrip().startswith('<p class="verdict warn">Nothing was evaluated')
    assert "the table of results needs <code>evaluate/answers.jsonl" in text
    assert '<h2 id="training"' in text and ">optimiser step</text>" in text
    assert (out / "table.md").read_text() == table["sentence"] + "\n"


def test_intervals_that_are_not_known_are_left_blank(made):
    table = json.loads(json.dumps(made["table"]))
    for row in table["rows"].values():
        row["rel_interval"] = None
        row["scores"]["count"]["interval"] = None
        if row["against"]:
            row["against"]["interval"] = None
    out = made["workdir"] / "unknown"
    summary = report.run(ConfigDict({"name": "demo"}), made["inputs"], out, None, rows=made["rows"], table=table)
    assert summary["left_out"] == []
    assert "nan" not in (out / "table.md").read_text() and "None" not in (out / "table.md").read_text()
    assert "None" not in page(out).split('id="coreset"')[0]


def test_rounds_that_were_drawn_but_never_trained_are_left_out(made):
    """120 steps in rounds of 10: round 12, drawn ahead at step 110, would begin at step 120."""
    assert "drawn from in 12 rounds" in page(made["out"])


def test_what_was_learned_and_forgotten_is_told(made):
    text = page(made["out"])
    assert "12 of 12 arms. First: 0 (" in text and ", step 10), 1 (" in text
    assert "2 arms were forgotten at some time, 1 of them recovered, 1 are forgotten at the end. Longest: 0 (" in text
    for name in ("heat-coincide_plus", "forgotten-coincide_plus", "difficulty", "spread"):
        assert f'id="{name}-' in text
    assert "| forgotten | coincide_plus |" in (made["out"] / "table.md").read_text()


def test_story_of_arms():
    losses = np.array(
        [[4.0, 1.0, np.nan, 2.0], [2.0, 0.98, np.nan, 1.0], [2.5, 0.97, np.nan, np.nan], [3.0, 0.96, 5, 1.5]]
    )
    told = curricula.story(np.arange(4), losses)
    np.testing.assert_array_equal(
        told.learned, [1, np.nan, np.nan, 1]
    )  # the second fell by 4 %, the third was seen once
    np.testing.assert_array_equal(told.forgotten[:, 0], [False, False, False, True])  # 3 > 2 + 0.2 · 4 > 2.5
    np.testing.assert_array_equal(told.forgotten[:, 3], [False, False, False, True])
    assert not told.forgotten[:, 1:3].any()


def test_ten_thousand_arms_are_a_small_page():
    rng = np.random.default_rng(0)
    losses = np.where(rng.random((100, 10_000)) < 0.5, rng.random((100, 10_000)), np.nan)
    told = curricula.story(np.arange(100), losses)
    steps, cells, learned, labels = curricula.grouped(told, np.full(10_000, "task"))
    assert cells.shape == (curricula.GROUPS, curricula.COLUMNS) == (len(labels), len(steps))
    assert len(rounds.heat("many", steps, cells, learned, labels)) < 100_000


def test_forgetting_by_task_is_the_mean_over_seeds(tmp_path):
    for seed, last in enumerate((0.0, 1.0)):
        train = tmp_path / f"seed{seed}" / "train"
        watch = [{"nll": [1.0, 3.0], "exact": [1.0, 0.0]}, {"nll": [2.0, 2.0 + last], "exact": [last, 0.0]}]
        artifacts.write_jsonl(train / "arms.jsonl", [{"step": 10 * n, "watch": w} for n, w in enumerate(watch)])
        artifacts.write_npy(train / "watched.npy", np.array([0, 1]))
    artefacts = Artefacts({}, {"row": [tmp_path / "seed0", tmp_path / "seed1"]})
    artefacts.tasks = np.array(["a", "b"], object)
    found = curricula.watched(artefacts)
    assert found["tasks"] == ["a", "b"] and found["lost"]["row"] == [[0.5, 1.0], [0.0, 0.0]]
    assert "| a | 50.0 / 1.000 |" in curricula.forgetting_table(found)
    assert curricula.watched(Artefacts({}, {"row": [tmp_path]}))["difficulty"] is None


def test_probes_are_a_line_of_their_own(made, tmp_path):
    for name, summary in (
        ("a", {"probe": {"records": 240, "times": 10, "seconds": 3.0}}),
        ("b", {"steps": 5, "moved": 0.031}),
    ):
        artifacts.write_json(tmp_path / name / "train" / "manifest.json", {"summary": summary})
    artefacts = Artefacts({}, {"a": [tmp_path / "a"], "b": [tmp_path / "b"]})
    seen = dict(tables.seen(artefacts, {"rows": {"a": {}, "b": {}}}))
    assert seen.pop("a probability moved by, of 1/arms") == ["–", "3.1 %"]
    assert seen == {"steps": ["–", "5"], "probes, rounds × records": ["10 × 240", "–"]}


def test_a_curriculum_without_its_plan_says_so(made):
    run = made["workdir"] / "rows" / "coincide_plus" / "seed0" / "train"
    held = (run / "run.json").read_bytes()
    (run / "run.json").unlink()
    out = made["workdir"] / "planless"
    summary = report.run(
        ConfigDict({"name": "demo"}), made["inputs"], out, None, rows=made["rows"], table=made["table"]
    )
    (run / "run.json").write_bytes(held)
    assert summary["left_out"] == ["curriculum"] and "seed0/train/run.json" in page(out)


def test_members_of_clusters_leave_out_what_is_in_none():
    groups = kmeans.members(np.array([1, -1, 0, 3, 1]), 4)
    assert [group.tolist() for group in groups] == [[2], [0, 4], [], [3]]


def test_missing_artefacts_are_named(made):
    out = made["workdir"] / "bare"
    summary = report.run(ConfigDict({"name": "demo"}), {}, out, None, rows={}, table=made["table"])
    text = page(out)
    for name in (
        "dataset/split.json",
        "select/clusters.parquet",
        "cluster/history.json",
        "train/metrics.jsonl",
        "manifest.json",
    ):
        assert f"needs <code>{name}" in text
    assert "results" not in summary["left_out"] and len(summary["left_out"]) == 9


def test_table_files(made):
    assert json.loads((made["out"] / "table.json").read_text()) == made["table"]
    lines = (made["out"] / "table.md").read_text().splitlines()
    assert lines[0] == "| task | metric | n | blind | coincide | full | random | coincide_plus |"
    assert any(line.startswith("| **Rel. %** (6 tasks)") for line in lines)


def test_costs_with_and_without_the_reference(made):
    text = page(made["out"])
    assert "<strong>19.5 s</strong> (extract + cluster + select)" in text  # 5.5 + 6.5 + 7.5
    assert "<strong>24.0 s</strong>" in text  # and 4.5 of the reference
    assert "Of train only the last attempt is counted" in text


def test_gallery_shows_five_drawn_clusters_and_the_worst(made):
    text = page(made["out"])
    assert text.count('<section class="cluster">') in (5, 6)
    assert text.count("the lowest within-cluster cosine") == 1
    assert len(text) < 5e6
