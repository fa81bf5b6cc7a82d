"""Cross entropy of the supervised positions against the plain one over all of them, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.core import axes
from coincide_jax.models import loss

ROWS, LENGTH, WIDTH, VOCAB = 8, 37, 16, 30


def drawn(share: float) -> tuple[np.ndarray, ...]:
    """hidden, head, targets, mask with about `share` of the positions supervised, uneven between rows."""
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(WIDTH, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    mask = rng.random((ROWS, LENGTH)) < share * np.linspace(0.5, 1.5, ROWS)[:, None]
    mask[3] = False  # a row without any
    return hidden, head, targets, mask


def plain(hidden, head, targets, mask):
    """The definition, every logit at once."""
    logits = jnp.einsum("btw,wv->btv", hidden, head, precision="highest")
    picked = jax.nn.one_hot(targets, head.shape[1], dtype=jnp.float32)
    return jnp.where(mask, -jnp.sum(jax.nn.log_softmax(logits, axis=-1) * picked, axis=-1), 0.0)


def with_gradients(function, hidden, head, targets, mask):
    """Loss of every position, and the gradients of a weighted sum of them."""
    weight = jnp.cos(jnp.arange(LENGTH, dtype=jnp.float32))[None]

    def total(hidden, head):
        nll = function(hidden, head, targets, mask)
        return jnp.sum(nll * weight), nll

    (_, nll), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    return nll, *grads


def gathered(hidden, head, targets, mask):
    """As the models call it: the head is stored in parts."""
    return loss.token_nll(hidden, axes.use(head, jnp.float32), targets, mask)


@pytest.fixture(scope="module")
def expected():
    """Few, many and all positions supervised: (inputs, what the plain one gives)."""
    run, cases = jax.jit(lambda *a: with_gradients(plain, *a)), [drawn(share) for share in (0.15, 0.6, 2.0)]
    return [(arrays, jax.device_get(run(*arrays))) for arrays in cases]


def agree(found, wanted, mask) -> None:
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(found[0])[~mask] == 0) and np.abs(wanted[2]).max() > 0.5


@pytest.mark.parametrize("positions", [24, 10_000], ids=["many chunks", "one chunk"])
def test_equals_the_plain_one(expected, positions, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", positions)
    run = jax.jit(lambda *a: with_gradients(loss.token_nll, *a))
    for arrays, wanted in expected:
        agree(run(*arrays), wanted, arrays[3])


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_equals_the_plain_one_on_a_mesh(expected, model_parallel, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", 8)
    mesh = axes.make_mesh(model_parallel)
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: with_gradients(gathered, *a))
        for (hidden, head, targets, mask), wanted in expected:
            rows = axes.put_batch({"hidden": hidden, "targets": targets, "mask": mask}, mesh)
            head = jax.device_put(head, axes.sharding(mesh, ("embed", "vocab"), head.shape))
            found = jax.device_get(run(rows["hidden"], head, rows["targets"], rows["mask"]))
            agree(found, wanted, mask)


def test_nothing_supervised_costs_nothing_and_is_zero():
    hidden, head, targets, mask = drawn(0.5)
    nll, *grads = jax.jit(lambda *a: with_gradients(loss.token_nll, *a))(hidden, head, targets, np.zeros_like(mask))
    assert not np.any(nll) and not any(np.any(grad) for grad in grads)


def test_half_precision_products_and_float32_losses():
    hidden, head, targets, mask = drawn(0.6)
    half = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
    found = jax.jit(lambda *a: with_gradients(loss.token_nll, *a))(*half, targets, mask)
    wide = (array.astype(jnp.float32) for array in half)
    wanted = jax.jit(lambda *a: with_gradients(plain, *a))(*wide, targets, mask)
    assert [array.dtype for array in found] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.asarray(found[2], np.float32), wanted[2], rtol=0.03, atol=0.05)


@pytest.mark.parametrize("model_parallel", [0, 2])
def test_a_head_with_bias(model_parallel, monkeypatch):
    """Phi's; without a mesh and with the vocabulary shared."""
    monkeypatch.setattr(loss, "CHUNK_POSITIONS", 24)
    arrays = drawn(0.6)
    bias = np.random.default_rng(6).normal(size=VOCAB).astype(np.float32)

    def total(hidden, head, bias, targets, mask):
        return jnp.sum(loss.token_nll(hidden, head, targets, mask, bias))

    def plain_total(hidden, head, bias, targets, mask):
        one = jnp.ones_like(hidden[..., :1])  # a column of ones, whose row of the head is the bias
        whole = jnp.concatenate([hidden, one], axis=2), jnp.concatenate([head, bias[None]])
        return jnp.sum(plain(*whole, targets, mask))

    hidden, head, targets, mask = arrays
    inputs = (hidden, head, bias, targets, mask)
    wanted = jax.device_get(jax.jit(jax.value_and_grad(plain_total, argnums=(0, 1, 2)))(*inputs))
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
    if model_parallel:
        mesh = axes.make_mesh(model_parallel)
        with jax.set_mesh(mesh):
            rows = axes.put_batch({"hidden": hidden, "targets": targets, "mask": mask}, mesh)
            head, bias = (
                jax.device_put(part, axes.sharding(mesh, names, part.shape))
                for part, names in ((head, ("width", "vocab")), (bias, ("vocab",)))
            )
            found = jax.device_get(step(rows["hidden"], head, bias, rows["targets"], rows["mask"]))
    else:
        found = jax.device_get(step(*inputs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)
    assert np.abs(wanted[1][2]).max() > 0.5
