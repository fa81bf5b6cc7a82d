"""COINCIDE on LLaVA-1.5 665k → 20 % → LLaVA-1.5-7B with LoRA (COINCIDE, EMNLP 2024, Table 1).

Command   python -m coincide_jax.main --config=configs/llava15.py --workdir=DIR
Needs     data/llava_v1_5_mix665k.json, its image folders under data/images, and two model folders: the target before
          instruction tuning (vicuna-7b-v1.5 with the pretrained projector) in weights/llava15_7b_init, the reference in
          weights/tinyllava_2b
Machine   published: 4 x V100-32GB; selection and training took the authors 15.1 h there
Published 97.4 % of full-data training at 20 %
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    """The paper's recipe."""
    config = common.defaults()
    config.name = "llava15"
    config.dataset.records = "data/llava_v1_5_mix665k.json"
    config.dataset.images = "data/images"
    config.dataset.unique_ids = False  # an id of the published mix is that of its image, and returns
    config.dataset.share_heldout = 0.02
    config.dataset.image_size = 336
    config.dataset.vocab = 32000
    config.dataset.max_length = 2048
    config.dataset.buckets = (768, 1024, 1536, 2048)
    config.model.vision = dict(patch=14, width=1024, depth=23, heads=16, mlp=4096)
    config.model.decoder = dict(width=4096, depth=32, heads=32, kv_heads=32, mlp=11008)
    config.target.path = "weights/llava15_7b_init"
    config.reference.path = "weights/tinyllava_2b"
    config.cluster.k = 10_000
    config.select.fraction = 0.2
    config.train = common.recipe(
        mode="lora",
        batch=128,
        micro_batch=16,
        learning_rate=2e-4,
        projector_learning_rate=2e-5,
        remat=True,
        lora=dict(rank=128, alpha=256.0, dropout=0.05, targets=("wq", "wk", "wv", "wo", "gate", "up", "down")),
    )
    config.evaluate.max_new_tokens = 128
    return config.lock()
