"""What comes from strangers is bounded: patterns are linear, and no upload holds up a question or takes much memory."""

import contextlib
import importlib
import os
import pkgutil
import re
import threading
import time

import psutil
import pytest
from chat_page import served
from hostile_files import MEGABYTE, hostile_files
from tiny_runs import save_base

pytest.importorskip("aiohttp", reason="the extra longlora[chat] is not installed")

from test_chat_page import Client

from longlora import chat, corpus, longqa
from longlora.chat.session import ChatModel
from longlora.settings import AnswerSettings, ChatSettings, PageSettings

WORST = (
    " ", "\n", " \n", "\t", "1", "1.", "1 ", "a", "A", "#", "# ", ".", '."', "\n\n", "\n\nChapter ", "\n\n1.1", "I",
    "-",
    "[", "<", "<think>", "\\sec", "sub", "\\subsub", "CHAPTER\n", "\x02", "a\x02", "charset=", "= ",
)  # fmt: skip


def patterns():
    for room in (corpus, chat, longqa):
        for found in pkgutil.iter_modules(room.__path__):
            module = importlib.import_module(f"{room.__name__}.{found.name}")
            for name, value in vars(module).items():
                values = value if isinstance(value, list | tuple) else [value]
                for each in values:
                    for pattern in each if isinstance(each, tuple) else (each,):
                        if isinstance(pattern, re.Pattern):
                            yield pytest.param(pattern, id=f"{found.name}.{name}")


def seconds_for(pattern, worst, size):
    """Processor time of looking for `pattern` in `size` characters that begin to match everywhere and never end to."""
    text = worst * (size // len(worst)) + "!"
    text = text.encode() if isinstance(pattern.pattern, bytes) else text
    began = time.process_time()
    for _ in pattern.finditer(text):
        pass
    return time.process_time() - began


@pytest.mark.parametrize("pattern", [*patterns()])
def test_a_pattern_takes_time_in_proportion_to_its_text(pattern):
    """1 MB of its worst takes less than 2 s; what is quadratic takes a hundred times as long for ten times the text."""
    took = {}
    for worst in WORST:
        for size in (MEGABYTE // 500, MEGABYTE // 50):
            took[worst] = seconds_for(pattern, worst, size)
            assert took[worst] < 0.1, (worst, size)
    worst = max(took, key=took.get)
    assert seconds_for(pattern, worst, MEGABYTE) < 2.0, worst


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    folder = save_base(tmp_path_factory.mktemp("models") / "tiny", model, tokenizer)
    page, answer = PageSettings(upload_megabytes=2, port=0), AnswerSettings(answer_tokens=4)
    return ChatModel(ChatSettings(model=str(folder), web=True, page=page, answer=answer))


class Watch:
    """How long questions are held up meanwhile, and how much memory this process and its children take.

    Other work on the machine makes every answer late; what an upload does to a question is bounded by the processor
    time that this process and its children spend while the question waits.
    """

    def __init__(self, client):
        self.client, self.ended = client, threading.Event()
        self.process = psutil.Process(os.getpid())
        self.longest, self.asked = 0.0, 0
        self.before = self.most = self.used()[0]

    def used(self):
        """Bytes, and seconds of processor time."""
        memory, seconds = 0, 0.0
        for each in (self.process, *self.process.children(recursive=True)):
            with contextlib.suppress(psutil.Error), each.oneshot():
                memory += each.memory_info().rss
                seconds += sum(each.cpu_times()[:2])
        return memory, seconds

    def ask(self):
        while not self.ended.is_set():
            began, (_, spent) = time.monotonic(), self.used()
            assert self.client.answer({"turns": [], "question": "Who?"})[-1][0] == "done"
            assert self.client.call("GET", "/api/model")[0] == 200
            self.longest = max(self.longest, min(time.monotonic() - began, self.used()[1] - spent))
            self.asked += 1
            self.ended.wait(0.1)

    def measure(self):
        while not self.ended.wait(0.1):
            self.most = max(self.most, self.used()[0])

    def __enter__(self):
        self.threads = [threading.Thread(target=each) for each in (self.ask, self.measure)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join(60)


def test_hostile_uploads_hold_up_nobody_and_take_little_memory(model):
    files = list(hostile_files())
    assert len(files) >= 50
    assert max(len(content) for _, content in files) <= MEGABYTE
    figures = {}
    with served(model) as (page, url):
        client = Client(page, url)
        for name, content in files:
            with Watch(client) as watch:
                status, said = client.add(name, content)
            assert status in (201, 400), (name, status, said)
            if status == 400:
                assert said["error"].endswith("."), said
                assert "/tmp" not in said["error"]
            else:
                assert client.call("DELETE", f"/api/documents/{said['id']}")[0] == 200
            assert watch.asked
            figures[name] = (status, watch.longest, (watch.most - watch.before) / 1e6)
    assert not {name: each for name, each in figures.items() if each[1] > 1.0}  # seconds
    assert not {name: each for name, each in figures.items() if each[2] > 200}  # 10^6 bytes


def test_hostile_requests_are_refused_in_a_sentence(model):
    with served(model) as (page, url):
        client = Client(page, url)
        status, document = client.add("a.txt\0b", b"words " * 100)
        assert (status, document["name"]) == (201, "a.txtb")
        about = {"id": document["id"]}
        asked = {"turns": [], "question": "Who?"}
        for body, words in (
            (b"[" * 200_000, "nested too deeply"),
            (b'{"question": ' * 100_000, "nested too deeply"),
            (asked | {"documents": [about | {"n": n} for n in range(33)]}, "32 documents"),
            (asked | {"documents": [about] * 200_000}, "32 documents"),
        ):
            status, trouble = client.call("POST", "/api/answers", body)
            assert status == 400
            assert words in trouble["error"]
        watch = Watch(client)
        events = client.answer(asked | {"documents": [about | {"n": n} for n in range(20)]})
        assert events[-1][0] == "error"
        assert "more than fit" in events[-1][1]["error"]
        assert watch.used()[0] - watch.before < 50e6
        turns = [{"role": "user", "content": "\ud800 Who?"}, {"role": "assistant", "content": "x"}]
        for kind in ("markdown", "json"):
            assert client.call("POST", "/api/export", {"format": kind, "turns": turns, "documents": []})[0] == 200
        assert client.answer({"turns": [], "question": "\ud800 Who?"})[-1][0] == "done"
