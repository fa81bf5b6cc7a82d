"""How much data: the paper's budgets, each beside as many records at random, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/fraction.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/fraction.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/fraction.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024), figure of Rel. % against the sampling ratio; the table is at 20 %
Read      report/report.html, Rel. % of the rows: p20 against random, p10 against random_p10, …

Rows: p20 (the headline) with random, p5, p10, p40 and p60 with random_p5, …, and full. A row that sets its fraction
holds its own number of records, not the headline's.
"""

from ml_collections import ConfigDict

from configs import demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("fraction", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    add("p20", {"select.fraction": 0.2})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    for percent in (5, 10, 40, 60):
        add(f"p{percent}", {"select.fraction": percent / 100})
        add(f"random_p{percent}", {"select.name": "random", "select.fraction": percent / 100})
