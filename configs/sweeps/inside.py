"""How records are picked inside a cluster: the paper's ablation, with swap sweeps beside it, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/inside.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/inside.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/inside.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024): nearest to the centroid is better at small budgets, greedy MMD at large ones, random
          between them. Swap sweeps after the greedy picks are not in the paper; they lower MMD² further
Read      report/report.html, Rel. % of the rows; score in rows/<row>/seed<k>/select/records.parquet is MMD² for the
          rows mmd and refined

Rows, all of as many records, the same number from each cluster: mmd (the headline), refined (two swap sweeps), nearest,
random_inside, and full, random.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("inside", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    add("mmd", {"select.intra": "mmd"})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    add("refined", {"select.refine": 2})
    add("nearest", {"select.intra": "nearest"})
    add("random_inside", {"select.intra": "random"})
