"""The recipe of a planned run, which `longlora extend --config` reads."""

from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from longlora.planner.shapes import model_name
from longlora.settings import ExtendSettings, PlanSettings

SAID = "context method group_size train rank steps batch device_batch dtype loss_chunk gradient_checkpointing".split()
"""Settings that a recipe states even where they are the default."""

FOREIGN = ("model", "output", "config", "json", "resume", "accept_changes", "memory", "gpu_memory", "reserve")
"""Settings of `extend` that are no part of a recipe, or are written by hand."""


def extend_knows() -> set[str]:
    """Names of every setting of `longlora extend`."""
    return {name for name, *_ in _leaves(ExtendSettings)}


def recipe_values(settings: PlanSettings) -> dict[str, Any]:
    """The settings of `longlora extend` that differ from its defaults, or matter most."""
    given = {name: value for name, value, _ in _leaves(settings)}
    defaults = {name: default for name, _, default in _leaves(settings)}
    given["group_size"] = settings.attention.tokens_per_group(settings.positions.context)
    values: dict[str, Any] = {"model": model_name(settings.model)}
    for name in [name for name, *_ in _leaves(ExtendSettings) if name in given and name not in FOREIGN]:
        value = given[name]
        if value is not None and (name in SAID or value != defaults[name]):
            values[name] = list(value) if isinstance(value, tuple) else value
    return values


def recipe_text(settings: PlanSettings, notes: list[str]) -> str:
    """YAML with `notes` as its first lines."""
    values = recipe_values(settings)
    lines = [f"# {note}" for note in notes]
    if "data" not in values:
        lines.append("# data: [name your documents]")
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=120)


def start_command(settings: PlanSettings, output: str = "RUN") -> str:
    """The command that starts the recipe on the planned GPUs."""
    launch = "longlora"
    if settings.gpus > 1:
        sharded = " --use_fsdp --fsdp_version 2" if settings.shard else ""
        launch = f"accelerate launch --num_processes {settings.gpus}{sharded} -m longlora"
    return f"{launch} extend --config recipe.yaml --output {output}"


def _leaves(settings: Any) -> list[tuple[str, Any, Any]]:
    """(name, value, default) of each setting, those of nested dataclasses among them; the class has no values."""
    found: list[tuple[str, Any, Any]] = []
    for field in fields(settings):
        value = None if isinstance(settings, type) else getattr(settings, field.name)
        nested = field.type if isinstance(settings, type) else value
        if is_dataclass(nested):
            found += _leaves(nested)
        else:
            found.append((field.name, value, field.default))
    return found
