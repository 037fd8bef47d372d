"""Files of pairs as examples to train on and to measure on: tokens with their answers marked, whole documents apart."""

import logging
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from longlora.corpus.conversations import ConversationFormat, Example
from longlora.errors import UserError
from longlora.longqa.pair_files import read_pairs
from longlora.longqa.pairs import Pair
from longlora.progress import Progress

logger = logging.getLogger(__name__)

FEWEST = 4
"""With fewer examples than this none is held out unless asked for: it would be too much of the data."""

MOST = 256
"""No more examples than this are held out."""

_BEGINNING = 2000
"""Characters at the beginning of a prompt that tell one document from another."""

_NAMED = 3
"""Places named to people; the JSON names all."""


@dataclass
class Read:
    """What became of the pairs of some files."""

    examples: list[Example] = field(default_factory=list)
    documents: list[str] = field(default_factory=list)
    """Which document each example is about."""
    too_long: list[str] = field(default_factory=list)
    """Places of the pairs whose answer would be cut away."""
    pairs: int = 0
    """Of all files, those left out among them."""
    longest: int = 0
    """Tokens of the longest pair, also of those left out."""
    unwritable: list[str] = field(default_factory=list)
    """Places of the pairs passed over because the chat template cannot write them."""
    answers_without_loss: int = 0
    """Answers before the last of a conversation, where only the last is learned."""

    def facts(self) -> dict[str, Any]:
        """For a summary: `{"pairs", "too_long": {"pairs", "where"}, "longest", "answers_without_loss"}`."""
        return {
            "pairs": self.pairs,
            "too_long": {"pairs": len(self.too_long), "where": self.too_long},
            "longest": self.longest,
            "answers_without_loss": self.answers_without_loss,
        }


def read_examples(
    files: Sequence[str],
    conversations: ConversationFormat,
    context: int,
    *,
    every_answer: bool = True,
    skip_malformed: int = 0,
) -> Read:
    """The pairs of `files` as examples of at most `context` tokens; a longer one is counted and left out.

    It is not cut: the answer is at the end, and an example without its answer would train nothing.

    Raises:
        UserError: a file cannot be read or holds a malformed pair, the chat template cannot write one, or all are
            too long.
    """
    pairs = [(_place(file, pair, files), pair) for file in files for pair in read_pairs(file, skip_malformed)]
    read = Read(pairs=len(pairs))
    with Progress("tokenising", "pairs", len(pairs)) as progress:
        for number, (place, pair) in enumerate(pairs, start=1):
            try:
                examples = conversations.examples(pair.conversation(), place, every=every_answer, tools=pair.tools)
            except UserError as error:
                if len(read.unwritable) >= skip_malformed:
                    raise
                read.unwritable.append(place)
                logger.warning("passed over: %s", error)
                continue
            lengths = [len(example.tokens) for example in examples]
            read.longest = max(read.longest, *lengths)
            if max(lengths) > context:
                read.too_long.append(place)
            else:
                read.examples += examples
                read.documents += [_document(pair)] * len(examples)
                asked = sum(message.role == "assistant" for message in pair.messages)
                read.answers_without_loss += asked - sum(len(example.answers) for example in examples)
            progress.show(number, f"{number:,} pairs")
    if not read.examples:
        raise UserError(
            f"none of the {len(pairs):,} pairs in {', '.join(files)} fits {context:,} tokens, the longest has "
            f"{read.longest:,}: give a longer --context, or shorter pairs (`longlora longqa build --section-tokens`)."
        )
    if read.too_long:
        more = f" and {len(read.too_long) - _NAMED:,} more" if len(read.too_long) > _NAMED else ""
        logger.warning(
            "%s of %s pairs do not fit %s tokens with their answer and are left out: %s%s; the longest has %s",
            f"{len(read.too_long):,}",
            f"{len(pairs):,}",
            f"{context:,}",
            ", ".join(read.too_long[:_NAMED]),
            more,
            f"{read.longest:,}",
        )
    return read


def hold_out(read: Read, share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to measure on, about `share` of them and at most `MOST`; one at least to train on.

    Those about one document stay together, or the held-out answers would be about material that was trained on.
    Where even the document with the fewest has more than a `FEWEST`-th of all, that would cost too much: then they
    are split one by one, which is said. Which ones follows from the documents and `seed` alone.
    """
    count = len(read.examples)
    wanted = min(round(share * count), MOST, count - 1)
    if share and count >= FEWEST:
        wanted = max(wanted, 1)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, document in enumerate(read.documents):
        groups[document].append(index)
    fewest = min(len(group) for group in groups.values())
    if wanted and fewest > max(wanted, count // FEWEST):
        logger.warning("the pairs are about too few documents to hold one out: the same are trained on and measured on")
        groups = defaultdict(list, {example.where: [index] for index, example in enumerate(read.examples)})
    drawn = sorted(groups, key=lambda name: (zlib.crc32(f"{seed}/{name}".encode(errors="replace")), name))
    kept: set[int] = set()
    for name in drawn:
        if len(kept) + len(groups[name]) <= wanted:
            kept |= set(groups[name])
    if wanted and not kept:
        kept = set(groups[min(drawn, key=lambda name: len(groups[name]))])
    training = [example for index, example in enumerate(read.examples) if index not in kept]
    return training, [read.examples[index] for index in sorted(kept)]


def _place(file: str, pair: Pair, files: Sequence[str]) -> str:
    return f"{file}, {pair.where}" if len(files) > 1 else pair.where


def _document(pair: Pair) -> str:
    """What tells the pair's document from others: its name if the pair has one, else how the first prompt begins."""
    named = pair.source.get("document")
    if isinstance(named, str) and named:
        return named
    return next(message.content for message in pair.messages if message.role == "user")[:_BEGINNING]
