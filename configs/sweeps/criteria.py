"""What each criterion of COINCIDE is worth: the paper's ablations of the selection, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/criteria.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/criteria.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/criteria.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024), ablations of the criteria, of the picks inside clusters, and of tau. Published, Rel. %
          on LLaVA-1.5: 97.4 for both criteria, 95.9 for transferability alone, 94.4 for equal shares of all clusters
Read      report/report.html, Rel. % of the rows beside `full` (= 100) and `random` (no criterion at all), with their
          intervals; rows/<row>/seed<k>/select/clusters.parquet says where each row's records come from

Rows, all of as many records (select.allocation=exact everywhere, since sequential allocation may fall short of the
budget, by another number in each row):

  mmd             the headline: shares by transferability and density, greedy MMD inside clusters
  nearest         inside clusters the records nearest to the centroid
  random_inside   inside clusters any records
  transferability random_inside without density: under so wide a kernel every density is 1 (compare with random_inside,
                  since greedy MMD would see the wide kernel too)
  equal           as many records of every cluster: at so high a temperature neither criterion is left
  tau_low, tau_high   the temperature a fifth and five times the default
  paper           the criteria as the paper's text has them (whole centroids, no mask, density without the diagonal)
  full, random    every record; as many records drawn at random

Density alone has no key and is not among the rows.
"""

from ml_collections import ConfigDict

from configs import common, demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    config = demo.get_config(rows)
    config.name = config.name.replace("demo", "criteria")
    config.select.allocation = "exact"
    return config


def sweep(add) -> None:
    """The rows; the first is the headline."""
    tau = common.defaults().select.tau
    add("mmd", {"select.intra": "mmd"})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    add("nearest", {"select.intra": "nearest"})
    add("random_inside", {"select.intra": "random"})
    add("transferability", {"select.intra": "random", "select.sigma": 100.0})
    add("equal", {"select.tau": 1e6})
    add("tau_low", {"select.tau": tau / 5})
    add("tau_high", {"select.tau": tau * 5})
    add("paper", {"select.variant": "paper"})
