"""Perplexity for so many forward tokens: strides first, then less of each document, then fewer documents.

Two windows of a document say as much about a model as a hundred overlapping ones, and many documents more than one, so
what is bought is documents: `longlora extend` measures within a tenth of what it trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longlora.evaluation.windows import windows
from longlora.settings import PerplexitySettings

ENOUGH_DOCUMENTS = 16
"""With as many documents, a smaller stride is worth more than further ones."""

FEWEST_DOCUMENTS = 2
"""Whatever the budget: one document alone has no interval."""


@dataclass(frozen=True)
class Affordable:
    """What to measure."""

    ways: tuple[PerplexitySettings, ...]
    """One for each context, all on the same documents."""
    document_tokens: int | None
    """Tokens to be read of each document's beginning; None for all."""
    tokens_read: int
    """Tokens of all forward passes."""


def affordable(lengths: Sequence[int], settings: PerplexitySettings, budget: int) -> Affordable:
    """The measurement of documents of `lengths` tokens that `budget` forward tokens buy.

    Args:
        lengths: of all documents.
        settings: with contexts; of its `stride` and `max_documents` what is given is kept.
        budget: tokens of forward passes over all contexts.
    """
    longest = max(settings.contexts)
    long_enough = [length for length in lengths if length >= max(longest, settings.min_document_tokens or 0)]
    long_enough = long_enough[: settings.max_documents]
    excerpt = max((1 if settings.last_tokens else 2) * longest, settings.min_document_tokens or 0)
    own = settings.stride != "auto" or settings.score == "stream" or settings.last_tokens is not None
    shares = (0,) if own else (8, 4, 2, 1)
    found: list[tuple[int, dict[int, int], list[int]]] = []
    for share in shares:
        strides = {
            context: max(settings.stride_at(context), min(context // share, context - 1) if share else 0)
            for context in settings.contexts
        }
        costs = [_cost(min(length, excerpt), strides, settings) for length in long_enough]
        bought, spent = 0, 0
        while bought < len(costs) and (bought < FEWEST_DOCUMENTS or spent + costs[bought] <= budget):
            spent += costs[bought]
            bought += 1
        found.append((spent, strides, long_enough[:bought]))
        if spent <= budget and bought >= min(ENOUGH_DOCUMENTS, len(long_enough)):
            break
    spent, strides, chosen = found[-1]
    whole = sum(_cost(length, strides, settings) for length in chosen)
    if whole <= budget and settings.last_tokens is None:
        spent, excerpt = whole, 0
    ways = tuple(
        replace(
            settings,
            contexts=(context,),
            stride=stride,
            max_documents=len(chosen),
            min_document_tokens=max(longest, settings.min_document_tokens or 0),
        )
        for context, stride in strides.items()
    )
    return Affordable(ways, excerpt or None, spent)


def _cost(tokens: int, strides: dict[int, int], settings: PerplexitySettings) -> int:
    """Forward tokens of a document of `tokens` tokens at all contexts."""
    return sum(
        window.end - window.begin
        for context, stride in strides.items()
        for window in windows(tokens, context, stride, settings.score, settings.last_tokens)
    )
