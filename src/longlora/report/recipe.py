"""The way to do the same again: the command for another model, and the code that uses the result."""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longlora.report.reading import Recorded
from longlora.settings import ExtendSettings, SftSettings

OF_THIS_RUN = frozenset(
    "model output data evaluation_data text_field max_tokens cache revision trust_remote_code context resume "
    "accept_changes report_to config json".split()
)
"""Settings that belong to this model, these documents and this machine, and are no part of the recipe."""


def kind(settings: dict[str, Any]) -> Any:
    """The settings class of the command that made the run."""
    return SftSettings if settings.get("command") == "sft" else ExtendSettings


def defaults(kind: Any = ExtendSettings) -> Iterator[tuple[str, Any]]:
    """Name and default of each setting of a command, `dataclasses.MISSING` where it has to be given."""
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from defaults(field.type)
        else:
            yield field.name, field.default


def differing(settings: dict[str, Any]) -> dict[str, Any]:
    """The recorded settings that are not as they come, of those that have a default."""
    return {
        name: settings[name]
        for name, default in defaults(kind(settings))
        if name in settings
        and default is not dataclasses.MISSING
        and settings[name] != (list(default) if isinstance(default, tuple) else default)
    }


def command(settings: dict[str, Any], context: int) -> str:
    """The command for another model, with the settings of this run that are not as they come."""
    if kind(settings) is SftSettings:
        lines = ["longlora sft YOUR_MODEL", "--data YOUR_PAIRS.jsonl"]
        lines += [f"--context {context}"] if settings.get("context") else []
    else:
        lines = ["longlora extend YOUR_MODEL", "--data YOUR_DOCUMENTS", f"--context {context}"]
    for name, value in differing(settings).items():
        flag = "--" + name.replace("_", "-")
        if name in OF_THIS_RUN or value is None:
            continue
        if isinstance(value, bool):
            lines.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            word = ",".join(str(part) for part in value) if isinstance(value, list) else str(value)
            lines.append(f"{flag} {shlex.quote(word)}")
    return " \\\n  ".join([*lines, "--output RUN"])


def merge_command(run: Recorded) -> str:
    """`longlora merge` of this run."""
    return f"longlora merge {shlex.quote(str(run.path))} --output MERGED"


def loading(run: Recorded) -> dict[str, str] | None:
    """The names in the Python that loads the result in stock transformers and PEFT, each as a string of Python.

    None where the adapter lies on another one, so that it has to be merged to be used without longlora.
    """
    base = str(run.adapter.get("base_model_name_or_path") or "BASE_MODEL") if run.adapter else ""
    if base and os.path.isfile(os.path.join(base, "adapter_config.json")):
        return None
    names = {"folder": str(run.path / ("adapter" if run.adapter else "model")), "base": base}
    if base.endswith(".gguf"):
        names |= {"base": str(Path(base).parent), "gguf": Path(base).name}
    # JSON's strings are Python's, but for what no path holds
    return {name: json.dumps(words, ensure_ascii=False) for name, words in names.items()}
