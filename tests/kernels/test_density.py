"""Density and kernel matrices against brute force in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.kernels import density


def rows(n, width=60, seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, width)) + 1
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def brute(x, sigma=1.0) -> np.ndarray:
    x = x.astype(np.float64)
    return np.exp(-np.sum((x[:, None] - x[None]) ** 2, axis=2) / (2 * sigma**2))


@pytest.mark.parametrize("sigma", [1.0, 0.3])
def test_gram_is_float64_and_equals_brute_force(sigma):
    x = np.stack([rows(12, seed=1), rows(12, seed=2)])
    kernel = density.gram(x, sigma)
    assert kernel.dtype == jnp.float64
    np.testing.assert_allclose(kernel, np.stack([brute(part, sigma) for part in x]), rtol=1e-13)
    assert jnp.zeros(1).dtype == jnp.float32  # float64 is entered in the kernel only


def test_inner_products_of_half_precision_rows_are_exact():
    x = rows(20, width=960, seed=3)
    one = np.asarray(density.gram(x[None], 1.0))[0]
    other = np.asarray(density.gram(x[None, ::-1, ::-1], 1.0))[0][::-1, ::-1]
    np.testing.assert_array_equal(one, other)
    assert np.all(np.diag(one) == 1.0)


def test_stored_rows_are_not_renormalised():
    x = rows(2) * np.float16(0.5)
    assert np.asarray(density.gram(x[None], 1.0))[0, 0, 1] == pytest.approx(brute(x)[0, 1], rel=1e-13)


@pytest.mark.parametrize("diagonal", [True, False])
def test_density_leaves_padding_out(diagonal):
    sizes = [9, 1, 0, 16, 2]
    x = np.ones((5, 16, 60), np.float16)
    for i, n in enumerate(sizes):
        x[i, :n] = rows(n, seed=i) if n else 0
    found = density.density(density.gram(x, 1.0), sizes, diagonal)
    assert found.dtype == np.float64
    for i, n in enumerate(sizes):
        if n == 0:
            assert found[i] == 0
        elif n == 1:
            assert found[i] == 1
        else:
            kernel = brute(x[i, :n])
            expected = kernel.mean() if diagonal else (kernel.sum() - n) / (n * (n - 1))
            assert found[i] == pytest.approx(expected, rel=1e-13)


def test_batches_hold_each_cluster_once_and_keep_to_the_memory():
    sizes = np.random.default_rng(0).lognormal(4, 1.2, 3000).astype(int) + 1
    batches = density.batches(sizes, 20480)
    seen = np.concatenate([batch[batch >= 0] for _, batch in batches])
    np.testing.assert_array_equal(np.sort(seen), np.arange(3000))
    shapes = {}
    for padded, batch in batches:
        assert np.all(sizes[batch[batch >= 0]] <= padded)
        assert len(batch) == 1 or len(batch) * padded * (4 * 20480 + 8 * 2048 + 16 * padded) <= density.BATCH_BYTES
        assert shapes.setdefault(padded, len(batch)) == len(batch)
    assert np.sum([padded**2 * len(batch) for padded, batch in batches]) < 1.8 * np.sum(np.maximum(sizes, 8) ** 2)


def test_little_data_needs_few_shapes():
    sizes = np.random.default_rng(0).integers(10, 150, 60)
    assert len({padded for padded, _ in density.batches(sizes, 960)}) <= 2


def test_runs_on_one_device_inside_a_larger_mesh():
    x = rows(10)[None]
    alone = np.asarray(density.gram(x, 1.0))
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        np.testing.assert_array_equal(alone, np.asarray(density.gram(x, 1.0)))


def test_tiles_and_rows_equal_the_stored_matrix():
    x = rows(70, seed=5)
    whole = brute(x)
    for block in (8, 32, 2048):
        np.testing.assert_allclose(density.row_sums(x, 1.0, block=block), whole.sum(axis=1), rtol=1e-13)
        picked = np.array([69, 0, 31])
        np.testing.assert_allclose(density.kernel_rows(x, picked, 1.0, block=block), whole[picked], rtol=1e-13)
    sums = density.row_sums(x, 0.4)
    assert density.mean_of_pairs(sums.sum(), 70.0, True) == pytest.approx(brute(x, 0.4).mean(), rel=1e-13)


def test_float32_products_lose_little_of_near_duplicates():
    """Less their mean, rows of a tight cluster keep the digits that tell them apart; as they are they do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60) + 0.02 * rng.normal(size=(50, 60))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    single = x.astype(np.float32)
    norms = np.sum(single * single, axis=1)
    plain = np.exp(-(norms[:, None] + norms[None] - 2 * single @ single.T) / 2)
    error = np.abs(plain - brute(x)).max()
    found = np.asarray(density.gram(x[None], 1.0, "float32"))[0]
    assert found.dtype == np.float64 and np.abs(found - brute(x)).max() < error / 20
    np.testing.assert_allclose(density.row_sums(x, 1.0, "float32", block=16), brute(x).sum(axis=1), rtol=1e-7)
    np.testing.assert_allclose(density.kernel_rows(x, np.arange(3), 1.0, "float32"), brute(x)[:3], rtol=1e-7)


def test_padded_sizes_are_four_an_octave():
    sizes = np.arange(1, 3000)
    padded = density.padded_size(sizes)
    assert np.all(padded >= sizes) and np.all(padded <= np.maximum(1.25 * sizes + 1, 8))
    assert len(np.unique(padded[(padded > 64) & (padded <= 128)])) == 4


def taken(compiled) -> int:
    said = compiled.memory_analysis()
    return said.argument_size_in_bytes + said.temp_size_in_bytes + said.output_size_in_bytes


@pytest.mark.parametrize("precision", density.PRECISIONS)
@pytest.mark.parametrize(
    ("batch", "n", "width"), [(1, 1024, 20480), (1, 4096, 20480), (6, 192, 20480), (4, 320, 5000), (3, 512, 640)]
)
def test_no_more_memory_than_is_counted(batch, n, width, precision):
    """Of the compiled programs, by what XLA says of them: the stored matrices, and the tiles."""
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((batch, n, width), np.float16)
        stored = density._gram.lower(x, np.float64(1), precision).compile()
    assert 0.3 * batch * density.cluster_bytes(n, width) < taken(stored) < batch * density.cluster_bytes(n, width)


@pytest.mark.parametrize("precision", density.PRECISIONS)
def test_tiles_take_no_more_memory_than_their_docstring_says(precision):
    block, width = 512, 20480
    with jax.enable_x64(True):
        x = jax.ShapeDtypeStruct((block, width), np.float16 if precision == "float64" else np.float32)
        tile = density._tile_sums.lower(x, x, np.int64(block), np.float64(1), precision).compile()
        cross = density._cross.lower(x, x, np.float64(1), precision).compile()
    limit = 32 * block**2 + 8 * width * 2 * block
    assert taken(tile) < limit and taken(cross) < limit


@pytest.mark.parametrize("width", [2048, 2049, 4096, 5000])
def test_any_number_of_columns(width):
    """Blocks of columns that do and do not divide the width."""
    x = rows(9, width)
    for precision, error in (("float64", 1e-13), ("float32", 1e-6)):
        np.testing.assert_allclose(density.gram(x[None], 1.0, precision)[0], brute(x), rtol=error)
        np.testing.assert_allclose(density.row_sums(x, 1.0, precision, 8), brute(x).sum(axis=1), rtol=error)
        np.testing.assert_allclose(
            density.kernel_rows(x, np.array([8, 2]), 1.0, precision), brute(x)[[8, 2]], rtol=error
        )
    half = np.float16(1) * x
    np.testing.assert_array_equal(density.gram(x[None], 1.0)[0], density.gram(half[None, :, ::-1], 1.0)[0])
