"""However k-means is cut, started or interrupted, labels stay the same: devices, tiles, streams, products."""

import contextlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coincide_jax.kernels import kmeans
from coincide_jax.kernels.kmeans import exact, products, seeding, sketch, sums, sweep, tiles

RESULT = ("centroids", "assignment", "objective", "updated", "imbalance", "empties", "moved", "iterations")
STREAMED = 30_000  # bytes, less than any array here


@contextlib.contextmanager
def devices(count: int, model: int = 1):
    with jax.set_mesh(jax.make_mesh((count // model, model), ("data", "model"), devices=jax.devices()[:count])):
        yield


def drawn(rows=700, width=64, centers=60, spread=1.2, seed=0) -> np.ndarray:
    """Unit float16 rows with close calls: overlapping groups, some copies, two zero rows."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(centers, width)) + rng.normal(size=width)
    x = centre[rng.integers(0, centers, rows)] + spread * rng.normal(size=(rows, width))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    x[50:60], x[[7, 300]] = x[60:70], 0
    return x


def fit(x, k=24, count=1, model=1, **settings):
    with devices(count, model):
        return kmeans.fit(x, k, **{"seed": 1, "iterations": 25, "chunk": 256} | settings)


def same(a, b):
    for name in RESULT:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.centroids.tobytes() == b.centroids.tobytes()


@pytest.fixture(scope="module", autouse=True)
def apart():
    """Rows are met apart wherever fewer products suffice, which costs more time than it saves at so few clusters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "APART", 0)
        yield


@pytest.fixture(scope="module")
def one():
    """One device, rows kept, float32 products: what all others must equal."""
    return fit(drawn(), product="float32", chunk=700)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_bitwise_equal_on_devices_tiles_and_streams(count, one):
    for chunk, memory in itertools.product((700, 200, 96), (0, STREAMED)):
        found = fit(drawn(), count=count, chunk=chunk, memory=memory, product="bfloat16")
        assert found.resident == (memory == 0)
        same(one, found)


def test_bitwise_equal_in_any_product_and_mesh(one):
    same(one, fit(drawn(), product="float16"))
    same(one, fit(drawn(), count=8, model=2, product="float32"))
    same(one, fit(drawn().astype(np.float32), product="bfloat16", count=2))


@pytest.fixture(scope="module")
def few():
    """The same of fewer rows in 29 clusters, which no mesh below divides."""
    return fit(drawn(rows=400, spread=0.8), k=29, product="float32", chunk=400)


@pytest.mark.parametrize(
    ("count", "model", "cuts"),
    [
        (2, 2, [(400, 0, "float32"), (70, STREAMED, "float16")]),
        (8, 2, [(400, 0, "bfloat16"), (96, STREAMED, "float32")]),
        (8, 4, [(128, 0, "float16"), (400, STREAMED, "bfloat16")]),
        (8, 8, [(400, 0, "float32"), (100, STREAMED, "bfloat16")]),
    ],
)
def test_bitwise_equal_when_devices_share_the_clusters(count, model, cuts, few):
    for chunk, memory, product in cuts:
        settings = {"chunk": chunk, "memory": memory, "product": product}
        found = fit(drawn(rows=400, spread=0.8), 29, count, model, split=True, **settings)
        assert found.resident == (memory == 0)
        same(few, found)
    assert found.centroids.flags.writeable


@pytest.mark.parametrize("k", [1, 3, 9])
def test_devices_that_have_no_cluster_to_share(k):
    x = drawn()[:200]
    same(fit(x, k, chunk=200, iterations=5), fit(x, k, 8, 8, chunk=200, iterations=5, split=True))


def test_ties_across_devices_and_restarts():
    """Copies of centroids on different devices: the first wins every row, the others restart, some in one go."""
    x = drawn(spread=0.6)
    copies = np.tile(fit(x, k=10, iterations=3).centroids, (4, 1))
    with devices(1):
        labels, cosine = kmeans.assign(x, copies, 256)
    one = fit(x, k=40, init=copies, iterations=3)
    assert labels.max() < 10 and one.empties[0] == 30
    with devices(4, 4):
        shared = kmeans.assign(x, copies, 700, split=True)
    np.testing.assert_array_equal(labels, shared[0])
    np.testing.assert_array_equal(cosine, shared[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seeding, "RESTARTED", 8)
        patch.setattr(tiles, "GATHERED", 9 * 4 * 64)
        same(one, fit(x, 40, 4, 2, init=copies, iterations=3, split=True))


def test_resumed_between_shared_and_whole_clusters(few):
    x, states = drawn(rows=400, spread=0.8), []
    fit(x, 29, 2, 2, split=True, on_state=states.append, iterations=4)
    same(few, fit(x, 29, resume=states[-1]))
    fit(x, 29, on_state=states.append, iterations=3)
    same(few, fit(x, 29, 4, 4, resume=states[-1], split=True))


def test_a_device_holds_its_share():
    """Of what has a row for each cluster: the limbs, the centroids and all that is made of them."""
    x = drawn()[:100]
    with devices(8, 4):
        held = kmeans.lay_out(x, 30, 100, product="float16", split=True)
        sweeper, centroids = sweep.Sweeper(held, 30), held.spread(exact.unit(x[10:40]))
        sweeper.run(centroids, None)
        following, _, _ = sweeper.settle(centroids)
        seeded = products.replace(following, jnp.arange(2, dtype=jnp.int32), jnp.zeros((2, 64)), held.split)
        arrays = [centroids, following, seeded, *sweeper.single, *sweeper.fast, *sums.total(*sweeper.limbs, 30)]
        assert {shard.data.shape for array in arrays for shard in array.addressable_shards} == {(8, 64)}
        assert {shard.data.shape for limb in sweeper.limbs for shard in limb.addressable_shards} == {(1, 8, 64)}
        assert sweeper.limbs[0].shape == (2, 32, 64) and held.per == 50
        np.testing.assert_array_equal(held.gather(centroids), exact.unit(x[10:40]))
        np.testing.assert_array_equal(held.gather(seeded)[2:], held.gather(following, np.arange(2, 30)))
        assert not held.gather(seeded, np.array([1])).any() and len(held.gather(seeded)) == 30


def test_clusters_are_shared_where_a_device_is_too_small_for_them(monkeypatch):
    x, share = drawn()[:100], 80 * 24 * 64 / tiles.SPLIT
    for limit, model, parts in ((share - 1, 4, 4), (share, 4, 1), (share - 1, 1, 1)):
        monkeypatch.setattr(tiles, "device_limit", lambda limit=limit: limit)
        with devices(8, model):
            held = kmeans.lay_out(x, 24, 100)
            assert (held.parts, held.shards, held.clusters) == (parts, 8 // parts, 24 // parts)
            assert held.by_rows.shard_shape((held.chunk, 64))[0] == held.per


def test_devices_that_share_clusters_read_their_rows_once():
    x, read = drawn()[:100], []

    class Counted:
        shape, dtype = x.shape, x.dtype

        def __len__(self):
            return len(x)

        def __getitem__(self, rows):
            read.append(rows)
            return x[rows]

    with devices(8, 4):
        kmeans.lay_out(Counted(), 24, 100, split=True).load(0)
    assert sorted((rows.start, rows.stop) for rows in read) == [(0, 50), (50, 100)]


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_starts_are_the_same_where_devices_share_the_clusters(init):
    start = {"k": 21, "iterations": 0, "init": init}
    wanted = fit(outliers(320, 20), **start).centroids
    for count, model in ((8, 4), (3, 3)):
        assert (
            wanted.tobytes()
            == fit(outliers(320, 20), count=count, model=model, split=True, **start).centroids.tobytes()
        )


def test_a_sketch_where_devices_share_the_clusters(monkeypatch):
    x, settings = drawn(rows=320, spread=0.2, centers=24), {"rank": 30, "seed": 1, "iterations": 9, "chunk": 128}
    monkeypatch.setattr(tiles, "SPLIT", 0.0)
    with devices(4, 4):
        held = kmeans.lay_out(x, 22, 128)
        start, told = sketch.start(x, 22, **settings, source=held)
        found = kmeans.fit(x, 22, seed=1, iterations=5, chunk=128, init=start, tiles=held)
    assert held.split == 22 and told["energy"] > 0.9 and told["iterations"] > 0
    with devices(1):
        alone, _ = sketch.start(x, 22, **settings)
    np.testing.assert_allclose(start, alone, atol=1e-5)
    same(found, fit(x, k=22, init=start, iterations=5))


def test_rows_are_skipped_and_labels_stay_lloyds():
    """Against Lloyd written out in float64: no pruning, no half precision."""
    x = drawn(rows=900, spread=0.5)
    found = fit(x, k=30, product="bfloat16")
    # at this K a row that is met meets 8 of the 30 at least: so some were skipped, and hardly any met all of them
    assert found.work[-1] < 8 / 30 and min(found.work) < 0.2 and found.moved[-1] == 0
    wide, centroids = x.astype(np.float64), None
    for iteration in range(found.iterations):
        if centroids is None:
            centroids = fit(x, k=30, iterations=0).centroids
        labels = exact.decide(x, np.linalg.norm(wide, axis=1), centroids)
        sums = np.stack([wide[labels == k].sum(axis=0) for k in range(30)])
        assert found.objective[iteration] == pytest.approx(np.sum(sums * centroids) / len(x), abs=1e-12)
        if np.any(sums.any(axis=1) == 0):
            pytest.fail("an empty cluster; choose other rows")
        centroids = exact.unit(sums)
    np.testing.assert_array_equal(found.assignment, labels)
    np.testing.assert_allclose(found.centroids, centroids, atol=1e-7)


def test_resumed_after_any_iteration(one):
    x, states = drawn(), []
    fit(x, on_state=states.append, product="bfloat16")
    assert len(states) == one.iterations
    for state in (states[0], states[len(states) // 2], states[-1]):
        again = kmeans.State.of(state.centroids, state.assignment, state.history)
        for left, right in zip(again, state, strict=True):
            np.testing.assert_array_equal(left, right)
        same(one, fit(x, resume=again, count=2, chunk=100))


@pytest.mark.parametrize("init", ["k-means++", "k-means||"])
def test_starts_are_the_same_anywhere_and_better_than_random(init):
    x = drawn(rows=600, centers=20, spread=0.15)
    starts = [fit(x, k=20, iterations=0, init=init, count=c, chunk=n).centroids for c, n in ((1, 600), (4, 96))]
    assert starts[0].tobytes() == starts[1].tobytes() and len(np.unique(starts[0], axis=0)) == 20
    rows = exact.unit(x.astype(np.float64))
    assert np.all((starts[0] @ rows.T).max(axis=1) > 1 - 1e-6)  # every one is a row
    best = [fit(x, k=20, iterations=1, init=name).objective[0] for name in (init, "random")]
    assert best[0] > best[1]
    few = fit(np.repeat(x[100:105], 4, axis=0), k=10, init=init)
    assert len(np.unique(few.assignment)) == 5


def outliers(rows=1000, alone=60, centers=12, width=64) -> np.ndarray:
    """Tight groups, and `alone` rows at the end that are far from them and from each other."""
    x = drawn(rows=rows, centers=centers, width=width, spread=0.1)
    rng = np.random.default_rng(6)
    far = rng.normal(size=(alone, width))
    return np.concatenate([x, (far / np.linalg.norm(far, axis=1, keepdims=True)).astype(np.float16)])


def test_parallel_starts_weigh_the_drawn_rows(monkeypatch):
    """Of the drawn rows many are outliers; a start by distance alone takes little else, one by weight the groups."""
    x = outliers()
    seeds = range(5)
    starts = [fit(x, k=12, iterations=0, init="k-means||", seed=seed) for seed in seeds]
    rows = exact.unit(x)
    alone = [np.sum((start.centroids @ rows.T).argmax(axis=1) >= 1000) for start in starts]
    assert np.mean(alone) < 4 and max(alone) < 8, alone
    weighed = [fit(x, k=12, iterations=1, init="k-means||", seed=seed).objective[0] for seed in seeds]
    kept = seeding._weighted
    monkeypatch.setattr(
        seeding, "_weighted", lambda tiles, norms, weight, *rest: kept(tiles, norms, np.sign(weight), *rest)
    )
    plain = [fit(x, k=12, iterations=1, init="k-means||", seed=seed).objective[0] for seed in seeds]
    assert np.mean(weighed) > np.mean(plain) + 0.05, (weighed, plain)


def test_weights_are_how_many_rows_are_nearest(monkeypatch):
    x, told = drawn(rows=400, centers=20), []
    monkeypatch.setattr(
        seeding, "_weighted", lambda tiles, norms, weight, k, rng: told.append(weight) or np.flatnonzero(weight)[:k]
    )
    fit(x, k=10, iterations=0, init="k-means||", chunk=64, count=2)
    (weight,) = told
    held = np.flatnonzero(weight)
    nearest = np.argmax(exact.unit(x) @ exact.unit(x[held]).T, axis=1)
    wanted = np.bincount(held[nearest[np.any(x, axis=1)]], minlength=400)
    assert weight.sum() == 398 and len(held) > 30
    assert np.abs(weight - wanted).sum() <= 12  # int8 copies and the rows themselves may differ on close calls


def test_weighted_draws_are_those_of_one_at_a_time():
    """The second row of two is drawn in proportion to weight · distance, also where it comes from the same batch."""
    x = np.eye(4, dtype=np.float16)
    x[1] = [1, 1, 0, 0]  # 1 − cos to row 0 is 0.29, to the others 1
    weight, seen = np.array([1e9, 30.0, 10.0, 0.0]), np.zeros(4)
    with devices(1):
        made = tiles.Tiles(x, 2, 4, np.float32)
        for seed in range(400):
            chosen = seeding._weighted(made, np.linalg.norm(x, axis=1), weight, 2, np.random.default_rng(seed))
            assert len(chosen) == 2
            seen[chosen[1]] += 1
    share = 30 * (1 - 0.5**0.5)
    assert seen[3] == 0 and seen[1] / 400 == pytest.approx(share / (share + 10), abs=0.1)


@pytest.mark.parametrize(("count", "chunk", "memory"), [(8, 1060, 0), (3, 100, 0), (2, 128, STREAMED)])
def test_parallel_starts_do_not_depend_on_devices_tiles_and_streams(count, chunk, memory):
    start = {"k": 40, "iterations": 0, "init": "k-means||"}
    wanted = fit(outliers(), chunk=2000, **start).centroids
    found = fit(outliers(), count=count, chunk=chunk, memory=memory, **start).centroids
    assert wanted.tobytes() == found.tobytes() and len(np.unique(wanted, axis=0)) == 40


def test_distances_do_not_depend_on_rows_a_device_has():
    """One row met with one is where XLA would turn two divisions into one."""
    x, found = np.random.default_rng(3).normal(size=(200, 8)).astype(np.float16), []
    for chunk, count in ((200, 1), (1, 1), (2, 2), (7, 1)):
        with devices(count):
            held = kmeans.lay_out(x, 6, chunk, 1 << 20)
            norms, _ = held.measure()
            found.append(seeding._distances(held, norms, np.array([5]), np.full(len(x), 2.0, np.float32)))
        np.testing.assert_array_equal(found[0], found[-1])
    assert held.per == 7 and len(np.unique(found[0])) > 150


def test_plus_plus_of_streamed_rows_is_refused():
    """It would read them once for each cluster; and another rule in its place would be a start that memory decides."""
    with pytest.raises(ValueError, match=r"take k-means\|\|, or a larger cluster.memory_mib"):
        fit(drawn(), iterations=0, init="k-means++", memory=STREAMED, chunk=128)


@pytest.mark.parametrize("memory", [0, STREAMED])
def test_five_distinct_points_and_ten_clusters(memory):
    x = np.repeat(drawn()[100:105], 30, axis=0)[np.random.default_rng(0).permutation(150)]
    found = fit(x, k=10, memory=memory, chunk=64)
    assert len(np.unique(found.assignment)) == 5 and found.iterations < 25
    for row in drawn()[100:105]:
        assert len(set(found.assignment[np.all(x == row, axis=1)])) == 1


def test_bounds_hold_for_every_score():
    """Fast and float32 scores against float64 ones, on rows and centroids that make rounding large."""
    rng = np.random.default_rng(4)
    x = (rng.normal(size=(64, 3000)) + 3).astype(np.float32)
    x = np.asarray(exact.grid(x / np.linalg.norm(x, axis=1, keepdims=True)))
    centroids = exact.unit(rng.normal(size=(16, 3000)) + 3)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    own, order = np.arange(64, dtype=np.int32) % 16, np.arange(16, dtype=np.int32)
    for dtype in ("float32", "bfloat16", "float16"):
        with devices(1), jax.enable_x64(True):
            mean, single, fast = products.directions(jnp.asarray(centroids), jnp.dtype(dtype))
            told = products.prepare(jnp.asarray(centroids), jnp.asarray(centroids), mean, single, fast)
        assert [len(parts) for parts in (single, fast)] == [3, -(-3000 // products.FAST[dtype])]
        (radius, rounded, cast), moved = jax.device_get(told)
        assert not moved.any()
        offset = centroids.astype(np.float64) - np.asarray(mean, np.float64)
        true = x.astype(np.float64) @ offset.T
        rows = jnp.asarray(x).astype(dtype)
        lost = np.linalg.norm(x - np.asarray(rows, np.float64), axis=1)
        for parts, far, of, away, block in (
            (fast, cast, rows, lost, products.FAST[dtype]),
            (single, rounded, jnp.asarray(x), 0.0, products.SINGLE),
        ):
            whole = np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)
            assert (
                far >= np.linalg.norm(offset - whole, axis=1).max() and radius >= np.linalg.norm(offset, axis=1).max()
            )
            bound = norms * far + (radius + far) * (away + products.accumulation(3000, block) * (norms + away))
            error = np.abs(np.asarray(products._product(of, parts), np.float64) - true).max(axis=1)
            assert np.all(error <= bound)
            assert np.max(error) > 2.0**-30, "these rows show no rounding"
        with devices(1):
            by_rows = jax.NamedSharding(jax.sharding.get_mesh(), jax.P(products.AXES))
            lists = (tiles.put(part, by_rows) for part in (np.asarray(rows), x, np.arange(64, dtype=np.int32), own))
            found = products.against(*lists, fast, single, jnp.asarray(order), 16)
        error = np.abs(np.asarray(found[3], np.float64) - true[np.arange(64), own])
        assert np.all(
            error <= norms * rounded + (radius + rounded) * products.accumulation(3000, products.SINGLE) * norms
        )


@pytest.mark.parametrize(("count", "model", "split"), [(1, 1, None), (8, 4, True), (2, 2, True)])
def test_two_clusters_that_are_left_are_met_alone(count, model, split, monkeypatch, one):
    """Rows between two clusters go to `between`, most of them leave it with a label, and the result is that of float32
    products; the third best of a row is below both by more than their rounding."""
    met, left = [], []
    between = sweep.Sweeper._between

    def counted(self, x, start, pairs):
        open_ = between(self, x, start, pairs)
        met.append(len(pairs.rows))
        left.append(len(open_))
        x, chosen = self.tiles.features[start + pairs.rows], np.stack(pairs[1:], axis=1)
        scores = x.astype(np.float64) @ self.tiles.gather(self.centroids).astype(np.float64).T
        best = np.sort(np.argsort(-scores, axis=1)[:, :2], axis=1)
        assert np.array_equal(best, np.sort(chosen, axis=1))
        decided = ~np.isin(pairs.rows, open_)
        assert np.array_equal(np.argmax(scores, axis=1)[decided], self.assignment[start + pairs.rows][decided])
        ordered = np.sort(scores, axis=1)
        assert np.all(self.gap[start + pairs.rows] <= ordered[:, -1] - ordered[:, -2] + 1e-12)
        return open_

    monkeypatch.setattr(sweep.Sweeper, "_between", counted)
    same(fit(drawn(), count=count, model=model, split=split, product="bfloat16"), one)
    assert sum(met) > 100 and sum(left) < sum(met)


@pytest.mark.parametrize(("count", "model"), [(1, 1), (4, 4), (8, 2)])
def test_three_best_of_all_clusters(count, model):
    rng = np.random.default_rng(2)
    x, centroids = rng.normal(size=(16, 8)).astype(np.float32), rng.normal(size=(11, 8)).astype(np.float32)
    centroids[7], centroids[10] = centroids[2], centroids[2]  # ties, in several shards
    x[::2] += 2 * centroids[2]
    with devices(count, model):
        held = tiles.Tiles(x, 11, 16, np.float32, split=model > 1)
        found = products.nearest(held.load(0), (held.spread(centroids),), held.split)
    scores = np.einsum("nd,kd->nk", x, centroids)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    wanted = np.take_along_axis(scores, order, axis=1)
    assert np.any(order[:, 0] == 2) and np.any(order[:, 0] != 2)
    np.testing.assert_array_equal(np.stack(jax.device_get((found[0], found[2])), axis=1), order[:, :2])
    np.testing.assert_allclose(np.stack(jax.device_get((found[1], *found[3:])), axis=1), wanted, rtol=1e-5)


def test_what_bfloat16_loses_is_what_the_cast_loses():
    rng = np.random.default_rng(6)
    wide = (rng.normal(size=(40, 300)) * 10.0 ** rng.uniform(-8, 1, (40, 300))).astype(np.float32)
    for x in (wide, np.clip(wide, -16, 16).astype(np.float16)):
        with devices(1), jax.enable_x64(True):
            there = tiles.put(x, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(products.AXES)))
            fast = there.astype(jnp.bfloat16)
            lost = np.asarray(sums.inspect(there, fast, True)[1])
        true = np.linalg.norm(x.astype(np.float64) - np.asarray(fast, np.float64), axis=1)
        assert np.all(lost >= true) and np.allclose(lost, true, rtol=1e-5) and np.all(true > 0)


def test_contractions_of_many_blocks_change_nothing(monkeypatch):
    x = drawn(rows=400, width=130)
    wanted = [fit(x, k=k, product="float32", chunk=400) for k in (2, 17)]
    monkeypatch.setattr(products, "FAST", {"float32": 64, "float16": 64, "bfloat16": 96})
    monkeypatch.setattr(products, "SINGLE", 32)
    jax.clear_caches()  # the lengths of the blocks are constants of the compiled programs
    for product, count in (("float32", 1), ("bfloat16", 2), ("float16", 3)):
        for k, expected in zip((2, 17), wanted, strict=True):
            same(expected, fit(x, k=k, product=product, count=count, chunk=150))
    jax.clear_caches()


def test_sums_of_more_rows_than_a_limb_holds():
    x = np.zeros((6000, 4), np.float32)
    x[:, 0], x[:, 1] = 1.0, -(2.0**-24)
    found = fit(x, k=1, chunk=6000, iterations=2)
    np.testing.assert_array_equal(found.centroids[0] * 2.0**24, [2.0**24, -1.0, 0.0, 0.0])


def test_a_tolerance_stops_late_enough_and_alike_after_a_stop():
    x, states = drawn(spread=0.6), []
    whole = fit(x)
    early = fit(x, tolerance=5e-4, on_state=states.append)
    assert early.iterations < whole.iterations and whole.objective[-1] < early.updated[-1] * 1.002
    same(early, fit(x, tolerance=5e-4, resume=states[len(states) // 2], count=2, chunk=100))
    # four copies of ten converged centroids: the objective stands still where thirty clusters have just restarted
    copies = np.repeat(fit(x, k=10).centroids, 4, axis=0)
    restarted = fit(x, k=40, init=copies, tolerance=5e-4)
    assert restarted.empties[0] == 30 and restarted.updated[-1] > 1.05 * restarted.objective[0]


def test_ordered_lengths_are_those_of_numpy():
    values = np.random.default_rng(5).integers(-(2**40), 2**40, size=(7, 333)) / 2.0**24
    with jax.enable_x64(True):
        found = np.asarray(jax.jit(sums.squares)(jnp.asarray(values)))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, np.sum(values**2, axis=1), rtol=1e-14)


def test_lengths_are_exact_for_long_and_short_rows():
    """Short float16 rows are summed as they come, long ones in one order: both are the nearest number to the length."""
    short = drawn()[:80]
    for x in (short, (short.astype(np.float32) * 14).astype(np.float16)):
        integers = np.rint(x.astype(np.float64) * 2.0**24).astype(object)
        true = [float(math.isqrt(sum(v * v for v in row.tolist()) << 80)) / 2.0**64 for row in integers.astype(int)]
        for count in (1, 8):
            with devices(count):
                norms, _ = tiles.Tiles(x, 8, 64, np.float32).measure()
            np.testing.assert_allclose(norms, true, rtol=2e-16)


def test_memory_decides_between_keeping_and_streaming():
    x = drawn()
    with devices(2):
        for memory, resident in ((0, True), (len(x) * 64 * 2 + 100_000, True), (len(x) * 64, False)):
            made = tiles.Tiles(x, 24, 128, np.float16, memory)
            assert made.resident == resident and made.chunk <= 128 and made.chunk % 2 == 0


def test_a_sketch_says_what_it_holds():
    x = drawn(spread=0.2, centers=24)
    with devices(1):
        start, told = sketch.start(x, 24, rank=30, seed=1, iterations=20, chunk=128)
        none, little = sketch.start(drawn(spread=3.0)[10:50], 5, rank=1, seed=1, iterations=20, chunk=128)
    assert told["energy"] > 0.9 and start.shape == (24, 64) and told["iterations"] > 0
    polished = fit(x, init=start, tolerance=3e-4)
    assert polished.objective[-1] > fit(x).objective[-1] * 0.99 and polished.iterations <= 4
    assert none is None and little["energy"] < 0.5


def test_a_sketch_of_long_rows_of_small_numbers():
    """Their coordinates along the directions are above what a feature may be; the numbers themselves are not."""
    x = (drawn(spread=0.2, centers=24).astype(np.float32) * 32).astype(np.float16)
    assert np.abs(x).max() < 16 < np.linalg.norm(x.astype(np.float32), axis=1).max()
    settings = {"rank": 30, "seed": 1, "iterations": 20, "chunk": 128}
    with devices(2):
        start, told = sketch.start(x, 24, **settings)
        short, small = sketch.start((x.astype(np.float32) / 32).astype(np.float32), 24, memory=STREAMED, **settings)
    assert told["objective"] == pytest.approx(32 * small["objective"], rel=1e-3)
    assert np.mean(np.sum(start * short, axis=1) > 0.999) > 0.8


def test_cosines_read_few_chunks_twice():
    """Blocks of whole store chunks, within a bounded memory, and each row's cosine that of the row alone."""
    x, seen = drawn(rows=3000, width=64), []

    class Counted:
        shape, dtype = (3000, 64), np.dtype(np.float16)

        def __len__(self):
            return 3000

        def __getitem__(self, part):
            seen.append(part)
            return x[part]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "READ", 1000 * 64 * 2)
        patch.setattr(exact, "BLOCK", 50 * 64)  # rows in float64 at a time
        labels, told = np.arange(3000) % 7, []
        found = kmeans.cosines(Counted(), exact.unit(x[:7]), labels, lambda *at: told.append(at))
    assert [(part.start, part.stop) for part in seen] == [(0, 768), (768, 1536), (1536, 2304), (2304, 3000)]
    assert [done for _, done, _ in told] == [0, 768, 1536, 2304, 3000] and {of for *_, of in told} == {3000}
    for row in (0, 7, 49, 50, 767, 768, 2999):
        alone = kmeans.cosines(x[row : row + 1], exact.unit(x[:7]), labels[row : row + 1])
        assert alone[0] == found[row]


def test_a_sketch_measures_the_rows_once():
    """Its tiles go on to `fit`, which measures no row again."""
    x, read = drawn(spread=0.2, centers=24), []

    class Counted:
        shape, dtype = x.shape, x.dtype

        def __len__(self):
            return len(x)

        def __getitem__(self, rows):
            if isinstance(rows, slice):
                read.append(rows)
            return x[rows]

    with devices(1):
        held = kmeans.lay_out(Counted(), 24, 700)
        start, _ = sketch.start(Counted(), 24, rank=30, seed=1, iterations=5, chunk=700, source=held)
        found = kmeans.fit(Counted(), 24, seed=1, iterations=5, chunk=700, init=start, tiles=held)
    assert found.resident and len(read) == 1
    same(found, fit(x, init=start, iterations=5))
