"""Every sampler again, slowly and obviously: float64, loops over slots and arms, straight from its formula.

Each class has `p(alive)` and `update(arms, losses, weight)`; a slot counts if its weight is above 0, its loss finite.
"""

import math

import numpy as np


def by_arm(arms, losses, weight):
    """`{arm: [(loss, weight), …]}` of the counting slots, and their number."""
    found, filled = {}, 0
    for arm, loss, w in zip(arms, losses, weight, strict=True):
        if w > 0 and math.isfinite(loss):
            found.setdefault(int(arm), []).append((float(min(max(loss, 0.0), 1e4)), float(w)))
            filled += 1
    return found, filled


def softmax(scores, alive):
    top = max(score for score, living in zip(scores, alive, strict=True) if living)
    mass = np.asarray([math.exp(s - top) if a else 0.0 for s, a in zip(scores, alive, strict=True)])
    return mass / mass.sum()


def uniform(alive):
    return np.asarray(alive, float) / np.sum(alive)


class Slow:
    """What the others stand on: K arms, the keys, the last loss of each arm."""

    def __init__(self, arms, keys, sizes):
        self.k, self.keys, self.sizes = arms, keys, np.asarray(sizes, float)
        self.last, self.ring = {}, []
        self.setup()

    def setup(self):
        pass

    def rewards(self, step, relative, held=True):
        """`{arm: reward in [0, 1]}` of the arms seen before, from this step's `by_arm`; keeps the losses. Not `held`:
        the drop itself, rescaled in [−1, 1]."""
        found, drops = {}, {}
        for arm in step:
            mean = sum(loss for loss, _ in step[arm]) / len(step[arm])
            if arm in self.last:
                drops[arm] = self.last[arm] - mean
                if relative:
                    drops[arm] /= max(self.last[arm], 1e-6)
            self.last[arm] = mean
        if self.keys["rescale"]:
            for arm in self.order:
                if arm in drops:
                    self.ring = [*self.ring, drops[arm]][-1024:]
            ordered = sorted(self.ring)
            low, high = (ordered[int(q * (len(ordered) - 1))] for q in (0.05, 0.95)) if ordered else (0, 1)
            found = {arm: float(np.clip(2 * d / max(high - low, 1e-6), -1, 1)) for arm, d in drops.items()}
            return {arm: 0.5 + 0.5 * reward for arm, reward in found.items()} if held else found
        if not held:
            return drops
        for arm, drop in drops.items():
            found[arm] = min(max(drop, 0.0), 1.0)
        return found

    def step(self, arms, losses, weight):
        step, filled = by_arm(arms, losses, weight)
        self.order = [int(a) for a, x, w in zip(arms, losses, weight, strict=True) if w > 0 and math.isfinite(x)]
        return step, filled


class Uniform(Slow):
    def p(self, alive):
        return uniform(alive)

    def update(self, *_):
        pass


class Proportional(Uniform):
    def p(self, alive):
        return self.sizes * alive / (self.sizes * alive).sum()


class EasyToHard(Slow):
    sign = 1

    def p(self, alive):
        unknown = [a and i not in self.last for i, a in enumerate(alive)]
        if any(unknown):
            return uniform(unknown)
        best = min((i for i in range(self.k) if alive[i]), key=lambda i: (self.sign * self.last[i], i))
        return np.eye(self.k)[best]

    def update(self, arms, losses, weight):
        for arm, seen in self.step(arms, losses, weight)[0].items():
            self.last.setdefault(arm, sum(loss for loss, _ in seen) / len(seen))


class HardToEasy(EasyToHard):
    sign = -1


class CoincidePlus(Slow):
    def setup(self):
        self.r = [0.0] * self.k

    def update(self, arms, losses, weight):
        rewards = self.rewards(self.step(arms, losses, weight)[0], self.keys["reward"] == "relative", held=False)
        for arm, reward in rewards.items():
            self.r[arm] = (1 - self.keys["mu"]) * self.r[arm] + self.keys["mu"] * reward

    def p(self, alive):
        mass = np.asarray([max(r, 0.0) if a else 0.0 for r, a in zip(self.r, alive, strict=True)])
        if mass.sum() <= 1e-12:
            return uniform(alive)
        return (1 - self.keys["gamma"]) * mass / mass.sum() + self.keys["gamma"] * uniform(alive)


class Printed(CoincidePlus):
    def p(self, alive):
        total, gamma = sum(self.r), self.keys["gamma"]
        if abs(total) <= 1e-12:
            return uniform(alive)
        p = [max((1 - gamma) * r / total + gamma / self.k, 0.0) * a for r, a in zip(self.r, alive, strict=True)]
        return np.asarray(p) / sum(p) if sum(p) > 1e-12 else uniform(alive)

    def update(self, arms, losses, weight):
        for arm in range(self.k):
            self.last.setdefault(arm, 0.0)  # every drop is then one from a visit before
        super().update(arms, losses, weight)


class Exp3(Slow):
    def setup(self):
        self.log_w = np.zeros(self.k)

    def p(self, alive):
        gamma = self.keys["gamma"]
        return (1 - gamma) * softmax(self.log_w, alive) + gamma * uniform(alive)

    def update(self, arms, losses, weight):
        step, filled = self.step(arms, losses, weight)
        self.before = self.log_w.copy()
        self.seen = self.rewards(step, self.keys["reward"] != "absolute")
        for arm, reward in self.seen.items():
            estimate = sum(reward * w for _, w in step[arm]) / filled
            self.log_w[arm] += (self.keys["eta"] or self.keys["gamma"] / self.k) * estimate
        self.after(step)

    def after(self, step):
        pass


class Exp3S(Exp3):
    def after(self, step):
        if step:
            total = sum(math.exp(value) for value in self.before)
            share = math.e * self.keys["alpha"] / self.k * total
            self.log_w = np.asarray([math.log(math.exp(value) + share) for value in self.log_w])
            self.log_w -= self.log_w.max()


class Exp3R(Exp3):
    def setup(self):
        super().setup()
        self.draws, self.gain, self.resets = np.zeros(self.k), np.zeros(self.k), 0

    def after(self, step):
        least = self.keys["drift_draws"]
        for arm, reward in self.seen.items():
            for _, w in step[arm]:
                explored = self.keys["gamma"] / self.k * w
                self.draws[arm] += explored
                self.gain[arm] += explored * reward
        if min(self.draws) >= least or sum(self.draws) >= 4 * least * self.k:
            compared = [i for i in range(self.k) if self.draws[i] >= least]
            means = {i: self.gain[i] / self.draws[i] for i in compared}
            believed = max(compared, key=lambda i: self.log_w[i], default=None)
            if compared and any(means[i] - means[believed] >= self.keys["drift"] for i in compared):
                self.log_w, self.resets = np.zeros(self.k), self.resets + 1
            self.draws, self.gain = np.zeros(self.k), np.zeros(self.k)


class Exp3IX(Slow):
    def setup(self):
        self.lost, self.t = np.zeros(self.k), 0

    def eta(self):
        return self.keys["eta"] or math.sqrt(math.log(self.k) / (self.k * (self.t + 1)))

    def p(self, alive):
        return softmax(-self.eta() * self.lost, alive)

    def implicit(self):
        return self.eta() / 2

    def update(self, arms, losses, weight):
        step, filled = self.step(arms, losses, weight)
        for arm, reward in self.rewards(step, self.keys["reward"] != "absolute").items():
            self.lost[arm] += sum((1 - reward) / (1 / w + self.implicit()) for _, w in step[arm]) / filled
        self.t += bool(step)


class TsallisInf(Exp3IX):
    def eta(self):
        return self.keys["eta"] or 2 / math.sqrt(self.t + 1)

    def implicit(self):
        return 0.0

    def p(self, alive):
        lost = [value for value, living in zip(self.lost, alive, strict=True) if living]
        low, high = min(lost) - 2 * math.sqrt(self.k) / self.eta(), min(lost) - 1e-12
        for _ in range(200):  # Σ p rises with x: halve the interval
            x = (low + high) / 2
            low, high = (x, high) if sum(4 / (self.eta() * (value - x)) ** 2 for value in lost) < 1 else (low, x)
        p = [4 / (self.eta() * (value - x)) ** 2 * living for value, living in zip(self.lost, alive, strict=True)]
        return np.asarray(p) / sum(p)


class Odm(Slow):
    def setup(self):
        self.r, self.t = np.zeros(self.k), 0

    def mass(self, t):
        return min(self.keys["gamma"], math.sqrt(self.k * math.log(self.k) / t))

    def p(self, alive):
        epsilon, before = self.mass(self.t + 1), self.mass(max(self.t, 1)) / self.k
        return (1 - epsilon) * softmax(before * self.r, alive) + epsilon * uniform(alive)

    def update(self, arms, losses, weight):
        step, _ = self.step(arms, losses, weight)
        for arm, seen in step.items():
            estimate = sum(loss * w for loss, w in seen) / len(seen)
            self.r[arm] = (1 - self.keys["mu"]) * self.r[arm] + self.keys["mu"] * estimate
        self.t += bool(step)


class Rounds(Slow):
    """Mean training losses of the arms, `measured` once a round; with a probe the test hands in what it measured."""

    def setup(self):
        self.losses, self.count = {}, 0
        self.begin()

    def update(self, arms, losses, weight):
        if self.keys["probe"]:
            return
        for arm, seen in self.step(arms, losses, weight)[0].items():
            self.losses.setdefault(arm, []).extend(loss for loss, _ in seen)
        self.count += 1
        if self.count == self.keys["round_steps"]:
            self.measured({arm: sum(seen) / len(seen) for arm, seen in self.losses.items()})
            self.losses, self.count = {}, 0


class Progress(Rounds):
    def begin(self):
        self.j, self.times, self.delta = {}, [0] * self.k, np.zeros(self.k)
        self.left = self.sizes.copy()

    def update(self, arms, losses, weight):
        super().update(arms, losses, weight)
        for arm, w in zip(arms, weight, strict=True):
            if w > 0:
                self.left[arm] = self.left[arm] - 1 or self.sizes[arm]  # an epoch begins

    def measured(self, means):
        self.delta = np.zeros(self.k)
        for arm, mean in means.items():
            if arm in self.j:
                gains = self.keys["objective"] == "accuracy"
                before = self.j[arm] if self.j[arm] > 1e-6 else (1 / self.keys["probe"] if gains else 1e-6)
                self.delta[arm] = np.clip((mean - self.j[arm]) / before * (1 if gains else -1), -1, 1)
            self.j[arm] = mean
            self.times[arm] += 1

    def p(self, alive):
        chosen = [a and max(self.times) >= 2 for a in alive]
        if self.keys["positive_only"]:
            chosen = [c and d > 0 for c, d in zip(chosen, self.delta, strict=True)]
        outside = np.asarray(alive) & ~np.asarray(chosen) if self.keys["positive_only"] else np.asarray(alive)
        rest = self.left * (outside if outside.any() else alive)
        if not any(chosen):
            return rest / rest.sum()
        share = self.keys["delta"]
        return (1 - share) * softmax(self.delta / self.keys["tau"], chosen) + share * rest / rest.sum()


class SkillIt(Rounds):
    def begin(self):
        self.window = []

    def measured(self, means):
        old = self.window[-1] if self.window else [0.0] * self.k
        self.window = [*self.window, [means.get(arm, old[arm]) for arm in range(self.k)]][-3:]

    def p(self, alive):
        losses = np.sum(self.window, axis=0) if self.window else np.ones(self.k)
        return softmax((self.keys["eta"] or 0.2) * losses, alive)  # the graph is the identity


class Rehearsed:
    """Around a slow sampler: which arms are replayed, which are due."""

    def __init__(self, inner, arms, keys):
        self.inner, self.k, self.keys = inner, arms, keys
        self.now, self.best, self.age = {}, {}, [0] * arms
        self.p = inner.p

    def update(self, arms, losses, weight):
        self.inner.update(arms, losses, weight)
        replayed = {}
        self.age = [age + 1 for age in self.age]
        for arm, loss, w in zip(arms, losses, weight, strict=True):
            if w != 0 and math.isfinite(loss):
                self.age[arm] = 0
                if w < 0:
                    replayed.setdefault(arm, []).append(min(max(float(loss), 0.0), 1e4))
        for arm, seen in {} if self.keys["probe"] else replayed.items():
            mean = sum(seen) / len(seen)
            before = self.now.get(arm, mean)
            self.learn(arm, (1 - self.keys["mu"]) * before + self.keys["mu"] * mean)

    def learn(self, arm, now):
        self.now[arm], self.best[arm] = now, min(self.best.get(arm, now), now)

    def measured(self, values):
        for arm, value in values.items():
            self.learn(arm, 1 - value if self.keys["objective"] == "accuracy" else value)
        if hasattr(self.inner, "measured"):
            self.inner.measured(values)

    def replay(self, seen):
        worse = [self.now.get(arm, 0) - self.best.get(arm, 0) if seen[arm] else 0.0 for arm in range(self.k)]
        explore = uniform(seen)
        gamma = self.keys["gamma"] if sum(worse) > 1e-12 else 1.0
        return self.keys["rehearsal"] * ((1 - gamma) * np.asarray(worse) / max(sum(worse), 1e-12) + gamma * explore)

    def due(self):
        ahead = (self.keys["lag"] + 2) * self.keys["round_steps"]
        spacing = self.keys["window"] // self.keys["visits"]
        return [age + 1 if age + ahead > spacing else 0 for age in self.age]


SLOW = {
    "uniform": Uniform,
    "proportional": Proportional,
    "static": Uniform,
    "easy_to_hard": EasyToHard,
    "hard_to_easy": HardToEasy,
    "coincide_plus": CoincidePlus,
    "printed": Printed,
    "exp3": Exp3,
    "exp3s": Exp3S,
    "exp3r": Exp3R,
    "exp3_ix": Exp3IX,
    "tsallis_inf": TsallisInf,
    "odm": Odm,
    "progress": Progress,
    "skill_it": SkillIt,
}
