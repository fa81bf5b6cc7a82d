"""Rotary frequencies: every published scaling against `transformers`, and heads rotated in part."""

import families
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from coincide_jax.core.errors import UserError
from coincide_jax.models import layers, rope

DIM, POSITIONS = 16, 512
LONG = {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 128}  # fmt: skip
CASES = [
    ({"rope_type": "linear", "factor": 2.5}, 300),
    ({"rope_type": "dynamic", "factor": 3.0}, 300),
    ({"rope_type": "dynamic", "factor": 3.0}, 900),
    (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 256},
        300,
    ),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 300),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0,
      "beta_slow": 2.0, "truncate": False, "mscale": 0.8, "mscale_all_dim": 1.2}, 300),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256, "attention_factor": 1.3}, 300),
    (LONG, 100),
    (LONG, 300),
    (LONG | {"factor": 3.0}, 300),
]  # fmt: skip


def config(scaling: dict):
    """A LLaMA with heads of `DIM`, as the loader makes it."""
    items = {key: tuple(value) if isinstance(value, list) else value for key, value in scaling.items()}
    return families.config("llama", rope_scaling=tuple(sorted(items.items())))


@pytest.mark.parametrize(("scaling", "length"), CASES, ids=lambda value: str(value)[:60])
def test_scalings_equal_transformers(scaling, length):
    theirs = transformers.LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=POSITIONS,
        rope_parameters={"rope_theta": 5000.0, **scaling},
    )  # fmt: skip
    want, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, "cpu", seq_len=length)
    found, scale = rope.frequencies(config(scaling), length)
    np.testing.assert_allclose(found, want.numpy(), rtol=1e-5)
    assert scale == pytest.approx(factor, rel=1e-6)
    plain, _ = rope.frequencies(config({}), length)
    changed = np.abs(np.asarray(found) / np.asarray(plain) - 1.0).max() > 1e-3
    assert changed == (scaling["rope_type"] != "dynamic" or length > POSITIONS)


def test_an_unknown_scaling_is_told():
    with pytest.raises(UserError, match="unknown rope scaling 'yarm'; did you mean 'yarn'"):
        rope.frequencies(config({"rope_type": "yarm"}), 10)


def test_the_rest_of_a_head_is_left_alone(key):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 16)).astype(np.float32)
    frequency, _ = rope.frequencies(families.config("stablelm"), 5)
    table = layers.rope_table(jnp.arange(5)[None], frequency)
    found = np.asarray(layers.rope(jnp.asarray(x), table))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(found[:, 0], x[:, 0])
    assert frequency.shape == (2,) and np.abs(found[:, 1:, :, :4] - x[:, 1:, :, :4]).max() > 0.1
