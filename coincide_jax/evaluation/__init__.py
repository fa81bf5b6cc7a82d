"""Stage 5: the model answers held-out questions by greedy decoding; each answer is scored beside a blind guess."""

import functools
import pathlib
import time
from collections import Counter, defaultdict

import jax
import numpy as np

from coincide_jax.core import artifacts, axes
from coincide_jax.core.errors import UserError, unknown
from coincide_jax.core.metrics import Progress, say
from coincide_jax.dataset import READING, Dataset, batches
from coincide_jax.evaluation import answers as answers_lib
from coincide_jax.evaluation import questions as questions_lib
from coincide_jax.evaluation import relative
from coincide_jax.evaluation.answers import METRICS
from coincide_jax.evaluation.floors import Floors
from coincide_jax.models import generate, hf

__all__ = ["KEYS", "METRICS", "STAGE_VERSION", "run"]

STAGE_VERSION = 1
PARTS = ("heldout", "dev")
KEYS = (
    "evaluate.part",
    "evaluate.rows",
    "evaluate.max_new_tokens",
    "evaluate.limit",
    "evaluate.bootstrap",
    "evaluate.seed",
    *READING,
    "device.precision",
)


def run(config, inputs: dict[str, pathlib.Path], out: pathlib.Path, mesh) -> dict:
    """Answers and scores every question; writes `answers.jsonl` (one line a question) and `scores.json`.

    Args:
      config: the keys of `KEYS`.
      inputs: folders 'dataset' (split.json) and 'train' (model/).
      out: the stage's folder.
      mesh: axes ('data', 'model'); the rows of a batch are spread over 'data'.

    Returns:
      Task → score, and the number of questions.

    Raises:
      UserError: no questions, a broken question file, an unknown metric.
    """
    model = inputs["train"] / "model"
    split = artifacts.read_json(inputs["dataset"] / "split.json")
    params, cfg, card = hf.load(model, mesh, config.device.precision, storage="compute")
    dataset = Dataset.of_model(split, model, card, cfg.image_tokens, config.dataset)
    asked = ask(config.evaluate, split, inputs["dataset"])
    floors = Floors((dataset.records[i].task, dataset.records[i].turns) for i in split["pool"] if dataset.records[i])
    predictions = predict(params, cfg, dataset, asked, config, mesh)
    blind, blind_scores, blind_by = floors.guess(asked)
    rows = [score(*one) for one in zip(asked, predictions, blind, blind_scores, strict=True)]
    artifacts.write_jsonl(out / "answers.jsonl", rows)
    intervals = relative.intervals(rows, config.evaluate.bootstrap, config.evaluate.seed)
    scores = summarise(rows, intervals, blind_by)
    artifacts.write_json(out / "scores.json", scores)
    above = sum(task["score"] > task["blind"] for task in scores.values())
    mean = np.mean([task["score"] for task in scores.values()])
    say("evaluate", f"{len(rows)} questions, {len(scores)} tasks: mean {100 * mean:.1f} %, {above} tasks above blind")
    return {"questions": len(rows), "scores": {task: value["score"] for task, value in scores.items()}}


def check(settings) -> None:
    """Reads the questions of `config.evaluate.questions`, if it names a folder, before anything is trained.

    Raises:
      UserError: an unknown part, a broken file, an unknown metric, no resamples.
    """
    if settings.part not in PARTS:
        raise unknown("evaluate.part", settings.part, PARTS)
    relative.check_resamples(settings.bootstrap)
    if settings.questions and pathlib.Path(settings.questions).is_dir():
        questions_lib.from_folder(settings.questions)


def ask(settings, split: dict, dataset: pathlib.Path) -> list[questions_lib.Question]:
    """The questions of this run, limited per task: those of the folder that split.json names, or of the dev part."""
    if settings.part == "dev":
        folder, missing = dataset / "dev", "dataset.share_dev is 0"
    else:
        folder = pathlib.Path(split["questions"]) if split["questions"] else None
        missing = "dataset.share_heldout is 0 and evaluate.questions names no folder"
    if folder is None or not folder.is_dir():
        raise UserError(f"there are no questions: {missing}")
    return questions_lib.limit(questions_lib.from_folder(folder), settings.limit, settings.seed)


def predict(params, cfg, dataset: Dataset, asked: list, config, mesh) -> list[str]:
    """Greedy answers to the questions, in their order."""
    settings = config.evaluate

    @functools.partial(jax.jit, static_argnames="max_new_tokens")
    def answer(params, batch, max_new_tokens):
        tokens = generate.greedy(params, batch, cfg, max_new_tokens=max_new_tokens, eos_id=dataset.eos_id)
        return jax.reshard(tokens, jax.P(None, None))  # whole on every device, so that any process can read it

    texts = [""] * len(asked)
    prompts = [(question.text, question.image) for question in asked]
    begin = time.monotonic()
    with Progress("evaluate", len(asked), "questions") as progress:
        for batch in batches.prompts(dataset, prompts, settings.rows, threads=config.dataset.threads):
            tokens = np.asarray(answer(params, axes.put_batch(batch, mesh), settings.max_new_tokens))
            real = np.flatnonzero(batch["index"] >= 0)
            for row in real[batch["valid"][real]]:  # a prompt whose image has vanished stays unanswered
                ids = [int(token) for token in tokens[row] if token >= 0 and token != dataset.eos_id]
                texts[int(batch["index"][row])] = dataset.tokenizer.decode(ids).strip()
            progress.advance(len(real))
    say("evaluate", f"answered at {len(asked) / (time.monotonic() - begin):.1f} questions/s")
    return texts


def score(question: questions_lib.Question, prediction: str, blind: str, blind_score: float) -> dict:
    """One line of answers.jsonl."""
    measure = answers_lib.metric(question.metric)
    return {
        "id": question.id,
        "task": question.task,
        "image": question.image,
        "question": question.text,
        "prediction": prediction,
        "answers": list(question.answers),
        "metric": question.metric,
        "score": round(measure(prediction, question.answers, question.choices), 6),
        "blind_prediction": blind,
        "blind_score": round(blind_score, 6),
    }


def summarise(rows: list[dict], intervals: dict, blind_by: dict[str, str]) -> dict:
    """Task → metric (all that its questions name), n, images, score, interval, blind, blind_by.

    `interval` holds the 95 % bounds, resampled by image; `blind_by` says what the floor comes from: 'question' or
    'constant' (`floors`).
    """
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)
    return {
        task: {
            "metric": ", ".join(name for name, _ in Counter(row["metric"] for row in found).most_common()),
            "n": len(found),
            "images": len({row["image"] or row["id"] for row in found}),
            "score": round(float(np.mean([row["score"] for row in found])), 6),
            "interval": intervals[task],
            "blind": round(float(np.mean([row["blind_score"] for row in found])), 6),
            "blind_by": blind_by[task],
        }
        for task, found in sorted(by_task.items())
    }
