"""Which device computes in which type."""

import types

import jax
import jax.numpy as jnp
import pytest

from coincide_jax.core import precision
from coincide_jax.core.errors import UserError


@pytest.mark.parametrize(
    ("platform", "capability", "compute"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "6.1", "float32"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "10.0", "bfloat16"),
    ],
)
def test_auto_asks_the_device(platform, capability, compute):
    device = types.SimpleNamespace(platform=platform, compute_capability=capability)
    chosen = precision.choose("auto", device)
    assert chosen.compute == compute and chosen.loss_scale == (compute == "float16")


def test_a_named_type_is_taken_whatever_the_device():
    assert precision.choose("bfloat16", jax.devices()[0]).dtype == jnp.bfloat16
    assert precision.choose("float16", jax.devices()[0]) == precision.Precision("float16", loss_scale=True)
    assert precision.choose("float32", types.SimpleNamespace(platform="tpu")).dtype == jnp.float32


def test_it_can_be_an_argument_of_jit():
    same = jax.jit(lambda x, p: x.astype(p.dtype), static_argnums=1)(jnp.ones(3), precision.Precision("bfloat16"))
    assert same.dtype == jnp.bfloat16
    assert hash(precision.choose("float32")) == hash(precision.Precision("float32"))


def test_unknown_name():
    with pytest.raises(UserError, match=r"unknown device\.precision 'bfloat'; did you mean 'bfloat16'"):
        precision.choose("bfloat")


def test_the_scale_falls_at_an_overflow_and_rises_after_sound_steps(monkeypatch):
    monkeypatch.setattr(precision, "GROWTH_STEPS", 3)
    scale, seen = precision.first_scale(), []
    for finite in (True, False, False, True, True, True, True):
        scale = precision.next_scale(scale, jnp.bool_(finite))
        seen.append(float(scale.scale) / precision.FIRST_SCALE)
    assert seen == [1.0, 0.5, 0.25, 0.25, 0.25, 0.5, 0.5]
    assert scale.scale.dtype == jnp.float32 and scale.fin_steps.dtype == jnp.int32


def test_the_scale_stops_one_below_its_bound():
    scale = precision.first_scale()
    for _ in range(40):
        scale = precision.next_scale(scale, jnp.bool_(False))
    assert float(scale.scale) == precision.LOWEST_SCALE / 2
