"""Which task helps which: the skill graph of Skill-it (Chen et al. 2023, §3.2 and appendix), learned by short runs.

`linear` (the paper's approximation, K runs): a run of `curriculum.graph_steps` steps on each task alone, from the
weights that training starts from; A_ij is how far it lowered the loss of task j, negative values 0, each row divided by
its largest, the diagonal 1. `brute` (K + K (K − 1)/2 runs): a run on task j alone against one on i and j together, of
as many steps; A_ij is the share by which the second ends lower on j. Losses are means over the held-out records of the
probe; steps of these runs are no steps of the training that follows, and the summary tells how many there were.
"""

import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coincide_jax.core import artifacts, processes
from coincide_jax.core.metrics import say
from coincide_jax.dataset import Dataset
from coincide_jax.kernels import bandits
from coincide_jax.models.vlm import VLMConfig
from coincide_jax.training import probe
from coincide_jax.training import steps as compiled
from coincide_jax.training.asking import Draw
from coincide_jax.training.loop import Termination, fit
from coincide_jax.training.state import Recipe


class Trial(NamedTuple):
    """What the short runs have in common: the start, the records with their tasks, the recipe."""

    params: dict
    cfg: VLMConfig
    data: Dataset
    draw: Draw
    recipe: Recipe
    settings: object  # config.curriculum
    threads: int
    mesh: object
    stop: Termination


def learn(trial: Trial, names: Sequence[str], out: pathlib.Path) -> tuple[np.ndarray, int]:
    """The graph f64[K, K] between the tasks `names`, and the optimiser steps that it took.

    Leaves graph.npy, and names.json with the order of its rows. A run that was killed goes on at the first short run
    that has not ended.
    """
    kind, steps = trial.settings.graph, trial.settings.graph_steps
    alone = [(task,) for task in range(len(names))]
    pairs = list(itertools.combinations(range(len(names)), 2)) if kind == "brute" else []
    cost = steps * (len(alone) + len(pairs))
    if processes.led((out / "graph.npy").exists):
        return np.load(out / "graph.npy"), cost
    say("train", f"the skill graph takes {len(alone) + len(pairs)} runs of {steps} steps")
    before = _losses(trial, trial.params) if kind == "linear" else None
    after = {}
    for tasks in alone + pairs:
        name = "+".join(map(str, tasks))
        kept, run = out / "losses" / f"{name}.npy", out / "runs" / name
        if not processes.led(kept.exists):
            say("train", f"skill graph: {' and '.join(names[task] for task in tasks)}")
            artifacts.write_npy(kept, _losses(trial, _train(trial, tasks, run)))
        processes.together()  # the losses are written, and the run is no longer read
        if processes.leads():
            shutil.rmtree(run, ignore_errors=True)
        after[tasks] = np.load(kept)
    if kind == "linear":
        graph = linear(before, np.stack([after[tasks] for tasks in alone]))
    else:
        graph = brute(np.stack([after[tasks] for tasks in alone]), {tasks: after[tasks] for tasks in pairs})
    artifacts.write_json(out / "names.json", list(names))
    artifacts.write_npy(out / "graph.npy", graph)
    edges = int((graph > 0).sum()) - len(names)
    say("train", f"skill graph: {edges} edges between {len(names)} tasks · {out / 'graph.npy'}")
    return graph, cost


def linear(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The graph f64[K, K] from the losses f[K] of the start and f[K, K], row i after a run on task i alone; NaN: not
    measured."""
    drop = np.nan_to_num(np.maximum(np.float64(before)[None] - after, 0.0))
    graph = drop / np.maximum(drop.max(axis=1, keepdims=True), 1e-12)
    np.fill_diagonal(graph, 1.0)
    return graph


def brute(alone: np.ndarray, together: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """The graph f64[K, K] from the losses f[K, K], row j after a run on task j alone, and f[K] after a run on tasks i
    and j together."""
    graph = np.eye(len(alone))
    for pair, losses in together.items():
        for helper, helped in (pair, pair[::-1]):
            own = float(alone[helped, helped])
            gain = (own - float(losses[helped])) / max(own, 1e-12)
            graph[helper, helped] = max(gain, 0.0) if np.isfinite(gain) else 0.0
    return graph


def _train(trial: Trial, tasks: tuple[int, ...], out: pathlib.Path) -> dict:
    """The whole tree after the steps of one short run, the records of its tasks in turn."""
    steps = trial.settings.graph_steps
    recipe = dataclasses.replace(trial.recipe, steps=steps, checkpoint_every=max(steps, trial.recipe.checkpoint_every))
    count = steps * recipe.batch  # the same for every task, so that one program serves all
    rng = np.random.default_rng([recipe.seed, *tasks])
    columns = [
        np.resize(rng.permutation(trial.draw.records[trial.draw.arm == task]), -(-count // len(tasks)))
        for task in tasks
    ]
    records = np.stack(columns, axis=1).reshape(-1)[:count]
    out.mkdir(parents=True, exist_ok=True)
    params, _ = fit(
        name="train",
        params=trial.params,
        cfg=trial.cfg,
        dataset=trial.data,
        members={"records": records, "arm": np.zeros(count, np.int64), "arms": 1},
        sampler=bandits.UNIFORM,
        total_records=count,
        recipe=recipe,
        round_steps=trial.settings.round_steps,
        lag=0,
        threads=trial.threads,
        mesh=trial.mesh,
        out=out,
        stop=trial.stop,
    )
    return params


def _losses(trial: Trial, params: dict) -> np.ndarray:
    """Mean loss (nats) of each task's probe records under these weights, f32[K]."""
    judge = compiled.compile_steps(trial.cfg, dataclasses.replace(trial.recipe, mode="full"), bandits.UNIFORM).judge
    return probe.measure(
        lambda batch: judge(params, {}, batch, "nll"),
        trial.data,
        trial.draw.probed,
        batch=trial.recipe.batch,
        micro=trial.recipe.micro_batch,
        threads=trial.threads,
        mesh=trial.mesh,
    )
