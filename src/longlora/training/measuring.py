"""What `longlora extend` measures of a model on the way: perplexity before, stretched and after, within a budget."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from longlora import ranks
from longlora.corpus.packing import PackedRows
from longlora.evaluation.budget import Affordable, affordable
from longlora.evaluation.perplexity import default_contexts, perplexity, perplexity_report
from longlora.evaluation.trials import TrialLog
from longlora.model.positions import extend_positions
from longlora.run_directory import RunDirectory
from longlora.settings import ExtendSettings, PerplexitySettings

logger = logging.getLogger(__name__)

MEASUREMENTS = 3
"""The base, the base with its positions stretched, and the trained model."""


@dataclass(frozen=True)
class Data:
    """What a run reads: rows to train on and held-out documents to measure on (empty when there are none)."""

    rows: PackedRows
    held_out: Sequence[np.ndarray]
    """Token ids (n,) of each document."""
    held_out_name: str
    content: Mapping[str, Mapping[str, Any]]
    """What `RunDirectory.recognise` knows the text by."""
    bos: int | None = None
    """The token that the tokenizer puts before a text, which then heads each window that is measured."""


def what_to_measure(settings: ExtendSettings, model: PreTrainedModel, data: Data) -> Affordable | None:
    """The contexts to measure, all on the same documents: those long enough for the longest of them, within budget."""
    if not data.held_out or settings.evaluation_tokens == 0:
        return None
    contexts: Sequence[int] = settings.perplexity.contexts
    if not contexts:
        extended = type(model.config).from_dict(model.config.to_dict())
        extend_positions(extended, settings.positions.context, settings.positions.method)
        contexts = default_contexts(extended)
    longest = max(len(ids) for ids in data.held_out)
    reachable = tuple(context for context in contexts if context <= longest)
    if len(reachable) < len(contexts):
        logger.info("the longest held-out document has %s tokens: contexts above that are not measured", f"{longest:,}")
    if not reachable:
        return None
    found = affordable(
        [len(ids) for ids in data.held_out],
        replace(settings.perplexity, contexts=reachable),
        settings.tokens_to_evaluate() // MEASUREMENTS,
    )
    logger.info(
        "measuring %s held-out documents%s before, stretched and after, %s tokens each time (--evaluation-tokens)",
        f"{found.ways[0].max_documents:,}",
        f", the first {found.document_tokens:,} tokens of each," if found.document_tokens else "",
        f"{found.tokens_read:,}",
    )
    return found


def measure(
    run: RunDirectory,
    name: str,
    label: str,
    model: Any,
    settings: ExtendSettings,
    data: Data,
    ways: Sequence[PerplexitySettings],
    order: int,
) -> dict[str, Any]:
    """Perplexity of `model` on the held-out documents, kept as `evaluation/perplexity-NAME.json` for a resumed run; on
    the way there in a log of that name, so that a run that is killed goes on there.

    Args:
        ways: contexts with their stride; where there are several, each result says its own stride.
        order: place of this line in tables and charts.
    """
    file = f"perplexity-{name}"
    known = known_before(run, file, settings.training.resume and name != "trained")
    if known:
        return known
    ranks.join()
    logger.info("perplexity of %s", label)
    about = {"ways": [asdict(way) for way in ways], "steps": settings.training.steps if name == "trained" else 0}
    log_file = run.evaluation / f"{file}.jsonl"
    with TrialLog.opened(log_file, about, resume=True, drop_others=True) as log:
        results = [result for way in ways for result in perplexity(model, data.held_out, way, log=log, bos=data.bos)]
    document = {
        "label": label,
        "order": order,
        **perplexity_report(settings.model, data.held_out_name, ways[0], results),
    }
    logger.info("  %s", "  ".join(f"{r.context:,}: {r.perplexity:.2f}" for r in results))
    run.write_evaluation(file, document)
    return document


def known_before(run: RunDirectory, file: str, wanted: bool) -> dict[str, Any] | None:
    """What a resumed run has measured already; what training changes never is, for more steps may have been given."""
    return ranks.first_alone(lambda: run.read_evaluation(file)) if wanted else None
