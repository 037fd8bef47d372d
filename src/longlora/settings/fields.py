"""Kinds of fields, the checks they share, and what every command takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from longlora.errors import UserError

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


def choice(names: tuple[str, ...]) -> object:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}")


def at_least(thing: str, given: float, least: float, unit: str = "") -> None:
    if given < least:
        raise UserError(f"--{thing} is {given}: it must be at least {least}{' ' + unit if unit else ''}.")


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How MODEL is found and loaded."""

    trust_remote_code: bool = False
    """Run Python code that comes with a hub model."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""


@dataclass(frozen=True, kw_only=True)
class CommandSettings:
    """What every command takes."""

    config: str | None = None
    """YAML recipe with the same names as the flags; flags override it."""

    json: bool = False
    """Print exactly one JSON object on standard output, everything else on standard error."""
