"""The one exception a user's mistake raises, and the nearest-name helper that makes its sentence useful."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: names the thing, what was given, what is allowed, and what to do.

    The command line prints it as one sentence and exits with status 2; in Python it is an ordinary exception.
    """


def nearest(given: str, allowed: Iterable[str]) -> str:
    """`Did you mean 'x'?` for the allowed name closest to `given`, or the empty string when none is close.

    >>> nearest("shfit", ["shift", "plain"])
    "Did you mean 'shift'?"
    """
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.5)
    return f"Did you mean '{close[0]}'?" if close else ""


def check_choice(thing: str, given: str, allowed: Iterable[str]) -> str:
    """`given` when it is one of `allowed`.

    Raises:
        UserError: it is not; the sentence lists the allowed names and the nearest one.
    """
    names = list(allowed)
    if given in names:
        return given
    hint = nearest(given, names)
    raise UserError(f"unknown {thing} '{given}': it must be one of {', '.join(names)}.{' ' + hint if hint else ''}")
