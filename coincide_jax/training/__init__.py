"""Stage 4b: one sharded loop trains base, reference and target, whole or by LoRA, in the order that a sampler draws.

`state.py` what a run carries · `steps.py` what is compiled · `loop.py` the loop · `log.py` and `arms.py` what it
writes · `stages.py` the three stages · `asking.py` budgets of answers, warm-up, held-out records · `probe.py` what is
measured between rounds · `skills.py` the graph of Skill-it.
"""

from coincide_jax.training.asking import Kinds, check
from coincide_jax.training.loop import Termination, fit
from coincide_jax.training.stages import (
    BASE_KEYS,
    POOLS,
    REFERENCE_KEYS,
    STAGE_VERSION,
    TRAIN_KEYS,
    TRAIN_VERSION,
    run,
    run_base,
    run_reference,
)
from coincide_jax.training.state import Recipe, TrainState

__all__ = (
    "BASE_KEYS",
    "POOLS",
    "REFERENCE_KEYS",
    "STAGE_VERSION",
    "TRAIN_KEYS",
    "TRAIN_VERSION",
    "Kinds",
    "Recipe",
    "Termination",
    "TrainState",
    "check",
    "fit",
    "run",
    "run_base",
    "run_reference",
)
