"""A user's mistake, told in one sentence instead of a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input. The message is one sentence: what was found, where, what was expected.

    `main` prints it and exits with status 2; no traceback is shown.
    """


def nearest(found: str, valid: Iterable[str]) -> str:
    """Returns "; did you mean 'x'?" for the valid choice closest to `found`, or the list of choices."""
    valid = sorted(valid)
    close = difflib.get_close_matches(found, valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid choices are {', '.join(valid)}."


def unknown(kind: str, found: str, valid: Iterable[str]) -> UserError:
    """A `UserError` for a name that is not among the valid ones, naming the nearest."""
    return UserError(f"unknown {kind} '{found}'{nearest(found, valid)}")
