"""In what order a target sees its records. One file a family of samplers; a new sampler is a function and a line here.

    curriculum.make(settings)                                # checks the keys of config.curriculum
    sampler, rank = curriculum.prepare(settings, records, arm, arms, difficulty)

`sampler` is init, probabilities, update (`kernels.bandits.Sampler`); `rank` is the order within an arm, for
`kernels.plan.members`.
"""

import functools

import numpy as np

from coincide_jax.core.errors import UserError, unknown
from coincide_jax.curriculum import coincide_plus, exp3, odm, offline, ordered, progress, rehearsal, skill_it, tsallis
from coincide_jax.curriculum.settings import Pool, Settings
from coincide_jax.kernels.bandits import Sampler

SAMPLERS = {
    "uniform": offline.uniform,
    "proportional": offline.proportional,
    "static": offline.static,
    "easy_to_hard": ordered.easy_to_hard,
    "hard_to_easy": ordered.hard_to_easy,
    "coincide_plus": coincide_plus.coincide_plus,
    "printed": coincide_plus.printed,
    "exp3": exp3.exp3,
    "exp3s": exp3.exp3s,
    "exp3r": exp3.exp3r,
    "exp3_ix": exp3.exp3_ix,
    "tsallis_inf": tsallis.tsallis_inf,
    "odm": odm.odm,
    "progress": progress.progress,
    "skill_it": skill_it.skill_it,
}
ONE_ARM = ("uniform", "static")  # the records are one arm; clusters are not read
OFFLINE = ("uniform", "proportional", "static", "easy_to_hard", "hard_to_easy")  # nothing to rehearse for
OF_TASKS = ("skill_it",)  # the arms are tasks
ASKS = ("progress",)  # answers are asked for when a record is drawn, within a budget
READS_POOL = ("proportional", "easy_to_hard", "hard_to_easy", "progress", "skill_it")  # others are the same for any


def make(settings, facts: Pool | None = None) -> Sampler:
    """The sampler that `config.curriculum` names; the same keys and facts give the same object.

    Args:
      settings: config.curriculum.
      facts: of the records that may be drawn; None = to check the keys only.

    Raises:
      UserError: unknown name, a constant out of its range, keys that contradict each other, a probe larger than an arm.
    """
    keys = Settings.of(settings)
    if keys.name not in SAMPLERS:
        raise unknown("curriculum.name", keys.name, SAMPLERS)
    keys.check()
    if keys.name == "static" and settings.get("pool", "coreset") == "all":
        raise UserError(
            "curriculum.name is 'static', the order of a coreset, but curriculum.pool is 'all'; set 'coreset'"
        )
    if keys.remembers and keys.name in OFFLINE:
        raise UserError(
            f"curriculum.rehearsal and curriculum.visits wrap an online sampler; curriculum.name is '{keys.name}'"
        )
    sampler = _built(keys, facts if keys.name in READS_POOL else None)
    if keys.probe and sampler.probe is None:
        raise UserError(
            f"curriculum.probe is {keys.probe}, but '{keys.name}' measures nothing; set it to 0, or "
            "curriculum.rehearsal above 0"
        )
    if facts is not None and keys.probe_from == "heldout" and keys.probe > min(facts.sizes):
        least = int(np.argmin(facts.sizes))
        raise UserError(
            f"curriculum.probe is {keys.probe} records an arm, but arm {least} has {facts.sizes[least]}; "
            "take fewer, or fewer arms by curriculum.k"
        )
    return sampler


@functools.lru_cache(maxsize=64)
def _built(keys: Settings, facts: Pool | None) -> Sampler:
    """Compiled steps are kept by sampler, so that seeds and rows of one curriculum share them."""
    sampler = SAMPLERS[keys.name](keys, facts)
    if keys.draw:
        sampler = sampler._replace(per_step=keys.draw == "step")
    return rehearsal.rehearsal(sampler, keys) if keys.remembers else sampler


def pool(arm: np.ndarray, arms: int, difficulty: np.ndarray | None = None, graph: np.ndarray | None = None) -> Pool:
    """What a sampler may know of the records that may be drawn, before any is trained on.

    Args:
      arm: int[N], the arm of each record.
      arms: K.
      difficulty: real[N], of each record, for `easy_to_hard` and `hard_to_easy`.
      graph: real[K, P], for `skill_it`: above 0 where training on arm i helps evaluation skill j.

    Raises:
      UserError: an arm without records, a difficulty that is not finite.
    """
    sizes = np.bincount(arm, minlength=arms)
    if (sizes == 0).any():
        raise UserError(
            f"arm {int(np.argmin(sizes))} of {arms} has no record that may be drawn ({int((sizes == 0).sum())} such "
            "arms); merge them by a smaller curriculum.k, or set curriculum.pool=all"
        )
    means = None
    if difficulty is not None:
        if not np.isfinite(difficulty).all():
            raise UserError(
                f"the difficulty of {int((~np.isfinite(difficulty)).sum())} records is not a finite number; "
                "set curriculum.difficulty='' to order arms by their first training loss"
            )
        means = tuple((np.bincount(arm, np.asarray(difficulty, np.float64), arms) / sizes).tolist())
    edges = None if graph is None else tuple(map(tuple, np.asarray(graph, np.float64).tolist()))
    return Pool(tuple(sizes.tolist()), means, edges)


def prepare(
    settings, records: np.ndarray, arm: np.ndarray, arms: int, difficulty: np.ndarray | None = None, graph=None
) -> tuple[Sampler, np.ndarray | None]:
    """The sampler of a run over `records` int[N], made with what it may know of them, and their order within an arm.

    Other arguments, returns and errors as of `pool`, `make` and `rank`.
    """
    return make(settings, pool(arm, arms, difficulty, graph)), rank(settings, records, difficulty)


def rank(settings, records: np.ndarray, difficulty: np.ndarray | None = None) -> np.ndarray | None:
    """What comes first within an arm, real[N], for `plan.members`; None where the order is permuted or by row.

    `static` in given order: the place in `records` (select/indices.npy is in selection order); the ordered samplers
    with a difficulty: that, or its negative.
    """
    if settings.name == "static" and settings.order == "given":
        return np.arange(len(records))
    if settings.name in ("easy_to_hard", "hard_to_easy") and difficulty is not None:
        return np.asarray(difficulty) * (1.0 if settings.name == "easy_to_hard" else -1.0)
    return None
