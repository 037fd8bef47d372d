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


def python_snippet(run: Recorded) -> str | None:
    """The adapter or full model of a run in stock transformers and PEFT.

    None where the adapter lies on another one, so that it has to be merged to be used without longlora.
    """
    if not run.adapter:
        return _plain_model(str(run.path / "model"))
    base = str(run.adapter.get("base_model_name_or_path") or "")
    if base and os.path.isfile(os.path.join(base, "adapter_config.json")):
        return None
    classes, where, more = "AutoConfig, AutoModelForCausalLM, AutoTokenizer", _text(base or "BASE_MODEL"), ""
    if base.endswith(".gguf"):
        classes, where = f"{classes}, GgufConfig", _text(str(Path(base).parent))
        unpacked = "quantization_config=GgufConfig(dequantize=True)"
        more = f", gguf_file={_text(Path(base).name)}, {unpacked}"
    return (
        "from peft import PeftModel\n"
        f"from transformers import {classes}\n"
        "\n"
        f"adapter = {_text(str(run.path / 'adapter'))}\n"
        "config = AutoConfig.from_pretrained(adapter)  # the longer positions\n"
        f"model = AutoModelForCausalLM.from_pretrained({where}, config=config{more})\n"
        "model = PeftModel.from_pretrained(model, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
    )


def _plain_model(folder: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "\n"
        f"model = AutoModelForCausalLM.from_pretrained({_text(folder)})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({_text(folder)})\n"
    )


def _text(words: str) -> str:
    """`words` as a Python string in double quotes (JSON's are the same but for what no path holds)."""
    return json.dumps(words, ensure_ascii=False)
