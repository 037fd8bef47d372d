"""Which text an evaluation reads, and in which windows.

Windows of L tokens slide over a document by S tokens; the last one is cut at the document's end. With L = 8, S = 3 and
a document of 16 tokens, `.` read and `#` scored:

    --score last      ·#######                   --score window    ·#######
                         .....###                                     ·#######
                            .....###                                     ·#######
                               .....##                                      ·######

`last` scores each token once, with at least L - S tokens before it from the second window on. The first token of a
window (`·`) has nothing to be predicted from. With `--last-tokens 6` every scored token has L - S tokens or more before
it, or all there are; at the longest context one window serves all:

    L = 8, S = 3          .....###               L = 16          ..........######
                             .....###

`stream` is the paper's own script (`eval.py` of LongLoRA): all documents end to end, whole windows, each scored whole,
and the last of them left out.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import numpy as np

from longlora.errors import UserError
from longlora.settings import PerplexitySettings


class Documents(Protocol):
    """Documents as token ids, any one at a time: what `TokenizedCorpus` is."""

    def __len__(self) -> int: ...

    def document(self, index: int) -> np.ndarray: ...


class Listed:
    """Documents that are in memory already."""

    def __init__(self, documents: list[np.ndarray]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def document(self, index: int) -> np.ndarray:
        return self.documents[index]


class Window(NamedTuple):
    """Tokens `[begin, end)` of a document are read; those from `begin + first` on are scored."""

    begin: int
    end: int
    first: int


def windows(tokens: int, context: int, stride: int, score: str, last_tokens: int | None = None) -> Iterator[Window]:
    """The windows of a document of `tokens` tokens, in order; of its `last_tokens` alone where they are given.

    >>> list(windows(16, 8, 3, "last"))[1:]
    [Window(begin=3, end=11, first=5), Window(begin=6, end=14, first=5), Window(begin=9, end=16, first=5)]
    """
    if score == "stream":
        yield from (Window(begin, begin + context, 1) for begin in range(0, tokens - context, stride)[:-1])
        return
    if last_tokens is not None:
        known = tokens - last_tokens
        while known < tokens:
            end = min(max(known + min(stride, context - 1), context), tokens)
            begin = max(end - context, 0)
            yield Window(begin, end, known - begin)
            known = end
        return
    previous_end = 0
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        first = max(previous_end - begin, 1) if score == "last" else 1
        if first < end - begin:
            yield Window(begin, end, first)
        if end == tokens:
            return
        previous_end = end


@dataclass(frozen=True)
class Reading:
    """What is read at one context length."""

    context: int
    stride: int
    rows: Documents
    """What windows are cut from: the documents, or one stream of all of them."""
    windows: Sequence[tuple[int, Window]]
    """Each with the index of its row."""
    owners: np.ndarray
    """(windows,) the place among the scored documents of the one in which each window begins."""
    documents: int
    """Documents scored."""
    skipped: int
    """Documents left out because they are too short."""
    text: str
    """Fingerprint of the documents' tokens and of which are scored: readings with the same one are of the same text."""

    @property
    def tokens_read(self) -> int:
        return sum(window.end - window.begin for _, window in self.windows)


def as_documents(documents: Iterable[np.ndarray] | Documents) -> Documents:
    return cast(Documents, documents) if hasattr(documents, "document") else Listed(list(documents))


def readings(corpus: Documents, contexts: Sequence[int], settings: PerplexitySettings) -> list[Reading]:
    """What is read at each of `contexts`: the same documents everywhere, but with `--texts each`.

    Raises:
        UserError: no document is long enough, or the stride is above a context.
    """
    lengths = [len(corpus.document(index)) for index in range(len(corpus))]
    found: list[Reading] = []
    fingerprints: dict[tuple[int, ...], str] = {}
    for context in contexts:
        stride = settings.stride_at(context)
        if stride > context:
            raise UserError(
                f"--stride is {stride}: it must be at most the shortest context, {min(contexts)} tokens, or tokens "
                "between windows would never be scored; give a smaller --stride or longer --contexts."
            )
        stream = settings.score == "stream"
        own = 1 if stream else context if settings.texts == "each" else max(contexts)
        threshold = max(own, settings.min_document_tokens or 0)
        chosen = tuple([at for at, length in enumerate(lengths) if length >= threshold][: settings.max_documents])
        if not chosen:
            raise UserError(
                f"no document has the {threshold} tokens that context {threshold} asks for: the longest of "
                f"{len(lengths)} has {max(lengths, default=0)}; give longer documents, or lower --contexts and "
                "--min-document-tokens."
            )
        last = settings.last_tokens
        if last is not None and last >= threshold:
            raise UserError(
                f"--last-tokens is {last:,}: it must be below the longest context, {threshold:,} tokens, for the first "
                "token of a document has nothing to be predicted from."
            )
        if chosen not in fingerprints:
            read = [corpus.document(index)[: threshold if last else None] for index in chosen]
            fingerprints[chosen] = text_fingerprint([*read, np.array([last])] if last else read)
        ends = np.cumsum([lengths[index] for index in chosen])
        rows: Documents = corpus
        if stream:
            rows = Listed([np.concatenate([corpus.document(index) for index in chosen])])
            every = [(0, window) for window in windows(int(ends[-1]), context, stride, "stream")]
            owners = np.searchsorted(ends, [window.begin for _, window in every], side="right")
            if not every:
                raise UserError(
                    f"the text has {int(ends[-1]):,} tokens, too few for --score stream at context {context}: give "
                    "more text."
                )
        else:
            read_of = [threshold if last else lengths[index] for index in chosen]
            counted = [list(windows(tokens, context, stride, settings.score, last)) for tokens in read_of]
            every = [(index, window) for index, own in zip(chosen, counted, strict=True) for window in own]
            owners = np.repeat(np.arange(len(chosen)), [len(own) for own in counted])
        skipped = sum(length < threshold for length in lengths)
        found.append(Reading(context, stride, rows, every, owners, len(chosen), skipped, fingerprints[chosen]))
    return found


def text_fingerprint(documents: Iterable[np.ndarray]) -> str:
    """Changes with any token or the end of any document, and not with how they are kept."""
    digest = hashlib.sha256()
    for tokens in documents:
        digest.update(np.int64(len(tokens)).tobytes())
        digest.update(np.ascontiguousarray(tokens, dtype=np.uint32).data)
    return digest.hexdigest()[:16]


def digest_of_texts(texts: Iterable[str]) -> str:
    """As `text_fingerprint`, of texts that several tokenizers read."""
    return text_fingerprint(np.frombuffer(text.encode(errors="replace"), dtype=np.uint8) for text in texts)
