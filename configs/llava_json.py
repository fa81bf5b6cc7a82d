"""Your own data set in LLaVA format, with tiny models trained on parts of it.

Command   python -m coincide_jax.main --config=configs/llava_json.py --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR --workdir=DIR
Machine   two CPU cores or better

Held-out questions are a share of the images, or your own: --config.evaluate.questions=DIR, one JSONL file a task.
Checkpoint folders of earlier runs can take the place of the tiny models: --config.target.path, --config.reference.path.
"""

from ml_collections import ConfigDict

from configs import common

sweep = common.four_rows


def get_config() -> ConfigDict:
    """Base, reference and target of about a million parameters."""
    config = common.defaults()
    config.name = "llava_json"
    config.dataset.system = ""
    config.dataset.vocab = 4096
    config.dataset.image_size = 60
    config.dataset.max_length = 160
    config.dataset.buckets = (72, 88, 112, 160)
    config.model.vision.patch = 10
    config.cluster.k = 500
    for recipe in (config.base, config.reference.train, config.train):
        recipe.batch, recipe.micro_batch = 64, 32
    config.base.epochs = 3.0
    config.reference.train.epochs = 0.5
    return config.lock()
