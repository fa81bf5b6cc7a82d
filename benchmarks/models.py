"""What extract.py, decode.py and train_step.py measure: sizes, weights, a batch, the PyTorch peer, FLOP, the peak."""

import argparse
import dataclasses
import math
import os
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from coincide_jax.core import axes, precision
from coincide_jax.models import hf, layers, vlm
from coincide_jax.models.vlm import VLMConfig

IMAGE_ID = 2  # stands at the image's positions of the peer's prompts
START = 8  # first position of the image
# what the flags say otherwise: width, depth, heads, key/value heads, MLP, vocabulary; and the tower's
STABLELM = dict(family="stablelm", norm="layer", biases=("wq", "wk", "wv"), rotary=16)
SIGLIP = dict(
    family="siglip",
    image_size=384,
    activation="gelu_pytorch_tanh",
    norm_eps=1e-6,
    class_token=False,
    pre_norm=False,
    patch_bias=True,
)
PRESETS = {
    "llava-1.5-7b": dict(
        sizes=dict(
            vision=dict(patch=14, width=1024, depth=23, heads=16, mlp=4096),
            decoder=dict(width=4096, depth=32, heads=32, kv_heads=32, mlp=11008),
        ),
        image=336,
        vocab=32_064,
        vision={},
        decoder={},
    ),
    "tinyllava-2.0b": dict(
        sizes=dict(
            vision=dict(patch=14, width=1152, depth=26, heads=16, mlp=4304),
            decoder=dict(width=2048, depth=24, heads=32, kv_heads=32, mlp=5632),
        ),
        image=378,  # the pixels of 384 that fill patches
        vocab=100_352,
        vision=SIGLIP,
        decoder=STABLELM,
    ),
}


def arguments(description: str) -> argparse.ArgumentParser:
    """The flags that these files have; by default a model of 130 M parameters."""
    parser = record.arguments(description)
    parser.add_argument("--against", choices=("auto", "pytorch", "peak"), default="auto", help="auto: peak on a GPU")
    parser.add_argument("--model", choices=("sizes", *PRESETS), default="sizes", help="sizes: those of the flags below")
    parser.add_argument("--precision", choices=precision.CHOICES, default="auto", help="of ours; the peer is float32")
    parser.add_argument("--image", type=int, default=224, help="pixels; patches have 14")
    parser.add_argument("--tower", type=int, nargs=4, default=[384, 11, 6, 1536], help="width depth heads mlp")
    parser.add_argument("--text", type=int, nargs=4, default=[640, 24, 10, 1728], help="width depth heads mlp")
    parser.add_argument("--kv_heads", type=int, default=0, help="of the text; 0: as many as heads")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512, help="positions of a row, the image's included")
    parser.add_argument("--rows", type=int, nargs="+", default=[4], help="of a batch; several are tried in turn (peak)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="cores that both sides may use; 0: all")
    parser.add_argument("--peak_size", type=int, default=8192, help="of the square matrices whose product is the peak")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def begin(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags, with `against` chosen; takes the cores before JAX counts them."""
    keys = parser.parse_args()
    if keys.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: keys.threads])
    if keys.against == "auto":
        keys.against = "peak" if jax.default_backend() == "gpu" else "pytorch"
    if keys.against == "pytorch" and (keys.model != "sizes" or len(keys.rows) > 1):
        parser.error("against PyTorch the sizes are those of the flags, with one number of rows")
    return keys


def config(keys: argparse.Namespace) -> VLMConfig:
    """The model that the flags name."""
    tower, text = (dict(zip(("width", "depth", "heads", "mlp"), part, strict=True)) for part in (keys.tower, keys.text))
    sizes = {"vision": tower | {"patch": 14}, "decoder": text | {"kv_heads": keys.kv_heads or text["heads"]}}
    chosen = dict(sizes=sizes, image=keys.image, vocab=keys.vocab, vision={}, decoder={})
    if keys.model != "sizes":
        chosen = PRESETS[keys.model]
    cfg = VLMConfig.tiny(chosen["sizes"], chosen["image"], chosen["vocab"], precision.choose(keys.precision))
    return dataclasses.replace(
        cfg,
        vision=dataclasses.replace(cfg.vision, **chosen["vision"]),
        decoder=dataclasses.replace(cfg.decoder, **chosen["decoder"]),
    )


def shortened(cfg: VLMConfig, held: int) -> VLMConfig:
    """The model with the first `held` layers of its decoder."""
    return dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, depth=held))


def draw_batch(cfg: VLMConfig, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Rows of one image and as much text as fits, all real."""
    draw = np.random.default_rng(seed)
    size, behind = cfg.vision.image_size, np.arange(length)[None] >= START + cfg.image_tokens
    return {
        "tokens": draw.integers(3, cfg.decoder.vocab, (rows, length)).astype(np.int32),
        "lengths": np.full(rows, length, np.int32),
        "image_start": np.full(rows, START, np.int32),
        "images": draw.integers(0, 256, (rows, size, size, 3)).astype(np.uint8),
        "text": np.repeat(behind, rows, axis=0),
    }


def save_peer(cfg: VLMConfig, folder: pathlib.Path, seed: int):
    """A random `LlavaForConditionalGeneration` (CLIP + LLaMA, float32) of these sizes, written to `folder`, in as many
    threads as there are cores."""
    import torch
    import transformers

    torch.manual_seed(seed)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    eye, text = cfg.vision, cfg.decoder
    vision = transformers.CLIPVisionConfig(
        hidden_size=eye.width,
        intermediate_size=eye.mlp,
        num_hidden_layers=eye.depth + 1,  # LLaVA reads the last but one, ours holds no more
        num_attention_heads=eye.heads,
        image_size=eye.image_size,
        patch_size=eye.patch,
    )
    language = transformers.LlamaConfig(
        hidden_size=text.width,
        intermediate_size=text.mlp,
        num_hidden_layers=text.depth,
        num_attention_heads=text.heads,
        num_key_value_heads=text.kv_heads,
        vocab_size=text.vocab,
        rms_norm_eps=text.norm_eps,
        max_position_embeddings=4096,
        initializer_range=text.width**-0.5,
        eos_token_id=None,
    )
    whole = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=IMAGE_ID,
        image_seq_length=cfg.image_tokens,
        tie_word_embeddings=False,
    )
    model = transformers.LlavaForConditionalGeneration(whole).eval()
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    return model


def peer_inputs(cfg: VLMConfig, batch: dict[str, np.ndarray]) -> dict:
    """The same batch for the peer: image ids in their places, normalised pixels."""
    import torch

    ids = batch["tokens"].astype(np.int64)
    ids[:, START : START + cfg.image_tokens] = IMAGE_ID
    pixels = (batch["images"] / 255.0 - np.array(cfg.vision.mean)) / np.array(cfg.vision.std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    return {"input_ids": torch.tensor(ids), "pixel_values": pixels}


def load(folder: pathlib.Path, keys: argparse.Namespace, mesh, held: int) -> tuple[dict, VLMConfig]:
    """The peer's weights as ours, `held` of the decoder's layers."""
    params, cfg, _ = hf.load(folder, mesh, keys.precision, storage="compute", layers=held)
    return params, cfg


def draw_params(cfg: VLMConfig, mesh, seed: int) -> dict:
    """Random weights in the compute type, drawn leaf by leaf: real sizes never lie there in float32."""
    shapes = layers.abstract_arrays(vlm.abstract(cfg), mesh)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    stds = [leaf.std for leaf in jax.tree.leaves(vlm.abstract(cfg), is_leaf=layers.is_leaf)]

    dtype = cfg.precision.dtype

    def one(key: jax.Array, shape: jax.ShapeDtypeStruct, std: float) -> jax.Array:
        if not std:
            return jnp.ones(shape.shape, dtype, device=shape.sharding)
        draw = jax.jit(
            lambda key: jax.random.normal(key, shape.shape, dtype) * jnp.asarray(std, dtype),
            out_shardings=shape.sharding,
        )
        return draw(key)

    return tree.unflatten([one(*each) for each in zip(keys, leaves, stds, strict=True)])


def matmul_peak(dtype, size: int) -> float:
    """FLOP/s of a chain of square products in `dtype`, the best of eight runs: what the device can reach."""
    chain = 16

    @jax.jit
    def run(x, w):
        return jax.lax.fori_loop(0, chain, lambda _, x: x @ w, x)

    draw = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (size, size), dtype) * jnp.asarray(size**-0.5, dtype) for key in draw)
    seconds = [timed(run, x, w)[1] for _ in range(9)][1:]
    return 2.0 * size**3 * chain / min(seconds)


def timed(function, *arguments):
    """What the function returns, computed, and its seconds."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return result, time.perf_counter() - start


def alternate(runs: dict, rounds: int) -> tuple[dict, dict, dict]:
    """Of functions by name: what their first call gave, its seconds, and the seconds of the rounds; every other round
    goes backwards."""
    first = {name: timed(run) for name, run in runs.items()}
    seconds = {name: [] for name in runs}
    for number in range(rounds):
        for name in reversed(runs) if number % 2 else runs:
            seconds[name].append(timed(runs[name])[1])
    return {name: found for name, (found, _) in first.items()}, {name: s for name, (_, s) in first.items()}, seconds


def ratio(theirs: list[float], own: list[float]) -> list[float]:
    """Median, least and largest of theirs / own over paired rounds: above 1 ours is faster."""
    found = [a / b for a, b in zip(theirs, own, strict=True)]
    return [round(value, 3) for value in (statistics.median(found), min(found), max(found))]


def described(keys: argparse.Namespace, cfg: VLMConfig) -> dict:
    """The part of the line that these files print."""
    return {
        "model": keys.model,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(vlm.abstract(cfg), is_leaf=layers.is_leaf)),
        "layers": cfg.decoder.depth,
        "image_tokens": cfg.image_tokens,
        "length": keys.length,
        "precision": cfg.precision.compute,
        "rounds": keys.rounds,
        "seed": keys.seed,
    }


def one_device_mesh():
    """The first device alone."""
    return axes.make_mesh(devices=jax.devices()[:1])
