"""`longlora eval longppl`: LongPPL of any models on the same documents, by themselves or by one evaluator."""

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from longlora.corpus.documents import read_documents
from longlora.corpus.tokens import reading_of
from longlora.evaluation.loading import data_name, held_out, load_evaluated, stretching
from longlora.evaluation.long_perplexity import Places, find_key_places, long_enough, long_perplexity, with_lengths
from longlora.evaluation.results import Document, evaluate_each, evaluated_models, trials_kept, weights_fingerprint
from longlora.evaluation.tables import shown
from longlora.evaluation.trials import TrialLog
from longlora.evaluation.windows import digest_of_texts
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load_config, load_tokenizer
from longlora.settings import EvaluateLongPerplexitySettings, LongPerplexitySettings
from longlora.tables import aligned

logger = logging.getLogger(__name__)


def evaluate_long_perplexity(settings: EvaluateLongPerplexitySettings) -> Document:
    """Run `longlora eval longppl`.

    Returns:
        For one model `{"model", "label", "data", "text", "evaluator", "short_context", "short_stride", "alpha", "beta",
        …, "results": [{"context", "longppl", "low", "high", "perplexity", "key_tokens", "tokens", "documents",
        "skipped_documents", "document_key_nll", "document_key_tokens"}], "seconds"}`; for several, or with a baseline,
        as `longlora.evaluation.results.evaluate_each`. `evaluator` is null where each model judges for itself,
        `longppl` where no token is a key token.

    Raises:
        UserError: a model, document or length that does not fit, a tokenizer that does not know where its tokens stand,
            or results that cannot be kept.
    """
    wanted = settings.long_perplexity
    lengths = with_lengths(replace(wanted, context=wanted.context or settings.extend_to), _configs(settings))
    return evaluate_each("longppl", settings, partial(_evaluate, _Judge(settings, lengths)), long_perplexity_table)


def long_perplexity_table(documents: Sequence[Document]) -> str:
    """LongPPL for people: a line a model."""
    first, result = documents[0], documents[0]["results"][0]
    grid = [["model", "LongPPL (95% interval)", "perplexity", "key tokens", "of all"]]
    for document in documents:
        row = document["results"][0]
        counts = [f"{row['key_tokens']:,}", f"{row['key_tokens'] / row['tokens']:.1%}"]
        grid.append([document["label"], shown(row, "longppl", 2), f"{row['perplexity']:.2f}", *counts])
    judge = f"chosen by {first['evaluator']}" if first["evaluator"] else "each model's own"
    if not first["evaluator"] and len(documents) > 1:
        judge += " (with --evaluator MODEL all are measured on the same ones)"
    return aligned(grid) + (
        f"\n{first['data']}; context {result['context']:,}, short context {first['short_context']:,} to "
        f"{first['short_context'] + first['short_stride'] - 1:,}; {result['tokens']:,} tokens of "
        f"{result['documents']:,} documents, {result['skipped_documents']:,} too short; key tokens {judge}"
    )


def _configs(settings: EvaluateLongPerplexitySettings) -> list[PreTrainedConfig]:
    """The configs of all models, the evaluator's among them, as they will be when they are loaded."""
    trust = settings.loading.trust_remote_code
    places = [(model.name, model.settings(settings).loading.revision) for model in evaluated_models(settings)]
    places += [(settings.evaluator, settings.loading.revision)] if settings.evaluator else []
    return [load_config(name, trust_remote_code=trust, revision=revision) for name, revision in places]


class _Judge:
    """Reads the documents, and says where their key tokens stand; an evaluator is asked once, for the first model."""

    def __init__(self, settings: EvaluateLongPerplexitySettings, lengths: LongPerplexitySettings) -> None:
        self.settings, self.lengths = settings, lengths
        self._found: tuple[list[str], int, list[Places]] | None = None

    def texts(self, name: str) -> tuple[list[str], int]:
        """The texts that are as long as the context to the evaluator, or else to the model `name`."""
        if self._found is not None:
            return self._found[:2]
        loading, corpus = self.settings.loading, self.settings.corpus
        judge = self.settings.evaluator or name
        tokenizer = load_tokenizer(judge, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
        documents = read_documents(corpus.data, reading_of(corpus, held_out(corpus)))
        return long_enough((document.text for document in documents), tokenizer, self.lengths)

    def places(self, texts: list[str], skipped: int, log: TrialLog) -> list[Places]:
        """Where the evaluator's key tokens stand."""
        assert self.settings.evaluator is not None
        if self._found is None:
            logger.info("key tokens by %s", self.settings.evaluator)
            model, tokenizer, _ = load_evaluated(self.settings.evaluator, replace(self.settings, extend_to=None))
            self._found = texts, skipped, find_key_places(model, tokenizer, texts, self.lengths, log=log)
            del model
            gc.collect()
        return self._found[2]


def _evaluate(judge: _Judge, name: str, settings: EvaluateLongPerplexitySettings, file: Path | None) -> Document:
    """The results document of one model, which goes beside its log `file`."""
    lengths, (texts, skipped) = judge.lengths, judge.texts(name)
    about = {
        "task": "longppl",
        "model": name,
        **stretching(settings),
        "data": data_name(settings.corpus),
        "data_fingerprint": digest_of_texts(texts),
        "evaluator": settings.evaluator,
        "short_context": lengths.short_context,
        "short_stride": lengths.short_stride,
        "alpha": lengths.alpha,
        "beta": lengths.beta,
        "max_documents": lengths.max_documents,
    }
    judging = weights_fingerprint(settings.evaluator, settings.loading.revision) if settings.evaluator else None
    only_in_the_log = {"context": lengths.context, "dtype": settings.dtype, "evaluator_weights": judging}
    with trials_kept(file, settings, about, "document", None, only_in_the_log) as log:
        places = judge.places(texts, skipped, log) if settings.evaluator else None
        model, tokenizer, label = load_evaluated(name, settings)
        logger.info("LongPPL of %s", label)
        if places is None:
            places = find_key_places(model, tokenizer, texts, lengths, log=log)
        result = long_perplexity(model, tokenizer, texts, places, lengths, log=log)
        return {
            **about,
            "label": label,
            "dtype": str(unwrapped(model).dtype).removeprefix("torch."),
            "results": [asdict(result) | {"skipped_documents": skipped}],
            "seconds": round(sum(record["seconds"] for record in log.records.values()), 1),
        }
