"""Who a target may be trained on, and what that costs: the budget of answers, the warm-up, records held out for probes.

A budget is a number of records. Each record that is drawn for the first time takes one of it, and so does each record
of a held-out probe, when it is measured first; drawing a record again, in a later epoch or as a replay, costs nothing.
When the budget is used up the run goes on, if it has steps left, over the records that it has. Skill-it asks
for nothing, but its records are counted alike; what the short runs of its skill graph read is not.
"""

import dataclasses
import pathlib
from typing import NamedTuple

import numpy as np

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import say
from coincide_jax.dataset import Dataset, annotate
from coincide_jax.kernels import plan
from coincide_jax.training import probe

GRAPHS = ("linear", "brute", "identity")
WARMUP = "select/warmup"  # the stage whose indices.npy are the warm-up


class Kinds(NamedTuple):
    """Samplers that are handed the records in another way. one_arm: all in one arm, whatever cluster they are in;
    offline: nothing is learned from losses; of_tasks: arms are tasks; asks: answers are asked for."""

    one_arm: tuple[str, ...] = ()
    offline: tuple[str, ...] = ()
    of_tasks: tuple[str, ...] = ()
    asks: tuple[str, ...] = ()


def check(config, kinds: Kinds) -> None:
    """Finds what a config can get wrong between records and samplers, before anything runs.

    Raises:
      UserError: an unknown word, a number out of its range, keys that contradict each other.
    """
    settings = config.curriculum
    if settings.graph not in GRAPHS:
        raise unknown("curriculum.graph", settings.graph, GRAPHS)
    for key in ("budget", "warmup"):
        if not 0 <= settings[key] <= 1:
            raise UserError(f"curriculum.{key} is {settings[key]}; expected a share of the pool, from 0 to 1")
    for key in ("warmup_k", "graph_steps"):
        if settings[key] < 1:
            raise UserError(f"curriculum.{key} = {settings[key]}; expected 1 or more")
    budgeted = settings.name in (*kinds.asks, *kinds.of_tasks)
    if settings.budget and not budgeted:
        raise UserError(
            f"curriculum.budget is {settings.budget}, but '{settings.name}' has none; it sees select.fraction"
        )
    if settings.answers and settings.name not in kinds.asks:
        raise UserError(f"curriculum.answers is {settings.answers}, but '{settings.name}' asks for no answers")
    if settings.answers and not pathlib.Path(settings.answers).is_file():
        raise UserError(
            f"curriculum.answers {settings.answers} does not exist; expected a JSONL file of id and answers"
        )
    if budgeted and settings.pool != "all":
        raise UserError(
            f"curriculum.name '{settings.name}' chooses from the whole pool, within a budget; set curriculum.pool=all"
        )
    if settings.name in kinds.of_tasks and settings.k:
        raise UserError(f"curriculum.k is {settings.k}, but the arms of '{settings.name}' are tasks; leave it 0")
    if settings.name in kinds.of_tasks and settings.graph != "identity" and not settings.probe:
        raise UserError(
            f"curriculum.graph is '{settings.graph}', which is learned from losses on records held out, but "
            "curriculum.probe is 0; set a number of records a task, or curriculum.graph=identity"
        )
    for key, reader in (("extract.reads", "features"), ("dataset.tokenizer_text", "tokenizer")):
        part, name = key.split(".")
        own = config.extract.features if reader == "features" else config.target.path  # made elsewhere
        if settings.name in kinds.asks and config[part][name] != "questions" and not own:
            raise UserError(
                f"curriculum.name '{settings.name}' asks for answers one by one, but {key} is '{config[part][name]}', "
                f"so that the {reader} would be made from every answer; set {key}=questions"
            )
    if settings.name in kinds.asks and settings.warmup >= (settings.budget or config.select.fraction) > 0:
        raise UserError(
            f"curriculum.warmup is {settings.warmup} of the pool, but the budget is "
            f"{settings.budget or config.select.fraction}; expected less"
        )


@dataclasses.dataclass
class Draw:
    """records, arm: int[N], what may be drawn and the arm of each; arms: K; total: different records in all; rank:
    real[N] or None, the order within an arm; first: bool[N] or None, the warm-up; probed: int[K, P] or None, held out.
    """

    records: np.ndarray
    arm: np.ndarray
    arms: int
    total: int
    rank: np.ndarray | None = None
    first: np.ndarray | None = None
    probed: np.ndarray | None = None

    def keep(self, chosen: np.ndarray) -> None:
        """Leaves the other records out."""
        self.records, self.arm = self.records[chosen], self.arm[chosen]
        self.rank = None if self.rank is None else self.rank[chosen]
        self.first = None if self.first is None else self.first[chosen]

    def members(self) -> dict:
        """As `fit` takes them."""
        return {"records": self.records, "arm": self.arm, "arms": self.arms, "rank": self.rank, "probed": self.probed}

    def limit(self) -> plan.Limit:
        """Of what may be drawn, the warm-up first."""
        warm = self.arm[:0] if self.first is None else self.arm[self.first]
        first = np.bincount(warm, minlength=self.arms).astype(np.int32)
        return plan.Limit(np.int32(self.total), first)


def begin(draw: Draw, settings, inputs: dict[str, pathlib.Path], seed: int, asks: tuple[str, ...]) -> None:
    """Fixes the order of the records within their arms, the warm-up of a run that asks for answers first: a limit takes
    an order that stays the same.

    Raises:
      UserError: the warm-up was never chosen.
    """
    draw.rank = np.random.default_rng([seed, len(draw.records)]).permutation(len(draw.records))
    if not (settings.warmup and settings.name in asks):
        return
    if WARMUP not in inputs:
        raise UserError(
            f"curriculum.warmup is {settings.warmup} but no folder {WARMUP} says which records; run it first"
        )
    draw.first = np.isin(draw.records, np.load(inputs[WARMUP] / "indices.npy"))
    draw.rank = np.where(draw.first, draw.rank, draw.rank + len(draw.records))


def hold_out(draw: Draw, count: int, seed: int) -> None:
    """Takes `count` records of each arm out of what may be drawn, for probes; they count as records of the budget.

    Raises:
      UserError: an arm that would have none left to train on.
    """
    free = np.ones(len(draw.records), bool) if draw.first is None else ~draw.first
    spared = np.bincount(draw.arm[free], minlength=draw.arms)
    short = (spared < count) | (np.bincount(draw.arm, minlength=draw.arms) <= count)
    if short.any():
        arm = int(np.argmax(short))
        raise UserError(
            f"curriculum.probe holds out {count} records of each arm, but arm {arm} has {spared[arm]} "
            "that can be spared; take fewer, fewer arms (curriculum.k, cluster.k), or curriculum.probe_from=seen"
        )
    draw.probed = probe.choose(draw.records[free], draw.arm[free], draw.arms, count, seed)
    draw.keep(~np.isin(draw.records, draw.probed))
    draw.total -= draw.probed.size


def check_budget(draw: Draw, batch: int) -> None:
    """What is left of a budget for training must fill a batch and hold the warm-up.

    Raises:
      UserError: it does not.
    """
    held = 0 if draw.probed is None else draw.probed.size
    spent = f" of {draw.total + held}, after {held} for the probe," if held else ""
    if draw.total < batch:
        raise UserError(
            f"the budget leaves {max(draw.total, 0)} records{spent} to train on; expected at least train.batch = "
            f"{batch}: raise curriculum.budget, or take a smaller batch or probe"
        )
    warm = 0 if draw.first is None else int(draw.first.sum())
    if warm > draw.total:
        raise UserError(
            f"the warm-up is {warm} records, but the budget leaves {draw.total}{spent} to train on; expected "
            "curriculum.warmup below curriculum.budget"
        )


def annotator(data: Dataset, settings, path: pathlib.Path, budget: int, known=()) -> annotate.Annotator:
    """The holder of the pool's answers, who from now on is the only one: the data set forgets them. `known`: rows that
    are in no pool and watched for the report."""
    if settings.answers:
        answers = annotate.FileAnswers(pathlib.Path(settings.answers))
    else:
        answers = annotate.OwnAnswers(data.records)
    known = {int(row): data.records[row].turns for row in known}
    found = annotate.Annotator(path, annotate.without_answers(data.records), answers, budget, known)
    data.withhold(found.turns)
    if found.asked:
        say("train", f"{len(found.asked)} answers have been asked for before")
    return found


def probes(draw: Draw, settings, asker: annotate.Annotator | None, seed: int):
    """What `fit` takes as `probed`: the records held out, asked for when they are measured first; or, of
    `probe_from=seen`, a function of the step that takes from each arm those of its records trained on before, at most
    `probe`, the first in an order that stays the same."""
    if settings.probe_from == "heldout":
        if asker is None:
            return draw.probed

        def held(step: int) -> np.ndarray:
            rows = draw.probed.reshape(-1)
            asker.ask(rows, "probe", np.full(len(rows), step))
            return draw.probed

        return held
    order = np.random.default_rng([seed, 1, len(draw.records)]).permutation(len(draw.records))
    places = {int(row): place for place, row in enumerate(draw.records)}

    def seen(step: int) -> np.ndarray:
        chosen = np.full((draw.arms, settings.probe), -1, np.int64)
        trained = np.asarray([places[row] for row in asker.trained_before(step).tolist()], np.int64)
        trained = trained[np.lexsort((order[trained], draw.arm[trained]))]
        arm = draw.arm[trained]
        number = np.arange(len(arm)) - np.searchsorted(arm, arm)  # of the record within its arm
        few = number < settings.probe
        chosen[arm[few], number[few]] = draw.records[trained[few]]
        return chosen

    return seen
