"""`longlora chat` as a person meets it in the terminal: one question, a conversation, Ctrl-C, bad documents."""

import inspect
import json
import logging
import os
import signal
from pathlib import Path

import pytest
from tiny_runs import save_base

from longlora import cli, logs
from longlora.chat import terminal
from longlora.chat.sampling import Sampler
from longlora.chat.terminal import Conversation
from longlora.errors import UserError, printable
from longlora.longqa import building, checking
from longlora.settings import ChatSettings, PageSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, tiny_tokenizer) -> Path:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    return save_base(tmp_path_factory.mktemp("models") / "tiny", model, tokenizer)


@pytest.fixture(autouse=True)
def _speaks_letters(monkeypatch):
    """Answers of letters, so that they can be read; the byte-level tokenizer has byte n at a known place."""
    letters = [65 + 1, *range(66, 91)]
    monkeypatch.setattr(Sampler, "choose", lambda _self, logits: letters[int(logits[letters].argmax())])


@pytest.fixture
def note(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("The keeper is called Tobias Wren. " * 8)
    return path


@pytest.fixture
def long_note(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"Chapter {number}\n\n" + "A whale was seen. " * 40 for number in range(1, 6)))
    return path


def run(*words):
    cli.main(["chat", *map(str, words)])


def refused(capsys, *words):
    """The sentence of a command that fails with status 2."""
    with pytest.raises(SystemExit) as exit_:
        run(*words)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_one_question_prints_the_answer_alone(capsys, folder, note):
    run(folder, "--document", note, "--question", "Who?", "--answer-tokens", 9)
    out, err = capsys.readouterr()
    assert len(out.rstrip("\n")) == 9
    assert "of 1,024 tokens" in err
    assert "kept 0 · first token" in err
    assert "cut off by --answer-tokens" in err


def test_one_question_as_json(capsys, folder, note):
    run(folder, "--document", note, "--question", "Who?", "--answer-tokens", 9, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == str(folder)
    assert result["documents"] == [
        {"name": "note.txt", "tokens": 271, "material": "material", "section": None, "heading": ""}
    ]
    answer = result["answer"]
    assert len(answer["text"]) == answer["answer_tokens"] == 9
    assert answer["used_tokens"] == answer["prompt_tokens"] + 9
    assert (answer["window"], answer["finish"], answer["reused_tokens"]) == (1024, "length", 0)
    assert 0 < answer["first_token_seconds"] <= answer["seconds"]


def test_a_document_that_is_too_long_is_never_cut(capsys, folder, long_note):
    words = (folder, "--document", long_note, "--question", "Who?", "--answer-tokens", 12)
    sentence = refused(capsys, *words)
    assert "'long.txt' has 3,6" in sentence
    assert "more than fit" in sentence
    assert "one of its 5 sections with --section N" in sentence
    run(*words, "--section", 5, "--json")
    (document,) = json.loads(capsys.readouterr().out)["documents"]
    assert (document["section"], document["heading"]) == (5, "Chapter 5")
    assert "no section 6" in refused(capsys, *words, "--section", 6)


def pdf(path, password=None):
    import pypdf

    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    if password:
        writer.encrypt(password)
    writer.write(path)


def test_bad_documents_are_refused_in_a_sentence(capsys, folder, tmp_path):
    (tmp_path / "junk.txt").write_bytes(bytes(range(256)) * 20)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.md").write_text(" \n\n ")
    pdf(tmp_path / "locked.pdf", "secret")
    pdf(tmp_path / "scanned.pdf")
    (tmp_path / "broken.epub").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n')
    for name, words in {
        "junk.txt": "is a binary file",
        "empty.txt": "is empty",
        "blank.md": "is empty",
        "locked.pdf": "is an encrypted PDF",
        "scanned.pdf": "no text layer",
        "broken.epub": "broken.epub' ",
        "rows.jsonl": "is a data set, not a document",
        "nothing.txt": "does not exist",
        ".": "is a folder",
    }.items():
        assert words in refused(capsys, folder, "--document", tmp_path / name, "--question", "Who?")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": " "}, "--question is empty"),
        ({"json": True}, "--json needs --question"),
        ({"web": True, "question": "Who?"}, "leave --web out"),
        ({"section": 2, "document": ("a", "b")}, "give one --document, not 2"),
        ({"section": 0, "document": ("a",)}, "--section is 0"),
        ({"page": PageSettings(port=80)}, "give --web too"),
        ({"prompt_format": "tempalte"}, "Did you mean 'template'"),
    ],
)
def test_settings_without_effect_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        ChatSettings(model="demo", **options)


def test_a_recipe_names_several_documents(tmp_path):
    recipe = tmp_path / "chat.yaml"
    recipe.write_text("model: demo\ndocument: [a.txt, b.txt]\nattention_sinks: 4\n")
    _, settings = cli.parse(["chat", "--config", str(recipe)])
    assert settings.document == ("a.txt", "b.txt")
    assert settings.sinks.attention_sinks == 4


# -------------------------------------------------------------------------------------------------- a conversation


@pytest.fixture
def types(monkeypatch):
    """`types(line, …)`: what is typed at the prompt; then Ctrl-D. An exception is raised in place of a line."""

    def lines(*given):
        waiting = [*given, EOFError()]

        def read(_prompt=""):
            line = waiting.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return lines


def test_a_conversation(capsys, folder, note, tmp_path, types):
    saved = tmp_path / "talk.json"
    types(
        "Who?", "And his cat?", "", KeyboardInterrupt(), f"/save {saved}", f"/save {saved}", "/nwe", "/new", "/save x"
    )
    run(folder, "--document", note, "--answer-tokens", 5)
    out, err = capsys.readouterr()
    assert [len(line) for line in out.splitlines()] == [5, 5]
    talk = json.loads(saved.read_text())
    assert [turn["content"] for turn in talk["messages"]] == ["Who?", out.splitlines()[0], "And his cat?"] + [
        out.splitlines()[1]
    ]
    assert talk["model"] == "tiny"
    assert "sees 1,024 tokens (plain prompts)" in err
    assert "note.txt: 271 tokens, 26% of the window" in err
    read = [int(line.split("read ")[1].split(",")[0]) for line in err.splitlines() if "read " in line]
    assert read[0] > 271 > 10 * (read[1] - len("\n\nQuestion: And his cat?\nAnswer:"))
    assert "/quit or Ctrl-D leaves" in err
    assert "is there already" in err
    assert "no command /nwe. Did you mean '/new'?" in err
    assert "a new conversation about note.txt" in err
    assert "nothing to save yet" in err


def test_sections_are_offered_and_chosen(capsys, folder, long_note, note, types):
    types(
        "Who?", "/section x", "/section 9", "/section 2", "Who?", "/documents", f"/open {note}", "/section 1", "/quit"
    )
    run(folder, "--document", long_note, "--answer-tokens", 3)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "Chapter 4" in err
    assert "/section N asks about one of these 5 sections." in err
    assert "choose a section with /section N" in err
    assert "not 'x': /documents lists them" in err
    assert "has no section 9" in err
    assert "asking about long.txt, section 2 (Chapter 2)" in err
    assert "note.txt: 271 tokens" in err


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys, folder, types, monkeypatch):
    choose, chosen = Sampler.choose, []

    def interrupted(self, logits):
        chosen.append(choose(self, logits))
        if len(chosen) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return chosen[-1]

    monkeypatch.setattr(Sampler, "choose", interrupted)
    types("Who?", "And?")
    before = signal.getsignal(signal.SIGINT)
    run(folder, "--answer-tokens", 40)
    out, err = capsys.readouterr()
    assert [len(line) for line in out.splitlines()] == [4, 40]
    assert "· stopped" in err
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_from_outside_commands_the_terminal(capsys, caplog):
    """Headings, names of files and what a teacher says stand in notes, in logs and in errors."""
    assert printable("a\x1b]0;title\x07b\r\n\tc\u009b2J é 中") == "a]0;titleb\n\tc2J é 中"
    hostile = "Chapter \x1b]0;title\x07\x9b2J"
    terminal._note(hostile)
    with pytest.raises(SystemExit):
        cli._fail(hostile, 2)
    said = capsys.readouterr()
    handler, record = logs._Printable("%(message)s"), logging.makeLogRecord({"msg": "%s", "args": (hostile,)})
    for text in (said.err, handler.format(record)):
        assert "Chapter ]0;title2J" in text
        assert "\x1b" not in text
    # what commands say of pairs and of plans goes the same way
    for module, function in ((building, "_say"), (checking, "check_pairs")):
        assert "printable(" in inspect.getsource(getattr(module, function))


def test_help_lists_every_command(capsys, folder, types):
    types("/help")
    run(folder)
    err = capsys.readouterr().err
    assert all(name in err for name in terminal.HELP)
    assert Conversation.__doc__
