"""`longlora longqa build` and `check`: teachers that fail, a key that stays secret, a killed build, the report."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import GOOD, FakeEndpoint, Reply, book, completion, distinct
from test_documents import write_pdf
from test_formats import scan
from test_longqa import settings_for

from longlora import cli
from longlora.errors import UserError
from longlora.longqa import endpoint
from longlora.longqa.pair_files import read_pairs
from longlora.settings import EndpointSettings


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeEndpoint]]:
    monkeypatch.setattr(endpoint, "MOST_SECONDS_BETWEEN", 0.02)
    started: list[FakeEndpoint] = []

    def start(respond: Callable[[int, dict[str, Any]], Reply]) -> FakeEndpoint:
        started.append(FakeEndpoint(respond))
        return started[-1]

    yield start
    for each in started:
        each.server.shutdown()
        each.server.server_close()


def ask(server: FakeEndpoint, prompt: str = "q?", **options: Any) -> Any:
    given = EndpointSettings(**({"retries": 2, "timeout": 5.0} | options))
    return endpoint.Endpoint(server.url, None, given, answer_tokens=50, parallel=1).answer(prompt)


def test_an_answer_of_the_endpoint(fake):
    server = fake(lambda *_: completion(GOOD))
    answer = ask(server, "What?")
    assert (answer.text, answer.problem, answer.prompt_tokens, answer.answer_tokens) == (GOOD, "", 7, 3)
    assert server.requests == [{"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 50}]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ((500, {"error": {"message": "out of memory"}}), "error of the endpoint"),
        ((503, b"<html>busy</html>"), "error of the endpoint"),
        ((429, {"error": "slow down"}, {"Retry-After": "0"}), "too many requests"),
        ((200, b"{not json"), "malformed answer"),
        ((200, {"choices": []}), "malformed answer"),
        ((200, {"choices": [{"message": {"content": ["parts"]}}]}), "malformed answer"),
        ((200, [1]), "malformed answer"),
        (completion(None), "empty"),
        (completion("   "), "empty"),
        (completion("I'm sorry, but I cannot read it."), "refusal"),
        (completion("and so on and so on " * 20), "repetition"),
        (completion("a stump of a sentence", "length"), "cut short"),
    ],
)
def test_a_failed_question_is_asked_again_and_then_skipped(fake, bad, problem):
    once = fake(lambda number, _: bad if number == 0 else completion(GOOD))
    assert ask(once).text == GOOD
    assert len(once.requests) == 2
    always = fake(lambda *_: bad)
    answer = ask(always)
    assert answer.problem == problem
    assert len(always.requests) == 3  # two retries


def test_a_useless_answer_is_asked_for_again_at_a_higher_temperature(fake):
    server = fake(lambda number, _: completion("") if number == 0 else completion(GOOD))
    ask(server, temperature=0.0)
    assert [body["temperature"] for body in server.requests] == [0.0, 0.7]
    server = fake(lambda number, _: (500, {}) if number == 0 else completion(GOOD))
    ask(server, temperature=0.0)
    assert [body["temperature"] for body in server.requests] == [0.0, 0.0]


def test_a_teacher_that_does_not_answer_in_time(fake):
    def respond(number: int, _: Any) -> Reply:
        time.sleep(1 if number < 2 else 0)
        return completion(GOOD)

    server = fake(respond)
    began = time.monotonic()
    assert ask(server, timeout=0.2, retries=1).problem == "timeout"
    assert time.monotonic() - began < 0.9
    assert ask(server, timeout=0.9, retries=0).text == GOOD


def test_the_endpoint_is_left_alone_as_long_as_it_asks(fake):
    def respond(number: int, _: Any) -> Reply:
        return (429, {}, {"Retry-After": "1"}) if number == 0 else completion(GOOD)

    server = fake(respond)
    assert ask(server).text == GOOD
    assert server.times[1] - server.times[0] >= 1


def test_retry_after_may_be_a_date_and_is_not_believed_without_end():
    import httpx

    def seconds(value: str | None) -> float | None:
        return endpoint._retry_after(httpx.Response(429, headers={} if value is None else {"Retry-After": value}))

    future = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert seconds(future) == pytest.approx(30, abs=2)
    assert seconds("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert (seconds("7"), seconds("999999"), seconds("soon"), seconds(None)) == (7, 600, None, None)


def test_newer_models_name_the_limit_otherwise(fake):
    def respond(_: int, body: dict[str, Any]) -> Reply:
        if "max_tokens" in body:
            return 400, {"error": {"message": "Use 'max_completion_tokens' instead of 'max_tokens'."}}
        return completion(GOOD)

    server = fake(respond)
    assert ask(server, retries=0).text == GOOD
    assert server.requests[-1]["max_completion_tokens"] == 50


def test_a_question_the_endpoint_refuses_is_not_asked_again(fake):
    server = fake(lambda *_: (400, {"error": {"message": "maximum context length is 4096"}}))
    answer = ask(server)
    assert answer.problem == "refused by the endpoint"
    assert "maximum context length" in answer.detail
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "words"), [(401, "--key-variable"), (403, "--key-variable"), (404, "/v1")])
def test_what_no_retry_mends_ends_the_work(fake, status, words):
    server = fake(lambda *_: (status, {"error": {"message": "no"}}))
    with pytest.raises(UserError, match=words):
        ask(server)
    assert len(server.requests) == 1


def test_a_teacher_that_cannot_be_reached():
    url = "http://127.0.0.1:9/v1"
    with pytest.raises(UserError, match="127.0.0.1:9.*Connection refused"):
        endpoint.Endpoint(url, "m", EndpointSettings(), answer_tokens=9, parallel=1)


def test_the_model_must_be_named_where_the_list_does_not_decide(fake, monkeypatch):
    server = fake(distinct)
    monkeypatch.setattr(endpoint.Endpoint, "_models", lambda _: ["a", "b"])
    with pytest.raises(UserError, match=r"lists 2 models \(a, b\): name one with --teacher"):
        ask(server)


KEY = "sk-very-secret-0123456789"


def test_the_key_goes_to_the_endpoint_and_nowhere_else(fake, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-service")
    caplog.set_level(logging.DEBUG)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text(book(2), encoding="utf-8")

    def respond(number: int, _: Any) -> Reply:
        return (500, {"error": {"message": f"key {KEY} failed"}}) if number == 0 else distinct(number)

    server = fake(respond)
    output = tmp_path / "pairs.jsonl"
    options = ["--teacher-url", server.url, "--output", str(output), "--retries", "0", "--section-tokens", "200"]
    cli.main(
        [
            "longqa",
            "build",
            "--documents",
            str(tmp_path / "documents"),
            *options,
            "--key-variable",
            "TEACHER_KEY",
            "--json",
        ]
    )
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    said = capfd.readouterr()
    kept = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    assert json.loads(said.out)["skipped"] == {"error of the endpoint": 1}
    assert "failed" in said.err + caplog.text
    for text in [*kept, said.out, said.err, caplog.text]:
        assert KEY not in text

    server.headers.clear()
    ask(server)  # without --key-variable no key is sent, whatever the environment holds
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_key_in_the_url_is_sent_and_told_to_nobody(fake, capfd, caplog):
    """Azure's way: the path goes before what follows the question mark."""
    secret = "api-key=hush-hush-123&api-version=7"
    server = fake(lambda *_: (500, {"error": {"message": f"no such thing: {secret}, hush-hush-123"}}))
    teacher = endpoint.Endpoint(
        f"{server.url}?{secret}", None, EndpointSettings(retries=0), answer_tokens=9, parallel=1
    )
    answer = teacher.answer("What?")
    assert answer.problem == "error of the endpoint"
    assert [path for path in server.paths if "chat" in path] == [f"/v1/chat/completions?{secret}"]
    for text in (answer.detail, teacher.name, teacher.url, *capfd.readouterr(), caplog.text):
        assert "hush" not in text
    with pytest.raises(UserError) as caught:
        endpoint.Endpoint(f"http://127.0.0.1:9/v1?{secret}", "m", EndpointSettings(), answer_tokens=9, parallel=1)
    assert "hush" not in str(caught.value)


def test_a_reply_without_end_is_cut_off(fake, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_REPLY_BYTES", 2_000)
    answer = ask(fake(lambda *_: completion("word " * 1_000)), retries=0)
    assert (answer.problem, answer.detail) == ("no connection", "the reply has more than 2,000 bytes")


def test_a_key_in_place_of_its_variables_name_is_not_repeated():
    with pytest.raises(UserError) as caught:
        EndpointSettings(key_variable=KEY)
    assert KEY not in str(caught.value)
    with pytest.raises(UserError) as caught:
        endpoint.Endpoint(
            "http://127.0.0.1:9", "m", EndpointSettings(key_variable="gsk_abc"), answer_tokens=9, parallel=1
        )
    assert "gsk_abc" not in str(caught.value)


def test_a_redirect_does_not_get_the_key(fake, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    other = fake(distinct)
    server = fake(lambda *_: (307, {}, {"Location": f"{other.url}/chat/completions"}))
    with pytest.raises(UserError, match="307"):
        ask(server, key_variable="TEACHER_KEY")
    assert other.requests == []


# ------------------------------------------------------------------------------------------------------- the build


def build(documents: Path, output: Path, server: FakeEndpoint, *more: str) -> dict[str, Any]:
    """`longlora longqa build --json` in this process: its JSON."""
    name, settings = cli.parse(
        ["longqa", "build", "--documents", str(documents), "--output", str(output), "--teacher-url", server.url]
        + ["--section-tokens", "200", "--retries", "0", "--json", *more]
    )
    assert name == "longqa build"
    from longlora.longqa.building import build_pairs

    return build_pairs(settings)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_a_build_from_documents_to_pairs(fake, tmp_path, name):
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "novel.txt").write_text(book(3), encoding="utf-8")
    (folder / "page.html").write_text(f"<h1>A page</h1><p>{book(1, seed=5)}</p>", encoding="utf-8")
    server = fake(distinct)
    output = tmp_path / name
    result = build(folder, output, server)
    pairs = read_pairs(output)
    assert len(pairs) == result["pairs"] == result["added"] == result["estimate"]["calls"] == len(server.requests)
    assert result["tokens"] == {"in": 7 * len(pairs), "out": 3 * len(pairs)}
    assert {pair.prompt for pair in pairs} == set(server.prompts())
    assert {pair.source["document"] for pair in pairs} == {str(folder / each) for each in ("novel.txt", "page.html")}
    for pair in pairs:
        assert pair.source["teacher"] == f"tiny at {server.url}"
        assert pair.source["question_id"].split("/")[1] == pair.category
        assert pair.prompt.endswith(f"Now the material ends. {pair.source['question']}")
    counts = result["estimate"]["categories"]
    assert counts == {each: sum(pair.category == each for pair in pairs) for each in counts}
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [name]


def test_a_second_run_needs_resume_and_asks_only_what_is_not_there(fake, tmp_path):
    document = tmp_path / "novel.txt"
    document.write_text(book(3), encoding="utf-8")
    output = tmp_path / "pairs.jsonl"
    refusing = fake(lambda number, _: completion("I'm sorry, but no.") if number % 2 else distinct(number))
    first = build(document, output, refusing)
    assert first["skipped"] == {"refusal": len(refusing.requests) // 2}
    before = output.read_bytes()
    with pytest.raises(UserError, match="--resume"):
        build(document, output, refusing)
    second = fake(lambda number, _: distinct(1000 + number))
    result = build(document, output, second, "--resume")
    assert output.read_bytes().startswith(before)
    assert result["added"] == len(second.requests) == first["skipped"]["refusal"]
    assert result["estimate"]["already"] == first["added"]
    prompts = [pair.prompt for pair in read_pairs(output)]
    assert len(set(prompts)) == len(prompts) == first["estimate"]["calls"]
    third = fake(distinct)
    assert build(document, output, third, "--resume")["added"] == 0
    assert third.requests == []


def test_a_moved_document_is_not_asked_about_again(fake, tmp_path):
    document = tmp_path / "novel.txt"
    document.write_text("\n\n" + book(3), encoding="utf-8")
    build(document, tmp_path / "pairs.jsonl", fake(distinct))
    moved = document.rename(tmp_path / "renamed.txt")
    later = fake(distinct)
    assert build(moved, tmp_path / "pairs.jsonl", later, "--resume")["added"] == 0
    assert later.requests == []


def test_an_answer_given_before_is_left_out(fake, tmp_path):
    (tmp_path / "novel.txt").write_text(book(3), encoding="utf-8")
    output = tmp_path / "pairs.jsonl"
    result = build(tmp_path / "novel.txt", output, fake(lambda number, _: completion(GOOD.upper() if number else GOOD)))
    assert len(read_pairs(output)) == 1
    assert result["skipped"] == {"answer given before": result["estimate"]["calls"] - 1}


def test_a_teacher_without_a_useful_answer_leaves_no_file(fake, tmp_path):
    (tmp_path / "novel.txt").write_text(book(1), encoding="utf-8")
    with pytest.raises(UserError, match="no useful answer .empty"):
        build(tmp_path / "novel.txt", tmp_path / "pairs.json", fake(lambda *_: completion("")))
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]


def test_a_teacher_that_breaks_down_ends_the_work_and_keeps_the_pairs(fake, tmp_path, caplog):
    (tmp_path / "novel.txt").write_text(book(8), encoding="utf-8")
    output = tmp_path / "pairs.jsonl"
    server = fake(lambda number, _: distinct(number) if number < 4 else (502, {"error": "gone"}))
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match=r"failed 5 questions in a row .*502: gone"):
        build(tmp_path / "novel.txt", output, server, "--parallel", "1")
    assert len(read_pairs(output)) == 4
    assert len(server.requests) == 9
    assert "4 new pairs are in" in caplog.text


def test_questions_are_under_way_at_the_same_time_but_no_more_than_asked(fake, tmp_path):
    (tmp_path / "novel.txt").write_text(book(6), encoding="utf-8")
    lock, under_way, most = threading.Lock(), 0, 0

    def respond(number: int, _: Any) -> Reply:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.05)
        with lock:
            under_way -= 1
        return distinct(number)

    build(tmp_path / "novel.txt", tmp_path / "pairs.jsonl", fake(respond), "--parallel", "3")
    assert most == 3


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl"])
def test_a_killed_build_goes_on_where_it_was(fake, tmp_path, name):
    (tmp_path / "novel.txt").write_text(book(10), encoding="utf-8")
    slow = threading.Event()

    def respond(number: int, _: Any) -> Reply:
        if number >= 5:
            slow.wait(30)
        return distinct(number)

    server = fake(respond)
    command = [sys.executable, "-m", "longlora", "longqa", "build", "--documents", str(tmp_path / "novel.txt")]
    command += ["--output", str(tmp_path / name), "--teacher-url", server.url, "--section-tokens", "200"]
    process = subprocess.Popen([*command, "--parallel", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(server.requests) < 7 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    slow.set()
    lines = tmp_path / (name if name.endswith("l") else f"{name}.part.jsonl")
    kept = [pair.prompt for pair in read_pairs(lines)]
    assert len(kept) == 5
    finished = subprocess.run([*command, "--resume", "--json"], capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout)
    prompts = [pair.prompt for pair in read_pairs(tmp_path / name)]
    assert prompts[:5] == kept
    assert len(set(prompts)) == len(prompts) == result["pairs"] == 5 + result["added"] > 7
    assert not set(kept) & set(server.prompts()[7:])
    assert not (tmp_path / f"{name}.part.jsonl").exists()


def test_a_dry_run_asks_nothing_and_writes_nothing(fake, tmp_path, capsys):
    (tmp_path / "novel.txt").write_text(book(3), encoding="utf-8")
    server = fake(distinct)
    cli.main(
        ["longqa", "build", "--documents", str(tmp_path / "novel.txt"), "--output", str(tmp_path / "p.json")]
        + ["--teacher-url", server.url, "--section-tokens", "200", "--dry-run"]
    )
    said = capsys.readouterr().out
    assert re.search(r"to ask: \d+ calls, about [\d,]+ tokens in, at most [\d,]+ out", said)
    assert server.headers == []
    assert [path.name for path in tmp_path.iterdir()] == ["novel.txt"]


def test_documents_that_hold_no_text_say_so(tmp_path, capsys, caplog):
    """Named, they are a mistake; met in a folder they are passed over, and counted."""
    folder = tmp_path / "documents"
    folder.mkdir()
    write_pdf(folder / "locked.pdf", ["text"], password="secret")
    scan(folder / "scan.pdf", "")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n")
    for name, sentence in {
        "locked.pdf": "is an encrypted PDF: save it without a password first",
        "scan.pdf": "they are pictures: run OCR on it first",
        "empty.txt": "is empty (0 bytes)",
        "blank.txt": "holds no text",
    }.items():
        with pytest.raises(SystemExit) as caught:
            cli.main(["longqa", "build", "--documents", str(folder / name), "--dry-run"])
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert sentence in said
        assert name in said
        assert "--data" not in said
    (folder / "novel.txt").write_text(book(2), encoding="utf-8")
    caplog.clear()
    cli.main(["longqa", "build", "--documents", str(folder), "--dry-run", "--json"])
    assert json.loads(capsys.readouterr().out)["estimate"]["documents"] == 1
    assert "2 empty documents, 1 files (encrypted PDF), 1 files (scanned PDF, no text layer)" in caplog.text


def test_mistakes_in_the_settings_are_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    base = ["longqa", "build", "--documents", str(tmp_path), "--output", str(tmp_path / "p.json")]
    cases = [
        (["longqa", "build"], "--documents is missing"),
        (base[:4], "--output is missing"),
        (base, "a teacher is missing"),
        ([*base[:4], "--output", "p.csv", "--teacher", "demo"], "must end in"),
        ([*base, "--teacher", "demo", "--retries", "1"], "no effect without --teacher-url"),
        ([*base, "--teacher-url", "localhost:80"], "must begin with http"),
        ([*base, "--teacher-url", "http://me:pw@host/v1"], "no password"),
        ([*base, "--teacher-url", "http://h", "--timeout", "0"], "more than 0"),
        ([*base, "--teacher", "demo", "--section-tokens", "3"], "at least 64"),
        ([*base, "--teacher", "demo", "--material", "novel"], "novel"),
        (["longqa", "check", "x.json", "--context", "9"], "--tokenizer"),
    ]
    for arguments, words in cases:
        with pytest.raises((UserError, SystemExit)) as caught:
            cli.parse(arguments)
        if isinstance(caught.value, UserError):
            assert words in str(caught.value), arguments
            assert "pw" not in str(caught.value)
    from longlora.longqa.building import build_pairs

    with pytest.raises(UserError, match="nothing to ask about"):
        build_pairs(settings_for(tmp_path))
    with pytest.raises(UserError) as caught:
        build_pairs(settings_for(tmp_path / "gone"))
    assert "does not exist" in str(caught.value)
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(UserError, match="holds no text .*other --documents"):
        build_pairs(settings_for(tmp_path))
    with pytest.raises(UserError, match="would be read as a document"):
        build_pairs(settings_for(tmp_path, tmp_path / "p.json", teacher="demo"))
    with pytest.raises(UserError, match="no folder"):
        build_pairs(settings_for(tmp_path / "a.txt", tmp_path / "nowhere" / "p.json", teacher="demo"))


# ---------------------------------------------------------------------------------------------- a teacher that is here


@pytest.fixture(scope="module")
def teacher_folder(tiny_model, tiny_tokenizer, tmp_path_factory) -> Path:
    """A MODEL of random weights with a chat template and a window of 2,000 tokens (bytes)."""
    folder = tmp_path_factory.mktemp("models") / "tiny-teacher"
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=2000).save_pretrained(folder)
    return folder


def local_options(folder: Path, documents: Path, output: Path) -> list[str]:
    options = ["--documents", str(documents), "--output", str(output), "--teacher", str(folder), "--json"]
    return [
        "longqa",
        "build",
        *options,
        "--section-tokens",
        "400",
        "--answer-tokens",
        "90",
        "--pairs-per-document",
        "3",
    ]


def test_a_local_teacher_reads_the_chat_template_and_its_answers_become_pairs(
    teacher_folder, tmp_path, monkeypatch, capsys
):
    """The teacher's words are put into its mouth; its prompts, its batches and what becomes of the words are real."""
    from longlora.longqa import local_teacher
    from longlora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher_folder)
    asked: list[list[int]] = []

    def generate(model: Any, prompts: list[list[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        assert (max_new_tokens, options["batch"], set(options["stop_tokens"])) == (90, 2, {tokenizer.eos_token_id})
        assert len(prompts) <= 2
        first = len(asked)
        asked.extend(prompts)
        said = [f"{GOOD[:60]} {first + number}." for number in range(len(prompts))]
        said = [
            words if first or number else f"They leave their home. {GOOD}" for number, words in enumerate(said)
        ]  # the first is cut
        return [tokenizer(words)["input_ids"][:max_new_tokens] for words in said]

    monkeypatch.setattr(local_teacher, "generate", generate)
    (tmp_path / "novel.txt").write_text(book(2, paragraphs=2), encoding="utf-8")
    output = tmp_path / "pairs.jsonl"
    cli.main([*local_options(teacher_folder, tmp_path / "novel.txt", output), "--parallel", "2"])
    result = json.loads(capsys.readouterr().out)
    pairs = read_pairs(output)
    assert result["added"] == len(pairs) == 3
    assert [tokenizer.decode(each) for each in asked] == [f"<user>{pair.prompt}</user><assistant>" for pair in pairs]
    assert result["tokens"]["in"] == sum(len(pair.prompt.encode()) for pair in pairs) + 3 * len(
        "<user></user><assistant>"
    )
    assert (pairs[0].answer, pairs[0].source["cut"]) == ("They leave their home.", True)
    assert "cut" not in pairs[1].source
    assert {pair.source["teacher"] for pair in pairs} == {"tiny-teacher"}


def test_a_local_teacher_is_asked_not_to_think_first(teacher_folder, tmp_path):
    """A reasoning model would spend its tokens on thoughts, which no pair keeps."""
    from longlora.longqa.local_teacher import LocalTeacher
    from longlora.model.loading import load_tokenizer
    from longlora.settings import LoadSettings

    shutil.copytree(teacher_folder, tmp_path / "thinker")
    tokenizer = load_tokenizer(teacher_folder)
    tokenizer.chat_template += "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
    tokenizer.save_pretrained(tmp_path / "thinker")
    teacher = LocalTeacher(str(tmp_path / "thinker"), answer_tokens=16, batch=1, loading=LoadSettings())
    assert tokenizer.decode(teacher._tokens("Who?")) == "<user>Who?</user><assistant>"


def test_a_local_teacher_that_goes_round_in_circles_is_stopped(teacher_folder):
    from longlora.longqa.local_teacher import LocalTeacher, _loops
    from longlora.settings import LoadSettings

    assert not _loops(list(range(100)))
    assert _loops([9, 8] + [1, 2, 3] * 11)
    assert not _loops([9, 8] + [1, 2, 3] * 10)  # 30 tokens of it may still be a refrain
    assert not _loops(([1] * 31 + [2]) * 2)
    teacher = LocalTeacher(str(teacher_folder), answer_tokens=150, batch=4, loading=LoadSettings())
    ((key, answer),) = teacher.answer_each([("key", "Tell me.")])
    assert key == "key"
    assert answer.problem  # random weights have nothing to say
    ((_, answer),) = teacher.answer_each([("key", "word " * 380)])
    assert answer.problem == "too long for the teacher"


def test_sections_that_do_not_fit_the_teacher_are_refused_before_it_is_loaded(teacher_folder, tmp_path, capsys):
    (tmp_path / "novel.txt").write_text(book(8, paragraphs=8), encoding="utf-8")
    options = local_options(teacher_folder, tmp_path / "novel.txt", tmp_path / "pairs.json")
    with pytest.raises(SystemExit) as caught:
        cli.main([*options, "--section-tokens", "1900"])
    assert caught.value.code == 2
    assert "window of 2,000 tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the check


def check(file: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON and the table of `longlora longqa check`."""
    from longlora.longqa.checking import check_pairs, report

    result = check_pairs(cli.parse(["longqa", "check", str(file), "--json", *options])[1])
    json.dumps(result)
    return result, report(result)


def test_the_check_finds_what_is_wrong_and_says_where(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"instruction": "one", "output": "first", "category": "summary"},
        {"instruction": "two", "output": "other"},
        {"instruction": "ONE ", "output": "first", "category": "summary"},  # the same pair
        {"instruction": "two", "output": "third"},  # the same prompt
        {"instruction": "four", "output": "third"},  # the same answer
        {"instruction": "five"},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n", encoding="utf-8")
    result, table = check(path)
    assert result["pairs"] == 5
    assert [each["where"] for each in result["malformed"]] == ["line 6", "line 7"]
    assert result["duplicates"] == {
        "pairs": [["line 1", "line 3"]],
        "prompts": [["line 2", "line 4"]],
        "answers": [["line 4", "line 5"]],
    }
    assert result["categories"] == {"not named": 3, "summary": 2}
    assert result["unit"] == "characters"
    assert result["lengths"]["prompt"] == {"least": 3, "median": 3, "p90": 4, "most": 4, "total": 17}
    for words in ("malformed: line 6", "the same pair: line 1, line 3", "summary 2"):
        assert words in table


@pytest.mark.parametrize("prompt_format", ["auto", "inst"])
def test_the_check_counts_the_tokens_that_fine_tuning_will_find(teacher_folder, tmp_path, prompt_format):
    from longlora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher_folder)  # a token a byte, and one that ends an answer
    path = tmp_path / "pairs.json"
    records = [{"instruction": "a" * length, "output": "naïve"} for length in (5, 50, 500)]
    path.write_text(json.dumps(records), encoding="utf-8")
    around = "[INST][/INST]" if prompt_format == "inst" else "<user></user><assistant>"
    ending = "naïve" if prompt_format == "inst" else "naïve</assistant>"
    answer = len(ending.encode()) + 1
    prompts = [len(around) + length for length in (5, 50, 500)]
    whole = [length + answer for length in prompts]
    options = ["--tokenizer", str(teacher_folder), "--prompt-format", prompt_format]
    result, table = check(path, *options, "--context", str(whole[1]))
    assert tokenizer.eos_token == "<|endoftext|>"
    assert result["lengths"]["pair"] == {
        "least": whole[0],
        "median": whole[1],
        "p90": whole[2],
        "most": whole[2],
        "total": sum(whole),
    }
    assert result["lengths"]["prompt"]["total"] == sum(prompts)
    assert result["lengths"]["answer"]["total"] == 3 * answer
    assert result["too_long"] == {"context": whole[1], "where": ["record 3"]}
    assert "1 of 3 pairs do not fit" in table
    result, table = check(path, *options, "--context", str(whole[2]))
    assert result["too_long"]["where"] == []
    assert "every pair fits" in table


def test_the_check_names_pairs_that_the_chat_template_cannot_write(teacher_folder, tmp_path):
    from longlora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(teacher_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if 'x' in m.content %}{{ raise_exception('no x here') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shutil.copytree(teacher_folder, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"instruction": text, "output": "yes"}) + "\n" for text in "axb"), encoding="utf-8"
    )
    result, _ = check(path, "--tokenizer", str(tmp_path / "model"))
    assert result["pairs"] == 2
    ((where, reason),) = [tuple(each.values()) for each in result["malformed"]]
    assert where == "line 2"
    assert "no x here" in reason
    with pytest.raises(UserError, match="--prompt-format counts tokens"):
        check(path, "--prompt-format", "inst")


def test_the_check_of_a_file_without_pairs(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="holds no pairs"):
        check(path)
    path.write_text('[{"instruction": "a"}]', encoding="utf-8")
    result, table = check(path)
    assert (result["pairs"], result["lengths"]["pair"]) == (0, None)
    assert "0 pairs, 1 malformed" in table


def test_many_faults_are_counted_and_the_first_ones_shown(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"instruction": "a"}\n' * 25, encoding="utf-8")
    result, table = check(path)
    assert len(result["malformed"]) == 25
    assert "… and 15 more" in table
