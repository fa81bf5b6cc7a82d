"""The sentence for a wrong name: what was found, and the nearest valid choice or all of them."""

import pytest

from coincide_jax.core.errors import UserError, nearest, unknown


@pytest.mark.parametrize(
    ("found", "valid", "sentence"),
    [
        ("coincid", ["random", "coincide"], "; did you mean 'coincide'?"),
        ("zzz", ["random", "coincide"], "; valid choices are coincide, random."),
        ("exp33", {"uniform": 1, "exp3": 2}, "; did you mean 'exp3'?"),
        ("any", [], "; valid choices are ."),
    ],
)
def test_nearest(found, valid, sentence):
    assert nearest(found, valid) == sentence


def test_unknown_is_a_users_mistake():
    error = unknown("sampler", "unifrom", ("uniform", "exp3"))
    assert isinstance(error, UserError)
    assert str(error) == "unknown sampler 'unifrom'; did you mean 'uniform'?"
