"""How many clusters: the paper's ablation of K, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/clusters.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/clusters.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/clusters.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024): a sufficiently large K is essential, up to about 10,000 of 665,000 records
Read      report/report.html, Rel. % of the rows

Rows, all of as many records: k60 (the demo's, the headline), k15, k30, k120, k240, each with clusters of its own from
the same features, and full, random.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("clusters", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    add("k60", {"cluster.k": 60})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    for k in (15, 30, 120, 240):
        add(f"k{k}", {"cluster.k": k})
