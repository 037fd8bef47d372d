"""Questions asked of an OpenAI-compatible server: the same prompts, the same scoring."""

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import save_base

from longlora.errors import UserError
from longlora.evaluation.passkey import evaluate_passkey
from longlora.evaluation.tasks import evaluate_tasks
from longlora.model.loading import load
from longlora.settings import EvaluateTasksSettings, PasskeySettings


@pytest.fixture
def base(tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any]) -> str:
    return str(save_base(tmp_path / "base", tiny_model("llama", vocab_size=257), tiny_tokenizer()))


@contextmanager
def serving(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of one model, its address and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "some/model"}]})

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.answer({"choices": [{"index": 0, **answer(asked[-1])}]})

        def answer(self, document: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(document).encode())

        def log_message(self, *_: Any) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", asked
    listening.shutdown()


@pytest.fixture
def server(tiny_tokenizer: Callable[[], Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server whose model has read the prompt, and its address and what it was asked."""
    tokenizer = tiny_tokenizer()

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.decode(question["prompt"])
        (key,) = set(re.findall(r"The pass key is (\d+)\. Remember", text))
        return {"text": f" {key if len(text) < 400 else 7}. There."}

    with serving(answer) as both:
        yield both


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


TASK = """
task: {kind}
custom_dataset: !function samples.samples
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""


def test_lm_evals_tasks_by_a_server_are_those_of_its_model(base: str, tmp_path: Path) -> None:
    """The server has the very model: what it says and how likely it finds an answer must come out the same."""
    pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
    questions = ["The grass is", "The sky is " + "very " * 120]
    (tmp_path / "samples.py").write_text(
        "from datasets import Dataset\n"
        f"rows = [{{'question': each, 'answer': ' blue'}} for each in {questions}]\n"
        "def samples(**_):\n    return {'test': Dataset.from_list(rows)}\n"
    )
    said = "generation_kwargs: {max_gen_toks: 6, until: [], do_sample: false}\nmetric_list: [{metric: exact_match}]"
    tasks = []
    for kind, more in (("loglikelihood", ""), ("generate_until", said)):
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, more=more))
        tasks.append(str(tmp_path / f"{kind}.yaml"))
    model, tokenizer = load(base)

    def answer(question: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor(question["prompt"])
        if ids.ndim == 1:
            ids = ids[None]
        with torch.no_grad():
            if not question.get("echo"):
                new = model.generate(ids, max_new_tokens=question["max_tokens"], do_sample=False)[0, ids.shape[1] :]
                return {"text": tokenizer.decode(new, skip_special_tokens=True)}
            likely = model(ids).logits[0].log_softmax(-1)
        best = [None, *({str(int(row.argmax())): float(row.max())} for row in likely)]
        own = [None, *(float(row[token]) for row, token in zip(likely[:-1], ids[0, 1:], strict=True)), 0.0]
        return {"logprobs": {"token_logprobs": own, "top_logprobs": best}}

    # cut on the left, a server reads two tokens less: it goes on for one, and reads the last one for nothing
    for context, cut, tolerance in ((1024, 0, 1e-5), (128, 1, 5e-3)):
        settings = {"models": (base,), "tasks": tuple(tasks), "context": context, "json": True}
        alone = evaluate_tasks(EvaluateTasksSettings(**settings))
        with serving(answer) as (url, asked):
            served = evaluate_tasks(EvaluateTasksSettings(**settings, server=url))
        for one, other in zip(alone["results"], served["results"], strict=True):
            assert one["cut"] == other["cut"] == cut
            mapped = math.log if one["metric"] == "perplexity" else float
            assert mapped(other["value"]) == pytest.approx(mapped(one["value"]), rel=tolerance)
        assert {each["model"] for each in asked} == {"some/model"}
        assert max(torch.tensor(each["prompt"]).numel() for each in asked) < context
    with pytest.raises(UserError, match="/v1/completions did not answer lm-eval's requests"), serving(dict) as (url, _):
        evaluate_tasks(EvaluateTasksSettings(**settings | {"tasks": (tasks[0],), "limit": 1, "server": url}))
