"""Every sampler once, and rehearsal around every online one: to see what each of them does with the same records.

Command   python -m coincide_jax.main --config=configs/sweeps/samplers.py            embedded data
          python -m coincide_jax.main --config=configs/sweeps/samplers.py:tiny       a few records, to see that it runs
          python -m coincide_jax.main --config=configs/sweeps/samplers.py:own --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR [--config.evaluate.questions=DIR] --workdir=DIR    5,000 of your records
Machine   two CPU cores; the embedded data took 18 minutes on a shared one
Paper     the samplers' own: see the docstrings of coincide_jax/curriculum
Read      report/report.html, the section Curriculum: task ratio over rounds, spread and visited arms of each row;
          rows/<row>/seed0/train/curriculum.jsonl has the probabilities of every round

Everything is small: what a row scores says little (configs/sweeps/curricula.py compares a few of them in earnest).
`full` sees every record once; all others take a fifth of its steps.
"""

from ml_collections import ConfigDict

from configs.sweeps import curricula

ONLINE = ("coincide_plus", "printed", "exp3", "exp3s", "exp3r", "exp3_ix", "tsallis_inf", "odm")


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
    add("coincide", {"curriculum.name": "static", "curriculum.pool": "coreset"})
    add("full", {"curriculum.name": "uniform", "curriculum.pool": "all", "curriculum.round_steps": 50})
    add("random", {"select.name": "random", "curriculum.name": "uniform", "curriculum.pool": "coreset"})
    rows = {name: {"curriculum.name": name} for name in ("proportional", "easy_to_hard", "hard_to_easy", *ONLINE)}
    rows["skill_it"] = {"curriculum.name": "skill_it", "curriculum.k": 0, "curriculum.probe": 2}
    rows["skill_it"] |= {"curriculum.graph_steps": 2}
    rows["progress"] = {"curriculum.name": "progress", "curriculum.probe": 2, "extract.reads": "questions"}
    # clusters of its own features, as many as the others have arms
    rows["progress"] |= {"cluster.k": lambda config: config.curriculum.k or config.cluster.k, "curriculum.k": 0}
    for name, changes in rows.items():
        add(name, {"curriculum.pool": "all"} | changes)
    for name in (*ONLINE, "skill_it", "progress"):
        add(f"{name}_rehearsal", {"curriculum.pool": "all", "curriculum.rehearsal": 0.2} | rows[name])
