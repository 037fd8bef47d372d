"""Kinds of fields, what may be given to them, and what every command takes."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from longlora.errors import UserError, check_choice

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.replace("+", ",").split(",") if part.strip()]


def _whole_numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(part.replace("_", "")) for word in words for part in _split(word))


def _names(words: list[str]) -> tuple[str, ...]:
    return tuple(part for word in words for part in _split(word))


def _comma(value: Iterable[object]) -> list[str]:
    return [",".join(str(part) for part in value)]


def _is_tuple(value: object) -> bool:
    return isinstance(value, tuple)


Tokens = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1, metavar="N,N,…", instance_from_str=_whole_numbers, is_instance=_is_tuple, str_from_instance=_comma
    ),
]
"""Whole numbers written with commas, `512,1024,2048`."""


Names = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1, metavar="NAME,NAME,…", instance_from_str=_names, is_instance=_is_tuple, str_from_instance=_comma
    ),
]
"""Names written with commas or plus signs, `lora,norm,embed`."""


def choice(names: Iterable[str]) -> Any:
    """One of `names`, in an `Annotated` field of `Checked` settings."""
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


@dataclass(frozen=True)
class AtLeast:
    """A number, or each of several, of at least so much, in an `Annotated` field of `Checked` settings."""

    least: float
    unit: str = ""

    def check(self, flag: str, given: Any) -> None:
        """Raises UserError where `given` is a number below that."""
        if isinstance(given, int | float) and given < self.least:
            raise UserError(f"{flag} is {given}: it must be at least {f'{self.least} {self.unit}'.rstrip()}.")


class Checked:
    """Settings that are refused, as they are made, where a field is not what its annotation allows.

    Raises:
        UserError: a number below `AtLeast`, or a name that is no `choice`; None is always allowed.
    """

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, flag, allowed in _allowed(kind):
            given = getattr(self, name)
            for each in given if isinstance(given, tuple) else (given,):
                if isinstance(allowed, AtLeast):
                    allowed.check(flag, each)
                elif each is not None:
                    check_choice(flag, each, allowed)


@functools.cache
def _allowed(kind: Any) -> list[tuple[str, str, AtLeast | list[str]]]:
    """(field, what people call it, a least number or the names that `choice` shows as its metavar)."""
    found: list[tuple[str, str, AtLeast | list[str]]] = []
    for field in fields(kind):
        name, stated = field.name, getattr(field.type, "__metadata__", ())
        flag = name if any("Positional" in repr(each) for each in stated) else "--" + name.replace("_", "-")
        found += [(name, flag, each) for each in stated if isinstance(each, AtLeast)]
        shown = [str(each.metavar) for each in stated if getattr(each, "metavar", None)]
        found += [(name, flag, each.strip("{}").split(",")) for each in shown if each.startswith("{")]
    return found


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How MODEL is found and loaded."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@dataclass(frozen=True, kw_only=True)
class CommandSettings(Checked):
    """What every command takes."""

    config: str | None = None
    """YAML recipe with the same names as the flags; flags override it."""

    json: bool = False
    """Print exactly one JSON object on standard output, everything else on standard error."""
