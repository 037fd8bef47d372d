"""What the command line says of mistakes that no single command owns."""

import sys

import pytest

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
        ("prompt_format", "unknown key 'prompt_format'. It is a setting of `longlora sft`. `longlora COMMAND --help`"),
        ("contxt", "unknown key 'contxt'. Did you mean 'context'? `longlora COMMAND --help` lists"),
        ("qqqqq", "unknown key 'qqqqq'. `longlora COMMAND --help` lists"),
    ],
)
def test_a_key_that_a_command_does_not_have(tmp_path, capsys, key, sentence):
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
        raise MemoryError

    name = words[0]
    module = type(sys)("exhausted_command")
    module.run = exhausted
    monkeypatch.setitem(sys.modules, "exhausted_command", module)
    monkeypatch.setitem(cli.COMMANDS, name, (cli.COMMANDS[name][0], "exhausted_command:run"))
    assert "out of memory (the process): " in (text := said(words, capsys))
    assert text.rstrip().endswith(ways)


@pytest.mark.parametrize(
    ("words", "instead"),
    [("bench perplexity demo", "longlora eval perplexity"), ("bench memory demo --by fake", "longlora plan MODEL")],
)
def test_what_is_gone_says_what_there_is_instead(words, instead, capsys):
    assert instead in said(words.split(), capsys)
