"""Forgetting, with and without rehearsal: a task of the embedded data is taken away for the second half of training.

    python -m benchmarks.forgetting [--task color] [--seeds 3] [--steps 100] [--rehearsal 0.2] [--workdir DIR] [--tiny]

The target is tuned on the demo's pool by COINCIDE+ whose arms are the tasks. Three runs a seed, all of as many steps
from the same base: `kept` may draw every task to the end; `gone` draws nothing of the task from the middle on;
`rehearsed` is `gone` with a share of its slots for replays of what was trained on before and is being forgotten
(curriculum/rehearsal.py). Printed as one JSON line: scores of the task's held-out questions and of all others, a number
a seed, and the means. A workdir that is given can be used again; what is complete there is skipped.
"""

import contextlib
import functools
import pathlib
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from coincide_jax import curriculum, evaluation, pipeline, training
from coincide_jax.core import artifacts, axes
from coincide_jax.curriculum import rehearsal
from coincide_jax.curriculum.settings import Settings
from coincide_jax.dataset import source
from coincide_jax.kernels.bandits import Sampler
from configs import demo


class Half(NamedTuple):
    """inner: state of the sampler; step: int32[], steps done."""

    inner: tuple
    step: jax.Array


def without(sampler: Sampler, arm: int, after: int) -> Sampler:
    """The sampler, but it draws nothing of `arm` once `after` steps are done, as long as another arm has records."""

    def init(arms: int) -> Half:
        return Half(sampler.init(arms), jnp.zeros((), jnp.int32))

    def probabilities(state: Half, alive):
        left = alive & ((jnp.arange(alive.shape[0]) != arm) | (state.step < after))
        return sampler.probabilities(state.inner, jnp.where(left.any(), left, alive))

    def update(state: Half, arms, losses, weight) -> Half:
        return Half(sampler.update(state.inner, arms, losses, weight), state.step + 1)

    return sampler._replace(init=init, probabilities=probabilities, update=update)


def config_of(seed: int, keys) -> object:
    """The demo with COINCIDE+ over the whole pool, for `keys.steps` steps."""
    config = demo.get_config("tiny" if keys.tiny else "one").unlock()
    if keys.tiny:
        config.train.batch = config.train.micro_batch = 8
    else:
        config.dataset.drawn.records = 4000
        config.base.epochs = 1.0
    config.curriculum.name, config.curriculum.pool = "coincide_plus", "all"
    config.train.steps, config.base.seed, config.train.seed = keys.steps, seed, seed
    return config.lock()


def tasks_as_clusters(workdir: pathlib.Path) -> list[str]:
    """Leaves the folder `tasks` in the form of the stage cluster, a cluster a task; returns the tasks' names."""
    split = artifacts.read_json(workdir / "dataset" / "split.json")
    task = np.asarray([str(record.get("task", "")) for record in source.load(pathlib.Path(split["records"]))])
    names = sorted(set(task))
    pool = np.isin(np.arange(len(task)), split["pool"])
    assignment = np.where(pool, np.searchsorted(names, task), -1).astype(np.int32)
    artifacts.write_npy(workdir / "tasks" / "assignment.npy", assignment)
    artifacts.write_npy(workdir / "tasks" / "centroids.npy", np.eye(len(names), dtype=np.float32))
    return names


def samplers_of(config, arms: list[str], keys) -> dict[str, Sampler]:
    """Condition → its sampler, one for all seeds, so that they share compiled steps."""
    kept = curriculum.make(config.curriculum)
    gone = without(kept, arms.index(keys.task), keys.steps // 2)
    told = Settings.of(dict(config.curriculum) | {"rehearsal": keys.rehearsal})
    return {"kept": kept, "gone": gone, "rehearsed": rehearsal.rehearsal(gone, told)}


def handed(sampler: Sampler, *_, **__) -> tuple[Sampler, None]:
    """In place of `curriculum.prepare`: this sampler, and no order within an arm."""
    return sampler, None


def measure(keys, workdir: pathlib.Path, mesh) -> dict:
    """Condition → scores of each seed, {'task': [...], 'others': [...]}."""
    found, samplers = {}, {}
    for seed in range(keys.seeds):
        config, folder = config_of(seed, keys), workdir / f"seed{seed}"
        pipeline.check(config)
        options = {"shared": {}, "names": ("dataset", "base"), "force": None, "command": ()}
        inputs = pipeline.run_row(config, folder, mesh, **options)
        names = tasks_as_clusters(folder)
        if keys.task not in names:
            raise SystemExit(f"--task is {keys.task}; expected one of {', '.join(names)}")
        inputs = {"dataset": inputs["dataset"], "base": inputs["base"], "cluster": folder / "tasks"}
        samplers = samplers or samplers_of(config, names, keys)
        for condition, sampler in samplers.items():
            out = folder / condition
            if not (out / "scores.json").exists():
                view = pipeline.subset(config, training.TRAIN_KEYS)
                prepare = functools.partial(handed, sampler)
                kinds = training.Kinds(offline=curriculum.OFFLINE)
                training.run(view, inputs, out / "train", mesh, prepare=prepare, kinds=kinds)
                if condition == "gone" and (left := drawn_late(out / "train", names.index(keys.task))):
                    raise SystemExit(
                        f"{left} records of {keys.task} were drawn late: the others ran out; fewer --steps"
                    )
                view, asked = pipeline.subset(config, evaluation.KEYS), inputs | {"train": out / "train"}
                evaluation.run(view, asked, out / "evaluate", mesh)
                artifacts.write_json(out / "scores.json", scores(out / "evaluate" / "answers.jsonl"))
            score = artifacts.read_json(out / "scores.json")
            others = [value for task, value in score.items() if task != keys.task]
            row = found.setdefault(condition, {"task": [], "others": []})
            row["task"].append(round(score[keys.task], 4))
            row["others"].append(round(sum(others) / len(others), 4))
    return found


def drawn_late(train: pathlib.Path, arm: int) -> int:
    """Draws of an arm in the second half of a run's rounds."""
    rounds = [line["draws"][arm] for line in artifacts.read_jsonl(train / "curriculum.jsonl")]
    return sum(rounds[len(rounds) // 2 :])


def scores(path: pathlib.Path) -> dict[str, float]:
    """Mean score of each task of an answers.jsonl."""
    of: dict[str, list[float]] = {}
    for answer in artifacts.read_jsonl(path):
        of.setdefault(answer["task"], []).append(answer["score"])
    return {task: sum(values) / len(values) for task, values in of.items()}


def main() -> None:
    """Runs the conditions, prints the line."""
    parser = record.arguments("A task taken away in mid-training, with and without rehearsal.")
    parser.add_argument("--task", default="color")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rehearsal", type=float, default=0.2)
    parser.add_argument("--workdir", type=pathlib.Path)
    parser.add_argument("--tiny", action="store_true", help="a few records, to see that it runs")
    keys = parser.parse_args()
    mesh = axes.make_mesh()
    told_apart = contextlib.redirect_stdout(sys.stderr)  # what the stages say; the line is all of stdout
    with tempfile.TemporaryDirectory() as folder, told_apart, jax.set_mesh(mesh):
        found = measure(keys, keys.workdir or pathlib.Path(folder), mesh)
    means = {
        condition: {part: round(sum(values) / len(values), 4) for part, values in row.items()}
        for condition, row in found.items()
    }
    told = {name: getattr(keys, name) for name in ("task", "seeds", "steps", "rehearsal")}
    record.emit("forgetting", told | {"by_seed": found, "mean": means}, keys)


if __name__ == "__main__":
    main()
