"""Files of pairs as examples to train on and to measure on: tokens with their answers marked, whole documents apart."""

import hashlib
import json
import logging
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np

from longlora.corpus.conversations import ConversationFormat, Example
from longlora.corpus.documents import NAMED
from longlora.corpus.tokens import TokenizedCorpus, tokenize_corpus
from longlora.errors import UserError
from longlora.longqa.pairs import Pair, pair_from_record
from longlora.settings import CorpusSettings

logger = logging.getLogger(__name__)

FEWEST = 4
"""With fewer examples than this none is held out unless asked for: it would be too much of the data."""

MOST = 256
"""No more examples than this are held out."""

_LEARNED = np.uint32(1 << 31)
"""Set, in the cache, in the tokens that carry loss."""

_BEGINNING = 2000
"""Characters at the beginning of a prompt that tell one document from another."""


class Examples(Sequence[Example]):
    """Examples of a tokenised corpus, read from the disk as they are asked for."""

    def __init__(self, corpus: TokenizedCorpus, indices: np.ndarray) -> None:
        self._corpus, self._indices = corpus, indices

    def chosen(self, places: np.ndarray) -> "Examples":
        """Those at `places` in this order."""
        return Examples(self._corpus, self._indices[places])

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        index = int(self._indices[place])
        marked = self._corpus.document(index)
        borders = np.flatnonzero(np.diff(marked >= _LEARNED, prepend=False, append=False)).reshape(-1, 2)
        answers = tuple((start, stop) for start, stop in borders.tolist())
        tokens = (marked & ~_LEARNED).astype(np.int32)
        return Example(tokens, answers, self._corpus.names[index].split(" ", 2)[2])


class _Conversations:
    """Makes examples of records, which are kept under names of three parts: what tells the document they are about from
    others, the answers of the conversation without loss (-1 where it has examples before), and the record's place."""

    def __init__(self, conversations: ConversationFormat, every_answer: bool) -> None:
        self._conversations, self._every = conversations, every_answer
        template = conversations.template or conversations.tokenizer.chat_template
        self.key = json.dumps(["conversations", template, every_answer])

    def __call__(self, record: Any, /) -> list[tuple[str, np.ndarray]]:
        pair = pair_from_record(record)
        try:
            examples = self._conversations.examples(pair.conversation(), every=self._every, tools=pair.tools)
        except (UserError, RecursionError) as error:
            raise ValueError(str(error).rstrip(".")) from error
        asked = sum(message.role == "assistant" for message in pair.messages)
        unlearned = asked - sum(len(example.answers) for example in examples)
        document = hashlib.sha256(_document(pair).encode(errors="replace")).hexdigest()[:16]
        made = []
        for number, example in enumerate(examples):
            marked = example.tokens.astype(np.uint32)
            for start, stop in example.answers:
                marked[start:stop] |= _LEARNED
            made.append((f"{document} {unlearned if number == 0 else -1} ", marked))
        return made


class Read(NamedTuple):
    """What became of the pairs of some files."""

    examples: Examples
    documents: np.ndarray
    """(examples,) which document each is about."""
    facts: dict[str, Any]
    """`{"pairs", "too_long": {"pairs", "where"}, "longest", "answers_without_loss"}`; `pairs` and `longest` count
    (in tokens) those left out as too long."""


def read_examples(
    corpus: CorpusSettings, conversations: ConversationFormat, context: int, *, every_answer: bool = True
) -> Read:
    """The pairs of `corpus.data` as examples of at most `context` tokens; a longer one is counted and left out.

    It is not cut: the answer is at the end, and an example without its answer would train nothing. All of them are
    kept in the cache, as documents are (`longlora.corpus.tokens`).

    Raises:
        UserError: a source cannot be read or holds a malformed pair, the chat template cannot write one, or all are
            too long.
    """
    taking = _Conversations(conversations, every_answer)
    made = tokenize_corpus(conversations.tokenizer, corpus, taking=taking)
    documents = np.empty(len(made), dtype=np.uint64)
    unlearned = np.empty(len(made), dtype=np.int32)
    for index, name in enumerate(made.names):
        document, count, _ = name.split(" ", 2)
        documents[index], unlearned[index] = int(document, 16), int(count)
    first = np.flatnonzero(unlearned >= 0)
    lengths = np.maximum.reduceat(np.diff(made.offsets), first)  # of pairs
    fits = lengths <= context
    kept = np.flatnonzero(np.repeat(fits, np.diff(first, append=len(made))))
    too_long = [made.names[index].split(" ", 2)[2] for index in first[~fits]]
    pairs, longest = len(first), int(lengths.max())
    if not len(kept):
        raise UserError(
            f"none of the {pairs:,} pairs in {', '.join(corpus.data)} fits {context:,} tokens, the longest has "
            f"{longest:,}: give a longer --context, or shorter pairs (`longlora longqa build --section-tokens`)."
        )
    if too_long:
        more = f" and {len(too_long) - NAMED:,} more" if len(too_long) > NAMED else ""
        logger.warning(
            "%s of %s pairs do not fit %s tokens with their answer and are left out: %s%s; the longest has %s",
            f"{len(too_long):,}",
            f"{pairs:,}",
            f"{context:,}",
            ", ".join(too_long[:NAMED]),
            more,
            f"{longest:,}",
        )
    facts = {
        "pairs": pairs,
        "too_long": {"pairs": len(too_long), "where": too_long},
        "longest": longest,
        "answers_without_loss": int(unlearned[first[fits]].sum()),
    }
    return Read(Examples(made, kept), documents[kept], facts)


def hold_out(documents: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of examples to train on and to measure on, about `share` of them and at most `MOST`; one at least to train
    on.

    Those about one document stay together, or the held-out answers would be about material that was trained on.
    Where even the document with the fewest has more than a `FEWEST`-th of all, that would cost too much: then they
    are split one by one, which is said. Which ones follows from the documents and `seed` alone.
    """
    count = len(documents)
    wanted = min(round(share * count), MOST, count - 1)
    if share and count >= FEWEST:
        wanted = max(wanted, 1)
    names, group, sizes = np.unique(documents, return_inverse=True, return_counts=True)
    if wanted and sizes.min() > max(wanted, count // FEWEST):
        logger.warning("the pairs are about too few documents to hold one out: the same are trained on and measured on")
        names = group = np.arange(count)
        sizes = np.ones(count, dtype=np.int64)
    drawn = sorted(range(len(names)), key=lambda each: (zlib.crc32(f"{seed}/{names[each]}".encode()), each))
    kept = np.zeros(len(names), dtype=bool)
    room = wanted
    for each in drawn:
        if sizes[each] <= room:
            kept[each] = True
            room -= sizes[each]
    if wanted and not kept.any():
        kept[min(drawn, key=lambda each: sizes[each])] = True
    return np.flatnonzero(~kept[group]), np.flatnonzero(kept[group])


def _document(pair: Pair) -> str:
    """What tells the pair's document from others: its name if the pair has one, else how the first prompt begins."""
    named = pair.source.get("document")
    if isinstance(named, str) and named:
        return named
    return next(message.content for message in pair.messages if message.role == "user")[:_BEGINNING]
