"""Transferability against loops over the pairs of centroids in float64."""

import numpy as np
import pytest

from coincide_jax.kernels import transfer


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
        found = transfer.transferability(c, part=part, num_layers=3, mask_above=mask, block=block)
        np.testing.assert_allclose(found, expected, atol=1e-13)


def test_transferability_where_all_cosines_are_masked():
    c = centroids(k=6)
    c[4:] = c[0]
    c[:3] = c[0]
    found = transfer.transferability(c, part="all", num_layers=3, mask_above=0.99)
    wide = c.astype(np.float64)
    cosine = wide[0] @ wide[3] / np.linalg.norm(wide[0]) / np.linalg.norm(wide[3])
    np.testing.assert_allclose(found, np.full(6, cosine), atol=1e-13)  # nothing but row 3's pairs is left
    same = np.repeat(c[:1], 4, axis=0)
    np.testing.assert_allclose(
        transfer.transferability(same, part="all", num_layers=3, mask_above=0.9), 1.0, atol=1e-13
    )
    with pytest.raises(ValueError, match="do not split"):
        transfer.transferability(c, part="text", num_layers=5, mask_above=0.9)
