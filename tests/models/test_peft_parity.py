"""LoRA training against PyTorch with `peft` on a random LLaVA-style model: loss, gradient, optimiser steps, float32."""

import jax
import numpy as np
import pytest
import torch
import weights
from loops import recipe
from safetensors.numpy import load_file

from benchmarks import models, train_step
from coincide_jax.core import axes
from coincide_jax.kernels import bandits
from coincide_jax.models import hf, lora
from coincide_jax.training import state as states
from coincide_jax.training import steps as compiled

STEPS, ROWS, LENGTH = 10, 8, 24
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ("all-linear",)}
RATES = {"learning_rate": 2e-3, "projector_learning_rate": 1e-3, "warmup": 0.3}
HOW = recipe(mode="lora", steps=STEPS, batch=ROWS, micro_batch=ROWS // 2, lora=LORA, **RATES)


def of_file(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def of_peer(model, what) -> dict[str, np.ndarray]:
    """`what` of each trained parameter, under the names of PEFT's files."""
    return {
        name.replace(".default", "").replace(".modules_to_save", ""): what(leaf).numpy().copy()
        for name, leaf in model.named_parameters()
        if leaf.requires_grad
    }


def inputs_of_peer(cfg, batch: dict) -> dict:
    """The rows with their padding masked; pixels of the rows that have an image."""
    ids, start = batch["tokens"].astype(np.int64), batch["image_start"]
    for row in np.flatnonzero(start >= 0):
        ids[row, start[row] : start[row] + cfg.image_tokens] = models.IMAGE_ID
    real = np.arange(ids.shape[1])[None] < batch["lengths"][:, None]
    images = {key: batch[key][start >= 0] for key in ("tokens", "images")}
    pixels = models.peer_inputs(cfg, images)["pixel_values"]
    labels = np.where(batch["labels"], ids, -100)
    tensors = {"input_ids": ids, "attention_mask": real.astype(np.int64), "labels": labels}
    return {key: torch.tensor(value) for key, value in tensors.items()} | {"pixel_values": pixels}


class Pair:
    """Our run and the peer's, from the same weights and adapters (neither of LoRA's matrices zero), on one batch of
    ragged rows, some without an image."""

    def __init__(self, tiny, folder):
        self.cfg, self.mesh, self.folder = tiny.cfg, tiny.mesh(), folder
        params = tiny.params(self.mesh)
        hf.export(params, self.cfg, folder / "model", image_token_id=models.IMAGE_ID)
        trained, self.frozen = states.divide(params, self.cfg, HOW, jax.random.key(0), self.mesh)
        trained["lora"] = weights.draw(lora.abstract(self.cfg, HOW.rank, HOW.targets), self.mesh, seed=3, std=0.1)
        self.state = states.start(trained, HOW, bandits.UNIFORM, 1, 1, 1)
        self.run, self.schedule = compiled.compile_steps(self.cfg, HOW, bandits.UNIFORM), states.Schedule.of(HOW, STEPS)
        self.batch = jax.device_get(tiny.batch(self.mesh, rows=ROWS, length=LENGTH))
        self.batch |= {"slot": np.arange(ROWS, dtype=np.int32), "valid": np.ones(ROWS, bool)}
        self.peer = train_step.Peer(folder / "model", self.export(trained), self.cfg, HOW, self.batch)
        self.peer.inputs = inputs_of_peer(self.cfg, self.batch)

    def export(self, tree):
        """A tree of the trained parameters' shapes, written as PEFT names them."""
        out = self.folder / "tree"
        out.mkdir(exist_ok=True)
        how = {"rank": HOW.rank, "alpha": HOW.alpha, "dropout": 0.0, "targets": HOW.targets}
        hf.export_adapter(tree["lora"], self.cfg, out, **how, base="", projector=tree["projector"])
        return out

    def accumulate(self) -> compiled.Accumulator:
        """Two micro-batches of the batch, which differ in their supervised tokens."""
        summed = jax.jit(compiled.empty, static_argnums=1)(self.state.params, ROWS)
        for number, rows in enumerate((slice(0, ROWS // 2), slice(ROWS // 2, ROWS))):
            part = axes.put_batch({key: value[rows] for key, value in self.batch.items()}, self.mesh)
            where = self.state.key, self.state.step, np.int32(number)
            summed = self.run.micro(self.state.params, self.frozen, summed, part, *where)
        return summed

    def step(self) -> dict:
        self.state, _, metrics = self.run.apply(self.state, self.accumulate(), self.schedule)
        self.peer()
        return jax.device_get(metrics)


def close(found: dict, expected: dict, share: float) -> None:
    """Each tensor within `share` of its largest value."""
    assert found.keys() == expected.keys() and len(found) > 2 * 3 * 7
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= share * np.abs(array).max(), name


def test_loss_gradient_and_ten_steps(tiny, tmp_path):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        pair = Pair(tiny, tmp_path)
        summed = pair.accumulate()
        loss = pair.peer.backward()
        assert float(summed.objective / summed.weight) == pytest.approx(loss, rel=1e-5)
        grads = jax.tree.map(lambda leaf: leaf / summed.weight, summed.grads)
        close(of_file(pair.export(grads)), of_peer(pair.peer.model, lambda leaf: leaf.grad), 1e-4)
        before = of_file(pair.export(pair.state.params))
        first = pair.step()
        assert first["gradient_norm"] > 1.5  # the clip is at work
        after, there = of_file(pair.export(pair.state.params)), of_peer(pair.peer.model, torch.Tensor.detach)
        close({k: after[k] - before[k] for k in after}, {k: there[k] - before[k] for k in there}, 1e-3)
        losses = [first["loss"]] + [pair.step()["loss"] for _ in range(STEPS - 1)]
        np.testing.assert_allclose(losses, pair.peer.losses, rtol=1e-4)
        close(of_file(pair.export(pair.state.params)), of_peer(pair.peer.model, torch.Tensor.detach), 1e-3)
    assert losses[-1] < 0.9 * losses[0]
