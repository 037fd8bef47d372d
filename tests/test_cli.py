"""What the command line says of mistakes that no single command owns."""

import re
import sys

import pytest
import torch

from longlora import cli
from longlora.cli import main


def said(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        (
            "prompt_format",
            "unknown key 'prompt_format'. It is a setting of `longlora sft`. `longlora COMMAND --help-all`",
        ),
        ("contxt", "unknown key 'contxt'. Did you mean 'context'? `longlora COMMAND --help-all` lists"),
        ("qqqqq", "unknown key 'qqqqq'. `longlora COMMAND --help-all` lists"),
        ("trust_remote_code", "A recipe may not: give --trust-remote-code on the command line."),
        ("trust-remote-code", "A recipe may not: give --trust-remote-code on the command line."),
    ],
)
def test_a_key_that_a_recipe_may_not_have(tmp_path, capsys, key, sentence):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{key}: 3\n")
    assert sentence in said(["plan", "demo", "--context", "4096", "--config", str(recipe)], capsys)


@pytest.mark.parametrize(
    ("words", "ways"),
    [
        (["chat", "demo"], "lower --kept-tokens; or give --dtype bfloat16."),
        (
            ["plan", "demo", "--context", "4096"],
            "--loss-chunk; or keep --gradient-checkpointing on; or give --memory auto.",
        ),
        (["demo"], "give it a machine with more memory, or close what else runs there."),
    ],
)
def test_out_of_memory_names_what_the_command_has(monkeypatch, capsys, words, ways):
    def exhausted(_settings):
        if name == "demo":  # on a CPU PyTorch raises a plain RuntimeError
            torch.empty(2**50, dtype=torch.uint8)
        raise MemoryError

    name = words[0]
    module = type(sys)("exhausted_command")
    module.run = exhausted
    monkeypatch.setitem(sys.modules, "exhausted_command", module)
    monkeypatch.setitem(cli.COMMANDS, name, (cli.COMMANDS[name][0], "exhausted_command:run"))
    cause = "can't allocate memory: you tried to allocate 1125899906842624 bytes" if name == "demo" else "the process"
    assert f"out of memory ({cause}): " in (text := said(words, capsys))
    assert text.rstrip().endswith(ways)


@pytest.mark.parametrize(
    ("words", "instead"),
    [("bench perplexity demo", "longlora eval perplexity"), ("bench memory demo --by fake", "longlora bench step")],
)
def test_what_is_gone_says_what_there_is_instead(words, instead, capsys):
    assert instead in said(words.split(), capsys)


def help_of(name, capsys, flag="--help"):
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), flag])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_is_explained(name, capsys):
    page = help_of(name, capsys, "--help-all")
    entries = {
        re.sub(r"\[no-\]", "", entry.split()[0]): len(entry.split()) for entry in re.split(r"\n(?=  \S)", page)[1:]
    }
    missing = [
        field
        for field in cli._fields(cli.COMMANDS[name][0])
        if entries.get("--" + field.replace("_", "-"), 0) < 4 and field not in ("model", "models", "file", "name")
    ]
    assert missing == []
    assert not re.search(r"\b(STR|INT|FLOAT)\b|None\}|`\w+Settings`", page)
    assert all(len(line) <= 110 or line.lstrip().startswith("--") for line in page.splitlines())


@pytest.mark.parametrize("name", ["extend", "sft", "plan", "bench step"])
def test_help_shows_the_dozen_that_most_people_need(name, capsys):
    short, everything = help_of(name, capsys), help_of(name, capsys, "--help-all")
    flags = re.findall(r"^  (--\S+)", short, re.MULTILINE)
    assert 10 <= len(flags) <= 16
    assert set(flags) < set(re.findall(r"^  (--\S+)", everything, re.MULTILINE))
    assert "--help-all" in short
    assert len(short.splitlines()) < 60


def test_a_default_is_said_once(capsys):
    page = " ".join(help_of("extend", capsys, "--help-all").split())
    assert "what trains is kept in float32. Default: bfloat16." in page
    assert "Tokens a group; default a quarter of the context (paper section 4.1, table 11). --final" in page
    assert "--[no-]gradient-checkpointing Recompute" in page


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("extend", "--group-size TOKENS"),
        ("eval perplexity", "--contexts TOKENS,TOKENS,…"),
        ("eval short", "--limit SAMPLES"),
        ("chat", "--section N "),
        ("longqa check", "FILE "),
        ("reproduce", "--only CELL,CELL,…"),
        ("cache", "--unused-days DAYS"),
        ("plan", "--method {yarn,"),
    ],
)
def test_an_option_says_what_to_give(name, option, capsys):
    assert f"\n  {option}" in help_of(name, capsys, "--help-all")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("eval perplexity demo --contexts 512,1", "--contexts is 1: it must be at least 2 tokens."),
        ("plan demo --context 4096 --rank 0", "--rank is 0: it must be at least 1."),
        ("reproduce table5", "unknown name 'table5': it must be one of table1"),
        ("plan demo --context 4096 --method yearn", "Did you mean 'yarn'?"),
    ],
)
def test_what_a_setting_allows_is_checked(words, sentence, capsys):
    assert sentence in said(words.split(), capsys)
