"""The whole pipeline on a laptop, on an embedded data set.

Command   python -m coincide_jax.main --config=configs/demo.py          one seed of every row
          python -m coincide_jax.main --config=configs/demo.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/demo.py:tiny     a few records, to see that everything runs
          python -m coincide_jax.main --config=configs/demo.py:curriculum=progress     one run with this curriculum
          python -m coincide_jax.main --config=configs/demo.py:tiny,curriculum=skill_it     both
Machine   two CPU cores
"""

from ml_collections import ConfigDict

from coincide_jax.core.errors import UserError
from configs import common

sweep = common.four_rows


def get_config(rows: str = "one") -> ConfigDict:
    """`rows` is 'one' (one seed of every row), 'table' (three) or 'tiny', and 'curriculum=NAME' as `common.choose`
    takes it."""
    config = common.defaults()
    words = common.choose(config, "configs/demo.py", rows, ("one", "table", "tiny")) or ("one",)
    if len(words) > 1:
        raise UserError(f"configs/demo.py:{rows}: the argument is 'table', 'tiny' or nothing")
    rows = words[0]
    config.name = "demo" if rows == "one" else f"demo_{rows}"
    config.seeds = (0, 1, 2) if rows == "table" else (0,)
    config.dataset.records = "drawn"
    config.dataset.system = ""
    config.dataset.vocab = 1024
    config.dataset.max_length = 96
    config.dataset.buckets = (48, 64, 96)
    config.base.epochs = 3.0
    config.reference.train.epochs = 1.0
    config.train.epochs = 3.0
    config.evaluate.max_new_tokens = 16
    config.evaluate.tasks_to_rank = 6
    if rows == "tiny":
        config.dataset.drawn = dict(records=240, heldout=48, base=160, seed=0)
        config.dataset.vocab = 512
        config.dataset.buckets = (96,)
        config.model.vision = dict(patch=12, width=32, depth=1, heads=2, mlp=64)
        config.model.decoder = dict(width=32, depth=6, heads=2, kv_heads=1, mlp=64)
        config.cluster.k = 12
        config.curriculum.warmup_k = 24
        config.curriculum.graph_steps = 2
        if config.curriculum.name in ("progress", "skill_it"):  # a budget of 48 records: some rounds of small steps
            config.cluster.k = 6
            config.curriculum.round_steps = 1
            config.curriculum.probe = min(config.curriculum.probe, 1)
            config.train.batch = config.train.micro_batch = 8
        config.base.epochs = config.train.epochs = 1.0
    return config.lock()


def of_one_size(name: str, rows: str = "one") -> ConfigDict:
    """The demo under another name, for tables whose rows all hold exactly their budget (sequential allocation may fall
    short of it, by another number in each row)."""
    config = get_config(rows).unlock()
    config.name = config.name.replace("demo", name)
    config.select.allocation = "exact"
    return config.lock()
