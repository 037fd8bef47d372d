"""`longlora COMMAND --help`: the options most people need, or with `--help-all` each, from the settings' fields."""

import ast
import dataclasses
import functools
import inspect
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from longlora.settings.fields import AtLeast

METAVARS = {
    "FILE": r"config|gguf|topic_list|questions|file",
    "FOLDER": r"output|cache|pages|reuse",
    "PATH": r"data|evaluation_data|documents?",
    "MODEL": r"models?|baseline|evaluator|tokenizer|teacher",
    "TOKENS": r"row_tokens|final_group_size|loss_chunk|extend_to|min_document_tokens|measure_limit",
    "STEPS": r"steps|.*_steps|.*_every",
    "ROWS": r"batch|device_batch|rows",
    "RATE": r"lr|.*_lr",
    "SHARE": r".*_share|reserve|held_out|utilisation|lora_dropout|top_p",
    "SECONDS": r"timeout",
    "MINUTES": r"minutes",
    "GIB": r"gpu_memory",
    "MB": r".*megabytes",
    "URL": r".*url|server",
    "TEXT": r"question|system",
    "NAME=SHARE,…": r"mix",
    "PERCENT": r"threshold",
    "VARIABLE": r"key_variable",
    "DEVICE": r"device",
    "ADDRESS": r"host",
    "CELL,CELL,…": r"only",
}
"""What to give -> the settings that take it, where neither choices nor a unit (`AtLeast`) say so. Where none fits, a
whole number is an N, another number a NUMBER."""


def help_page(name: str, kind: type[Any], everything: bool) -> str:
    """What command `name` takes, for a terminal.

    Args:
        kind: the command's settings; `kind.everyday` names the options most people need, in their order.
        everything: all options, by group.
    """
    width = min(shutil.get_terminal_size().columns, 110)
    groups = list(_groups(kind))
    known = {field.name: (owner, field) for _, owner, fields in groups for field in fields}
    positional = [each for each in known.values() if _is_positional(*each)]
    required = [each for each in known.values() if each not in positional and not _has_default(each[1])]
    words = [f"usage: longlora {name}", *(_metavar(*each) for each in positional)]
    words += [_flag(*each) for each in required] + ["[OPTIONS]"]
    parts = [textwrap.fill(" ".join(words), width, subsequent_indent="    "), inspect.cleandoc(kind.__doc__ or "")]
    everyday = getattr(kind, "everyday", ())
    if everything or not everyday:
        parts += [
            "\n".join([textwrap.fill(title, width), *(_lines(owner, field, width) for field in fields)])
            for title, owner, fields in groups
            if fields
        ]
    else:
        others = len(known) - len(everyday) - len(positional)
        parts += [
            "\n".join(_lines(*each, width) for each in positional),
            "\n".join(_lines(*known[each], width) for each in everyday),
            f"`longlora {name} --help-all` lists {others} more.",
        ]
    return "\n\n".join(parts)


Field = dataclasses.Field[Any]


def _groups(kind: type[Any], title: str = "Options") -> Iterator[tuple[str, Any, list[Field]]]:
    """(title, dataclass, its own fields) of a settings class and of those nested in it."""
    fields = dataclasses.fields(kind)
    own = [field for field in fields if not dataclasses.is_dataclass(field.type)]
    yield title, kind, sorted(own, key=lambda field: not _is_positional(kind, field))
    for field in fields:
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _groups(field.type, inspect.cleandoc(field.type.__doc__ or "").partition("\n\n")[0])


def _lines(owner: Any, field: Field, width: int) -> str:
    """An option with its text beside it."""
    head = f"  {_metavar(owner, field) if _is_positional(owner, field) else _flag(owner, field)}"
    text = _documents(owner).get(field.name, "")
    default = field.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    if not _has_default(field):
        text += " Required."
    elif (
        default is not None
        and default is not False
        and shown
        and not re.search(r"[Dd]efault|\b0 (turns|chooses)", text)
    ):
        text += f" Default: {'on' if default is True else shown}."
    body = textwrap.wrap(text, width - 28)
    first = [f"{head:<27} {body[0]}"] if len(head) < 27 else [head, f"{'':27} {body[0]}"]
    return "\n".join([*first, *(f"{'':27} {line}" for line in body[1:])])


def _flag(owner: Any, field: Field) -> str:
    dashed = field.name.replace("_", "-")
    if field.type is bool:
        return f"--[no-]{dashed}" if field.default is True else f"--{dashed}"
    return f"--{dashed} {_metavar(owner, field)}"


def _metavar(owner: Any, field: Field) -> str:
    """What to give: choices where they are known, else what kind of thing it is."""
    bare, more = _hints(owner)[field.name]
    if isinstance(bare, types.UnionType):
        bare = next(each for each in typing.get_args(bare) if each is not type(None))
    stated = next((str(each.metavar) for each in more if getattr(each, "metavar", None)), None)
    unit = next((each.unit.upper() for each in more if isinstance(each, AtLeast)), "")
    found = next((word for word, names in METAVARS.items() if re.fullmatch(names, field.name)), None)
    if stated and stated.startswith("{"):
        return stated
    if stated:
        return found or stated.replace("N,N", f"{unit},{unit}" if unit else "N,N")
    found = unit or found or ("N" if bare is int else "NUMBER" if bare is float else "NAME")
    return f"{found} …" if typing.get_origin(bare) is tuple else found


def _is_positional(owner: Any, field: Field) -> bool:
    return any("Positional" in repr(each) for each in _hints(owner)[field.name][1])


def _has_default(field: Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


@functools.cache
def _hints(kind: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """For each field its bare type and what `Annotated` adds to it."""
    found = {}
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        more = getattr(hint, "__metadata__", ())
        found[name] = (hint.__origin__ if more else hint, more)
    return found


@functools.cache
def _documents(kind: Any) -> dict[str, str]:
    """The text under each field of a dataclass and of its bases: Python keeps no docstrings of attributes."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
