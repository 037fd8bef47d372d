"""`longlora eval longppl`: LongPPL of any models on the same documents, by themselves or by one evaluator."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from longlora.corpus.tokens import TokenizedCorpus, tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation.loading import data_name, held_out, load_evaluated, same_tokens
from longlora.evaluation.long_perplexity import find_key_tokens, long_perplexity, with_lengths
from longlora.models import load_config
from longlora.settings import EvaluateLongPerplexitySettings, LongPerplexitySettings

logger = logging.getLogger(__name__)


def evaluate_long_perplexity(settings: EvaluateLongPerplexitySettings) -> dict[str, Any]:
    """Run `longlora eval longppl`.

    Returns:
        For one model `{"model", "label", "data", "evaluator", "short_context", "short_stride", "alpha", "beta",
        "results": [{"context", "longppl", "perplexity", "key_tokens", "tokens", "documents", "skipped_documents"}]}`;
        for several `{"models": [one such document each]}`. `evaluator` is null where each model judges for itself,
        `longppl` where no token is a key token.

    Raises:
        UserError: a model, document or length that does not fit, or an evaluator with another tokenizer.
    """
    wanted = settings.long_perplexity
    lengths = with_lengths(replace(wanted, context=wanted.context or settings.extend_to), _configs(settings))
    keys, read = None, None
    if settings.evaluator:
        keys, read = _judge(settings, lengths)
    documents = [_evaluate(name, settings, lengths, keys, read) for name in settings.models]
    if not settings.json:
        print(long_perplexity_table(documents))
    return documents[0] if len(documents) == 1 else {"models": documents}


def long_perplexity_table(documents: Sequence[dict[str, Any]]) -> str:
    """LongPPL for people: a line a model."""
    first, result = documents[0], documents[0]["results"][0]
    width = max(len("model"), *(len(document["label"]) for document in documents))
    lines = [f"{'model':<{width}}{'LongPPL':>10}{'perplexity':>12}{'key tokens':>12}{'of all':>8}"]
    for document in documents:
        row = document["results"][0]
        longppl = "–" if row["longppl"] is None else f"{row['longppl']:.2f}"
        lines.append(
            f"{document['label']:<{width}}{longppl:>10}{row['perplexity']:>12.2f}{row['key_tokens']:>12,}"
            f"{row['key_tokens'] / row['tokens']:>8.1%}"
        )
    judge = f"chosen by {first['evaluator']}" if first["evaluator"] else "each model's own"
    if not first["evaluator"] and len(documents) > 1:
        judge += " (with --evaluator MODEL all are measured on the same ones)"
    lines.append(
        f"{first['data']}; context {result['context']:,}, short context {first['short_context']:,} to "
        f"{first['short_context'] + first['short_stride'] - 1:,}; {result['tokens']:,} tokens of "
        f"{result['documents']:,} documents, {result['skipped_documents']:,} too short; key tokens {judge}"
    )
    return "\n".join(lines)


def _configs(settings: EvaluateLongPerplexitySettings) -> list[PreTrainedConfig]:
    """The configs of all models, the evaluator's among them, as they will be when they are loaded."""
    names = [*settings.models, *([settings.evaluator] if settings.evaluator else [])]
    trust, revision = settings.loading.trust_remote_code, settings.loading.revision
    return [load_config(name, trust_remote_code=trust, revision=revision) for name in names]


def _judge(
    settings: EvaluateLongPerplexitySettings, lengths: LongPerplexitySettings
) -> tuple[list[np.ndarray], TokenizedCorpus]:
    """The evaluator's key tokens, and the documents as it read them."""
    assert settings.evaluator is not None
    model, tokenizer, _ = load_evaluated(settings.evaluator, replace(settings, extend_to=None))
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    logger.info("key tokens by %s", settings.evaluator)
    return find_key_tokens(model, corpus, lengths), corpus


def _evaluate(
    name: str,
    settings: EvaluateLongPerplexitySettings,
    lengths: LongPerplexitySettings,
    keys: list[np.ndarray] | None,
    read: TokenizedCorpus | None,
) -> dict[str, Any]:
    model, tokenizer, label = load_evaluated(name, settings)
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    if read is not None and not same_tokens(corpus, read):
        raise UserError(
            f"--evaluator {settings.evaluator} has another tokenizer than '{name}', so its key tokens are not this "
            "model's tokens: give an evaluator of the same family, or none to let each model judge for itself."
        )
    logger.info("LongPPL of %s", label)
    result = long_perplexity(model, corpus, lengths, keys)
    return {
        "model": name,
        "label": label,
        "data": data_name(settings.corpus),
        "evaluator": settings.evaluator,
        "short_context": lengths.short_context,
        "short_stride": lengths.short_stride,
        "alpha": lengths.alpha,
        "beta": lengths.beta,
        "results": [result.to_dict()],
    }
