"""Your own data set in LLaVA format, with tiny models trained on parts of it.

Command   python -m coincide_jax.main --config=configs/llava_json.py --config.dataset.records=PATH.json \\
              --config.dataset.images=DIR --workdir=DIR
Machine   two CPU cores or better

          --config=configs/llava_json.py:curriculum=progress with the same keys: one run with this curriculum

Held-out questions are a share of the images, or your own: --config.evaluate.questions=DIR, one JSONL file a task.
Checkpoint folders of earlier runs can take the place of the tiny models: --config.target.path, --config.reference.path.
"""

from ml_collections import ConfigDict

from configs import common

sweep = common.four_rows


def get_config(argument: str = "") -> ConfigDict:
    """Base, reference and target of about a million parameters; `argument` is nothing or 'curriculum=NAME'."""
    config = common.defaults()
    common.choose(config, "configs/llava_json.py", argument)
    config.name = "llava_json"
    config.dataset.system = ""
    config.dataset.vocab = 4096
    config.dataset.max_length = 128
    config.dataset.buckets = (48, 64, 80, 128)
    config.cluster.k = 500
    for recipe in (config.base, config.reference.train, config.train):
        recipe.batch, recipe.micro_batch = 64, 32
        recipe.loss_mean = "records"  # else the few long answers decide what a small model learns
        recipe.learning_rate = recipe.projector_learning_rate = 6e-4  # at 2e-3 it hardly learns to use the image
    # a model that starts from nothing needs many passes before it sees; a checkpoint (target.path) needs one
    config.dataset.base_share = 0.3
    config.base.epochs = 10.0
    config.train.epochs = 4.0
    return config.lock()
