"""What each criterion of COINCIDE is worth: the paper's ablation of the shares of the clusters, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/criteria.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/criteria.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/criteria.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024), ablation of the criteria. Published, Rel. % on LLaVA-1.5: 97.4 for both, 95.9 for
          transferability alone, 94.7 for density alone, 94.4 for as many records of every cluster
Read      report/report.html, Rel. % of the rows beside `full` (= 100) and `random` (no criterion at all), with their
          intervals; rows/<row>/seed<k>/select/clusters.parquet says where each row's records come from

Rows, all of as many records (select.allocation=exact everywhere, since sequential allocation may fall short of the
budget, by another number in each row):

  both           the headline: shares by S / (tau D)
  transfer       by S / tau
  density        by 1 / (tau D)
  equal          as many of every cluster, as far as they reach
  paper          both criteria as the paper's text has them (whole centroids, no mask, density without the diagonal)
  full, random   every record; as many records drawn at random
"""

from ml_collections import ConfigDict

from configs import demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("criteria", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    add("both", {"select.weights": "both"})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    for weights in ("transfer", "density", "equal"):
        add(weights, {"select.weights": weights})
    add("paper", {"select.variant": "paper"})
