"""Greedy decoding of `coincide_jax.models.generate` against PyTorch `transformers`, or against the matmul peak.

    python -m benchmarks.decode [--rows B] [--length T] [--new N] [--rounds R] [--precision P] …

Prints one JSON line. Against PyTorch (the default without a GPU): the same random weights, prompts with an image and
cores; N new tokens a row, none of which ends it, and one new token, so that the pass over the prompts can be taken off.
The peer is `generate` in float32 with its dynamic cache. All take turns in one process, every other round backwards;
the first calls, which for JAX hold the compilation, stand apart. The first token of every row has to agree, or the
benchmark fails; later ones may part where two are equally likely to within rounding.

Against the peak (the default on a GPU): tokens/s and model FLOP utilisation of the tokens after the first, for each
`--rows`. At real sizes:

    python -m benchmarks.decode --model=llava-1.5-7b --length=704 --new=128 --rows 1 8 32 64
"""

import pathlib
import statistics
import tempfile

import jax
import numpy as np

from benchmarks import models, record
from coincide_jax.core import axes
from coincide_jax.models import flops, generate

NEVER = -5  # an id that no token has


def ours(params: dict, batch: dict, cfg, new: int):
    """i32[B, new]."""
    return generate.greedy(params, batch, cfg, max_new_tokens=new, eos_id=NEVER)


def peer(model, inputs: dict, new: int) -> np.ndarray:
    """i64[B, new] by `generate`."""
    import torch

    with torch.inference_mode():
        out = model.generate(
            **inputs, attention_mask=torch.ones_like(inputs["input_ids"]), max_new_tokens=new, do_sample=False
        )
    return out[:, inputs["input_ids"].shape[1] :].numpy()


def after_first(seconds: dict, name: str) -> list[float]:
    """Seconds of a round without its pass over the prompts."""
    return [many - one for many, one in zip(seconds[f"{name}_many"], seconds[f"{name}_one"], strict=True)]


def against_pytorch(keys) -> dict:
    """The line of the comparison with the peer."""
    import torch
    import transformers

    mesh, sizes = models.one_device_mesh(), models.config(keys)
    on_host = models.draw_batch(sizes, *keys.rows, keys.length, keys.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        model = models.save_peer(sizes, pathlib.Path(folder), keys.seed)
        params, cfg = models.load(pathlib.Path(folder), keys, mesh, sizes.decoder.depth)
        inputs, batch = models.peer_inputs(sizes, on_host), axes.put_batch(on_host, mesh)
        runs = {}
        for name, new in (("one", 1), ("many", keys.new)):
            runs[f"ours_{name}"] = lambda n=new: ours(params, batch, cfg, n)
            runs[f"peer_{name}"] = lambda n=new: peer(model, inputs, n)
        found, first, seconds = models.alternate(runs, keys.rounds)
    own, theirs = np.asarray(found["ours_many"]), found["peer_many"]
    assert (own[:, 0] == theirs[:, 0]).all(), f"the first tokens differ: {own[:, 0]} and {theirs[:, 0]}"
    rows, later = keys.rows[0], {name: after_first(seconds, name) for name in ("ours", "peer")}
    return {
        "peer": f"transformers {transformers.__version__} generate, torch {torch.__version__}, float32, SDPA",
        **models.described(keys, sizes),
        "rows": rows,
        "new_tokens": keys.new,
        "equal_tokens": round(float((own == theirs).mean()), 4),
        "tokens_per_s": {
            name: round(rows * (keys.new - 1) / statistics.median(spent), 2) for name, spent in later.items()
        },
        "first_call_seconds": {name: round(value, 2) for name, value in first.items()},
        "speed_ratio": {  # median, least, largest of peer / ours: above 1 ours is faster
            "whole": models.ratio(seconds["peer_many"], seconds["ours_many"]),
            "prompts": models.ratio(seconds["peer_one"], seconds["ours_one"]),
            "after_first": models.ratio(later["peer"], later["ours"]),
        },
    }


def against_peak(keys) -> dict:
    """The line of the utilisation, batch by batch until the memory is full."""
    mesh, cfg = models.one_device_mesh(), models.config(keys)
    with jax.set_mesh(mesh):
        peak = models.matmul_peak(cfg.precision.dtype, keys.peak_size)
        params, swept = models.draw_params(cfg, mesh, keys.seed), []
        for rows in keys.rows:
            batch = axes.put_batch(models.draw_batch(cfg, rows, keys.length, keys.seed), mesh)
            runs = {
                f"ours_{name}": lambda b=batch, n=new: ours(params, b, cfg, n)
                for name, new in (("one", 1), ("many", keys.new))
            }
            try:
                _, _, seconds = models.alternate(runs, keys.rounds)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                break
            middle = statistics.median(after_first(seconds, "ours"))
            rate = flops.decode(cfg, rows, keys.length, keys.new - 1) / middle
            swept.append(
                {
                    "rows": rows,
                    "prompt_seconds": round(statistics.median(seconds["ours_one"]), 4),
                    "tokens_per_s": round(rows * (keys.new - 1) / middle, 1),
                    "utilisation": round(rate / peak, 5),
                }
            )
    return {
        "peer": f"chain of {cfg.precision.compute} products of {keys.peak_size}² matrices",
        **models.described(keys, cfg),
        "new_tokens": keys.new,
        "peak_tflops": round(peak / 1e12, 3),
        "swept": swept,
        "tokens_per_s": max((one["tokens_per_s"] for one in swept), default=None),
    }


def main() -> None:
    """Chooses the peer, prints the line."""
    parser = models.arguments("Greedy decoding against PyTorch or the matmul peak; one JSON line.")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, at least 2")
    keys = models.begin(parser)
    line = against_pytorch(keys) if keys.against == "pytorch" else against_peak(keys)
    record.emit("decode", line, keys)


if __name__ == "__main__":
    main()
