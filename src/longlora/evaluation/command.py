"""`longlora eval perplexity`: any models, any contexts, the same documents, one table."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longlora.corpus.encoding import beginning
from longlora.corpus.tokens import tokenize_corpus
from longlora.evaluation import statistics
from longlora.evaluation.loading import data_name, held_out, load_evaluated, stretching
from longlora.evaluation.perplexity import default_contexts, perplexity, perplexity_report
from longlora.evaluation.results import Document, data_fingerprint, evaluate_each, evaluated_models, trials_kept
from longlora.evaluation.statistics import Estimate
from longlora.evaluation.tables import result_table, shown, spread
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load_config
from longlora.model.positions import extend_positions
from longlora.settings import EvaluatePerplexitySettings

logger = logging.getLogger(__name__)


def evaluate_perplexity(settings: EvaluatePerplexitySettings) -> Document:
    """Run `longlora eval perplexity`.

    Returns:
        For one model `{"model", "label", "data", "stride", "score", "texts", …, "results": [{"context", "stride",
        "perplexity", "low", "high", "nll", "tokens", "tokens_read", "documents", "skipped_documents", "text",
        "document_nll", "document_tokens"}], "seconds"}`; for several, or with a baseline, as
        `longlora.evaluation.results.evaluate_each`.

    Raises:
        UserError: a model, document or context that does not fit, or results that cannot be kept.
    """
    return evaluate_each("perplexity", _with_contexts(settings), _evaluate, perplexity_table, perplexity_changes, "%")


def perplexity_table(documents: Sequence[Document]) -> str:
    """Perplexities and their 95% intervals for people: a line a model, a column a context."""
    first, results = documents[0], documents[0]["results"]
    stride = first["stride"] or "/".join(f"{r['stride']:,}" for r in results)
    tokens, counts, skipped = (
        spread([r[key] for r in results]) for key in ("tokens", "documents", "skipped_documents")
    )
    last = f", the last {first['last_tokens']:,} before the longest context is full" if first.get("last_tokens") else ""
    lines = [
        result_table(documents, "perplexity at", lambda result: shown(result, "perplexity", 2)),
        f"{first['data']}; stride {stride}, score {first['score']}; {tokens} tokens of {counts} documents, {skipped} "
        f"too short{last}",
    ]
    if len({r.get("text") for r in results}) > 1:
        lines.append("each context is scored on documents of its own: do not read its line as a curve")
    return "\n".join(lines)


def perplexity_changes(document: Mapping[str, Any], before: Mapping[str, Any]) -> dict[int, Estimate]:
    """By context, how far perplexity is from what it was, as a share; with an interval where the text is the same."""
    earlier = {result["context"]: result for result in before["results"]}
    found = {}
    for result in document["results"]:
        if other := earlier.get(result["context"]):
            found[result["context"]] = (
                statistics.perplexity_change(result["document_nll"], other["document_nll"], result["document_tokens"])
                if result["text"] == other["text"] and result["document_tokens"] == other["document_tokens"]
                else Estimate(result["perplexity"] / other["perplexity"] - 1, None, None)
            )
    return found


def _with_contexts(settings: EvaluatePerplexitySettings) -> EvaluatePerplexitySettings:
    """`settings` with the same contexts for all models, where none are given: those of the longest window."""
    models = evaluated_models(settings)
    if settings.perplexity.contexts or len(models) == 1:
        return settings
    found: list[tuple[int, ...]] = []
    for model in models:
        own = model.settings(settings)
        loading = own.loading
        config = load_config(model.name, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
        if own.extend_to:
            extend_positions(config, own.extend_to, own.method)
        found.append(default_contexts(config))
    longest = max(found, key=max)
    contexts = tuple(context for context in longest if context >= settings.perplexity.stride_at(context))
    return replace(settings, perplexity=replace(settings.perplexity, contexts=contexts or longest))


def _evaluate(name: str, settings: EvaluatePerplexitySettings, file: Path | None) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    model, tokenizer, label = load_evaluated(name, settings)
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    way, first = settings.perplexity, beginning(tokenizer)
    about = {
        "task": "perplexity",
        "label": label,
        **perplexity_report(name, data_name(settings.corpus), way, []),
        **stretching(settings),
        "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
        "data_fingerprint": data_fingerprint(corpus),
        "bos": bool(first) and way.score != "stream",
        "max_documents": way.max_documents,
        "min_document_tokens": way.min_document_tokens,
    }
    logger.info("perplexity of %s", label)
    with trials_kept(file, settings, about, "part", only_in_the_log={"stride": way.stride}) as log:
        results = perplexity(model, corpus, way, log=log, bos=first[0] if first else None)
        return {
            **about,
            **perplexity_report(name, about["data"], way, results),
            "seconds": round(sum(record["seconds"] for record in log.records.values()), 1),
        }
