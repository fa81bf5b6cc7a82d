"""`--plan`: bytes on disk and memory against real runs of the stages, FLOP by hand, the command and its sentences."""

import json
import pathlib
import subprocess
import sys
import tracemalloc

import command
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax import cluster, main, pipeline, plan, selection
from coincide_jax.core import axes, precision
from coincide_jax.core import store as stores
from coincide_jax.core.errors import UserError
from coincide_jax.extract import activations
from coincide_jax.models import flops, layers, vlm
from coincide_jax.plan import sizes, stages
from coincide_jax.plan.devices import Devices
from configs import arrays, common, demo, llava15


def by_stage(config, devices: str, **options) -> dict:
    """Stage → its cost."""
    return {cost.stage: cost for cost in plan.costs(config, Devices.parse(devices), **options)[0]}


def test_the_published_recipe_by_arithmetic():
    config = llava15.get_config()
    found = by_stage(config, "1xH100-80GB")
    assert list(found) == ["extract", "cluster", "select", "train", "evaluate"]
    assert found["extract"].records == round(665_298 * 0.98) and "20 of 24 layers, D = 20480" in found["extract"].how
    assert 1.5e18 < found["extract"].flop < 2.2e18  # methods.md §4.8: about 1.8e18
    n = found["cluster"].records
    assert found["select"].disk > 2 * n * 20_480 and "1 pass over the features, copied" in found["select"].how
    assert found["cluster"].flop == pytest.approx(51 * 2 * n * 10_000 * 20_480)  # 50 iterations, and the separation
    assert found["train"].records == int(0.2 * n)
    assert "features stay on the devices" in found["cluster"].how
    assert "features streamed, 26.7 GB in each" in by_stage(config, "4xV100-32GB")["cluster"].how


def test_a_forward_pass_of_the_first_layers_by_hand():
    cfg = vlm.VLMConfig.tiny(common.defaults().model, 48, 512)
    one, all_ = (flops.encode(flops.first_layers(cfg, depth), 3, 100) for depth in (1, 6))
    layer = 2 * (2 * 96 * 96 + 2 * 96 * 48 + 3 * 96 * 256) * 100 + 2 * 96 * 100 * 101
    assert all_ - one == 3 * 5 * layer
    assert flops.head(cfg, 3, 100) == 3 * 100 * 2 * 96 * 512


N, WIDTH, K = 6000, 640, 40


@pytest.fixture
def given(tmp_path):
    """A config of arrays alone, and the folder of its features: clusters of even size."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=(K, WIDTH))
    x = centre[np.arange(N) % K] + 0.3 * rng.normal(size=(N, WIDTH))
    np.save(tmp_path / "f.npy", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
    config = arrays.get_config().unlock()
    config.extract.features, config.cluster.k, config.cluster.iterations = str(tmp_path / "f.npy"), K, 3
    return config, tmp_path


def test_disk_is_counted_to_the_byte(given):
    config, folder = given
    found = by_stage(config, "8xCPU-2GB", arrays=True)
    assert list(found) == ["cluster", "select"] and found["cluster"].records == N
    mesh = axes.make_mesh()
    with jax.set_mesh(mesh):
        cluster.run(config, {}, folder / "cluster", mesh)
        selection.run(config, {"cluster": folder / "cluster"}, folder / "select", mesh)
    written = [(folder / "cluster" / name).stat().st_size for name in ("centroids.npy", "assignment.npy")]
    assert found["cluster"].disk == sum(written)
    assert found["select"].disk == (folder / "select" / "indices.npy").stat().st_size


@pytest.mark.parametrize(("rows", "width"), [(300, 48), (4096, 16), (9000, 33)])
def test_the_feature_store_is_counted_to_the_byte(tmp_path, rows, width):
    writer = stores.create(tmp_path / "f.zarr", rows, width)
    for first in writer.shards:
        writer.write(first, np.ones((min(writer.shard_rows, rows - first), width), np.float16))
    shards = [path for path in (tmp_path / "f.zarr").rglob("*") if path.is_file() and "/c/" in str(path)]
    assert stages.store(rows, width) == sum(path.stat().st_size for path in shards)


MEASURED = """
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from benchmarks.select import Peak, anonymous
from coincide_jax import cluster, selection
from coincide_jax.core import axes
from configs import arrays

folder, stage, rows, width, k = pathlib.Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
rng = np.random.default_rng(0)
out = np.lib.format.open_memmap(folder / "f.npy", "w+", np.float16, (rows, width))
for start in range(0, rows, 4096):
    x = rng.standard_normal((min(4096, rows - start), width), np.float32)
    out[start : start + len(x)] = x / np.linalg.norm(x, axis=1, keepdims=True)
np.save(folder / "c.npy", np.array(out[:k], np.float32))
np.save(folder / "a.npy", np.arange(rows, dtype=np.int32) % k)
del out
config = arrays.get_config().unlock()
config.extract.features, config.cluster.k, config.cluster.iterations = str(folder / "f.npy"), k, 2
config.cluster.product = "float32"
if stage == "select":
    config.cluster.centroids, config.cluster.assignment = str(folder / "c.npy"), str(folder / "a.npy")
    config.cluster.audit.separation, config.extract.num_layers = False, 4
mesh = axes.make_mesh()
with jax.set_mesh(mesh):
    if stage == "select":
        cluster.run(config, {}, folder / "cluster", mesh)
    jnp.zeros(8).block_until_ready()
    before = anonymous()
    with Peak() as peak:
        if stage == "cluster":
            cluster.run(config, {}, folder / "cluster", mesh)
        else:
            selection.run(config, {"cluster": folder / "cluster"}, folder / "select", mesh)
print(json.dumps(peak.bytes - before))
"""


@pytest.mark.parametrize(
    ("stage", "rows", "width", "k"), [("cluster", 60_000, 2048, 200), ("select", 60_000, 2048, 100)]
)
def test_memory_is_counted_within_30_percent(tmp_path, stage, rows, width, k):
    """Anonymous memory of the stage in a process of its own, on one CPU device."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), stage, str(rows), str(width), str(k)],
        capture_output=True,
        text=True,
        cwd=command.ROOT,
        env=command.environment(),
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    config = arrays.get_config().unlock()
    config.extract.features, config.cluster.k, config.cluster.product = str(tmp_path / "f.npy"), k, "float32"
    found = by_stage(config, "1xCPU-16GB", arrays=True)[stage]
    assert found.host + found.device == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize(("scores", "vocab"), [(False, 1024), (True, 4096)])
def test_extraction_is_what_xla_says_within_30_percent(scores, vocab):
    config = common.defaults()
    config.dataset.update(max_length=256, buckets=(256,), vocab=vocab, image_size=56)
    config.model.vision = dict(patch=14, width=64, depth=9, heads=2, mlp=128)
    config.model.decoder = dict(width=192, depth=9, heads=4, kv_heads=2, mlp=512)
    config.extract.update(rows_per_device=32, scores=scores)
    config.dataset.records, config.reference.path = "drawn", "not here"
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    cfg = vlm.VLMConfig.tiny(config.model, 56, vocab, precision.choose("float32"))
    taps = activations.choose_taps(config.extract, 9)
    cut = flops.first_layers(cfg, 9 if scores else taps[-1] + 1)
    with jax.set_mesh(mesh):
        params = layers.abstract_arrays(vlm.abstract(cut), mesh)
        kinds = {"tokens": ((32, 256), jnp.int32), "lengths": ((32,), jnp.int32), "image_start": ((32,), jnp.int32)}
        kinds |= {"images": ((32, 56, 56, 3), jnp.uint8), "labels": ((32, 256), bool), "text": ((32, 256), bool)}
        place = axes.batch_sharding(mesh)
        batch = {name: jax.ShapeDtypeStruct(*kind, sharding=place) for name, kind in kinds.items()}
        said = activations.features.lower(params, batch, cut, taps, scores).compile().memory_analysis()
    used = said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes
    found = by_stage(config, "1xCPU-16GB")["extract"]
    assert found.device == pytest.approx(used, rel=0.3)


@pytest.mark.parametrize("name", ["llava15", "vision_flan"])
def test_the_command_prints_every_stage_and_that_both_fit(name):
    status, output = command.call(f"--config=configs/{name}.py", "--plan_devices=1xH100-80GB,4xV100-32GB")
    assert status == 0, output
    tables = output.strip().split("\n\n")
    assert [table.splitlines()[-1].split(":")[0] for table in tables] == ["1xH100-80GB", "4xV100-32GB"]
    for table in tables:
        assert [line.split()[0] for line in table.splitlines()[2:7]] == [
            "extract",
            "cluster",
            "select",
            "train",
            "evaluate",
        ]
        assert table.endswith(" GB a device: fits")


def test_what_does_not_fit_is_refused_with_the_key_to_change():
    status, output = command.call("--config=configs/llava15.py", "--plan_devices=1xV100-32GB")
    assert status == 2
    assert "llava15 does not fit 1xV100-32GB: stage 'train' takes" in output.splitlines()[-1]
    status, output = command.call("--config=configs/llava15.py", "--plan_devices=1xT4-16GB", "--config.select.tau=0.2")
    assert status == 2 and "stage 'cluster' takes" in output and "lower cluster.k" in output.splitlines()[-1]


def test_the_devices_present():
    status, output = command.call("--config=configs/demo.py", "--plan", "--notable")
    assert status == 0 and output.splitlines()[-1].startswith("8xCPU-") and output.strip().endswith("fits")
    rows = {line.split()[0]: line.split() for line in output.splitlines()[2:9]}
    assert list(rows) == ["base", "reference", "extract", "cluster", "select", "train", "evaluate"]
    assert float(rows["train"][3].removeprefix("<")) >= 0  # hours: the speed is measured here


def planned(file: str, argument: str = "", **changes) -> list[plan.Row]:
    """The rows of a config file's table."""
    module = main.load_module(command.ROOT / "configs" / file)
    config = (module.get_config(argument) if argument else module.get_config()).unlock()
    config.update_from_flattened_dict(changes)
    last = getattr(module, "LAST", pipeline.NAMES[-1])
    return [plan.Row(*row) for row in pipeline.planned(config, module.sweep, last=last)]


def cells(text: str) -> dict[str, list[str]]:
    """Row → the words of its line, of what `plan.tell` says of a table."""
    return {line.split()[0]: line.split() for line in text.split("\n\n")[1].splitlines()[2:]}


def test_a_table_is_the_sum_of_what_its_rows_make():
    one, rows = Devices.parse("2xV100-32GB"), planned("demo.py", "table")
    found = cells(plan.tell(rows[0].config, [one], rows=rows))
    assert list(found) == ["coincide", "full", "random", "coincide_plus", "total"]
    assert " ".join(found["coincide"][5:]) == "3×base reference extract cluster 3×select 3×train 3×evaluate"
    assert found["full"][1] == "3" and found["full"][5:] == ["3×train", "3×evaluate"]
    by_row = {row.name: {cost.stage: cost for cost in plan.costs(row.config, one)[0]} for row in rows}
    # all records against a fifth of them, and answers to as many questions
    assert by_row["full"]["train"].flop > 4.9 * by_row["random"]["train"].flop
    assert by_row["full"]["evaluate"] == by_row["random"]["evaluate"]
    flop = 3 * sum(by_row["coincide"][stage].flop for stage in ("base", "select", "train", "evaluate"))
    flop += sum(by_row["coincide"][stage].flop for stage in ("reference", "extract", "cluster"))
    assert float(found["coincide"][2]) == pytest.approx(flop, rel=0.05)  # two digits are printed
    flop += sum(3 * by_row[row][stage].flop for row in ("full", "coincide_plus") for stage in ("train", "evaluate"))
    flop += sum(3 * by_row["random"][stage].flop for stage in ("select", "train", "evaluate"))
    assert float(found["total"][1]) == pytest.approx(flop, rel=0.05)
    disk = [float(found[row.name][4]) for row in rows]
    assert float(found["total"][3]) == pytest.approx(sum(disk), abs=0.03) and min(disk) > 0.05


def test_rows_that_are_not_counted_are_named():
    rows = planned("sweeps/curricula.py")
    text = plan.tell(rows[0].config, [Devices.parse("1xH100-80GB")], rows=rows)
    found = cells(text)
    assert found["progress"][1:5] == ["3", "–", "–", "–"] and "not counted: 'progress' has stages" in text
    assert text.endswith("  without progress") and text.count("(without its probes)") == 1
    assert {row.name for row in rows} | {"total"} == found.keys()


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("clusters", {"k60": "base reference extract cluster select train evaluate", "k15": "cluster select train"}),
        ("taps", {"random": "select train evaluate", "mlp": "extract cluster select train evaluate"}),
        ("fraction", {"p40": "select train evaluate", "full": "train evaluate"}),
        ("audit", {"attention_k100": "base reference extract cluster", "mlp_k100": "extract cluster",
                   "mlp_k300": "cluster"}),
    ],
)  # fmt: skip
def test_rows_of_real_sweeps(file, what):
    own = {"plan.records": 20_000, "dataset.records": "not here.json"} if file == "audit" else {}
    rows = planned(f"sweeps/{file}.py", **own)
    text = plan.tell(rows[0].config, [Devices.parse("1xT4-16GB")], rows=rows)
    found = cells(text)
    assert found.keys() == {row.name for row in rows} | {"total"}
    for row, stages_ in what.items():
        assert " ".join(found[row][5:]).startswith(stages_)
    assert file != "audit" or "\ntrain" not in text  # its rows end with the clusters


def test_a_row_that_does_not_fit_is_named():
    rows = planned("sweeps/clusters.py")
    rows[-1].config.unlock().train.update(micro_batch=2**20, batch=2**20)
    one = [Devices.parse("1xV100-32GB")]
    plan.refuse(rows[0].config, one, rows=rows[:-1])
    with pytest.raises(UserError, match=r"clusters, row 'k240', does not fit 1xV100-32GB: stage 'train' takes"):
        plan.refuse(rows[0].config, one, rows=rows)


def test_the_command_counts_the_table():
    status, output = command.call("--config=configs/demo.py:table", "--plan_devices=1xT4-16GB,2xT4-16GB")
    assert status == 0 and output.count("\ncoincide_plus ") == output.count("\ntotal ") == 2
    status, output = command.call("--config=configs/demo.py", "--plan_devices=1xT4-16GB", "--notable")
    assert status == 0 and "total" not in output


def test_records_are_those_of_the_file(tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    (tmp_path / "r.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(70)]))
    config = demo.get_config().unlock()
    config.dataset.records = str(tmp_path / "r.json")
    one = Devices.parse("1xCPU-4GB")
    assert sizes.find(config, one, False).records == 70
    config.dataset.limit = 50
    assert sizes.find(config, one, False).pool == round(50 * (1 - 0.1 - 0.02 - 0.2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--plan_devices=4V100",), "'4V100' is no device description; expected COUNTxKIND-MEMORYGB as in 4xV100-32GB"),
        (("--plan_devices=1xH10-80GB",), "unknown accelerator in --plan_devices 'H10'; did you mean 'H100'"),
        (("--plan_devices=3xV100-32GB",), "train.micro_batch is 16; expected a multiple of the 3 devices"),
        (("--plan", "--config.plan.records=0"), "dataset.records 'data/llava_v1_5_mix665k.json' is not here and plan."),
    ],
)
def test_mistakes_are_sentences(arguments, sentence):
    status, output = command.call("--config=configs/llava15.py", *arguments)
    assert status == 2 and sentence in output


def test_kmeans_parallel_says_what_it_holds():
    config = llava15.get_config().unlock()
    plain = by_stage(config, "1xH100-80GB")["cluster"]
    config.cluster.init = "k-means||"
    found = by_stage(config, "1xH100-80GB")["cluster"]
    assert found.host - plain.host == 24 * 100_000 * 20_480 and "k-means|| holds 100000 drawn rows" in found.how

    with pytest.raises(UserError, match=r"does not fit this host: stage 'cluster' takes 51.* take cluster.init=random"):
        plan.refuse(config, [Devices.parse("1xH100-80GB")._replace(host=48e9)])


def test_centroids_that_devices_share_fit_small_ones():
    """80 bytes for each number of 10,000 centroids are 16 GB, and a quarter of that on each of four devices."""
    config, four = llava15.get_config().unlock(), Devices.parse("4xV100-16GB")
    with pytest.raises(UserError, match=r"stage 'cluster' takes 16.* raise device.model_parallel .up to 4 devices"):
        plan.refuse(config, [four])
    whole = by_stage(config, "4xV100-16GB")["cluster"]
    config.device.model_parallel = 4
    found = by_stage(config, "4xV100-16GB")["cluster"]
    numbers = 10_000 * 20_480
    assert whole.device > 80 * numbers
    assert 80 * numbers / 4 < found.device < four.usable * four.bytes
    assert "centroids shared by 4 devices" in found.how and "model_parallel" not in found.remedy
    with pytest.raises(UserError, match="stage 'train' takes"):  # clustering is no longer what does not fit
        plan.refuse(config, [four])
    config.cluster.k = 1000  # of which a device has all
    assert "shared" not in by_stage(config, "4xV100-16GB")["cluster"].how


def test_a_row_of_the_host_is_counted_within_20_percent(tmp_path):
    """What NumPy holds at its peak, of many rows less that of few; from the start to the last file."""
    peaks, mesh = {}, axes.make_mesh(devices=jax.devices()[:1])
    for keys in ({"init": "random"}, {"init": "random", "audit": {"stability": True}}, {"init": "k-means||"}):
        config = arrays.get_config().unlock()
        config.cluster.update({"k": 20, "iterations": 2, "product": "float32"} | keys)
        for rows in (20_000, 20_000, 220_000):  # the first one compiles
            x = np.random.default_rng(0).normal(size=(rows, 4))
            np.save(tmp_path / "f.npy", (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16))
            config.extract.features = str(tmp_path / "f.npy")
            tracemalloc.start()
            with jax.set_mesh(mesh):
                cluster.run(config, {}, tmp_path / "cluster", mesh)
            peaks[rows] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        measured = (peaks[220_000] - peaks[20_000]) / 200_000
        assert stages.cluster_row(config.cluster, labels=False) == pytest.approx(measured, rel=0.2), keys


def test_nothing_is_run(tmp_path):
    status, output = command.call(command.TINY, f"--workdir={tmp_path}/w", "--plan_devices=1xCPU-8GB")
    assert status == 0 and "\n1xCPU-8GB: " in output and output.splitlines()[-1].startswith("total ")
    assert not pathlib.Path(tmp_path / "w").exists()
