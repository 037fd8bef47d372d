"""`longlora eval passkey`: does the model find a number hidden in filler, at each context and depth?

Greedy and exact match: the answer's first tokens, as many as the key takes, must read as the key (LongLoRA section
4.2 and `passkey_retrivial.py`). Prompts are filled so that prompt and answer make up the context to the token.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from longlora.errors import UserError
from longlora.evaluation.passkey_prompts import Hidden, draw_keys, filled, original_prompt, prompt
from longlora.evaluation.perplexity import default_contexts
from longlora.evaluation.prompting import PromptFormat
from longlora.evaluation.results import Document
from longlora.evaluation.retrieval import Question, Task, ask_models, footing, window_of
from longlora.evaluation.statistics import share
from longlora.evaluation.tables import result_table, shown
from longlora.model.loading import window
from longlora.progress import Progress
from longlora.settings import PasskeySettings

DEPTHS = 5

ANSWER_TOKENS = len(" 49999")
"""Room for the answer: no tokenizer takes more tokens for a key than it has characters, with the space before it."""

CHARACTERS_A_TOKEN = 3.75
"""The original's estimate for its filler."""


def evaluate_passkey(settings: PasskeySettings) -> Document:
    """Run `longlora eval passkey`.

    Returns:
        `{"model", "task": "passkey", "seed", "keys", …, "results": [{"context", "depth", "accuracy", "trials",
        "skipped", "tokens"}]}`, several models as in `longlora.evaluation.retrieval.ask_models`.
        With `interval` there is no depth, and `tokens` is the mean length that the original reports.

    Raises:
        UserError: a model, tokenizer or context that does not serve.
    """
    make_task = original_task if settings.interval else grid_task
    return ask_models("passkey", settings, functools.partial(make_task, settings), passkey_table)


def grid_task(settings: PasskeySettings, form: PromptFormat, config: PreTrainedConfig) -> Task:
    """Every context × depth × trial, each prompt filled to `context - ANSWER_TOKENS` tokens."""
    contexts = settings.contexts or _usual_contexts(config)
    depths = evenly_spaced(settings.depths or DEPTHS)
    questions = []
    with Progress("filling prompts", "prompts", len(contexts) * len(depths) * settings.trials) as bar:
        for context in contexts:
            characters = None
            for depth, trial in itertools.product(depths, range(settings.trials)):
                random = np.random.default_rng([settings.seed, context, round(depth * 1000), trial])
                hidden = draw_keys(settings.keys, depth, random)
                write = functools.partial(_tokens, form, hidden)
                tokens, characters = filled(write, context - ANSWER_TOKENS, characters)
                cell = {"context": context, "depth": depth}
                questions.append(_question(form, hidden, f"{context}/{depth:g}/{trial}", cell, tokens, context))
                bar.show(len(questions), f"{context:,} tokens")
    return _task(questions, {"seed": settings.seed, "keys": settings.keys, "interval": None})


def original_task(settings: PasskeySettings, form: PromptFormat, config: PreTrainedConfig) -> Task:
    """The original's prompts: lengths at each multiple of `interval`, trial i with seed i, the key anywhere."""
    assert settings.interval is not None
    longest = settings.contexts[0] if settings.contexts else window_of(config, "--contexts")
    if longest < settings.interval:
        raise UserError(f"--interval is {settings.interval:,}, beyond the longest length of {longest:,} tokens.")
    questions = []
    for context in range(settings.interval, longest + 1, settings.interval):
        characters = int(CHARACTERS_A_TOKEN * context // 1024 * 1024)
        for trial in range(settings.trials):
            hidden, _ = original_prompt(characters, trial)
            tokens = _tokens(form, [hidden], characters)
            limit = max(longest, window(config) or 0)
            questions.append(_question(form, [hidden], f"{context}/{trial}", {"context": context}, tokens, limit))
    return _task(questions, {"seed": 0, "keys": 1, "interval": settings.interval})


def evenly_spaced(depths: int) -> list[float]:
    """That many depths from 0 to 1.

    >>> evenly_spaced(5), evenly_spaced(1)
    ([0.0, 0.25, 0.5, 0.75, 1.0], [0.5])
    """
    return [round(at / (depths - 1), 4) for at in range(depths)] if depths > 1 else [0.5]


def passkey_table(documents: Sequence[Document]) -> str:
    """Accuracy in per cent for people: a line a model and depth, a column a context."""
    told = [document | {"results": [*document["results"], *_over_depths(document)]} for document in documents]
    lines = [
        result_table(
            told,
            "% of pass keys found, depth",
            lambda result: shown(result, "accuracy", 0, 100),
            row=lambda result: depth if isinstance(depth := result.get("depth", "any"), str) else f"{depth:.0%}",
        )
    ]
    for document in documents:
        keys = f"{document['keys']} keys a prompt, " if document["keys"] > 1 else ""
        lines.append(footing(document, f"{keys}seed {document['seed']}"))
    return "\n".join(lines)


def _usual_contexts(config: PreTrainedConfig) -> tuple[int, ...]:
    """As for perplexity; learned positions, which have one window only, as a model that was never extended."""
    if getattr(config.get_text_config(), "rope_parameters", None):
        return default_contexts(config)
    whole = window_of(config, "--contexts")
    return whole // 4, whole // 2, whole


def _over_depths(document: Document) -> list[dict[str, Any]]:
    """Accuracy at each context over all depths, where there are several."""
    found: dict[int, list[float]] = {}
    for result in document["results"]:
        found.setdefault(result["context"], []).extend(result["scores"])
    if len({result.get("depth") for result in document["results"]}) == 1:
        return []
    shares = {context: share(sum(scores) / len(scores), len(scores)) for context, scores in found.items() if scores}
    return [
        {"context": context, "depth": "all", "accuracy": value, "low": low, "high": high}
        for context, (value, low, high) in shares.items()
    ]


def _tokens(form: PromptFormat, hidden: list[Hidden], characters: int) -> np.ndarray:
    return form.tokens(prompt(hidden, hidden[0], characters), hidden[0].opening)


def _question(
    form: PromptFormat, hidden: list[Hidden], trial: str, cell: dict[str, Any], tokens: np.ndarray, limit: int
) -> Question:
    asked = hidden[0]
    return Question(
        trial=trial,
        cell=cell,
        tokens=tokens,
        limit=limit,
        expected=str(asked.key),
        right=_reads_as_key(form, asked),
    )


def _reads_as_key(form: PromptFormat, asked: Hidden) -> Callable[[list[int]], bool]:
    """Whether the answer's first tokens, as many as the key takes after `asked.opening`, read as the key does."""
    before = form.tokens(asked.question, asked.opening)
    whole = form.tokens(asked.question, f"{asked.opening} {asked.key}").tolist()
    key = whole[len(before) :]
    return lambda answer: form.text(answer[: len(key)]) == form.text(key)


def _task(questions: list[Question], about: dict[str, Any]) -> Task:
    return Task(questions=questions, max_new_tokens=ANSWER_TOKENS, about=about)
