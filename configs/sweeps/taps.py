"""Which activations: the paper's ablation of what a feature is made of, on the embedded data.

Command   python -m coincide_jax.main --config=configs/sweeps/taps.py          one seed of every row
          python -m coincide_jax.main --config=configs/sweeps/taps.py:table    three seeds of every row
          python -m coincide_jax.main --config=configs/sweeps/taps.py:tiny     a few records, to see that it runs
Machine   two CPU cores
Paper     COINCIDE (EMNLP 2024), ablation of the activations. Published, Rel. % on LLaVA-1.5: 97.4 for the attention of
          five layers, 96.5 for that of the last layer only, 96.0 for the feed-forward blocks, 95.7 for booleans
Read      report/report.html, Rel. % of the rows; audit.md, how good the clusters of each row are

Rows, all of as many records, each with features and clusters of its own, made once for all seeds:

  attention      the headline: output of the attention in layers spread over the decoder
  last           of the last layer only
  mlp            output of the feed-forward blocks, same layers
  booleans       signs of the attention's output
  full, random   every record; as many records drawn at random
"""

from ml_collections import ConfigDict

from configs import demo

KINDS = {
    "attention": {"extract.tap_from": "attention"},
    "last": {"extract.taps": (-1,)},
    "mlp": {"extract.tap_from": "mlp"},
    "booleans": {"extract.squash": "sign"},
}


def get_config(rows: str = "one") -> ConfigDict:
    """The demo's sizes; `rows` as there: 'one', 'table' or 'tiny'."""
    return demo.of_one_size("taps", rows)


def sweep(add) -> None:
    """The rows; the first is the headline."""
    add("attention", KINDS["attention"])
    add("full", {"curriculum.pool": "all"})
    add("random", {"select.name": "random"})
    for name in ("last", "mlp", "booleans"):
        add(name, KINDS[name])
