"""In what order: every curriculum from the same base, for the same steps. An honest comparison, whatever it shows.

Command   python -m coincide_jax.main --config=configs/sweeps/curricula.py            three seeds, embedded data
          python -m coincide_jax.main --config=configs/sweeps/curricula.py:one        one seed
          python -m coincide_jax.main --config=configs/sweeps/curricula.py:tiny       a few records, to see that it runs
          python -m coincide_jax.main --config=configs/sweeps/curricula.py:own --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR [--config.evaluate.questions=DIR] --workdir=DIR
                                                                       your LLaVA file: 20,000 records, three seeds
Machine   two CPU cores; RESULTS.md says how long the embedded data took
Paper     COINCIDE+, Algorithm 1 and its table of LLaVA-1.5 at 20 %; rehearsal is what its authors leave as future work
Read      report/report.html, the sections Results and Curriculum; report/table.md; rows/<row>/seed<k>/train/*.jsonl

Rows. `full` sees every record once and is the denominator of Rel. % alone. All others take a fifth of its steps, with
the same batch, schedule and base; what rehearsal replays counts as steps:

  coincide           the static COINCIDE coreset in random order, once (the headline)
  random             as many records drawn at random
  coincide_plus      Algorithm 1 as mended, from every record
  exp3_ix            Exp3 with implicit exploration
  skill_it           the tasks that help where the loss is high, by a graph of short runs on each task alone
  coincide_plus_rehearsal, exp3_ix_rehearsal     with a fifth of the slots for what is being forgotten
  progress           PROGRESS: clusters of questions, a warm-up, then relative progress by a probe of the budget

Probes and the graph's runs are no steps: they are lines of their own in the table. No probe measures more than 2,000
records a round. The watched records (curriculum.watch) are of the dev part, and only the report reads them.
"""

from ml_collections import ConfigDict

from coincide_jax.core.errors import UserError
from configs import demo, llava_json

ROWS = ("table", "one", "tiny", "own")


def get_config(rows: str = "table") -> ConfigDict:
    """`rows` is 'table' (three seeds), 'one', 'tiny' or 'own' (a LLaVA file that the command names)."""
    if rows not in ROWS:
        raise UserError(f"configs/sweeps/curricula.py:{rows}: the argument is 'one', 'tiny', 'own' or nothing")
    config = llava_json.get_config() if rows == "own" else demo.get_config("tiny" if rows == "tiny" else "table")
    config.unlock()
    config.name = f"curricula_{rows}"
    config.seeds = (0, 1, 2) if rows in ("table", "own") else (0,)
    config.select.allocation = "exact"
    config.train.epochs = 1.0
    config.curriculum.round_steps = 5
    config.dataset.tokenizer_text = "questions"  # of all rows, since PROGRESS may not have seen the answers
    if rows == "own":
        config.dataset.limit = 20_000
        config.evaluate.limit = 100
        config.curriculum.k = 60
        config.curriculum.watch = 200
    elif rows != "tiny":
        config.dataset.drawn = dict(records=16000, heldout=1800, base=16000, seed=0)
        config.dataset.share_dev = 0.04
        config.base.epochs = 4.0
        config.train.batch = config.train.micro_batch = 16
        config.curriculum.round_steps = 10
        config.curriculum.watch = 120
    else:
        config.dataset.share_dev = 0.1
        config.cluster.k = 6
        config.train.batch = config.train.micro_batch = 8
        config.curriculum.round_steps = 2
        config.curriculum.warmup_k = 6
        config.curriculum.watch = 16
    return config.lock()


REHEARSED = {"curriculum.rehearsal": 0.2}
PROBED = {  # what samplers with a probe are told besides their names
    "skill_it": {"curriculum.k": 0, "curriculum.probe": 2, "curriculum.graph_steps": 10},
    "progress": {
        "curriculum.k": 0,
        "curriculum.probe": 2,
        "extract.reads": "questions",
        # clusters of its own features, as many as the others have arms
        "cluster.k": lambda config: config.curriculum.k or config.cluster.k,
    },
}


def from_every_record(name: str) -> dict:
    """The keys of a row whose sampler draws from the whole pool."""
    return {"curriculum.name": name, "curriculum.pool": "all"} | PROBED.get(name, {})


def compared_with(add) -> None:
    """The rows without a sampler that learns; the first is the headline."""
    add("coincide", {"curriculum.name": "static", "curriculum.pool": "coreset"})
    # `full` learns nothing from its rounds: longer ones only mean that it is watched less often
    add("full", {"curriculum.name": "uniform", "curriculum.pool": "all", "curriculum.round_steps": 50})
    add("random", {"select.name": "random", "curriculum.name": "uniform", "curriculum.pool": "coreset"})


def sweep(add) -> None:
    """The rows; the first is the headline."""
    compared_with(add)
    for name in ("coincide_plus", "exp3_ix", "skill_it"):
        add(name, from_every_record(name))
    for name in ("coincide_plus", "exp3_ix"):
        add(f"{name}_rehearsal", from_every_record(name) | REHEARSED)
    add("progress", from_every_record("progress"))
