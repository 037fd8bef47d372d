"""The one exception a user's mistake raises, and what makes its sentence useful and safe to print."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend: names the thing, what was given, what is allowed, and what to do.

    The command line prints it as one sentence and exits with status 2; in Python it is an ordinary exception.
    """


class Unfinished(UserError):  # noqa: N818
    """What stopped a run in the middle of its work, which stays for `--resume` to go on with."""


class Interrupted(Exception):  # noqa: N818
    """The run was told to stop by a signal and did, so that `--resume` goes on; the exit status is REQUEUE."""


REQUEUE = 75
"""Exit status of a run that a scheduler stopped and should start again (EX_TEMPFAIL of sysexits.h)."""


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


def printable(text: str) -> str:
    r"""`text` without control characters, by which what comes from outside could play with a terminal.

    >>> printable("a\x1b[31mb\tc\n")
    'a[31mb\tc\n'
    """
    if text.isprintable():
        return text
    return "".join(character for character in text if character in "\n\t" or character.isprintable())
