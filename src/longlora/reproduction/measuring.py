"""What is measured on the trained model of a cell, always with the model's full attention."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from longlora.evaluation.copying import perplexity_by_distance, recall
from longlora.evaluation.perplexity import perplexity
from longlora.model.loading import load_config
from longlora.model.positions import original_context
from longlora.settings import ExtendSettings, PerplexitySettings
from longlora.training.extension import Data

DOCUMENTS = 3
"""Held-out documents that perplexity is measured on: the first that are as long as the context."""

PASSAGES = 48
"""Repeated passages a distance."""


def contexts(original: int, context: int) -> tuple[int, ...]:
    """The original window and its doublings up to the target context, in tokens."""
    doublings = range(max(1, (context - 1) // original).bit_length())
    return *(original << doubling for doubling in doublings), context


def perplexities(model: Any, documents: Sequence[np.ndarray], tested: Sequence[int], longest: int) -> dict[str, float]:
    """Perplexity by context in tokens, all on the same documents, windows sliding by half of the context."""
    found = {}
    for context in tested:
        settings = PerplexitySettings(
            contexts=(context,), stride=max(1, context // 2), max_documents=DOCUMENTS, min_document_tokens=longest
        )
        found[str(context)] = perplexity(model, documents, settings, progress=False)[0].perplexity
    return found


def quality_and_reach(model: Any, data: Data, settings: ExtendSettings) -> dict[str, Any]:
    """Perplexity by context; at the target context by the distance of the nearest copy; recall of repeated passages.

    Returns:
        `{"perplexity": {context: …}, "by_distance": […], "recall": […]}`, the last two as
        `longlora.evaluation.copying` has them.
    """
    context = settings.positions.context
    group = context // 4
    long_enough = [ids for ids in data.held_out if len(ids) >= context][:DOCUMENTS]
    *shorter, _ = contexts(original_context(load_config(settings.model)), context)
    edges = [group // 2, group, 2 * group]
    by_distance = perplexity_by_distance(model, long_enough, context, context // 4, edges)
    at_target = sum(sort.nll for sort in by_distance) / sum(sort.tokens for sort in by_distance)
    distances = [group * quarters // 4 for quarters in (3, 6, 10, 13)]
    recalled = recall(model, data.held_out, distances, PASSAGES, settings.training.seed, context)
    return {
        "perplexity": perplexities(model, data.held_out, shorter, context) | {str(context): math.exp(at_target)},
        "by_distance": [sort.to_dict() for sort in by_distance],
        "recall": [found.to_dict() for found in recalled],
    }
