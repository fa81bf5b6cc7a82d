"""A user's mistake: one clear sentence, exit status 2, no traceback."""

import fcntl
import json

import command
import pytest

LLAVA = "--config=configs/llava_json.py"


def sentence(*arguments) -> str:
    """The one sentence that a wrong command ends with."""
    status, output = command.call(*arguments)
    assert status == 2, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("coincide: ")
    return last


@pytest.fixture
def records(tmp_path):
    """A LLaVA file of two good text-only records."""
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]
    path = tmp_path / "records.json"
    path.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(2)]))
    return path


def own(path, tmp_path, *more):
    """Arguments that run the pipeline on `path`."""
    return (
        LLAVA,
        f"--config.dataset.records={path}",
        f"--config.dataset.images={tmp_path}",
        f"--workdir={tmp_path}/w",
        *more,
    )


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path):
    status, output = command.run(*own(tmp_path / "none.json", tmp_path, "--config.cluster.k=many"))
    assert status == 2 and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("coincide: ")
    assert not (tmp_path / "w").exists()


def test_no_config():
    assert "--config=configs/demo.py" in sentence()


def test_unknown_config_file():
    assert "did you mean 'configs/demo.py'" in sentence("--config=configs/dem.py")


def test_unknown_argument_of_the_config():
    assert "configs/demo.py:tables" in sentence("--config=configs/demo.py:tables")


def test_unknown_key_names_the_nearest():
    assert "did you mean 'cluster.k'" in sentence(command.TINY, "--config.cluster.kk=4")


def test_wrong_type():
    assert "cluster.k" in sentence(command.TINY, "--config.cluster.k=many")


def test_unknown_flag():
    assert "workdirr" in sentence(command.TINY, "--workdirr=x")


@pytest.mark.parametrize("flag", ["--stages=clusters", "--stages=dataset,clusters", "--force=clusters"])
def test_unknown_stage(tmp_path, flag):
    assert "unknown stage 'clusters'; did you mean 'cluster'" in sentence(command.TINY, f"--workdir={tmp_path}/w", flag)
    assert not (tmp_path / "w").exists()


def test_unknown_selector(tmp_path):
    line = sentence(*own("none", tmp_path, "--config.select.name=coincid"))
    assert "unknown selector 'coincid'" in line and "did you mean 'coincide'" in line


def test_unknown_sampler(tmp_path):
    line = sentence("--config=configs/llava15.py", f"--workdir={tmp_path}/w", "--config.curriculum.name=exp33")
    assert "'exp33'; did you mean 'exp3'" in line


@pytest.mark.parametrize(("key", "value"), [("select.name", "random"), ("curriculum.pool", "all"), ("train.seed", 3)])
def test_a_key_that_the_rows_of_the_table_set(tmp_path, key, value):
    line = sentence(*own("none", tmp_path, f"--config.{key}={value}"))
    assert f"config key '{key}' is set by " in line and "--notable" in line


def test_unknown_metric_is_found_before_anything_runs(records, tmp_path):
    (tmp_path / "questions").mkdir()
    row = {"id": "1", "question": "What?", "answers": ["this"], "metric": "exactt"}
    (tmp_path / "questions" / "what.jsonl").write_text(json.dumps(row) + "\n")
    line = sentence(*own(records, tmp_path, f"--config.evaluate.questions={tmp_path}/questions"))
    assert "what.jsonl, line 1" in line and "unknown metric 'exactt'" in line and "did you mean 'exact'" in line
    assert not (tmp_path / "w" / "dataset").exists()


@pytest.mark.parametrize("fraction", [0, 1.5, -0.1])
def test_budget_outside_its_range(tmp_path, fraction):
    assert "select.fraction" in sentence(*own("none", tmp_path, f"--config.select.fraction={fraction}"))


@pytest.mark.parametrize("key", ["base.micro_batch", "train.micro_batch", "evaluate.rows"])
def test_rows_that_the_devices_cannot_share(tmp_path, key):
    line = sentence(command.TINY, f"--workdir={tmp_path}/w", f"--config.{key}=4")
    assert f"{key} is 4; expected a multiple of the 8 devices that share its rows" in line
    assert not (tmp_path / "w").exists()


def test_missing_file(tmp_path):
    assert f"{tmp_path}/none.json does not exist" in sentence(*own(tmp_path / "none.json", tmp_path))


def test_folder_instead_of_file(tmp_path):
    assert f"{tmp_path} is a folder" in sentence(*own(tmp_path, tmp_path))


def test_images_folder_missing(records, tmp_path):
    rows = json.loads(records.read_text())
    rows[0]["image"] = "a.png"
    records.write_text(json.dumps(rows))
    assert "dataset.images" in sentence(*own(records, tmp_path, f"--config.dataset.images={tmp_path}/gone"))


def test_json_cut_in_the_middle(records, tmp_path):
    records.write_text(records.read_text()[:-40])
    line = sentence(*own(records, tmp_path))
    assert f"{records} is not valid JSON: line 1, column " in line


def test_all_records_quarantined(records, tmp_path):
    records.write_text(json.dumps([{"id": "a", "image": "gone.png", "conversations": []}]))
    assert f"all 1 records of {records} are quarantined: row 0: " in sentence(*own(records, tmp_path))
    assert not (tmp_path / "w" / "dataset" / "manifest.json").exists()


def test_workdir_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in sentence(command.TINY, f"--workdir={tmp_path}/file/run")


def test_second_process_on_one_workdir(tmp_path):
    with open(tmp_path / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("4321")
        handle.flush()
        assert "in use by process 4321" in sentence(command.TINY, f"--workdir={tmp_path}")


def test_an_argument_that_a_config_does_not_take_is_one_sentence():
    status, output = command.call("--config=configs/arrays.py:x")
    assert status == 2 and "takes no argument; found ':x'" in output
    assert "unknown argument of configs/llava15.py:x 'x'" in sentence("--config=configs/llava15.py:x")
