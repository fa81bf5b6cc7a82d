"""Strict settings for every test: eight CPU devices, strict dtype promotion, rank promotion raises."""

import os
import pathlib
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
CACHE = pathlib.Path(tempfile.gettempdir()) / "coincide_jax_test_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import command
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def few_mappings():
    """Programs of earlier files are let go, for the reason that `pipeline.let_programs_go` has."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compile():
    """For files that compile much and run little: LLVM does hardly anything, which halves the time of compiling.

    What is computed and how it lies on the devices is the same. Code as users get it is tried by every other file,
    kernels above all, and by the runs in processes of their own (`command.run`)."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def key() -> jax.Array:
    """The one random key of a test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A tiny run that nobody disturbed: its folder, which nobody may change, and what it printed."""
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    status, output = command.run(command.TINY, f"--workdir={workdir}")
    assert status == 0, output
    return workdir, output
