"""Selects from arrays made elsewhere, such as those of the authors' program; needs no records, images or model.

Command   python -m coincide_jax.main --config=configs/arrays.py --workdir=DIR --config.extract.features=tan_act.npy \\
              --config.select.fraction=0.2 --config.select.variant=official --config.extract.num_layers=5
          with clusters made elsewhere, both files:
              --config.cluster.centroids=kmeans_centroids.npy --config.cluster.assignment=nearest_cent.npy
Machine   any; memory is bounded by select.cache_mib, and by what k-means needs where it runs

Reads     features [N, D], .npy (memory-mapped) or .zarr, rows of about unit length; D is cut into extract.num_layers
          layers of an image half and a text half each: [v_1, t_1, v_2, t_2, …]
Writes    select/indices.npy      int64 [M], in the order of selection
          select/clusters.parquet cluster, size, transferability, density, score, probability, quota, picked
          select/records.parquet  index, cluster, rank and score of each chosen row
          cluster/centroids.npy, cluster/assignment.npy

Given clusters without a record are dropped and the others numbered anew, here and in assignment.npy; the column `given`
of clusters.parquet, and cluster/given.npy, then hold the numbers that they had.

With clusters given and select.variant=official (the default) the indices are those that the rules of the authors'
program give, in its order: tests/selection/test_official.py compares with a slow transcription of those rules, not with
the program itself. Where that program divides 0 by 0 or breaks (a centroid without cosines below 0.9, an empty
cluster), this one goes on. Without clusters, k-means makes cluster.k of them; `--plan` says what it takes.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The published settings of LLaVA-1.5; give `extract.features`."""
    config = common.defaults()
    config.name = "arrays"
    config.cluster.k = 10_000
    config.cluster.audit.duplicates = 1.0  # reads the features several times more; `--plan` counts it
    return config.lock()
