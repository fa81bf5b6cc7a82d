"""Density, Gram matrices and transferability against brute force in float64 NumPy."""

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
        assert len(batch) == 1 or 8 * len(batch) * padded * (20480 + 4 * padded) <= density.BATCH_BYTES
        assert shapes.setdefault(padded, len(batch)) == len(batch)
    assert np.sum([padded**2 * len(batch) for padded, batch in batches]) < 1.8 * np.sum(np.maximum(sizes, 8) ** 2)


def test_little_data_needs_few_shapes():
    sizes = np.random.default_rng(0).integers(10, 150, 60)
    assert len({padded for padded, _ in density.batches(sizes, 960)}) <= 2


def centroids(k=30, layers=3, h=8, seed=0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(k, 2 * layers * h)) + 1.0
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def slow_transferability(c, part, layers, mask):
    if part == "text":
        h = c.shape[1] // (2 * layers)
        c = np.concatenate([c[:, (2 * layer + 1) * h : (2 * layer + 2) * h] for layer in range(layers)], axis=1)
    c = c.astype(np.float64)
    out = []
    for i in range(len(c)):
        cosine = [c[i] @ c[j] / np.linalg.norm(c[i]) / np.linalg.norm(c[j]) for j in range(len(c))]
        out.append(np.mean([value for value in cosine if value <= mask]))
    return np.array(out)


@pytest.mark.parametrize(("part", "mask"), [("text", 0.9), ("all", 2.0), ("text", 0.5)])
def test_transferability_equals_the_formula(part, mask):
    c = centroids()
    expected = slow_transferability(c, part, 3, mask)
    for block in (7, 1024):
        found = density.transferability(c, part=part, num_layers=3, mask_above=mask, block=block)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_transferability_where_all_cosines_are_masked():
    c = centroids(k=6)
    c[4:] = c[0]
    c[:3] = c[0]
    found = density.transferability(c, part="all", num_layers=3, mask_above=0.99)
    cosine = float(c[0] @ c[3])
    np.testing.assert_allclose(found, np.full(6, cosine), atol=1e-6)  # nothing but row 3's pairs is left
    same = np.repeat(c[:1], 4, axis=0)
    np.testing.assert_allclose(density.transferability(same, part="all", num_layers=3, mask_above=0.9), 1.0, atol=1e-6)
    with pytest.raises(ValueError, match="do not split"):
        density.transferability(c, part="text", num_layers=5, mask_above=0.9)


def test_runs_on_one_device_inside_a_larger_mesh():
    x = rows(10)[None]
    alone = np.asarray(density.gram(x, 1.0))
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        np.testing.assert_array_equal(alone, np.asarray(density.gram(x, 1.0)))
