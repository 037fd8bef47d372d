"""`longlora eval perplexity`: any models, any contexts, the same documents, one table."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlora.corpus.tokens import tokenize_corpus
from longlora.evaluation.loading import data_name, held_out, load_evaluated, stretching
from longlora.evaluation.perplexity import perplexity, perplexity_report
from longlora.evaluation.results import (
    Document,
    Evaluated,
    change_lines,
    data_fingerprint,
    evaluate_each,
    keep,
    say_where_results_go,
    weights_fingerprint,
)
from longlora.evaluation.trials import TrialLog
from longlora.model.lm_head import unwrapped
from longlora.settings import EvaluatePerplexitySettings

logger = logging.getLogger(__name__)


def evaluate_perplexity(settings: EvaluatePerplexitySettings) -> Document:
    """Run `longlora eval perplexity`.

    Returns:
        For one model `{"model", "label", "data", "stride", "score", …, "results": [{"context", "perplexity", "nll",
        "tokens", "documents", "skipped_documents"}], "seconds"}`; for several, or with a baseline, as
        `longlora.evaluation.results.evaluate_each`.

    Raises:
        UserError: a model, document or context that does not fit, or results that cannot be kept.
    """

    def evaluate(model: Evaluated, file: Path | None) -> Document:
        return _evaluate(model.name, file, model.settings(settings))

    def table(documents: Sequence[Document]) -> str:
        changes = change_lines(documents, _by_context, relative=True) if settings.baseline else []
        return "\n".join([perplexity_table(documents), *changes])

    return evaluate_each("perplexity", settings, evaluate, table)


def perplexity_table(documents: Sequence[Document]) -> str:
    """Perplexities for people: a line a model, a column a context."""
    contexts = sorted({result["context"] for document in documents for result in document["results"]})
    names = [document.get("label") or document["model"] for document in documents]
    width = max(len("perplexity at"), *(len(name) for name in names))
    lines = [f"{'perplexity at':<{width}}" + "".join(f"{context:>10,}" for context in contexts)]
    for name, document in zip(names, documents, strict=True):
        found = _by_context(document)
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


def _by_context(document: Mapping[str, Any]) -> dict[int, float]:
    return {result["context"]: result["perplexity"] for result in document["results"]}


def _range(numbers: Iterable[int]) -> str:
    """`7`, or `5 to 9` where they differ."""
    found = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in dict.fromkeys((found[0], found[-1])))


def _evaluate(name: str, file: Path | None, settings: EvaluatePerplexitySettings) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    model, tokenizer, label = load_evaluated(name, settings)
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    way = settings.perplexity
    about = {
        "task": "perplexity",
        "label": label,
        **perplexity_report(name, data_name(settings.corpus), way, []),
        **stretching(settings),
        "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
        "data_fingerprint": data_fingerprint(corpus),
        "max_documents": way.max_documents,
        "min_document_tokens": way.min_document_tokens,
    }
    weights = weights_fingerprint(name, settings.loading.revision)
    logger.info("perplexity of %s", label)
    with TrialLog.opened(file, {**about, "weights": weights}, settings.resume) as log:
        say_where_results_go(file, "part", len(log.records))
        results = perplexity(model, corpus, way, log=log)
        document = {
            **about,
            "results": [result.to_dict() for result in results],
            "seconds": round(sum(record["seconds"] for record in log.records.values()), 1),
        }
        return keep(document, file)
