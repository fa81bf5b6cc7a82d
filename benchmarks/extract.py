"""Feature extraction of `coincide_jax.extract` against PyTorch `transformers`, or against the device's matmul peak.

    python -m benchmarks.extract [--rows B] [--length T] [--layers L] [--rounds R] [--precision P] …

Prints one JSON line. Against PyTorch (the default without a GPU): the same random weights, batch, cores; features of
five tapped layers (the peer by forward hooks, float32, attention by SDPA, no head), once through all layers of the
decoder and once through the first `--layers` only. All four take turns in one process, every other round backwards; the
first calls, which for JAX hold the compilation, stand apart. The features have to agree, or the benchmark fails.

Against the peak (the default on a GPU): samples/s, tokens/s and model FLOP utilisation for each `--rows`, as a share of
the FLOP/s that a chain of large products reaches on the same device in the same type. At real sizes:

    python -m benchmarks.extract --model=tinyllava-2.0b --length=1024 --layers=20 --rows 4 8 16 32 64
    python -m benchmarks.extract --model=llava-1.5-7b --length=1024 --layers=32 --rows 4 8 16 32
"""

import pathlib
import statistics
import tempfile

import jax
import numpy as np

from benchmarks import models, record
from coincide_jax.core import axes
from coincide_jax.extract import activations
from coincide_jax.models import flops


def peer_features(model, inputs: dict, batch: dict, taps: tuple[int, ...], held: int) -> np.ndarray:
    """f32[B, D] by hooks on `o_proj`, through the first `held` layers: mean, tanh, unit length; joined, unit length."""
    import torch

    inside = np.zeros(batch["text"].shape, bool)
    inside[:, models.START : models.START + model.config.image_seq_length] = True
    masks = [torch.tensor(mask, dtype=torch.float32) for mask in (inside, batch["text"])]
    parts = []

    def hook(module, arguments, states):
        for mask in masks:
            mean = torch.einsum("btw,bt->bw", states, mask) / mask.sum(1, keepdim=True)
            parts.append(torch.nn.functional.normalize(torch.tanh(mean), dim=1))

    language = model.model.language_model
    whole = language.layers
    language.layers = whole[:held]
    hooks = [whole[tap].self_attn.o_proj.register_forward_hook(hook) for tap in taps]
    with torch.inference_mode():
        model.model(**inputs, use_cache=False)
    for one in hooks:
        one.remove()
    language.layers = whole
    return torch.nn.functional.normalize(torch.cat(parts, dim=1), dim=1).numpy()


def against_pytorch(keys) -> dict:
    """The line of the comparison with the peer."""
    import torch
    import transformers

    mesh, sizes = models.one_device_mesh(), models.config(keys)
    depth = sizes.decoder.depth
    taps = activations.spread_taps(depth, 5)
    if taps[-1] >= keys.layers:
        raise SystemExit(f"--layers={keys.layers} ends before the last tapped layer, {taps[-1]}")
    on_host = models.draw_batch(sizes, *keys.rows, keys.length, keys.seed)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        model = models.save_peer(sizes, pathlib.Path(folder), keys.seed)
        inputs, batch = models.peer_inputs(sizes, on_host), axes.put_batch(on_host, mesh)
        runs = {}
        for name, held in (("full", depth), ("early", keys.layers)):
            params, cfg = models.load(pathlib.Path(folder), keys, mesh, held)
            runs[f"ours_{name}"] = lambda p=params, c=cfg: activations.features(p, batch, c, taps)["features"]
            runs[f"peer_{name}"] = lambda h=held: peer_features(model, inputs, on_host, taps, h)
        found, first, seconds = models.alternate(runs, keys.rounds)
    wide = {name: np.asarray(rows, np.float64) for name, rows in found.items()}
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in wide.items()}
    cosine = min(float((unit["peer_full"] * unit[name]).sum(1).min()) for name in unit)
    assert cosine >= 0.9999, f"the features differ: cosine {cosine}"
    return {
        "peer": f"transformers {transformers.__version__}, torch {torch.__version__}, float32, SDPA, hooks",
        **models.described(keys, sizes),
        "rows": keys.rows[0],
        "layers_early": keys.layers,
        "least_cosine": cosine,
        "samples_per_s": {name: round(keys.rows[0] / statistics.median(s), 3) for name, s in seconds.items()},
        "first_call_seconds": {name: round(value, 2) for name, value in first.items()},
        "speed_ratio": {  # median, least, largest of peer / ours: above 1 ours is faster
            "full": models.ratio(seconds["peer_full"], seconds["ours_full"]),
            "early": models.ratio(seconds["peer_early"], seconds["ours_early"]),
            "peer_full_by_ours_early": models.ratio(seconds["peer_full"], seconds["ours_early"]),
        },
    }


def against_peak(keys) -> dict:
    """The line of the utilisation, batch by batch until the memory is full."""
    mesh, whole = models.one_device_mesh(), models.config(keys)
    cfg = models.shortened(whole, keys.layers)
    taps = activations.spread_taps(whole.decoder.depth, 5)
    with jax.set_mesh(mesh):
        peak = models.matmul_peak(cfg.precision.dtype, keys.peak_size)
        params, swept = models.draw_params(cfg, mesh, keys.seed), []
        for rows in keys.rows:
            batch = axes.put_batch(models.draw_batch(cfg, rows, keys.length, keys.seed), mesh)
            try:
                _, _, seconds = models.alternate(
                    {"ours": lambda b=batch: activations.features(params, b, cfg, taps)["features"]}, keys.rounds
                )
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                break
            middle = statistics.median(seconds["ours"])
            rate = flops.encode(cfg, rows, keys.length) / middle
            swept.append(
                {
                    "rows": rows,
                    "seconds": round(middle, 4),
                    "samples_per_s": round(rows / middle, 3),
                    "tokens_per_s": round(rows * keys.length / middle, 1),
                    "utilisation": round(rate / peak, 4),
                }
            )
    return {
        "peer": f"chain of {cfg.precision.compute} products of {keys.peak_size}² matrices",
        **models.described(keys, whole),
        "layers_run": cfg.decoder.depth,
        "peak_tflops": round(peak / 1e12, 3),
        "swept": swept,
        "utilisation": max((one["utilisation"] for one in swept), default=None),
    }


def main() -> None:
    """Chooses the peer, prints the line."""
    parser = models.arguments("Feature extraction against PyTorch or the matmul peak; one JSON line.")
    parser.add_argument("--layers", type=int, default=20, help="of the decoder, run with early exit")
    keys = models.begin(parser)
    line = against_pytorch(keys) if keys.against == "pytorch" else against_peak(keys)
    record.emit("extract", line, keys)


if __name__ == "__main__":
    main()
