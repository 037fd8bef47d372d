"""A novel to ask about, and an OpenAI-compatible endpoint in a thread that answers, fails and dawdles as it is told."""

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = "The chapter tells how the two sisters leave their home and find another one by the sea."


def book(chapters: int = 3, paragraphs: int = 4, seed: int = 0) -> str:
    """A novel of made-up words: chapters of paragraphs of sentences."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioulnrst", k=draw.randint(2, 8))) for _ in range(200)]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(5, 15))).capitalize() + "."

    parts = []
    for chapter in range(1, chapters + 1):
        parts.append(f"CHAPTER {chapter}")
        parts += [" ".join(sentence() for _ in range(6)) for _ in range(paragraphs)]
    return "\n\n".join(parts) + "\n"


Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class FakeEndpoint:
    """An OpenAI-compatible server in a thread; `respond(number, body)` says what the request of that number gets."""

    def __init__(self, respond: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            @property
            def route(self) -> str:
                return self.path.partition("?")[0]

            def do_GET(self) -> None:
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                self.reply(200, {"data": [{"id": "tiny"}]} if self.route == "/v1/models" else {})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    number = len(fake.requests)
                    fake.requests.append(body)
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    fake.paths.append(self.path)
                if self.route != "/v1/chat/completions":
                    return self.reply(404, {"error": {"message": f"no route {self.path}"}})
                return self.reply(*respond(number, body))

            def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(OSError):  # the client may have gone
                    self.send_response(status)
                    for name, value in (headers or {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.requests]


def completion(text: Any, finish: str = "stop") -> Reply:
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}


def distinct(number: int, _: Any = None) -> Reply:
    return completion(f"{GOOD} That is answer number {number}.")
