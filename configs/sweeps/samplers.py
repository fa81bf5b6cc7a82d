"""Every sampler once, and rehearsal around every online one: to see what each of them does with the same records.

Command   python -m coincide_jax.main --config=configs/sweeps/samplers.py            embedded data
          python -m coincide_jax.main --config=configs/sweeps/samplers.py:tiny       a few records, to see that it runs
          python -m coincide_jax.main --config=configs/sweeps/samplers.py:own --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR [--config.evaluate.questions=DIR] --workdir=DIR    5,000 of your records
Machine   two CPU cores; the embedded data took 7 minutes
Paper     the samplers' own: see the docstrings of coincide_jax/curriculum
Read      report/report.html, the section Curriculum: task ratio over rounds, spread and visited arms of each row; its
          table of results: how far a probability moved. rows/<row>/seed0/train/curriculum.jsonl: the probabilities

Everything is small: what a row scores says little (configs/sweeps/curricula.py compares a few of them in earnest).
`full` sees every record once; all others take a fifth of its steps.
"""

from ml_collections import ConfigDict

from configs.sweeps import curricula

ONLINE = ("coincide_plus", "printed", "exp3", "exp3s", "exp3r", "exp3_ix", "tsallis_inf", "odm", "skill_it", "progress")
SLOW = ("exp3", "exp3s", "exp3r")


def get_config(rows: str = "one") -> ConfigDict:
    """`rows` is 'one' (the embedded data), 'tiny' or 'own' (a LLaVA file that the command names)."""
    config = curricula.get_config(rows).unlock()
    config.name = config.name.replace("curricula", "samplers")
    config.seeds = (0,)
    config.curriculum.watch = 0
    if rows == "own":
        config.dataset.limit = 5000
        config.evaluate.limit = 20
        config.cluster.k, config.curriculum.k = 100, 20
        config.curriculum.round_steps = 2
    elif rows == "one":
        config.dataset.drawn = dict(records=4000, heldout=600, base=8000, seed=0)
        config.base.epochs = 1.0
    return config.lock()


def sweep(add) -> None:
    """The rows; the first is the headline."""
    curricula.compared_with(add)
    for name in ("proportional", "easy_to_hard", "hard_to_easy", *ONLINE):
        add(name, _row(name))
    for name in ONLINE:
        add(f"{name}_rehearsal", _row(name) | curricula.REHEARSED)


def _row(name: str) -> dict:
    """As in the other sweep, with a short graph, and a rate for the samplers whose published one, gamma/K, is so small
    that a few dozen steps move nothing."""
    short = {"curriculum.graph_steps": 2} if name == "skill_it" else {"curriculum.eta": 0.3} if name in SLOW else {}
    return curricula.from_every_record(name) | short
