"""How sharply the shares of the clusters follow the criteria: the paper's ablation of tau, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/temperature.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/temperature.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/temperature.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024): 0.1 everywhere; too small a tau hurts, since few clusters take everything
Read      report/report.html, Rel. % of the rows; clusters_picked in rows/<row>/seed<k>/select/manifest.json

Rows, all of as many records: tau (the default, the headline), a fifth, half, twice and five times it, and full, random.
"""

from ml_collections import ConfigDict

from configs import common, demo


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("temperature", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    tau = common.defaults().select.tau
    add("tau", {"select.tau": tau})
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    for name, factor in (("tau_fifth", 0.2), ("tau_half", 0.5), ("tau_twice", 2.0), ("tau_five", 5.0)):
        add(name, {"select.tau": factor * tau})
