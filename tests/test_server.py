"""Questions asked of an OpenAI-compatible server: the same prompts, the same scoring."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import save_base

from longlora.errors import UserError
from longlora.evaluation.passkey import evaluate_passkey
from longlora.settings import PasskeySettings


@pytest.fixture
def base(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]) -> str:
    return str(save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tiny_tokenizer()))


@pytest.fixture
def server(tiny_tokenizer: Callable[[], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose model has read the prompt, and its address and what it was asked."""
    tokenizer, asked = tiny_tokenizer(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "some/model"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            text = tokenizer.decode(asked[-1]["prompt"])
            (key,) = set(re.findall(r"The pass key is (\d+)\. Remember", text))
            self.answer({"choices": [{"text": f" {key if len(text) < 400 else 7}. There."}]})

        def answer(self, document: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    listening.shutdown()


def test_pass_keys_by_a_server(base: str, server: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = server
    settings = PasskeySettings(models=(base,), contexts=(350, 450), depths=2, trials=1, server=url, json=True)
    document = evaluate_passkey(settings)
    assert [(row["context"], row["accuracy"]) for row in document["results"]] == [
        (350, 1),
        (350, 1),
        (450, 0),
        (450, 0),
    ]
    assert document["label"] == f"{base} at {url}"
    assert {(each["model"], each["temperature"], each["max_tokens"]) for each in asked} == {("some/model", 0, 6)}
    assert sorted(len(each["prompt"]) for each in asked) == [344, 344, 444, 444], "filled to the token, as ever"


def test_what_is_no_server(base: str) -> None:
    with pytest.raises(UserError, match="--server http://127.0.0.1:9/v1 does not answer"):
        evaluate_passkey(PasskeySettings(models=(base,), contexts=(350,), server="http://127.0.0.1:9/v1", json=True))
    with pytest.raises(UserError, match="--server has one model"):
        PasskeySettings(models=(base, base), server="http://localhost:8000/v1")
