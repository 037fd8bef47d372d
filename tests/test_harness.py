"""Our model in lm-eval, against lm-eval's own wrapper of a transformers model, and its tasks from a file."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import save_base

pytest.importorskip("lm_eval", reason="the [eval] extra is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from longlora.errors import UserError
from longlora.evaluation.harness import LoadedModel, load_tasks, run_tasks
from longlora.evaluation.tasks import evaluate_tasks
from longlora.model.loading import load
from longlora.settings import EvaluateTasksSettings

WINDOW = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> Path:
    tokenizer = tiny_tokenizer()
    return save_base(tmp_path_factory.mktemp("harness") / "base", tiny_model("llama", vocab_size=257), tokenizer)


@pytest.fixture(scope="module")
def stock(folder: Path) -> HFLM:
    """lm-eval as it is run on a folder."""
    return HFLM(pretrained=str(folder), device="cpu", batch_size=1, max_length=WINDOW)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, 0, metadata=("test", i, 1)) for i, given in enumerate(arguments)]


def test_what_is_longer_than_the_window_is_counted(folder: Path) -> None:
    lm = LoadedModel(*load(folder), window=WINDOW)
    exact = "x" * (WINDOW - 2)  # with the two tokens of the continuation, of which the last is not read
    asked = [(exact + "x", "ab"), (exact + "xx", "ab"), (exact, "ab")]
    lm.loglikelihood(requests("loglikelihood", asked), disable_tqdm=True)
    assert (lm.cut, lm.requests) == (1, 3)
    settings = {"max_gen_toks": 10, "until": []}
    lm.generate_until(requests("generate_until", [("x" * 54, settings), ("x" * 55, settings)]), disable_tqdm=True)
    assert (lm.cut, lm.requests) == (2, 5)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
"""


def write_task(folder: Path, name: str, kind: str, more: str = "") -> str:
    """A task of four samples in a .yaml file, with its data beside it."""
    data = folder / "data.jsonl"
    samples = [{"question": "The grass is", "answer": " green."}, {"question": "The sky is", "answer": " blue."}] * 2
    data.write_text("\n".join(map(json.dumps, samples)))
    file = folder / f"{name}.yaml"
    file.write_text(TASK.format(name=name, data=data, kind=kind) + more)
    return str(file)


def test_tasks_of_a_file_as_lm_eval_alone_has_them(folder: Path, stock: HFLM, tmp_path: Path) -> None:
    """Sample by sample, from the command, with lm-eval's own standard errors."""
    generated = (
        "generation_kwargs: {max_gen_toks: 6, until: [], do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    )
    names = [
        write_task(tmp_path, "likely", "loglikelihood"),
        write_task(tmp_path, "whole", "loglikelihood_rolling"),
        write_task(tmp_path, "said", "generate_until", generated),
    ]
    settings = EvaluateTasksSettings(
        models=(str(folder),), tasks=tuple(names), limit=3, json=True, output=str(tmp_path)
    )
    document = evaluate_tasks(settings)
    assert json.loads((tmp_path / "tasks.json").read_text()) == document
    assert (document["context"], document["limit"], document["chat"]) == (WINDOW, 3, False)
    found = {(row["task"], row["metric"]): row for row in document["results"]}
    assert {row["samples"] for row in found.values()} == {3}
    assert found["likely", "acc"]["higher_is_better"]
    assert not found["likely", "perplexity"]["higher_is_better"]

    # without the index of its fourteen thousand own tasks, which takes it a minute
    known = TaskManager(include_defaults=False)
    theirs: Any = simple_evaluate(model=stock, tasks=names, limit=3, bootstrap_iters=1000, task_manager=known)
    for (task, metric), row in found.items():
        name, _, answers = metric.partition(",")
        assert row["value"] == pytest.approx(theirs["results"][task][f"{name},{answers or 'none'}"], rel=1e-4)
        error = theirs["results"][task][f"{name}_stderr,{answers or 'none'}"]
        if isinstance(error, float):
            assert row["high"] - row["value"] == pytest.approx(1.96 * error, rel=0.3 if row["scores"] == [] else 1e-4)
    _, samples = run_tasks(LoadedModel(*load(folder), window=WINDOW), load_tasks(names[2:])[names[2]], 3)
    assert [sample["resps"] for sample in samples["said"]] == [s["resps"] for s in theirs["samples"]["said"]]


def test_samples_drawn_by_chance_are_lm_evals_and_the_same_for_every_model(tmp_path: Path) -> None:
    (tmp_path / "draw.py").write_text(
        "import random\nimport numpy as np\nfrom datasets import Dataset\n"
        "def samples(**_):\n"
        "    drawn = [{'question': str(random.random()), 'answer': str(np.random.rand())} for _ in range(3)]\n"
        "    return {'test': Dataset.from_list(drawn)}\n"
    )
    names = []
    for name in ("one", "other"):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ncustom_dataset: !function draw.samples\ntest_split: test\noutput_type: loglikelihood\n"
            'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        )
        names.append(str(tmp_path / f"{name}.yaml"))
    for asked in (names, names[1:], names[::-1]):
        for name, (task,) in load_tasks(asked).items():
            random.seed(0)
            np.random.seed(1234)
            expected = [(str(random.random()), str(np.random.rand())) for _ in range(3)]
            assert [(doc["question"], doc["answer"]) for doc in task.eval_docs] == expected, name


def test_at_the_new_window(folder: Path, tmp_path: Path) -> None:
    """Twice as long as the old one: what is scored depends on the beginning of the text, and nothing is cut."""
    data = tmp_path / "data.jsonl"
    data.write_text(
        "\n".join(json.dumps({"question": f"{begin} " + "grass " * 18, "answer": " sky"}) for begin in "ab")
    )
    (tmp_path / "long.yaml").write_text(TASK.format(name="long", data=data, kind="loglikelihood"))
    given = {"models": (str(folder),), "tasks": (str(tmp_path / "long.yaml"),), "json": True}
    stretched = evaluate_tasks(EvaluateTasksSettings(**given, extend_to=2 * WINDOW, context=2 * WINDOW))
    old = evaluate_tasks(EvaluateTasksSettings(**given))
    likely = [next(row for row in each["results"] if row["metric"] == "perplexity") for each in (stretched, old)]
    assert [row["cut"] for row in likely] == [0, 2]
    assert len(set(likely[0]["scores"])) == 2
    assert len(set(likely[1]["scores"])) == 1, "without the beginning both are the same text"


def test_tasks_that_cannot_be_had(tmp_path: Path) -> None:
    broken = write_task(tmp_path, "broken", "loglikelihood")
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"the data of '.*broken.yaml' cannot be had \(FileNotFoundError"):
        load_tasks([broken])
    with pytest.raises(UserError, match=r"lm-eval has no task '.*missing.yaml'"):
        load_tasks([str(tmp_path / "missing.yaml")])
