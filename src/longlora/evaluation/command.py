"""`longlora eval perplexity`: any models, any contexts, the same documents, one table."""

import gc
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from longlora.corpus.tokens import tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation.perplexity import perplexity, perplexity_report
from longlora.models import load
from longlora.positions import extend_positions
from longlora.settings import EvaluatePerplexitySettings

logger = logging.getLogger(__name__)


def evaluate_perplexity(settings: EvaluatePerplexitySettings) -> dict[str, Any]:
    """Run `longlora eval perplexity`.

    Returns:
        For one model `{"model", "data", "stride", "score", "results": [{"context", "perplexity", "nll", "tokens",
        "documents", "skipped_documents"}]}`; for several `{"models": [one such document each]}`.

    Raises:
        UserError: a model, document or context that does not fit.
    """
    documents = [_evaluate(name, settings) for name in settings.models]
    if not settings.json:
        print(perplexity_table(documents))
    return documents[0] if len(documents) == 1 else {"models": documents}


def perplexity_table(documents: list[dict[str, Any]]) -> str:
    """Perplexities for people: a line a model, a column a context."""
    contexts = sorted({result["context"] for document in documents for result in document["results"]})
    names = [document.get("label") or document["model"] for document in documents]
    width = max(len("perplexity at"), *(len(name) for name in names))
    lines = [f"{'perplexity at':<{width}}" + "".join(f"{context:>10,}" for context in contexts)]
    for name, document in zip(names, documents, strict=True):
        found = {result["context"]: result["perplexity"] for result in document["results"]}
        cells = (f"{found[context]:>10.2f}" if context in found else f"{'–':>10}" for context in contexts)
        lines.append(f"{name:<{width}}" + "".join(cells))
    results = documents[0]["results"]
    stride = documents[0]["stride"] or "/".join(f"{r['stride']:,}" for r in results)
    tokens, counts, skipped = (_range(r[key] for r in results) for key in ("tokens", "documents", "skipped_documents"))
    lines.append(
        f"{documents[0]['data']}; stride {stride}, score {documents[0]['score']}; "
        f"{tokens} tokens of {counts} documents, {skipped} too short"
    )
    return "\n".join(lines)


def _range(numbers: Iterable[int]) -> str:
    """`7`, or `5 to 9` where they differ."""
    found = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in dict.fromkeys((found[0], found[-1])))


def _evaluate(name: str, settings: EvaluatePerplexitySettings) -> dict[str, Any]:
    model, tokenizer = load(
        name,
        dtype=settings.dtype,
        device="auto",
        trust_remote_code=settings.loading.trust_remote_code,
        revision=settings.loading.revision,
    )
    label = name
    if settings.extend_to:
        extension = extend_positions(model, settings.extend_to, settings.method)
        if not extension.changed:
            raise UserError(f"--extend-to is {settings.extend_to:,}: {extension.message}")
        label = f"{name}, {settings.method} to {settings.extend_to:,}, not trained"
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=True if "stdlib" in settings.corpus.data else None)
    logger.info("perplexity of %s", label)
    results = perplexity(model, corpus, settings.perplexity)
    data = ", ".join(Path(source).name if Path(source).exists() else source for source in settings.corpus.data)
    del model
    gc.collect()
    return {"label": label, **perplexity_report(name, data, settings.perplexity, results)}
