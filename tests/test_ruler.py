"""RULER: samples and scores equal to lm-eval's own, lengths that do not fit, and runs that go on after a stop."""

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")
pytest.importorskip("nltk", reason="the [eval] extra is not installed")
pytest.importorskip("wonderwords", reason="the [eval] extra is not installed")
pytest.importorskip("scipy", reason="the [eval] extra is not installed")

from lm_eval.tasks import TaskManager
from tiny_runs import make_run, save_base

from longlora.errors import UserError
from longlora.evaluation import ruler
from longlora.evaluation.harness import LoadedModel
from longlora.evaluation.ruler import averages, effective_length, evaluate_ruler
from longlora.evaluation.ruler_samples import FOLDER, NoSampleError, RulerTask, choose_tasks, ruler_tasks
from longlora.model.loading import load_tokenizer
from longlora.model.source import resolve
from longlora.settings import RulerSettings

OFFLINE = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]


@pytest.fixture(scope="module")
def demo_tokenizer() -> Any:
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def bytes_tokenizer(tiny_tokenizer: Callable[[], Any]) -> Any:
    return tiny_tokenizer()


class Task(RulerTask):
    """With what lm-eval does with its samples, one at a time."""

    @property
    def samples(self) -> list[dict[str, Any]]:
        return list(self.eval_docs)

    @property
    def max_new_tokens(self) -> int:
        return self.config.generation_kwargs["max_gen_toks"]

    def prompt_text(self, sample: dict[str, Any]) -> str:
        return str(self.fewshot_context(sample, num_fewshot=0, gen_prefix=self.doc_to_prefix(sample)))

    def score(self, sample: dict[str, Any], answer: str) -> float:
        return float(self.process_results(sample, [answer])[str(self.context)])


# ---------------------------------------------------------------------------------------------------- lm-eval's own


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_multikey_3", "ruler_vt", "ruler_cwe"])
def test_samples_are_lm_evals(name: str, demo_tokenizer: Any) -> None:
    """As lm-eval's evaluator makes them: its seeds, its tokenizer, its prompts."""
    ours = Task(name, demo_tokenizer, 1024, trials=4, seed=0)

    sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # as in a new process
    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    metadata = {"max_seq_lengths": [1024], "tokenizer": resolve("demo").location}
    theirs = TaskManager(include_defaults=False, include_path=FOLDER, metadata=metadata).load([name])["tasks"][name]
    theirs.set_config("num_fewshot", 0)
    theirs.build_all_requests(limit=4)
    random.setstate(before[0])
    np.random.set_state(before[1])

    assert [ours.prompt_text(sample) for sample in ours.samples] == [made.args[0] for made in theirs.instances]
    assert ours.max_new_tokens == theirs.instances[0].args[1]["max_gen_toks"]
    for sample, made in zip(ours.samples, theirs.instances, strict=True):
        assert sample["outputs"] == made.doc["outputs"]
        half = "  So it is\x00 " + " and ".join(sample["outputs"][: len(sample["outputs"]) // 2 + 1]).upper()
        for answer in ("", half, ", ".join(sample["outputs"])):
            assert ours.score(sample, answer) == theirs.process_results(made.doc, [answer])["1024"]


def test_scores_by_hand(demo_tokenizer: Any) -> None:
    task = Task("ruler_vt", demo_tokenizer, 1024, trials=1, seed=0)
    sample = {**task.samples[0], "outputs": ["ABCDE", "FGHIJ", "KLMNO", "PQRST"]}
    assert task.score(sample, " abcde, then KLMNO.") == 0.5
    assert task.score(sample, "ABCD FGHIJ") == 0.25
    assert task.score(sample, "PQRST KLMNO\nFGHIJ\tABCDE") == 1.0
    assert task.score(sample, "") == 0.0


@pytest.mark.parametrize("name", OFFLINE)
def test_samples_have_the_size_and_the_answer(name: str, demo_tokenizer: Any) -> None:
    task = Task(name, demo_tokenizer, 1536, trials=3, seed=1)
    assert len(task.samples) == 3
    texts = [task.prompt_text(sample) for sample in task.samples]
    assert len(set(texts)) == 3
    for sample, text in zip(task.samples, texts, strict=True):
        assert text.endswith(sample["gen_prefix"])
        assert all(word in text for word in sample["outputs"])
        asked = len(demo_tokenizer(sample["input"], add_special_tokens=False)["input_ids"])
        # fwe fills the context with the prompt alone, and cwe keeps room for an example that lm-eval then leaves out
        assert asked <= 1536 - (0 if name == "ruler_fwe" else task.max_new_tokens)
        assert asked >= 1536 / 3
    again = Task(name, demo_tokenizer, 1536, trials=2, seed=1)
    assert [again.prompt_text(sample) for sample in again.samples] == texts[:2]
    other = Task(name, demo_tokenizer, 1536, trials=1, seed=2)
    assert other.prompt_text(other.samples[0]) not in texts


def test_generators_and_lm_eval_are_left_as_they_were(demo_tokenizer: Any) -> None:
    from lm_eval.tasks.ruler import vt_utils

    states = random.getstate(), np.random.get_state()[1].tolist()
    Task("ruler_vt", demo_tokenizer, 1024, trials=1, seed=3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    replaced = (vt_utils.get_tokenizer, vt_utils.sys_vartrack_w_noise_random, vt_utils.generate_input_output)
    assert {function.__module__.split(".")[0] for function in replaced} == {"lm_eval"}


# ------------------------------------------------------------------------------------------------ what does not fit


@pytest.mark.parametrize(
    ("name", "context"),
    [
        *(("ruler_vt", context) for context in (20, 128, 256, 400, 900)),
        *(("ruler_cwe", context) for context in (20, 256, 900)),
        *(("niah_single_1", context) for context in (20, 128, 300)),
        ("ruler_fwe", 100),
    ],
)
def test_a_task_that_does_not_fit_says_so(name: str, context: int, bytes_tokenizer: Any) -> None:
    """lm-eval itself would search for ever."""
    with pytest.raises(NoSampleError, match=f"its smallest sample does not fit into {context} tokens"):
        Task(name, bytes_tokenizer, context, trials=2, seed=0)


def test_which_tasks_run_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.find", lambda _: (_ for _ in ()).throw(LookupError()))
    chosen, left_out = choose_tasks((), download=False)
    assert chosen == OFFLINE
    assert len(ruler_tasks()) == ruler.TASKS
    assert {entry["task"] for entry in left_out} == set(ruler_tasks()) - set(OFFLINE)
    reasons = {entry["task"]: entry["reason"] for entry in left_out}
    assert "Paul Graham's essays" in reasons["niah_single_2"]
    assert "punkt_tab" in reasons["niah_single_2"]
    assert "SQuAD" in reasons["ruler_qa_squad"]
    assert "HotpotQA" in reasons["ruler_qa_hotpot"]
    assert choose_tasks((), download=True) == (ruler_tasks(), [])
    assert choose_tasks(("ruler_vt",), download=False) == (["ruler_vt"], [])
    with pytest.raises(UserError, match="unknown RULER task 'ruler_vta'.*Did you mean 'ruler_vt'"):
        choose_tasks(("ruler_vta",), download=False)


# ------------------------------------------------------------------------------------------------------ the summary


def cell(context: int, task: str, accuracy: float | None) -> dict[str, Any]:
    return {"context": context, "task": task, "accuracy": accuracy, "trials": 20}


def test_averages_are_over_the_tasks_that_ran_at_every_context() -> None:
    results = [cell(512, "a", 1.0), cell(1024, "a", 0.5), cell(1024, "b", 0.9), cell(512, "c", 0.8)]
    results += [cell(1024, "c", 0.1), cell(512, "d", None), cell(1024, "d", 1.0)]
    common, means = averages(results)
    assert common == ["a", "c"]
    assert [(mean["context"], mean["accuracy"]) for mean in means] == [(512, 0.9), (1024, 0.3)]
    assert all(mean["low"] < mean["accuracy"] < mean["high"] for mean in means)
    assert averages([cell(512, "a", None)]) == ([], [])


@pytest.mark.parametrize(
    ("accuracies", "threshold", "expected"),
    [
        ([0.9, 0.86, 0.85], 0.856, 2000),
        ([0.9, 0.8, 0.9], 0.856, 1000),
        ([0.5, 0.9, 0.9], 0.856, None),
        ([0.856], 0.856, 1000),
        ([], 0.5, None),
    ],
)
def test_effective_length(accuracies: list[float], threshold: float, expected: int | None) -> None:
    means = [{"context": 1000 * at, "accuracy": accuracy} for at, accuracy in enumerate(accuracies, start=1)]
    assert effective_length(means, threshold) == expected


@pytest.mark.parametrize("given", ["90 percent", "101", "-1", "nan", "Own"])
def test_a_threshold_that_is_none(given: str) -> None:
    with pytest.raises(
        UserError, match=f"--threshold is '{given}': it must be a percentage from 0 to 100, auto or own"
    ):
        RulerSettings(models=("demo",), threshold=given)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], bytes_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("ruler")
    model = tiny_model("llama", vocab_size=len(bytes_tokenizer), max_position_embeddings=512)
    base = save_base(folder / "base", model, bytes_tokenizer)
    make_run(folder / "run", base, bytes_tokenizer)
    return folder


def settings(places: Path, model: str = "base", **given: Any) -> RulerSettings:
    given = {"contexts": (1024, 600), "tasks": ("niah_single_1", "niah_multikey_2"), "trials": 2, "json": True, **given}
    return RulerSettings(models=(str(places / model),), **given)


def answering(right: Callable[[str], bool]) -> Callable[..., list[str]]:
    """A reader in place of a model: finds the number in the prompt, and says it where `right` of the prompt."""

    def generate_until(_: Any, requests: list[Any], **__: Any) -> list[str]:
        answers = []
        for text in (request.args[0] for request in requests):
            (key,) = set(re.findall(r"special magic number for (\S+) mentioned in the provided text is$", text))
            (value,) = re.findall(rf"One of the special magic numbers for {key} is: (\d+)\.", text)
            answers.append(f" {value}." if right(text) else " 123")
        return answers

    return generate_until


def test_the_command(places: Path, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "generate_until", answering(lambda text: len(text) < 575))
    document = json.loads(json.dumps(evaluate_ruler(settings(places))))
    results = {(row["context"], row["task"]): row for row in document["results"]}
    assert list(results) == [(c, t) for c in (600, 1024) for t in ("niah_single_1", "niah_multikey_2")]
    assert {key: row["accuracy"] for key, row in results.items() if key[0] == 600} == {
        (600, "niah_single_1"): 1.0,
        (600, "niah_multikey_2"): 1.0,
    }
    assert results[1024, "niah_single_1"]["accuracy"] == 0.0
    assert all(
        set(row)
        == {"context", "task", "accuracy", "low", "high", "trials", "scores", "skipped", "cut", "tokens", "seconds"}
        for row in results.values()
    )
    assert {(row["trials"], row["skipped"]) for row in results.values()} == {(2, 0)}
    assert document["average_over"] == ["niah_single_1", "niah_multikey_2"]
    assert [(mean["context"], mean["accuracy"]) for mean in document["averages"]] == [(600, 1.0), (1024, 0.0)]
    # four of four, by Wilson
    assert document["averages"][0]["low"] == pytest.approx(4 / (4 + 1.959964**2))
    assert document["weighted_averages"] == {"increasing": pytest.approx(1 / 3), "decreasing": pytest.approx(2 / 3)}
    assert (document["threshold"], document["threshold_from"], document["effective_length"]) == (0.794, "base", 600)
    assert document["left_out"] == []
    assert (document["model"], document["seed"], document["window"]) == (str(places / "base"), 0, 512)


def test_the_models_own_score_as_threshold(places: Path, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadedModel, "generate_until", answering(lambda _: False))
    assert evaluate_ruler(settings(places))["effective_length"] is None
    document = evaluate_ruler(settings(places, threshold="own"))
    assert (document["threshold"], document["effective_length"]) == (0.0, 1024)


def test_a_model_answers_as_transformers_generates(places: Path, bytes_tokenizer: Any) -> None:
    import torch

    from longlora.model.loading import load

    output = places / "answers"
    evaluate_ruler(settings(places, contexts=(600,), tasks=("niah_single_1",), output=str(output)))
    (record,) = [json.loads(line) for line in (output / "ruler.jsonl").read_text().splitlines()[1:]]
    model, _ = load(str(places / "base"))
    task = Task("niah_single_1", bytes_tokenizer, 600, 2, 0)
    for sample, found in zip(task.samples, record["answers"], strict=True):
        ids = bytes_tokenizer(task.prompt_text(sample), return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=128, do_sample=False, attention_mask=torch.ones_like(ids))
        assert found["answer"] == bytes_tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert found["expected"] == sample["outputs"]
        assert found["score"] == task.score(sample, found["answer"])


def test_a_stopped_run_goes_on(places: Path, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = answering(lambda _: True)
    output = places / "stopped"
    asked = []

    def stops(model: Any, requests: list[Any], **rest: Any) -> list[str]:
        asked.append(len(requests))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return reader(model, requests, **rest)

    monkeypatch.setattr(LoadedModel, "generate_until", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_ruler(settings(places, output=str(output)))
    with pytest.raises(UserError, match=r"ruler.jsonl holds 2 trials of an evaluation that was stopped: give --resume"):
        evaluate_ruler(settings(places, output=str(output)))
    with (output / "ruler.jsonl").open("a") as file:
        file.write('{"trial": "1024/niah_si')  # what a kill leaves
    with pytest.raises(UserError, match="'seed' was 0 .* and is now 1"):
        evaluate_ruler(settings(places, output=str(output), resume=True, seed=1))
    asked[:] = [0] * 3
    document = evaluate_ruler(settings(places, output=str(output), resume=True))
    assert asked == [0, 0, 0, 2, 2], "the two cells that were not there"
    assert len(document["results"]) == 4
    assert document["effective_length"] == 1024
    assert json.loads((output / "ruler.json").read_text()) == json.loads(json.dumps(document))


def test_what_does_not_fit_is_counted(
    places: Path, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LoadedModel, "generate_until", answering(lambda _: True))
    tasks = ("niah_single_1", "ruler_vt", "niah_single_2")
    monkeypatch.setattr("nltk.data.find", lambda _: (_ for _ in ()).throw(LookupError()))
    document = evaluate_ruler(settings(places, contexts=(300, 600), tasks=tasks, json=False))
    assert [(entry["task"], entry["context"]) for entry in document["left_out"]] == [
        ("niah_single_2", None),
        ("niah_single_1", 300),
        ("ruler_vt", 300),
        ("ruler_vt", 600),
    ]
    assert [(row["task"], row["context"]) for row in document["results"]] == [("niah_single_1", 600)]
    printed = capsys.readouterr().out
    assert "left out at 300: niah_single_1, ruler_vt: its smallest sample does not fit into 300 tokens" in printed
    assert "left out: niah_single_2: needs Paul Graham's essays" in printed
    assert "effective length of 1 task, not 13: 600 (threshold 79.4%, Llama-2-7B at 4k over all 13 tasks)" in printed
    with pytest.raises(UserError, match="--tasks: ruler_qa_squad asks questions of SQuAD"):
        evaluate_ruler(settings(places, tasks=("ruler_qa_squad",)))


def test_a_chat_template_around_a_prompt_that_fills_the_window(
    tmp_path: Path, tiny_model: Callable[..., Any], tiny_tokenizer: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval sizes samples without the template: it has room of its own, and nothing is cut."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last %}\n" + "-" * 100 + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}\nassistant: {% endif %}"
    )
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=600)
    save_base(tmp_path / "chat", model, tokenizer)
    read: list[str] = []
    real = LoadedModel._model_generate

    def generate(self: Any, context: Any, **rest: Any) -> Any:
        read.append(tokenizer.decode(context[0]))
        return real(self, context, **rest)

    monkeypatch.setattr(LoadedModel, "_model_generate", generate)
    document = evaluate_ruler(settings(tmp_path, "chat", contexts=(600,), tasks=("niah_multikey_2",), trials=1))
    assert [(row["trials"], row["cut"]) for row in document["results"]] == [(1, 0)]
    assert document["threshold_from"] == "chat"
    assert read[0].startswith("user: A special magic number is hidden")
    assert re.search(r"assistant: The special magic number for \S+ mentioned in the provided text is$", read[0])


def test_results_of_a_run_go_into_its_folder(
    places: Path, bytes_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "generate_until", answering(lambda _: True))
    document = evaluate_ruler(settings(places, "run", contexts=(), tasks=("niah_single_1",)))
    # original window 512, stretched by four
    assert [row["context"] for row in document["results"]] == [512, 1024, 2048]
    assert json.loads((places / "run" / "evaluation" / "ruler.json").read_text())["effective_length"] == 2048
