"""Greedy decoding with the cache against running the whole sequence again for every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.core import axes
from coincide_jax.models import generate, vlm

NEW = 6


def by_recomputation(params, batch, cfg, eos_id) -> np.ndarray:
    """i32[b, NEW] without a cache."""
    tokens = np.pad(np.asarray(batch["tokens"]), ((0, 0), (0, NEW)))
    lengths, rows = np.array(batch["lengths"]), np.arange(len(tokens))
    answer, done = np.full((len(tokens), NEW), -1, np.int32), np.zeros(len(tokens), bool)
    run = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, b, cfg).hidden, cfg))
    for step in range(NEW):
        scores = np.asarray(run(params, batch | {"tokens": jnp.asarray(tokens)}))
        token = scores[rows, lengths - 1].argmax(-1)
        answer[~done, step] = token[~done]
        done |= token == eos_id
        tokens[rows, lengths] = token
        lengths += 1
    return answer


@pytest.mark.parametrize(("devices", "model_parallel"), [(1, 1), (8, 2)])
def test_cache_equals_recomputation(tiny, devices, model_parallel):
    single, mesh = tiny.mesh(), tiny.mesh(devices, model_parallel)
    with jax.set_mesh(single):
        params, batch = tiny.params(single), tiny.batch(single)
        free = by_recomputation(params, batch, tiny.cfg, eos_id=-5)
        eos_id = int(free[0, 2])  # so that a row ends early
        expected = by_recomputation(params, batch, tiny.cfg, eos_id)
    assert len(np.unique(free)) > 8 and (np.asarray(batch["image_start"]) < 0).any()
    assert (expected == -1).any() and (expected[:, -1] != -1).any()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh)
        found = generate.greedy(params, batch, tiny.cfg, max_new_tokens=NEW, eos_id=eos_id)
    np.testing.assert_array_equal(found, expected)


def test_stops_when_all_rows_ended_and_pads(tiny):
    mesh = tiny.mesh()
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=4)
        one = axes.put_batch({key: np.repeat(np.asarray(array)[:1], 4, axis=0) for key, array in batch.items()}, mesh)
        first = int(generate.greedy(params, one, tiny.cfg, max_new_tokens=NEW, eos_id=-5)[0, 0])
        ended = np.asarray(generate.greedy(params, one, tiny.cfg, max_new_tokens=NEW, eos_id=first))
    np.testing.assert_array_equal(ended, [[first] + [-1] * (NEW - 1)] * 4)
