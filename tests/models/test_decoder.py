"""The tap against attention written out in NumPy, position by position."""

import jax
import numpy as np

from coincide_jax.models import vlm


def rotated(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """One head's vector at a position."""
    half = len(x) // 2
    angle = position * theta ** (-np.arange(half) / half)
    low, high = x[:half], x[half:]
    return np.concatenate([low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)])


def slow_tap(block: dict, x: np.ndarray, length: int, cfg) -> np.ndarray:
    """Output projection's result of one layer for one row, float64[length, w]."""
    h = x[:length] / np.sqrt((x[:length] ** 2).mean(-1, keepdims=True) + cfg.norm_eps) * block["norm1"]["scale"]
    group = cfg.heads // cfg.kv_heads
    out = np.zeros((length, cfg.width))
    for head in range(cfg.heads):
        kv, own = divmod(head, group)
        q = [rotated(h[t] @ block["wq"][:, kv, own], t, cfg.rope_theta) for t in range(length)]
        k = [rotated(h[t] @ block["wk"][:, kv], t, cfg.rope_theta) for t in range(length)]
        v = h @ block["wv"][:, kv]
        for t in range(length):
            score = np.array([q[t] @ k[s] / np.sqrt(cfg.head_dim) for s in range(t + 1)])
            weight = np.exp(score - score.max())
            out[t] += (weight / weight.sum()) @ v[: t + 1] @ block["wo"][kv, own]
    return out


def test_taps_are_the_output_projection(tiny):
    mesh, cfg = tiny.mesh(), tiny.cfg.decoder
    with jax.set_mesh(mesh):
        params, batch = tiny.params(mesh), tiny.batch(mesh, rows=4)
        first = jax.tree.map(lambda leaf: leaf[:1], params["decoder"]["blocks"])
        short = params | {"decoder": params["decoder"] | {"blocks": first}}
        taps, embedded, after_one = (
            np.asarray(array, np.float64)
            for array in jax.jit(
                lambda p, s, b: (
                    vlm.forward(p, b, tiny.cfg, tap=lambda x: x).taps,
                    vlm.embed(p, b, tiny.cfg),
                    vlm.forward(s, b, tiny.cfg).hidden,
                )
            )(params, short, batch)
        )
    assert taps.shape == (cfg.depth, *embedded.shape)
    for layer, entering in enumerate((embedded, after_one)):
        block = jax.tree.map(lambda leaf, n=layer: np.asarray(leaf[n], np.float64), params["decoder"]["blocks"])
        for row, length in enumerate(np.asarray(batch["lengths"])):
            expected = slow_tap(block, entering[row], length, cfg)
            np.testing.assert_allclose(taps[layer, row, :length], expected, rtol=1e-4, atol=1e-4)
    # not nearly uniform, or the test would hold for wrong scores too
    assert np.abs(taps[1]).max() > 0.5
