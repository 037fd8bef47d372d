"""Does the model find what it has read, and from how far? Two measures that need no instruction-following.

*Copies in real text.* Where the last `n` tokens, the one to be predicted among them, already stood together earlier in
the document, the token could have been copied. The nearest such place is where the model could first find it; its
distance sorts the tokens, and the perplexity of each sort says what that distance is worth:

    distance   ...the_default_factory ........ 1,800 tokens ........ the_default_fac|tory
                                                                                     ^ counted under 1,024 - 2,047

*Repeated passages.* Passages that the model has not seen (`#`, `%`), other text (`.`), then the passages again: the
share of their tokens that the model ranks first the second time, by the distance between the two, is retrieval that
every language model can show, whatever it was trained on. A passage's first tokens are the cue and are not counted.

    ####..%%%%.................####..%%%%
    |------- distance ---------|
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from longlora.errors import UserError
from longlora.evaluation.perplexity import evaluating, losses_from
from longlora.evaluation.windows import windows

CUE = 16
"""Tokens of a repeated passage that tell the model which passage it is."""

PASSAGE = 48
"""Tokens of a repeated passage, the cue among them."""

SPACING = 2 * PASSAGE
"""Tokens from the start of a passage to the start of the next one in a row."""

PASSAGES_A_ROW = 8
"""Most passages that one row tries at once."""


@dataclass(frozen=True, kw_only=True)
class DistancePerplexity:
    """Perplexity of the tokens whose nearest copy begins to be found between two distances."""

    nearest: int
    """Least distance in tokens; 0 for tokens of which no earlier copy is in the window."""

    farthest: int | None
    """The distance it stays below; None: no limit."""

    perplexity: float | None
    """exp(nll); None where there is no such token."""

    nll: float
    """Summed negative log-likelihood, in nats."""

    tokens: int
    """Tokens scored."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """How much of a passage comes back when it is met again."""

    distance: int
    """Tokens from a token of the passage to the same one of its repetition."""

    accuracy: float
    """Share of the tokens after the cue that the model ranks first."""

    trials: int
    """Passages tried."""


def copy_distances(ids: np.ndarray, n: int) -> np.ndarray:
    """(N,) tokens back to the nearest earlier place where the `n` tokens up to and with this one stood; 0 for none.

    >>> copy_distances(np.array([7, 1, 2, 3, 9, 1, 2, 3]), 3)
    array([0, 0, 0, 0, 0, 0, 0, 4])
    """
    found = np.zeros(len(ids), dtype=np.int64)
    last: dict[bytes, int] = {}
    ids = np.ascontiguousarray(ids)
    for at in range(n - 1, len(ids)):
        gram = ids[at - n + 1 : at + 1].tobytes()
        found[at] = at - last.get(gram, at)
        last[gram] = at
    return found


def perplexity_by_distance(
    model: nn.Module,
    documents: Sequence[np.ndarray],
    context: int,
    stride: int,
    edges: Sequence[int],
    n: int = 8,
) -> list[DistancePerplexity]:
    """Perplexity at `context`, each token counted under the distance of its nearest copy.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        documents: token ids (n,) of each document, `context` tokens or more each.
        context: tokens of a window.
        stride: tokens the window slides by; each token is scored once, with at least context - stride before it.
        edges: rising distances in tokens at which a new sort begins.
        n: tokens that must agree.

    Returns:
        First the tokens without a copy in their window, then one sort for each of `[1, edges[0])`, `[edges[0],
        edges[1])`, … and `[edges[-1], …)`.
    """
    bounds = [1, *edges]
    sums, counts = np.zeros(len(bounds) + 1), np.zeros(len(bounds) + 1, dtype=np.int64)
    with evaluating(model):
        for ids in documents:
            distances = copy_distances(ids, n)
            for begin, end, first in windows(len(ids), context, stride, "last"):
                scored = losses_from(model, ids[None, begin:end], first)[0].double().cpu().numpy()
                places = np.arange(begin + first, end)
                # the whole n-gram must stand in the window for the model to have read it
                readable = places - distances[places] - (n - 1) >= begin
                sort = np.searchsorted(bounds, np.where(readable, distances[places], 0), side="right")
                np.add.at(sums, sort, scored)
                np.add.at(counts, sort, 1)
    limits: list[tuple[int, int | None]] = [(0, 1), *zip(bounds, [*bounds[1:], None], strict=True)]
    return [
        DistancePerplexity(
            nearest=nearest,
            farthest=farthest,
            perplexity=math.exp(total / count) if count else None,
            nll=float(total),
            tokens=int(count),
        )
        for (nearest, farthest), total, count in zip(limits, sums, counts, strict=True)
    ]


def repeated_passages(
    documents: Sequence[np.ndarray], distance: int, trials: int, seed: int, context: int
) -> list[tuple[np.ndarray, list[int]]]:
    """Rows that together repeat `trials` passages, each `distance` tokens later.

    Returns:
        For each row its tokens (n,), at most `context`, and where the repetitions begin.

    Raises:
        UserError: a repetition does not fit `context`, or no document is long enough.
    """
    if not PASSAGE <= distance <= context - PASSAGE:
        raise UserError(
            f"distance {distance:,}: it must be from {PASSAGE} to {context - PASSAGE:,} tokens, so that the passage "
            f"of {PASSAGE} tokens and its repetition fit the context of {context:,}."
        )
    most = max(1, min(PASSAGES_A_ROW, distance // SPACING, (context - distance) // SPACING))
    generator = random.Random(f"{seed}/{distance}")
    rows = []
    while trials:
        count = min(most, trials)
        trials -= count
        length = distance + (count - 1) * SPACING + PASSAGE
        long_enough = [ids for ids in documents if len(ids) >= length]
        if not long_enough:
            raise UserError(
                f"no document has the {length:,} tokens that a repetition after {distance:,} tokens asks for: give "
                "longer documents or a shorter distance."
            )
        text = generator.choice(long_enough)
        start = generator.randrange(len(text) - length + 1)
        row = text[start : start + length].copy()
        begins = [distance + place * SPACING for place in range(count)]
        for begin in begins:
            source = generator.choice([ids for ids in documents if len(ids) >= PASSAGE])
            at = generator.randrange(len(source) - PASSAGE + 1)
            for where in (begin - distance, begin):
                row[where : where + PASSAGE] = source[at : at + PASSAGE]
        rows.append((row, begins))
    return rows


def recall(
    model: nn.Module, documents: Sequence[np.ndarray], distances: Sequence[int], trials: int, seed: int, context: int
) -> list[Recall]:
    """Share of repeated passages' tokens after their cue that `model` ranks first, by distance.

    Each token is judged with the true ones before it, so this is what greedy decoding would copy as long as it is
    right. Several passages share a forward pass.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        documents: token ids (n,) of each document.
        distances: tokens from a passage to its repetition.
        trials: passages a distance.
        seed: of the choice of passages.
        context: the model's window in tokens.

    Raises:
        UserError: as `repeated_passages`.
    """
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for distance in distances:
            right = 0
            for row, begins in repeated_passages(documents, distance, trials, seed, context):
                input_ids = torch.from_numpy(row.astype(np.int64)).to(device)[None]
                logits = model(input_ids=input_ids, logits_to_keep=len(row) - begins[0], use_cache=False).logits[0]
                predicted = logits.argmax(-1)
                for begin in begins:
                    judged = slice(begin + CUE, begin + PASSAGE)
                    guesses = predicted[judged.start - 1 - begins[0] : judged.stop - 1 - begins[0]]
                    right += int((guesses == input_ids[0, judged]).sum())
            found.append(Recall(distance=distance, accuracy=right / (trials * (PASSAGE - CUE)), trials=trials))
    return found
