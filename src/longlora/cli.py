"""The command line: settings from flags and YAML, one function a command, errors as sentences.

Commands and recipes are made from the dataclasses of `longlora.settings`; heavy rooms are imported when a command runs.
"""

import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import tyro

from longlora import ranks
from longlora import settings as s
from longlora.errors import REQUEUE, Interrupted, UserError, check_choice, nearest, printable
from longlora.help_page import help_page
from longlora.logs import quiet_libraries
from longlora.whole_files import NO_ROOM, read_yaml

COMMANDS: dict[str, tuple[type[s.CommandSettings], str]] = {
    "extend": (s.ExtendSettings, "longlora.training.extension:extend"),
    "sft": (s.SftSettings, "longlora.training.fine_tuning.command:sft"),
    "chat": (s.ChatSettings, "longlora.chat.command:chat"),
    "eval perplexity": (s.EvaluatePerplexitySettings, "longlora.evaluation.command:evaluate_perplexity"),
    "eval short": (s.EvaluateShortSettings, "longlora.evaluation.short:evaluate_short"),
    "eval longppl": (
        s.EvaluateLongPerplexitySettings,
        "longlora.evaluation.long_perplexity_command:evaluate_long_perplexity",
    ),
    "eval tasks": (s.EvaluateTasksSettings, "longlora.evaluation.tasks:evaluate_tasks"),
    "eval ruler": (s.RulerSettings, "longlora.evaluation.ruler:evaluate_ruler"),
    "eval passkey": (s.PasskeySettings, "longlora.evaluation.passkey:evaluate_passkey"),
    "eval topics": (s.TopicsSettings, "longlora.evaluation.longeval:evaluate_topics"),
    "eval lines": (s.LinesSettings, "longlora.evaluation.longeval:evaluate_lines"),
    "plan": (s.PlanSettings, "longlora.planner.command:plan"),
    "merge": (s.MergeSettings, "longlora.model.merging:merge_run"),
    "export": (s.ExportSettings, "longlora.model.exporting.command:export"),
    "report": (s.ReportSettings, "longlora.report.command:report"),
    "longqa build": (s.BuildLongQASettings, "longlora.longqa.building:build_pairs"),
    "longqa check": (s.CheckLongQASettings, "longlora.longqa.checking:check_pairs"),
    "cache": (s.CacheSettings, "longlora.corpus.cache_command:cache"),
    "reproduce": (s.ReproduceSettings, "longlora.reproduction.command:reproduce"),
    "demo": (s.DemoSettings, "longlora.demo:demo"),
    "bench attention": (s.BenchAttentionSettings, "longlora.bench.attention:bench_attention"),
    "bench step": (s.BenchStepSettings, "longlora.bench.step:bench_step"),
}
"""Command words -> the dataclass they are parsed into, and `module:function` that runs it and returns its JSON."""

GONE = {
    "bench perplexity": "`longlora bench perplexity` is gone: `longlora eval perplexity` says what it will take.",
    "bench memory": "`longlora bench memory` is gone: `longlora bench step` has memory beside the plan's.",
}
"""What earlier versions had -> what there is instead."""

_LARGE = ("device_batch", "context", "contexts", "length", "evaluation_batch", "loss_chunk", "kept_tokens")
"""Settings that take memory, where a command has them."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; the exit status is 2 for a mistake of the user's, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = ""
    try:
        name, settings = parse(argv)
        quiet_libraries()
        result = _run(name, settings, argv)
        if settings.json and ranks.rank() == 0:
            print(json.dumps(result))
    except UserError as error:
        _fail(str(error), 2)
    except Interrupted as stop:
        _fail(str(stop), REQUEUE)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        again = " with --resume" if _resumes(name) else ""
        _fail(f"the disk is full{where}: free some space, then give the same command again{again}.", 2)
    except (MemoryError, RuntimeError) as error:
        said = str(error).rpartition("DefaultCPUAllocator: ")[2]  # a plain RuntimeError, where no GPU is full
        on_cpu = said != str(error)
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu):
            dead = ranks.who_died()
            if dead is None:
                raise
            _fail(f"{dead} has ended, and the run with it: see why, then give the same command with --resume.", 1)
        cause = said.partition(". ")[0] or "the process"
        _fail(f"out of memory ({cause}): {_less_memory(name)}.", 2)
    except KeyboardInterrupt:
        _fail("stopped." + (" Give the same command with --resume to go on." if _resumes(name) else ""), 130)


def _run(name: str, settings: Any, argv: Sequence[str]) -> Any:
    """What the command's function returns; meanwhile results keep the command line."""
    from longlora.results import COMMAND  # here, or `longlora --help` would wait for it

    running = COMMAND.set(("longlora", *argv))
    try:
        module, _, function = COMMANDS[name][1].partition(":")
        return getattr(importlib.import_module(module), function)(settings)
    finally:
        COMMAND.reset(running)


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """The command's name and its settings, from flags and from the YAML file of `--config`.

    Raises:
        UserError: unknown command, unreadable recipe, unknown key, or a value out of range.
        SystemExit: `--help`, or flags that do not parse (status 2).
    """
    name, rest = _command(list(argv))
    kind = COMMANDS[name][0]
    if asked := {"-h", "--help", "--help-all"}.intersection(rest):
        print(help_page(name, kind, everything="--help-all" in asked))
        raise SystemExit(0)
    return name, tyro.cli(
        kind,
        args=_with_recipe(kind, rest),
        prog=f"longlora {name}",
        description=kind.__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _command(argv: list[str]) -> tuple[str, list[str]]:
    for was, now in GONE.items():
        *command, last = was.split()
        if argv[: len(command)] == command and (_value_of(last, argv) or argv[len(command) :][:1] == [last]):
            raise UserError(now)
    for count in (2, 1):
        name = " ".join(argv[:count])
        if name in COMMANDS:
            return name, argv[count:]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        raise SystemExit(0 if argv else 2)
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"longlora {version('longlora')}")
        raise SystemExit(0)
    group = [name for name in COMMANDS if name.startswith(argv[0] + " ")]
    if group:
        given = argv[1] if len(argv) > 1 else ""
        if given in ("", "-h", "--help"):
            print(_overview(group))
            raise SystemExit(0 if given else 2)
        raise UserError(
            f"unknown command '{argv[0]} {given}': it must be one of {', '.join(group)}. "
            f"{nearest(f'{argv[0]} {given}', group)}".rstrip()
        )
    raise UserError(
        f"unknown command '{argv[0]}': it must be one of {', '.join(COMMANDS)}. {nearest(argv[0], COMMANDS)}".rstrip()
    )


def _overview(names: Sequence[str] = tuple(COMMANDS)) -> str:
    lines = ["usage: longlora COMMAND [OPTIONS]", "", "A longer context window for a language model you already have."]
    lines += ["", "commands:"]
    width = max(len(name) for name in names)
    for name in names:
        first_sentence = (COMMANDS[name][0].__doc__ or "").splitlines()[0]
        lines.append(f"  {name:<{width}}  {first_sentence}")
    lines += ["", "`longlora COMMAND --help` shows a command's options; `longlora demo` shows the whole way at once."]
    return "\n".join(lines)


def _with_recipe(kind: type[s.CommandSettings], rest: list[str]) -> list[str]:
    """`rest` with the recipes of its `--recipe` and `--config` as the flags they stand for, before the flags given."""
    words: list[str] = []
    positional: list[str] = []
    if name := _value_of("--recipe", rest):
        check_choice("--recipe", name, s.RECIPES)
        words += _flags_of(kind, str(resources.files("longlora") / "assets" / "recipes" / f"{name}.yaml"))[1]
    if path := _value_of("--config", rest):
        positional, more = _flags_of(kind, path)
        words += more
    first_flag = next((at for at, word in enumerate(rest) if word.startswith("-")), len(rest))
    return [*(rest[:first_flag] or positional), *words, *rest[first_flag:]]


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    """The value given to `flag`, the last one where there are several."""
    found = None
    for at, word in enumerate(words):
        if word == flag and at + 1 < len(words):
            found = words[at + 1]
        elif word.startswith(flag + "="):
            found = word.partition("=")[2]
    return found


def _flags_of(kind: type[s.CommandSettings], path: str) -> tuple[list[str], list[str]]:
    """The positional arguments and the flags that a YAML recipe stands for."""
    recipe = read_yaml("--config", path)
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} must hold `name: value` lines with the names of the flags.")
    fields = _fields(kind)
    words: list[str] = []
    positional: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name == "trust_remote_code" and value:
            raise UserError(
                f"--config {path} switches trust_remote_code on, by which a model's own code would run here. A recipe "
                "may not: give --trust-remote-code on the command line."
            )
        if name not in fields or name in ("config", "recipe", "json"):
            others = [command for command, (other, _) in COMMANDS.items() if name in _fields(other)]
            hint = f"It is a setting of `longlora {others[0]}`." if others else nearest(name, fields)
            parts = (f"--config {path}: unknown key '{key}'.", hint, "`longlora COMMAND --help-all` lists the names.")
            raise UserError(" ".join(filter(None, parts)))
        if value is None:
            continue
        flag = "--" + name.replace("_", "-")
        if name in ("model", "models"):
            positional = [str(part) for part in value] if isinstance(value, list) else [str(value)]
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            many = [str(part) for part in value]
            words += [flag, *many] if "data" in name or name in ("document", "documents") else [flag, ",".join(many)]
        else:
            words += [flag, str(value)]
    return positional, words


def _resumes(name: str) -> bool:
    """Whether the command goes on where it stopped with `--resume`."""
    return name in COMMANDS and "resume" in _fields(COMMANDS[name][0])


def _less_memory(name: str) -> str:
    """What to change so that a command takes less memory, in flags that it has."""
    has = _fields(COMMANDS[name][0]) if name in COMMANDS else {}
    lower = [flag for flag in _LARGE if flag in has]
    ways = [f"lower {', '.join('--' + flag.replace('_', '-') for flag in lower)}"] if lower else []
    ways += ["keep --gradient-checkpointing on"] if "gradient_checkpointing" in has else []
    ways += ["give --memory auto"] if "memory" in has else []
    ways += ["give --dtype bfloat16"] if "dtype" in has and "memory" not in has else []
    return "; or ".join(ways) or "give it a machine with more memory, or close what else runs there"


def _fields(kind: Any) -> dict[str, Any]:
    """Every setting of a command by name, those of its nested dataclasses among them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            found |= _fields(field.type)
        else:
            found[field.name] = field
    return found


def _fail(sentence: str, status: int) -> None:
    if ranks.speaks():
        print(f"longlora: {printable(sentence)}", file=sys.stderr)
    raise SystemExit(status)
