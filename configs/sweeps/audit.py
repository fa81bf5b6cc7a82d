"""How well clusters of activations agree with labels that nobody showed them: the measure that the paper names as
missing, for each kind of activation and several K, on a data set of your own.

Command   python -m coincide_jax.main --config=configs/sweeps/audit.py --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR --config.evaluate.questions=DIR --workdir=DIR
Machine   two CPU cores or better
Paper     COINCIDE (EMNLP 2024), limitations: how well clusters stand for concepts and skills is not measured there
Read      audit.md in the workdir, also printed: cohesion (mean cosine to the own centroid), separation (to the next
          one), silhouette, and purity and normalised mutual information against the labels `task`, `concept` and
          `skill` of the records, beside those of shuffled clusters

Rows: the activations of `configs/sweeps/taps.py` (attention of five layers, of the last layer only, feed-forward
blocks, booleans), each with K = 100, 300 and 1,000. Every row ends with the clusters: nothing is selected or trained
but the tiny base and the reference, with few epochs.
"""

from ml_collections import ConfigDict

from configs import llava_json
from configs.sweeps import taps

LAST = "cluster"
KS = (100, 300, 1000)


def get_config() -> ConfigDict:
    """The tiny models of `configs/llava_json.py`, two passes over the base's records instead of ten."""
    config = llava_json.get_config().unlock()
    config.name = "audit"
    config.base.epochs = 2.0
    return config.lock()


def sweep(add) -> None:
    """The rows; the first is the headline."""
    for name, keys in taps.KINDS.items():
        for k in KS:
            add(f"{name}_k{k}", keys | {"cluster.k": k})
