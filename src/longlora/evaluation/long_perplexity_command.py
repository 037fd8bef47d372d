"""`longlora eval longppl`: LongPPL of any models on the same documents, by themselves or by one evaluator."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from longlora.corpus.tokens import TokenizedCorpus, tokenize_corpus
from longlora.errors import UserError
from longlora.evaluation.loading import data_name, held_out, load_evaluated, same_tokens, stretching
from longlora.evaluation.long_perplexity import find_key_tokens, long_perplexity, with_lengths
from longlora.evaluation.results import (
    Document,
    Evaluated,
    data_fingerprint,
    evaluate_each,
    evaluated_models,
    keep,
    say_where_results_go,
    weights_fingerprint,
)
from longlora.evaluation.trials import TrialLog
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load_config, load_tokenizer
from longlora.settings import EvaluateLongPerplexitySettings, LongPerplexitySettings

logger = logging.getLogger(__name__)


def evaluate_long_perplexity(settings: EvaluateLongPerplexitySettings) -> Document:
    """Run `longlora eval longppl`.

    Returns:
        For one model `{"model", "label", "data", "evaluator", "short_context", "short_stride", "alpha", "beta", …,
        "results": [{"context", "longppl", "perplexity", "key_tokens", "tokens", "documents", "skipped_documents"}],
        "seconds"}`; for several, or with a baseline, as `longlora.evaluation.results.evaluate_each`. `evaluator` is
        null where each model judges for itself, `longppl` where no token is a key token.

    Raises:
        UserError: a model, document or length that does not fit, an evaluator with another tokenizer, or results that
            cannot be kept.
    """
    wanted = settings.long_perplexity
    lengths = with_lengths(replace(wanted, context=wanted.context or settings.extend_to), _configs(settings))
    evaluator = _Evaluator(settings, lengths) if settings.evaluator else None

    def evaluate(model: Evaluated, file: Path | None) -> Document:
        return _evaluate(model.name, file, model.settings(settings), lengths, evaluator)

    return evaluate_each("longppl", settings, evaluate, long_perplexity_table)


def long_perplexity_table(documents: Sequence[Document]) -> str:
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
    trust = settings.loading.trust_remote_code
    places = [(model.name, model.settings(settings).loading.revision) for model in evaluated_models(settings)]
    places += [(settings.evaluator, settings.loading.revision)] if settings.evaluator else []
    return [load_config(name, trust_remote_code=trust, revision=revision) for name, revision in places]


class _Evaluator:
    """The model that says which tokens are key tokens; it is asked once, for the first model."""

    def __init__(self, settings: EvaluateLongPerplexitySettings, lengths: LongPerplexitySettings) -> None:
        assert settings.evaluator is not None
        self.name, self.settings, self.lengths = settings.evaluator, replace(settings, extend_to=None), lengths
        self.weights = weights_fingerprint(self.name, settings.loading.revision)
        self._found: tuple[list[np.ndarray], TokenizedCorpus] | None = None

    def keys(self, name: str, corpus: TokenizedCorpus, log: TrialLog) -> list[np.ndarray]:
        """The key tokens of `corpus`, the documents as the model `name` reads them; `log` keeps them as they come.

        Raises:
            UserError: the evaluator reads other tokens.
        """
        if self._found is None:
            model, tokenizer, _ = load_evaluated(self.name, self.settings)
            read = tokenize_corpus(tokenizer, self.settings.corpus, held_out=held_out(self.settings.corpus))
            self._refuse_other_tokens(name, corpus, read)
            logger.info("key tokens by %s", self.name)
            self._found = find_key_tokens(model, read, self.lengths, log=log), read
            del model
            gc.collect()
        keys, read = self._found
        self._refuse_other_tokens(name, corpus, read)
        return keys

    def _refuse_other_tokens(self, name: str, corpus: TokenizedCorpus, read: TokenizedCorpus) -> None:
        if not same_tokens(corpus, read):
            raise UserError(
                f"--evaluator {self.name} has another tokenizer than '{name}', so its key tokens are not this "
                "model's tokens: give an evaluator of the same family, or none to let each model judge for itself."
            )


def _evaluate(
    name: str,
    file: Path | None,
    settings: EvaluateLongPerplexitySettings,
    lengths: LongPerplexitySettings,
    evaluator: _Evaluator | None,
) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    loading = settings.loading
    tokenizer = load_tokenizer(name, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
    corpus = tokenize_corpus(tokenizer, settings.corpus, held_out=held_out(settings.corpus))
    about = {
        "task": "longppl",
        "model": name,
        **stretching(settings),
        "data": data_name(settings.corpus),
        "data_fingerprint": data_fingerprint(corpus),
        "evaluator": settings.evaluator,
        "short_context": lengths.short_context,
        "short_stride": lengths.short_stride,
        "alpha": lengths.alpha,
        "beta": lengths.beta,
        "max_documents": lengths.max_documents,
    }
    only_the_log = {
        "context": lengths.context,
        "dtype": settings.dtype,
        "weights": weights_fingerprint(name, loading.revision),
        "evaluator_weights": evaluator.weights if evaluator else None,
    }
    with TrialLog.opened(file, {**about, **only_the_log}, settings.resume) as log:
        say_where_results_go(file, "piece", len(log.records))
        keys = evaluator.keys(name, corpus, log) if evaluator else None
        model, _, label = load_evaluated(name, settings)
        logger.info("LongPPL of %s", label)
        result = long_perplexity(model, corpus, lengths, keys, log=log)
        document = {
            **about,
            "label": label,
            "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
            "results": [result.to_dict()],
            "seconds": round(sum(record["seconds"] for record in log.records.values()), 1),
        }
        return keep(document, file)
