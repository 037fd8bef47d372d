"""Texts as token ids: tokenised many at a time on all cores, in memory that does not grow with corpus or document."""

import hashlib
import json
import os
import re
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from longlora.corpus.documents import Document

PIECE_CHARACTERS = 50_000
"""A longer text is tokenised in pieces of at most this length: the unit that one core works on, and so long is a
tokenizer that is shared not free for others."""

BATCH_CHARACTERS = 2 * PIECE_CHARACTERS * min(max(os.cpu_count() or 1, 2), 16)
"""Characters tokenised at a time, two pieces for each core. Measured: 0.1 GB of memory a million; ten times as many at
a time take 1.3 times as long a character, as they leave the processor's caches."""

_CHARACTERS_A_TOKEN = 8
"""More than any ordinary text needs for a token."""

# Places where byte-level BPE cuts as well: a single newline, a single space. Runs of blanks may be one token.
_AFTER_LINE = re.compile(r"(?<=\S\n)(?=\S)")
_BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")
_CUT_WINDOW = 10_000


@dataclass(frozen=True)
class Encoded:
    """A batch of tokens."""

    tokens: np.ndarray
    """(n,) uint32, documents end to end; the last may go on in the next batch, as the first may have begun before."""

    ended: list[tuple[Document, int]]
    """The documents that end in it, in order, and where in its tokens; one without tokens where the one before does."""

    goes_on: Document | None = None
    """The last document, where it does not end."""


_Piece = tuple[Document, str, bool]
"""A document, a piece of its text, and whether it is the last."""


def encode_documents(
    tokenizer: Any,
    documents: Iterable[Document],
    wanted_tokens: Callable[[], int] | None = None,
    *,
    special_tokens: bool = False,
) -> Generator[Encoded, None, None]:
    """The tokens of each document, in order, a batch at a time.

    A document is its text's tokens, after the beginning-of-sequence token if the tokenizer adds one by itself, and
    before the end-of-sequence token if there is one; nothing when the tokenizer makes no tokens of its text. A text of
    more than `PIECE_CHARACTERS` is cut after a line or before a word: exact for byte-level BPE, while a SentencePiece
    tokenizer begins each piece with a space.

    Args:
        tokenizer: a transformers tokenizer; a fast one shares each batch among the threads of the tokenizers library.
        documents: read only as far as the next batch needs, or with no `wanted_tokens` a batch further.
        wanted_tokens: how many more tokens will be used: a small number makes small batches.
        special_tokens: the letters of a special token in a text mean that token; else they are letters like others.
    """
    first = beginning(tokenizer)
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    begun = False  # whether the present document has tokens
    with ThreadPoolExecutor(1) as threads, closing(_batches(documents, wanted_tokens)) as batches:
        for batch, encoding in _ahead(threads, batches, tokenizer, special_tokens, wanted_tokens is None):
            tokens = array("I")
            ended = []
            for (document, _, ends), ids in zip(batch, encoding.result(), strict=True):
                if ids:
                    tokens.fromlist(ids if begun else [*first, *ids])
                    begun = True
                if ends:
                    if begun:
                        tokens.fromlist(last)
                    ended.append((document, len(tokens)))
                    begun = False
            yield Encoded(np.frombuffer(tokens, dtype=np.uint32), ended, None if ends else document)


def encode_records(documents: Iterable[Document]) -> Generator[Encoded, None, None]:
    """The tokens that a `Taking` made of records, as names and tokens, all those of a record in one batch."""
    for record in documents:
        names, tokens = zip(*cast(Any, record.text), strict=True)
        stops = np.cumsum([len(each) for each in tokens]).tolist()
        parts = [Document(f"{name}{record.name}", "", record.position) for name in names]
        yield Encoded(np.concatenate(tokens), list(zip(parts, stops, strict=True)))


def _ahead(
    threads: ThreadPoolExecutor, batches: Iterable[list[_Piece]], tokenizer: Any, special_tokens: bool, ahead: bool
) -> Iterator[tuple[list[_Piece], Future[list[list[int]]]]]:
    """Each batch with its tokens; with `ahead` the next is being tokenised while the caller works on one."""
    waiting: tuple[list[_Piece], Future[list[list[int]]]] | None = None
    for pieces in batches:
        begun = pieces, threads.submit(encode, tokenizer, [text for _, text, _ in pieces], special_tokens)
        if not ahead:
            yield begun
            continue
        if waiting:
            yield waiting
        waiting = begun
    if waiting:
        yield waiting


def _batches(
    documents: Iterable[Document], wanted_tokens: Callable[[], int] | None
) -> Generator[list[_Piece], None, None]:
    batch: list[_Piece] = []
    characters = 0
    for document in documents:
        for piece, ends in pieces(document.text):
            batch.append((document, piece, ends))
            characters += len(piece)
            most = BATCH_CHARACTERS
            if wanted_tokens is not None:
                most = min(most, wanted_tokens() * _CHARACTERS_A_TOKEN)
            if characters >= most:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def pieces(text: str, most: int | None = None) -> Iterator[tuple[str, bool]]:
    """`text` in pieces of at most `most` characters, and of each whether it is the last."""
    most = most or PIECE_CHARACTERS
    begin = 0
    while len(text) - begin > most:
        end = begin + most
        for cut in (_AFTER_LINE, _BEFORE_WORD):
            places = [match.start() for match in cut.finditer(text, max(begin + 1, end - _CUT_WINDOW), end + 1)]
            if places:
                end = places[-1]
                break
        yield text[begin:end], False
        begin = end
    yield text[begin:], True


_ONE_AT_A_TIME = threading.Lock()
"""A fast tokenizer that is told anew what it should do while another thread uses it fails ("Already borrowed")."""


@contextmanager
def _set_up(tokenizer: Any, special_tokens: bool) -> Iterator[Any]:
    """The tokenizers library's own tokenizer, for this thread alone; None where there is none (a slow tokenizer)."""
    with _ONE_AT_A_TIME:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = not special_tokens
        yield backend


def encode(tokenizer: Any, texts: list[str], special_tokens: bool = False) -> list[list[int]]:
    """The tokens of each text, without any before and after it, from any thread.

    The way of `tokenizer(texts)`, less the offsets of all tokens, which take three times the memory.
    """
    with _set_up(tokenizer, special_tokens) as backend:
        if backend is not None:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return list(tokenizer(texts, **options, split_special_tokens=not special_tokens)["input_ids"])


def token_starts(tokenizer: Any, text: str) -> np.ndarray:
    """Offset of the first character of each token of `text`, (tokens,), ascending, found in little memory.

    A slow tokenizer does not tell: there the tokens are taken to be of one length.
    """
    starts, begin = [], 0
    for piece, last in pieces(text):
        with _set_up(tokenizer, special_tokens=False) as backend:
            if backend is not None:
                found = backend.encode_batch([piece], add_special_tokens=False)[0].offsets
        if backend is not None:
            places = np.array([place for place, _ in found], dtype=np.int64)
        else:
            places = np.linspace(0, len(piece), len(encode(tokenizer, [piece])[0]), endpoint=False).astype(np.int64)
        starts.append(begin + places)
        begin += len(piece)
        if not last:
            time.sleep(_BREATH)
    return np.concatenate(starts)


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of `text`, whatever its length in little memory; the letters of special tokens are letters."""
    count = 0
    for piece, last in pieces(text):
        count += len(encode(tokenizer, [piece])[0])
        if not last:
            time.sleep(_BREATH)
    return count


_BREATH = 0.001
"""Seconds in which others may have the tokenizer: a lock alone would go to whoever held it last."""


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token in a list if the tokenizer puts one before a text by itself, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of everything that decides which tokens a text gets; the same in every process."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # How the tokenizer was last called, not what it is.
        content.pop("truncation", None)
        content.pop("padding", None)
        content.pop("encode_special_tokens", None)
        digest.update(json.dumps(content).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                digest.update(path.name.encode() + path.read_bytes())
    digest.update(json.dumps([beginning(tokenizer), tokenizer.eos_token_id]).encode())
    return digest.hexdigest()
