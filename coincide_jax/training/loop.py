"""The loop: draw a round, read its records, run its steps, write what happened, save, go on where it stopped."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from coincide_jax.core import artifacts, axes, checkpoint, precision
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import JsonLines, Progress, say
from coincide_jax.dataset import batches
from coincide_jax.kernels import plan
from coincide_jax.models import lora
from coincide_jax.training import probe
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.state import Recipe

IN_FLIGHT = 2  # steps that the host may be ahead of the device
STOPPED = 143  # exit code after SIGTERM: 128 + 15


class Termination:
    """Inside it SIGTERM does not kill: it sets `requested`, and the loop saves at the next step boundary. A request
    that no loop answered ends the program when the block ends."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "Termination":
        self.before = signal.signal(signal.SIGTERM, self._request)
        return self

    def _request(self, *_) -> None:
        self.requested = True

    def __exit__(self, kind, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)
        if self.requested and kind is None:
            raise SystemExit(STOPPED)


class Log:
    """`metrics.jsonl` (a line a step) and `curriculum.jsonl` (a line a round), cut back to where a run goes on.

    `loss` is the newest one that has reached the host. `seconds` of a line is the time between the completions of two
    steps, as the host saw them (reading, drawing and saving included); the steps still in flight at a flush share
    what is left, so that the lines add up to the time that went by.
    """

    def __init__(self, out: pathlib.Path, step: int):
        _cut(out / "metrics.jsonl", lambda line: line["step"] <= step)
        _cut(out / "curriculum.jsonl", lambda line: line["drawn_at"] < step)
        self.steps, self.rounds = JsonLines(out / "metrics.jsonl"), JsonLines(out / "curriculum.jsonl")
        self.waiting: list[tuple[int, dict]] = []
        self.seconds: list[float] = []  # of the first of them, which have ended
        self.loss, self.clock = math.nan, time.monotonic()

    def step(self, step: int, metrics: dict) -> None:
        """Keeps the metrics of a step, still on the device, and waits for the step `IN_FLIGHT` before it."""
        self.waiting.append((step, metrics))
        if len(self.waiting) > IN_FLIGHT:
            ended = jax.block_until_ready(self.waiting[-1 - IN_FLIGHT][1])
            self.seconds.append(self._lap())
            self.loss = float(jax.device_get(ended["loss"]))

    def _lap(self) -> float:
        """Seconds since the last call."""
        before, self.clock = self.clock, time.monotonic()
        return self.clock - before

    def flush(self, name: str) -> None:
        """Fetches and writes what waits.

        Raises:
          UserError: a loss that is not finite; a gradient that is not, unless the step was skipped for it; a loss scale
            that helps no more.
        """
        fetched = jax.device_get([metrics for _, metrics in self.waiting])
        late = len(self.waiting) - len(self.seconds)
        self.seconds += [self._lap() / late] * late if late else []
        for (step, _), metrics, seconds in zip(self.waiting, fetched, self.seconds, strict=True):
            metrics = {key: value.item() for key, value in metrics.items()}
            self.loss, norm, skipped = metrics["loss"], metrics["gradient_norm"], metrics.get("skipped", 0)
            if not math.isfinite(self.loss) or not (math.isfinite(norm) or skipped):
                raise UserError(
                    f"{name}: loss {self.loss}, gradient norm {norm} at step {step} (steps "
                    f"{self.waiting[0][0]}–{self.waiting[-1][0]} were checked); a lower {name}.learning_rate may help"
                )
            if metrics.get("loss_scale", 1.0) < precision.LOWEST_SCALE:
                raise UserError(
                    f"{name}: gradients still overflow float16 at step {step} although the loss scale fell to "
                    f"{metrics['loss_scale']:g}; expected device.precision=float32, or a lower {name}.learning_rate"
                )
            metrics["gradient_norm"] = norm if math.isfinite(norm) else None  # JSON has no infinity
            self.steps.write(step=step, **metrics, seconds=round(seconds, 4))
        self.waiting.clear()
        self.seconds.clear()

    def close(self) -> None:
        """Closes both files."""
        self.steps.close()
        self.rounds.close()


def _cut(path: pathlib.Path, keep: Callable[[dict], bool]) -> None:
    """Drops the lines of a JSON-lines file that `keep` refuses, and a last line cut short by a kill."""
    if not path.exists():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    artifacts.write_text(path, "".join(line for line in whole if keep(json.loads(line))))


def _claim(out: pathlib.Path, identity: dict) -> None:
    """Notes what run the folder holds; refuses to go on with the checkpoints of another one."""
    path = out / "run.json"
    if not path.exists():
        artifacts.write_json(path, identity)
        return
    found = artifacts.read_json(path)
    for key, value in identity.items():
        if found.get(key, value) != value:
            raise UserError(f"{out} holds a run with {key} = {found[key]}, now {value}; take another folder")


def _reader(dataset, records: np.ndarray, first: int, recipe: Recipe, threads: int) -> Iterator[list[batches.Batch]]:
    """The micro-batches of a plan from row `first` on; the first step is read before this returns."""
    steps = batches.planned(dataset, records, micro=recipe.micro_batch, start_step=first, threads=threads)
    return itertools.chain([next(steps)], steps)


def fit(
    *,
    name: str,
    params: dict,
    cfg,
    dataset,
    members: dict,
    sampler,
    total_records: int,
    recipe: Recipe,
    round_steps: int,
    lag: int,
    threads: int,
    mesh,
    out: pathlib.Path,
    stop: Termination,
    exact: bool = False,
    at_end: Callable[[dict], None] | None = None,
    ask: Callable[[np.ndarray, int], None] | None = None,
) -> tuple[dict, dict]:
    """Trains a model. The same call on the same folder goes on where a killed one stopped, with the same numbers.

    Args:
      name: key of the recipe, for screen and messages (base, reference.train, train).
      params: whole tree of the start; stays as it is.
      members: records int[N] and arm int[N] (which of `arms` each belongs to); rank real[N], the order within an arm of
        a sampler that does not shuffle; probed int[arms, P], records that a sampler with a probe measures, or a
        function step → int[arms, P] (-1: none) of them; limit, a `plan.Limit` of what is drawn.
      sampler: init, probabilities, update.
      exact: whether a probe measures exact answers instead of losses.
      total_records: records of one epoch of this run; the recipe's epochs or steps make the length of it.
      round_steps: S, steps between two draws.
      lag: 0 draws a round after the last update, 1 a round earlier, so that reading overlaps.
      out: gets checkpoints/, metrics.jsonl, curriculum.jsonl, run.json.
      at_end: is handed the trained tree before LoRA is merged.
      ask: is handed the records int[S, B] of every round that was drawn (-1: empty) and the number of its first step,
        before any of them is read.

    Returns:
      The trained whole tree (LoRA merged) and summary numbers.

    Raises:
      UserError: no records, a lag that is not 0 or 1, a loss that is not finite, gradients
        that overflow float16 whatever the loss scale, a folder of another run.
      SystemExit: 143, after a save, when SIGTERM came.
    """
    if not len(members["records"]):
        raise UserError(f"{name}: there are no records to train on")
    if lag not in (0, 1) or round_steps < 1:
        raise UserError(f"curriculum.lag is {lag} and round_steps {round_steps}; expected lag 0 or 1, round_steps ≥ 1")
    steps, slots = recipe.length(total_records)
    arms = members["arms"]
    table = plan.members(members["records"], members["arm"], arms, members.get("rank"))
    limit, probed = members.get("limit"), members.get("probed")
    _claim(
        out,
        {
            "start": checkpoint.fingerprint(params),
            "records": hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in table)).hexdigest()[:16],
            "steps": steps,
            "slots": slots,
            "round_steps": round_steps,
            "lag": lag,
            "seed": recipe.seed,
            "mode": recipe.mode,
            "precision": cfg.precision.compute,
        },
    )
    table = jax.device_put(table, jax.NamedSharding(mesh, jax.P()))
    trained, frozen = states.divide(params, cfg, recipe, jax.random.key(recipe.seed), mesh)
    scaled = cfg.precision.loss_scale
    state = states.start(trained, recipe, sampler, arms, 1 + lag, round_steps, loss_scale=scaled)
    run, schedule = compiled.compile_steps(cfg, recipe, sampler), states.Schedule.of(recipe, steps)
    accumulator = jax.jit(compiled.empty, static_argnums=1)(state.params, recipe.batch)

    checkpoints = checkpoint.Checkpoints(out / "checkpoints", recipe.keep)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(abstract)
    step = 0
    if restored is not None:
        step, state, _ = restored
        say(name, f"goes on at step {step} of {steps}")
    log = Log(out, step)
    ahead, probing, chosen = None, 0.0, None
    say(name, f"{steps} steps of {recipe.batch} records · {len(members['records'])} records in {arms} arms")
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        Progress(name, steps, "steps") as progress,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        progress.advance(step)
        while step < steps:
            number, first = divmod(step, round_steps)
            if first == 0 and run.learn:
                begin = time.monotonic()
                chosen = probed(step) if callable(probed) else probed
                values = probe.measure(
                    lambda batch, state=state: run.judge(state.params, frozen, batch, exact),
                    dataset,
                    chosen,
                    batch=recipe.batch,
                    micro=recipe.micro_batch,
                    threads=threads,
                    mesh=mesh,
                )
                values = jax.device_put(values, jax.NamedSharding(mesh, jax.P()))
                state = state.replace(sampler=run.learn(state.sampler, values))
                probing += time.monotonic() - begin
            for drawn in range(0 if step == 0 else number + lag, number + lag + 1) if first == 0 else ():
                state, p = run.draw(state, table, np.int32(drawn), np.int32(slots), limit)
                log.rounds.write(round=drawn, drawn_at=step, **_round(state, p))
            records = jax.device_get(state.plan.records)
            for later, rows in enumerate(records if ask else ()):
                ask(rows, (number + later) * round_steps)
            reader = ahead.result() if ahead else _reader(dataset, records[0], first, recipe, threads)
            more = lag and (number + 1) * round_steps < steps
            ahead = pool.submit(_reader, dataset, records[1], 0, recipe, threads) if more else None
            for micro_batches in itertools.islice(reader, steps - step):
                for index, batch in enumerate(micro_batches):
                    if batch["valid"].any():
                        batch = axes.put_batch(batch, mesh)
                        where = (state.key, state.step, np.int32(index), *((state.scale.scale,) if scaled else ()))
                        accumulator = run.micro(state.params, frozen, accumulator, batch, *where)
                state, accumulator, metrics = run.apply(state, accumulator, schedule)
                step += 1
                log.step(step, metrics)
                progress.advance(1, f"loss {log.loss:.3f}" if math.isfinite(log.loss) else "")
                if step == steps or step % recipe.checkpoint_every == 0 or stop.requested:
                    log.flush(name)
                    checkpoints.save(step, state, {"steps": steps})
                if stop.requested and step < steps:
                    checkpoints.wait()
                    say(name, f"SIGTERM: saved at step {step} of {steps}; the same command goes on from here")
                    raise SystemExit(STOPPED)
            log.flush(name)
    summary = _summary(out, state)
    say(
        name,
        f"loss {summary['loss_first']:.3f} → {summary['loss']:.3f} (mean of the first and the last tenth of steps)",
    )
    if chosen is not None:
        say(name, f"probes of {chosen.size} records before each round took {probing:.1f} s in all")
    if at_end is not None:
        at_end(state.params)
    whole, adapters = states.unite(state.params, frozen)
    return (whole if adapters is None else lora.merge(whole, adapters, recipe.lora_scale)), summary


def _round(state: states.TrainState, p: jax.Array) -> dict:
    """What the curriculum's line of a round says: entropy of p in nats, arms seen so far, p and draws of each arm."""
    p, arms, draws = jax.device_get((p, state.plan.arms[-1], state.draws))
    entropy = -float(np.sum(p * np.log(np.maximum(p, 1e-30))))
    counts = np.bincount(arms[arms >= 0], minlength=len(p))
    return {
        "entropy": round(entropy, 6),
        "visited": int((draws > 0).sum()),
        "probabilities": [round(float(value), 8) for value in p],
        "draws": counts.tolist(),
    }


def _summary(out: pathlib.Path, state: states.TrainState) -> dict:
    lines, position = artifacts.read_jsonl(out / "metrics.jsonl"), state.position
    tenth = max(len(lines) // 10, 1)
    scaled = {} if state.scale is None else {"skipped": sum(line["skipped"] for line in lines)}
    return scaled | {
        "steps": len(lines),
        "records": sum(line["records"] for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
        "loss_first": float(np.mean([line["loss"] for line in lines[:tenth]])),
        "loss": float(np.mean([line["loss"] for line in lines[-tenth:]])),
        "epochs": int(position.epoch),
        "distinct": int(jax.device_get(position.kept if int(position.epoch) else position.cursor).sum()),
        "arms_seen": int((jax.device_get(state.draws) > 0).sum()),
    }
