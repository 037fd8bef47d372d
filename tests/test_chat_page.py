"""The routes of the page without a browser: documents in, answers streamed, one at a time; strangers kept out."""

import http.client
import json
import threading
from urllib.parse import quote, urlsplit

import pytest
from chat_page import ANSWER_TOKENS, load_chat_model, served, wait_until
from tiny_runs import save_base

pytest.importorskip("aiohttp", reason="the extra longlora[chat] is not installed")

from longlora import cli
from longlora.chat.documents import read_document
from longlora.chat.sampling import Sampler
from longlora.chat.serving import FILES, listening_socket
from longlora.errors import UserError

OWN = {"X-Longlora": "test"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    return load_chat_model(save_base(tmp_path_factory.mktemp("models") / "tiny", model, tokenizer))


@pytest.fixture(autouse=True)
def _speaks_letters(monkeypatch):
    letters = list(range(66, 91))
    monkeypatch.setattr(Sampler, "choose", lambda _self, logits: letters[int(logits[letters].argmax())])


@pytest.fixture
def page(model):
    with served(model) as (page, url):
        yield Client(page, url)


class Client:
    """A page and requests to it."""

    def __init__(self, page, url):
        self.page, self.netloc = page, urlsplit(url).netloc

    def open(self, method, path, body=None, headers=OWN):
        connection = http.client.HTTPConnection(self.netloc, timeout=120)
        data = json.dumps(body) if isinstance(body, dict | list) else body
        connection.request(method, path, data, headers)
        return connection, connection.getresponse()

    def call(self, method, path, body=None, headers=OWN):
        """Status and content, decoded where it is JSON."""
        connection, response = self.open(method, path, body, headers)
        content = response.read()
        connection.close()
        is_json = response.headers.get("Content-Type", "").startswith("application/json")
        return response.status, json.loads(content) if is_json else content.decode()

    def add(self, name, content):
        return self.call("POST", f"/api/documents?name={quote(name)}", content)

    def events(self, body):
        """Names and data of an answer's events as they come."""
        connection, response = self.open("POST", "/api/answers", body)
        assert response.status == 200, response.read()
        while line := response.readline():
            if line.startswith(b"event: "):
                yield line[7:].decode().strip(), json.loads(response.readline().removeprefix(b"data: "))
        connection.close()

    def answer(self, body):
        """All events of an answer; the last is `done` or `error`."""
        return list(self.events(body))


NOTE = b"The keeper is called Tobias Wren. " * 8


def test_a_document_is_added_asked_about_twice_and_removed(page):
    status, document = page.add("a note.txt", NOTE)
    assert status == 201
    assert document["name"] == "a note.txt"
    assert (document["tokens"], document["surplus"], document["sections"]) == (271, 0, [])
    asked = {"documents": [{"id": document["id"]}], "turns": [], "question": "Who?"}
    (begin, *_, last) = events = page.answer(asked)
    assert begin[0] == "begin"
    assert last[0] == "done"
    assert [data["done"] for name, data in events if name == "reading"][-1] == last[1]["prompt_tokens"]
    assert "".join(data["text"] for name, data in events if name == "text") == last[1]["text"]
    assert last[1]["answer_tokens"] == ANSWER_TOKENS
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": last[1]["text"]}]
    (*_, second) = page.answer(asked | {"turns": turns, "question": "And his cat?"})
    assert second[1]["prompt_tokens"] - second[1]["reused_tokens"] <= 0.1 * second[1]["prompt_tokens"]
    assert page.call("GET", f"/api/documents/{document['id']}") == (200, document)
    assert page.call("DELETE", f"/api/documents/{document['id']}")[0] == 200
    status, trouble = page.call("POST", "/api/answers", asked)
    assert status == 400
    assert "no longer here" in trouble["error"]


def test_a_document_that_is_too_long_comes_with_its_sections(page):
    text = "\n\n".join(f"Chapter {number}\n\n" + "A whale was seen. " * 30 for number in range(1, 5)).encode()
    _, document = page.add("long.txt", text)
    assert document["surplus"] == document["tokens"] - document["room"] > 0
    assert [section["heading"] for section in document["sections"]] == [f"Chapter {n}" for n in range(1, 5)]
    asked = {"turns": [], "question": "Who?"}
    (*_, last) = page.answer(asked | {"documents": [{"id": document["id"]}]})
    assert last[0] == "error"
    assert "more than fit" in last[1]["error"]
    (*_, last) = page.answer(asked | {"documents": [{"id": document["id"], "section": 3}]})
    assert last[0] == "done"
    status, trouble = page.call("POST", "/api/answers", asked | {"documents": [{"id": document["id"], "section": 5}]})
    assert (status, "no section 5" in trouble["error"]) == (400, True)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("junk.txt", bytes(range(256)) * 9, "'junk.txt' is a binary file"),
        ("junk.pdf", bytes(range(256)) * 9, "'junk.pdf' cannot be read as PDF"),
        ("empty.md", b"", "'empty.md' is empty"),
        ("blank.md", b" \n \n", "'blank.md' is empty"),
        ("rows.parquet", b"PAR1", "'rows.parquet' is a data set"),
        ("large.txt", b"x" * 200_001, "'large.txt' is larger than 0.2 MB"),
        ("../../etc/passwd", b"\0\0", "'passwd' is a binary file"),
        ("..\\..\\boot.ini", b"\0\0", "'boot.ini' is a binary file"),
    ],
)
def test_a_bad_document_is_refused_in_a_sentence_that_names_no_path(page, name, content, words):
    status, trouble = page.add(name, content)
    assert status == 400
    assert words in trouble["error"]
    assert "/tmp" not in trouble["error"]
    assert page.page.documents == {}


def test_no_more_documents_than_there_is_room_for(page):
    _, document = page.add("a.txt", NOTE)
    known = page.page.documents[document["id"]]
    page.page.documents |= {str(number): known for number in range(199)}
    status, trouble = page.add("b.txt", NOTE)
    assert (status, "200 documents here already" in trouble["error"]) == (400, True)
    del page.page.documents["0"]
    assert page.add("b.txt", NOTE)[0] == 201


def test_stop_ends_an_answer_that_keeps_what_was_said(page):
    events = page.events({"turns": [], "question": "Who?"})
    seen, number = [], None
    for name, data in events:
        if name == "begin":
            number = data["id"]
        if name == "text" and not seen:
            assert page.call("POST", f"/api/answers/{number}/stop", {}) == (200, {"stopped": True})
        if name == "text":
            seen.append(data["text"])
    assert name == "done"
    assert data["finish"] == "stopped"
    assert 0 < data["answer_tokens"] < ANSWER_TOKENS
    assert data["text"] == "".join(seen)
    wait_until(lambda: page.page.answers_under_way == 0)
    assert page.call("POST", f"/api/answers/{number}/stop", {}) == (200, {"stopped": False})


def test_a_browser_that_is_closed_frees_the_model(page, monkeypatch):
    made = []
    choose = Sampler.choose
    monkeypatch.setattr(Sampler, "choose", lambda self, logits: made.append(1) or choose(self, logits))
    connection, response = page.open("POST", "/api/answers", {"turns": [], "question": "Who?"})
    while not response.readline().startswith(b"event: text"):
        pass
    response.close()
    connection.close()
    wait_until(lambda: page.page.answers_under_way == 0)
    assert len(made) < ANSWER_TOKENS
    (*_, last) = page.answer({"turns": [], "question": "Who?"})
    assert last[0] == "done"


def test_one_answer_at_a_time_and_the_others_know_their_place(page, monkeypatch):
    choose, made = Sampler.choose, []
    may_go_on = [threading.Event() for _ in range(3)]  # beyond its first token, each answer in turn

    def held(self, logits):
        made.append(1)
        if len(made) % ANSWER_TOKENS == 2:
            assert may_go_on[len(made) // ANSWER_TOKENS].wait(60)
        return choose(self, logits)

    monkeypatch.setattr(Sampler, "choose", held)
    seen = {name: [] for name in ("first", "second", "third")}

    def ask(name):
        for event in page.events({"turns": [], "question": name}):
            seen[name].append(event)

    def queue(name):
        return [data["ahead"] for kind, data in seen[name] if kind == "queue"]

    threads = []
    for name in seen:
        threads.append(threading.Thread(target=ask, args=(name,)))
        threads[-1].start()
        wait_until(lambda name=name: seen[name])
    wait_until(lambda: queue("third") == [2])
    may_go_on[0].set()
    wait_until(lambda: queue("third") == [2, 1])
    may_go_on[1].set()
    may_go_on[2].set()
    for thread in threads:
        thread.join(120)
    assert (queue("first"), queue("second"), queue("third")) == ([], [1], [2, 1])
    assert {events[-1][0] for events in seen.values()} == {"done"}


def test_a_conversation_is_exported(page):
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A man."}]
    body = {"turns": turns, "documents": [{"name": "a.txt", "tokens": 7, "section": 2, "heading": "Chapter 5"}]}
    _, talk = page.call("POST", "/api/export", body | {"format": "json"})
    assert talk["messages"] == turns
    assert talk["documents"] == body["documents"]
    status, text = page.call("POST", "/api/export", body | {"format": "markdown"})
    assert status == 200
    assert "Document: a.txt, section 2 (Chapter 5), 7 tokens" in text
    assert page.call("POST", "/api/export", body | {"format": "exe"})[0] == 400


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        {"turns": [], "question": " "},
        {"turns": [{"role": "assistant", "content": "x"}], "question": "Who?"},
        {"turns": [{"role": "user", "content": 3}, {"role": "assistant", "content": ""}], "question": "Who?"},
        {"turns": "x", "question": "Who?"},
        {"documents": ["x"], "question": "Who?"},
        {"documents": [{"id": "../../etc/passwd"}], "question": "Who?"},
    ],
)
def test_malformed_requests_are_refused(page, body):
    status, trouble = page.call("POST", "/api/answers", body)
    assert status == 400
    assert trouble["error"]
    assert page.page.answers_under_way == 0


def test_other_sites_are_kept_out(page):
    question = {"turns": [], "question": "Who?"}
    rebound = OWN | {"Host": "evil.example:7860"}
    for method, path in (("GET", "/"), ("GET", "/api/model"), ("POST", "/api/answers")):
        assert page.call(method, path, question, rebound)[0] == 403
    elsewhere = OWN | {"Origin": "https://evil.example"}
    assert page.call("POST", "/api/answers", question, elsewhere)[0] == 403
    assert page.call("POST", "/api/answers", question, {"Origin": "null"} | OWN)[0] == 403
    assert page.call("POST", "/api/answers", question, {"Content-Type": "text/plain"})[0] == 403
    assert page.call("POST", "/api/documents?name=a.txt", NOTE, {"Content-Type": "text/plain"})[0] == 403
    _, document = page.add("a.txt", NOTE)
    for headers in ({}, elsewhere):
        assert page.call("DELETE", f"/api/documents/{document['id']}", None, headers)[0] == 403
    assert page.call("GET", f"/api/documents/{document['id']}")[0] == 200
    assert page.call("OPTIONS", "/api/answers", None, elsewhere)[0] in (403, 405)
    own = OWN | {"Origin": f"http://{page.netloc}"}
    assert page.call("POST", "/api/export", {"format": "json"}, own)[0] == 200
    tunnel = OWN | {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert page.call("POST", "/api/export", {"format": "json"}, tunnel)[0] == 200


def test_no_file_of_the_machine_is_readable(page, model, tmp_path):
    for path in FILES:
        assert page.call("GET", path)[0] == 200
    for path in (
        "/page.html",
        "/../serving.py",
        "/%2e%2e/serving.py",
        "/etc/passwd",
        "//etc/passwd",
        "/style.css/../../serving.py",
        "/api/documents/..%2f..%2fetc%2fpasswd",
        "/file=/etc/passwd",
    ):
        status, content = page.call("GET", path)
        assert status in (400, 404), path
        assert "root:" not in str(content)
    assert page.call("GET", "/api/documents")[0] == 405  # what was added is not listed
    _, response = page.open("GET", "/")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in response.headers


def test_the_page_needs_nothing_from_elsewhere(page):
    for path in FILES:
        _, content = page.call("GET", path)
        assert "https://" not in content
        assert "http://" not in content.replace("http://www.w3.org/2000/svg", "")


def test_documents_of_the_command_line_are_offered(model, tmp_path):
    path = tmp_path / "note.txt"
    path.write_bytes(NOTE)
    with served(model, [read_document(path, model.tokenizer)]) as (page, url):
        client = Client(page, url)
        _, described = client.call("GET", "/api/model")
    assert [each["name"] for each in described["documents"]] == ["note.txt"]
    assert described["window"] == described["seen"] == 1024
    assert described["model"] == "tiny"


def test_a_port_that_is_taken_is_a_sentence(capsys):
    taken = listening_socket("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f"--port {port} is in use"):
        listening_socket("127.0.0.1", port)
    taken.close()
    with pytest.raises(UserError, match="--host 203.0.113.7 .* cannot be listened on"):
        listening_socket("203.0.113.7", 0)


def test_without_the_extra_the_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(SystemExit):
        cli.main(["chat", "demo", "--web"])
    assert "pip install 'longlora[chat]'" in capsys.readouterr().err
