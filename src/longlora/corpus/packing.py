"""Documents packed into rows of `context` tokens: joined and cut as in the paper, or kept apart within a row."""

import logging
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longlora.corpus.skipping import skipped_positions
from longlora.corpus.tokens import TokenizedCorpus
from longlora.errors import UserError, check_choice
from longlora.settings import PACKINGS

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label that carries no loss."""


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of `context` tokens gathered on demand from the tokens on disk; made by `pack`.

    A row is a list of segments, each a stretch of one document. In memory are two int64 a segment and one a row.
    """

    def __init__(
        self,
        corpus: TokenizedCorpus,
        context: int,
        isolated: bool,
        starts: np.ndarray,
        lengths: np.ndarray,
        bounds: np.ndarray,
        document_lengths: np.ndarray,
    ) -> None:
        """
        Args:
            corpus: where the tokens are.
            context: tokens a row.
            isolated: whether segments are documents to be kept apart.
            starts: (segments,) first token of each segment in `corpus.tokens`.
            lengths: (segments,) tokens.
            bounds: (rows + 1,): row i is made of segments bounds[i] … bounds[i + 1] - 1.
            document_lengths: (documents,) tokens of each document that was to be packed.
        """
        self.corpus, self.context, self.isolated = corpus, context, isolated
        self.starts, self.lengths, self.bounds = starts, lengths, bounds
        self.document_lengths = document_lengths
        self.dropped_tokens = int(document_lengths.sum() - lengths.sum())
        self._reach: int | None = None
        self._seed = 0

    def skip_positions(self, context: int, seed: int) -> None:
        """Let the positions of each row skip, so that they reach over `context` tokens (`longlora.corpus.skipping`)."""
        assert not self.isolated, "documents kept apart have positions of their own"
        self._reach, self._seed = context, seed

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Row `index`: `input_ids` and `labels`, (context,) int64; isolated also `position_ids` and `attention_mask`,
        and with skipping positions `position_ids`.

        Raises:
            IndexError: there is no such row.
        """
        index = range(len(self))[index]
        input_ids = np.zeros(self.context, dtype=np.int64)
        labels = np.full(self.context, IGNORED, dtype=np.int64)
        positions = np.empty(self.context, dtype=np.int64)
        at = 0
        for segment in range(self.bounds[index], self.bounds[index + 1]):
            start, length = self.starts[segment], self.lengths[segment]
            end = at + length
            input_ids[at:end] = self.corpus.tokens[start : start + length]
            unscored = 1 if self.isolated else 0
            labels[at + unscored : end] = input_ids[at + unscored : end]
            positions[at:end] = np.arange(length)
            at = end
        row = {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}
        if self.isolated:
            positions[at:] = np.arange(self.context - at)
            row["position_ids"] = torch.from_numpy(positions)
            row["attention_mask"] = (torch.arange(self.context) < at).long()
        if self._reach is not None:
            skipped = skipped_positions(self.context, self._reach, f"{self._seed}/{index}")
            row["position_ids"] = torch.from_numpy(skipped)
        return row


def pack(
    corpus: TokenizedCorpus,
    *,
    context: int,
    packing: str = "concatenate",
    prefer_long: bool = False,
    mix: Mapping[str, float] | None = None,
    seed: int = 0,
    documents: np.ndarray | None = None,
    together: bool = True,
) -> PackedRows:
    """Rows of `context` tokens from `corpus`, in an order shuffled with `seed`.

    Three documents `aaaaaaa`, `bbb` and `cc` at a context of 5 (`·` is padding, `x` a label of -100):

        concatenate, in the shuffled order b a c    isolate
        b b b a a | a a a a a | c c                 input_ids     a a a a a | b b b a a | c c · · ·
        row 0       row 1       dropped             labels        x a a a a | x b b x a | x c x x x
                                                    position_ids  0 1 2 3 4 | 0 1 2 0 1 | 0 1 0 1 2
                                                    attention     1 1 1 1 1 | 1 1 1 1 1 | 1 1 0 0 0

    - `concatenate` (the paper): documents joined in a random order and cut; attention and loss cross their borders;
      the last, incomplete row is dropped.
    - `isolate`: a document longer than the context is cut into pieces, pieces are put together by best-fit
      decreasing, and no loss crosses from one to the next. Positions begin again with each piece, and with the
      padding, so that a backend that tells documents apart by their positions needs no mask. A piece of a single
      token has nothing to predict and is dropped. With `together` off each piece has a row of its own.

    Only the documents whose indices `documents` lists are packed, by default all.

    Rows are shuffled too, so that consecutive rows come from different documents even when read in order. With
    `prefer_long` the rows made of documents of at least `context` tokens stand first and the others follow, each part
    shuffled by itself: then the rows must be read in order for the preference to have an effect.

    `mix` gives shares of the rows, by `long` and `short` documents (of at least `context` tokens, and the others) or by
    source (the beginning of a document's name): each kind is packed by itself, and its rows are spread evenly, so that
    rows read in order keep the shares at every step. Rows are dropped from where one of the kinds runs out.

    Raises:
        UserError: `context` or `packing` is not allowed, there are too few tokens for a row, or `prefer_long` is
            asked for and no document has `context` tokens, or a kind of `mix` has no row.
    """
    check_choice("--packing", packing, PACKINGS)
    if context < 2:
        raise UserError(f"--context is {context}: a row needs at least 2 tokens, one to see and one to predict.")
    lengths = np.diff(corpus.offsets)
    order = np.random.default_rng(seed).permutation(len(corpus) if documents is None else documents)
    is_long = lengths[order] >= context
    if prefer_long and not is_long.any():
        raise UserError(
            f"--prefer-long has no effect: none of the {len(order):,} documents has {context:,} tokens, "
            f"the longest has {lengths.max(initial=0):,}. Leave it out, or give longer documents."
        )
    cut = partial(_isolate, together=together) if packing == "isolate" else _concatenate
    rows_of = partial(cut, corpus, context)
    generator = np.random.default_rng([seed, 1])
    if mix:
        kinds = (
            {"long": is_long, "short": ~is_long} if set(mix) == {"long", "short"} else _by_source(corpus, order, mix)
        )
        rows = _spread({name: rows_of([order[kinds[name]]], generator) for name in mix}, mix)
    else:
        rows = rows_of([order[is_long], order[~is_long]] if prefer_long else [order], generator)
    facts = describe(rows)
    if not len(rows):
        raise UserError(
            f"the data has {facts['tokens']:,} tokens in {facts['documents']:,} documents, not enough for one row of "
            f"{context:,} tokens with --packing {packing}: give more or longer documents with --data, "
            "or a smaller --context."
        )
    logger.info(
        "%s rows of %s tokens from %s documents (%s of at least that length), %s tokens dropped, %.1f%% padding",
        *(f"{each:,}" for each in (len(rows), context, facts["documents"], facts["long_documents"])),
        f"{rows.dropped_tokens:,}",
        100 * facts["padding_share"],
    )
    return rows


def describe(rows: PackedRows) -> dict[str, Any]:
    """What was packed, for a log or a report.

    Returns:
        `documents`, `long_documents` (those of at least the context) and `tokens` that were to be packed; `rows`;
        `dropped_tokens`, which are in no row; `padding_share`, the part of all row places that is padding, 0 to 1.
    """
    places = len(rows) * rows.context
    return {
        "documents": len(rows.document_lengths),
        "long_documents": int((rows.document_lengths >= rows.context).sum()),
        "tokens": int(rows.document_lengths.sum()),
        "rows": len(rows),
        "dropped_tokens": rows.dropped_tokens,
        "padding_share": 1 - int(rows.lengths.sum()) / places if places else 0.0,
    }


def _concatenate(
    corpus: TokenizedCorpus, context: int, parts: list[np.ndarray], generator: np.random.Generator
) -> PackedRows:
    order = np.concatenate(parts)
    lengths = np.diff(corpus.offsets)[order]
    order, lengths = order[lengths > 0], lengths[lengths > 0]
    ends = np.cumsum(lengths)  # in the joined stream
    rows = int(lengths.sum()) // context
    row_starts = np.arange(rows) * context
    begins = ends - lengths
    segment_begins = np.union1d(row_starts, begins[begins < rows * context])
    document = np.searchsorted(ends, segment_begins, side="right")
    starts = corpus.offsets[order[document]] + segment_begins - begins[document]
    segment_lengths = np.diff(segment_begins, append=rows * context)
    bounds = np.append(np.searchsorted(segment_begins, row_starts), len(segment_begins))

    # The row across the border between long and other documents counts with the others.
    first = int(np.diff(corpus.offsets)[parts[0]].sum()) // context if len(parts) > 1 else rows
    new_order = np.concatenate([generator.permutation(first), first + generator.permutation(rows - first)])
    segments, bounds = _reorder(bounds, new_order)
    return PackedRows(corpus, context, False, starts[segments], segment_lengths[segments], bounds, lengths)


def _isolate(
    corpus: TokenizedCorpus,
    context: int,
    parts: list[np.ndarray],
    generator: np.random.Generator,
    together: bool = True,
) -> PackedRows:
    starts, lengths, rows_of_pieces, rows = [], [], [], 0
    for part in parts:
        part_starts, part_lengths = _pieces(corpus, part, context)
        row_of_piece = best_fit_decreasing(part_lengths, context) if together else np.arange(len(part_lengths))
        part_rows = int(row_of_piece.max(initial=-1)) + 1
        starts.append(part_starts)
        lengths.append(part_lengths)
        rows_of_pieces.append(rows + generator.permutation(part_rows)[row_of_piece])
        rows += part_rows
    row = np.concatenate(rows_of_pieces)
    by_row = np.argsort(row, kind="stable")
    segment_starts, segment_lengths = np.concatenate(starts)[by_row], np.concatenate(lengths)[by_row]
    bounds = np.searchsorted(row[by_row], np.arange(rows + 1))
    document_lengths = np.diff(corpus.offsets)[np.concatenate(parts)]
    return PackedRows(corpus, context, True, segment_starts, segment_lengths, bounds, document_lengths)


def _by_source(corpus: TokenizedCorpus, order: np.ndarray, sources: Iterable[str]) -> dict[str, np.ndarray]:
    """For each of `sources`, which of the documents `order` it holds: the longest source that begins their name."""
    longest_first = sorted(sources, key=len, reverse=True)
    found = np.array([next((s for s in longest_first if corpus.names[i].startswith(s)), "") for i in order.tolist()])
    return {source: found == source for source in longest_first}


def _spread(kinds: Mapping[str, PackedRows], shares: Mapping[str, float]) -> PackedRows:
    """The rows of several kinds, each spread evenly over the whole, as many as keep the shares.

    Row j of a kind with share s is due at (j + 1/2) / s: up to any time t about s · t rows of it are due.
    """
    for name, rows in kinds.items():
        if not len(rows):
            raise UserError(
                f"--mix wants {shares[name]:.0%} of the rows from '{name}', and its documents fill no row of "
                f"{rows.context:,} tokens: give more of them with --data, or a smaller --context."
            )
    parts = list(kinds.values())
    due = np.concatenate([(np.arange(len(rows)) + 0.5) / shares[name] for name, rows in kinds.items()])
    first_runs_out = min(len(rows) / shares[name] for name, rows in kinds.items())
    order = np.argsort(due, kind="stable")
    row_lengths = np.concatenate([np.diff(rows.bounds) for rows in parts])
    segments, bounds = _reorder(np.append(0, np.cumsum(row_lengths)), order[due[order] < first_runs_out])
    return PackedRows(
        parts[0].corpus,
        parts[0].context,
        parts[0].isolated,
        np.concatenate([rows.starts for rows in parts])[segments],
        np.concatenate([rows.lengths for rows in parts])[segments],
        bounds,
        np.concatenate([rows.document_lengths for rows in parts]),
    )


def _pieces(corpus: TokenizedCorpus, documents: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the documents cut into pieces of `context`, without pieces of a single token."""
    document_lengths = np.diff(corpus.offsets)[documents]
    counts = -(-document_lengths // context)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(corpus.offsets[documents], counts) + within * context
    lengths = np.minimum(np.repeat(document_lengths, counts) - within * context, context)
    kept = lengths > 1
    return starts[kept], lengths[kept]


def best_fit_decreasing(lengths: np.ndarray, context: int) -> np.ndarray:
    """The row of each piece: longest pieces first, each into the fullest row that still holds it, else a new row.

    Pieces of one length are placed together, as many into a row as it holds, so the loop runs once a row and length
    rather than once a piece; the rows come out as from placing them one by one.
    """
    row_of_piece = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    open_rows: dict[int, list[int]] = {}  # free places -> rows
    free_sizes: list[int] = []  # the keys of open_rows, sorted
    rows = placed = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        while count:
            fit = bisect_left(free_sizes, length)
            if fit < len(free_sizes):
                free = free_sizes[fit]
                row = open_rows[free].pop()
                if not open_rows[free]:
                    del open_rows[free], free_sizes[fit]
            else:
                free, row = context, rows
                rows += 1
            taken = min(free // length, count)
            row_of_piece[by_length[placed : placed + taken]] = row
            placed += taken
            count -= taken
            free -= taken * length
            if free > 1:  # no piece is shorter than two tokens
                if free not in open_rows:
                    open_rows[free] = []
                    insort(free_sizes, free)
                open_rows[free].append(row)
    return row_of_piece


def _reorder(bounds: np.ndarray, new_order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which segments to take, and the new bounds, to put the rows of `bounds` into `new_order`."""
    counts = np.diff(bounds)[new_order]
    new_bounds = np.append(0, np.cumsum(counts))
    segments = np.arange(new_bounds[-1]) + np.repeat(bounds[new_order] - new_bounds[:-1], counts)
    return segments, new_bounds
