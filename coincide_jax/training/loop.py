"""The loop: draw a round, read its records, run its steps, write what happened, save, go on where it stopped."""

import concurrent.futures
import contextlib
import functools
import hashlib
import itertools
import pathlib
import signal
from collections.abc import Callable, Iterator

import jax
import numpy as np

from coincide_jax.core import artifacts, axes, checkpoint, peaks, processes
from coincide_jax.core.errors import UserError
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import batches
from coincide_jax.kernels import plan
from coincide_jax.models import flops, layers, lora
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled
from coincide_jax.training.arms import ArmLog
from coincide_jax.training.log import Log, Work
from coincide_jax.training.state import Recipe


class Termination:
    """Inside it SIGTERM does not kill: it sets `requested`, and the loop saves at the next step boundary. A request
    that no loop answered ends the program when the block ends. Of several processes one that gets the signal is
    enough: all stop at the same step."""

    def __init__(self):
        self.requested = False

    def __enter__(self) -> "Termination":
        self.before = signal.signal(signal.SIGTERM, self._request)
        return self

    def loop(self) -> Callable[[int], bool]:
        """For a loop that begins: asked after every step, whether to save and end now."""
        stop = processes.Stop()
        return lambda step: stop.now(self.requested, step)

    def _request(self, *_) -> None:
        self.requested = True

    def __exit__(self, kind, *_) -> None:
        signal.signal(signal.SIGTERM, self.before)
        if kind is None and any(processes.told(self.requested)):
            raise SystemExit(processes.STOPPED)


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


def _reader(
    dataset, records: np.ndarray, first: int, recipe: Recipe, threads: int, share: int
) -> Iterator[list[batches.Batch]]:
    """The micro-batches of a plan from row `first` on; the first step is read before this returns."""
    steps = batches.planned(
        dataset, records, micro=recipe.micro_batch, start_step=first, threads=threads,
        packing=recipe.packing, as_drawn=recipe.loss_mean == "micro_batch", share=share,
    )  # fmt: skip
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
    objective: str = "nll",
    at_end: Callable[[dict], None] | None = None,
    ask: Callable[[np.ndarray, int], None] | None = None,
) -> tuple[dict, dict]:
    """Trains a model. The same call on the same folder goes on where a killed one stopped, with the same numbers.

    Args:
      name: key of the recipe, for screen and messages (base, reference.train, train).
      params: whole tree of the start; stays as it is.
      members: records int[N] and arm int[N] (which of `arms` each belongs to); rank real[N], the order within an arm of
        a sampler that does not shuffle; probed int[arms, P], records that a sampler with a probe measures, or a
        function step → int[arms, P] (-1: none) of them; watched int[n], records that are measured for the report alone;
        limit, a `plan.Limit` of what is drawn.
      sampler: init, probabilities, update.
      objective: what a probe measures, of `steps.KINDS`.
      total_records: records of one epoch of this run; the recipe's epochs or steps make the length of it.
      round_steps: S, steps between two draws.
      lag: 0 draws a round after the last update, 1 a round earlier, so that reading overlaps.
      out: gets checkpoints/, metrics.jsonl, curriculum.jsonl, arms.jsonl, run.json.
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
    identity = {
        "start": checkpoint.fingerprint(params),
        "records": hashlib.sha256(b"".join(np.asarray(part).tobytes() for part in table)).hexdigest()[:16],
        "steps": steps,
        "slots": slots,
        "round_steps": round_steps,
        "lag": lag,
        "seed": recipe.seed,
        "mode": recipe.mode,
        "packing": recipe.packing,
        "precision": cfg.precision.compute,
    }
    processes.led(functools.partial(_claim, out, identity))
    whole = jax.NamedSharding(mesh, jax.P())
    trained, frozen = states.divide(params, cfg, recipe, jax.random.key(recipe.seed), mesh)
    scaled = cfg.precision.loss_scale
    state = states.start(trained, recipe, sampler, arms, 1 + lag, round_steps, loss_scale=scaled)
    run = compiled.compile_steps(cfg, recipe, sampler)
    # nothing that a step takes is copied to the devices unasked
    rest = table, members.get("limit"), states.Schedule.of(recipe, steps), np.int32(slots)
    table, limit, schedule, slots = axes.put(rest, whole)
    on_devices = functools.cache(lambda number: axes.put(np.int32(number), whole))
    accumulator = jax.jit(compiled.empty, static_argnums=1)(state.params, recipe.batch)
    asked = stop.loop()
    share = mesh.shape["data"]  # devices that share the rows of a batch

    checkpoints = checkpoint.Checkpoints(out / "checkpoints", recipe.keep)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = checkpoints.restore(abstract)
    step, notes = 0, {}
    if restored is not None:
        step, state, notes = restored
        say(name, f"goes on at step {step} of {steps}")
    costs = flops.training(cfg, recipe.mode, recipe.rank, recipe.targets)
    peak, origin = peaks.total(cfg.precision.compute, mesh)
    reading = {"batch": recipe.batch, "micro": recipe.micro_batch, "threads": threads, "mesh": mesh}
    heard = ArmLog(out / "arms.jsonl", arms, step, members, dataset, reading, notes.get("heard", {}))
    log, ahead = Log(out, step, heard, costs, peak, tensorboard=recipe.tensorboard), None

    def judge(kind: str) -> Callable:
        return lambda batch, params=state.params: run.judge(params, frozen, batch, kind)

    attention = layers.attention_used(cfg.decoder.head_dim, dataset.buckets[-1], cfg.precision.dtype)
    say(name, f"{steps} steps of {recipe.batch} records · {len(members['records'])} records in {arms} arms")
    say(name, f"attention {attention} · MFU is of {peak / 1e12:.3g} TFLOP/s ({origin})")
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        Progress(name, steps, "steps", step) as progress,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        while step < steps:
            number, first = divmod(step, round_steps)
            if first == 0:
                values = log.arms.write(step, judge, objective if run.learn else None)
                if run.learn:
                    state = state.replace(sampler=run.learn(state.sampler, axes.put(values, whole)))
                log.measured()
            for drawn in range(0 if step == 0 else number + lag, number + lag + 1) if first == 0 else ():
                state, p = run.draw(state, table, on_devices(drawn), slots, limit)
                log.rounds.write(round=drawn, drawn_at=step, **_round(state, p))
            records, arms_of = jax.device_get((state.plan.records, state.plan.arms[0]))
            for later, rows in enumerate(records if ask else ()):
                ask(rows, (number + later) * round_steps)
            with log.wait():
                reader = ahead.result() if ahead else _reader(dataset, records[0], first, recipe, threads, share)
            more = lag and (number + 1) * round_steps < steps
            ahead = pool.submit(_reader, dataset, records[1], 0, recipe, threads, share) if more else None
            for micro_batches in itertools.islice(log.reading(reader), steps - step):
                for index, batch in enumerate(micro_batches):
                    if batch["valid"].any():
                        batch = axes.put_batch(batch, mesh)
                        where = (state.key, state.step, on_devices(index), *((state.scale.scale,) if scaled else ()))
                        accumulator = run.micro(state.params, frozen, accumulator, batch, *where)
                state, accumulator, metrics = run.apply(state, accumulator, schedule)
                step += 1
                log.step(step, metrics, Work.of(micro_batches), arms_of[(step - 1) % round_steps])
                progress.advance(1, log.note)
                stopped = asked(step)
                if step == steps or step % recipe.checkpoint_every == 0 or stopped:
                    log.flush(name)
                    checkpoints.save(step, state, {"steps": steps, "heard": log.arms.heard()})
                if stopped and step < steps:
                    checkpoints.wait()
                    say(name, f"SIGTERM: saved at step {step} of {steps}; the same command goes on from here")
                    raise SystemExit(processes.STOPPED)
            log.flush(name)
        log.arms.write(step, judge, None)
    told = jax.device_get((state.position, state.draws, state.scale))
    summary = processes.led(functools.partial(_summary, out, *told)) | {"attention": attention, "peak": [peak, origin]}
    say(
        name,
        f"loss {summary['loss_first']:.3f} → {summary['loss']:.3f} (mean of the first and the last tenth of steps)",
    )
    if at_end is not None:
        at_end(state.params)
    tree, adapters = states.unite(state.params, frozen)
    return (tree if adapters is None else lora.merge(tree, adapters, recipe.lora_scale)), summary


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


def _summary(out: pathlib.Path, position: plan.Position, draws: np.ndarray, scale) -> dict:
    """Of what a run wrote, and of where it ended."""
    lines = artifacts.read_jsonl(out / "metrics.jsonl")
    tenth = max(len(lines) // 10, 1)
    seconds = np.asarray([line["seconds"] for line in lines])
    waited = float(np.sum(seconds * [line["data_wait"] for line in lines]) / max(seconds.sum(), 1e-9))
    scaled = {} if scale is None else {"skipped": sum(line["skipped"] for line in lines)}
    rounds = artifacts.read_jsonl(out / "curriculum.jsonl")
    return scaled | {
        "steps": len(lines),
        "records": sum(line["records"] for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
        "loss_first": float(np.mean([line["loss"] for line in lines[:tenth]])),
        "loss": float(np.mean([line["loss"] for line in lines[-tenth:]])),
        "epochs": int(position.epoch),
        "distinct": int((position.kept if int(position.epoch) else position.cursor).sum()),
        # medians over the steps: the first ones hold the compilation
        "tokens_per_second": float(np.median([line["tokens_per_second"] for line in lines])),
        "mfu": float(np.median([line["mfu"] for line in lines])),
        "data_wait": round(waited, 4),
        "arms_seen": int((draws > 0).sum()),
        "moved": moved(np.asarray([line["probabilities"] for line in rounds])),
    }


def moved(p: np.ndarray) -> float:
    """By how much a curriculum changed its mind: the largest change of a probability since the first round, f64[R, K],
    in units of that of an even draw. Arms that ran out (p = 0) do not count, nor what the others gain by that."""
    units = p * np.maximum((p > 0).sum(1, keepdims=True), 1)
    return float(np.abs(units - units[0])[(p > 0) & (p[0] > 0)].max(initial=0.0))
