"""Texts as token ids: tokenised many at a time on all cores, in memory that does not grow with the corpus."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longlora.corpus.documents import Document

PIECE_CHARACTERS = 1_000_000
"""A longer text is tokenised in pieces of at most this length: the unit that one core works on."""

BATCH_CHARACTERS = PIECE_CHARACTERS * min(max(os.cpu_count() or 1, 4), 16)
"""Characters tokenised at a time, a piece for each core; measured: 0.13 GB of memory a million."""

_CHARACTERS_A_TOKEN = 8
"""More than any ordinary text needs for a token."""

# Places where byte-level BPE cuts as well: a single newline, a single space. Runs of blanks may be one token.
_AFTER_LINE = re.compile(r"(?<=\S\n)(?=\S)")
_BEFORE_WORD = re.compile(r"(?<=\S)(?= \S)")
_CUT_WINDOW = 10_000


def encode_documents(
    tokenizer: Any, documents: Iterable[Document], wanted_tokens: Callable[[], int | None]
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and tokens (n,) uint32 of each document, in order; no tokens when the tokenizer makes none of its text.

    A document is its text's tokens, after the beginning-of-sequence token if the tokenizer adds one by itself, and
    before the end-of-sequence token if there is one. A text of more than `PIECE_CHARACTERS` is cut after a line or
    before a word: exact for byte-level BPE, while a SentencePiece tokenizer begins each piece with a space.

    Args:
        tokenizer: a transformers tokenizer; a fast one shares each batch among the threads of the tokenizers library.
        documents: read only as far as the next batch needs.
        wanted_tokens: how many more tokens will be used, None for all: a small number makes small batches.
    """
    first = np.array(beginning(tokenizer), dtype=np.uint32)
    last = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype=np.uint32)
    parts: list[np.ndarray] = []
    for batch in _batches(documents, wanted_tokens):
        for (name, _, ends), ids in zip(batch, _encode(tokenizer, [piece for _, piece, _ in batch]), strict=True):
            parts.append(np.array(ids, dtype=np.uint32))
            if ends:
                text_tokens = sum(map(len, parts))
                yield name, np.concatenate([first, *parts, last]) if text_tokens else np.empty(0, np.uint32)
                parts.clear()


def _batches(
    documents: Iterable[Document], wanted_tokens: Callable[[], int | None]
) -> Iterator[list[tuple[str, str, bool]]]:
    """Batches of (document's name, piece of its text, whether it is the last piece)."""
    batch: list[tuple[str, str, bool]] = []
    characters = 0
    for document in documents:
        pieces = list(_pieces(document.text))
        for number, piece in enumerate(pieces, start=1):
            batch.append((document.name, piece, number == len(pieces)))
            characters += len(piece)
            wanted = wanted_tokens()
            if characters >= BATCH_CHARACTERS or (wanted is not None and characters >= wanted * _CHARACTERS_A_TOKEN):
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = begin + PIECE_CHARACTERS
        for cut in (_AFTER_LINE, _BEFORE_WORD):
            places = [match.start() for match in cut.finditer(text, max(begin + 1, end - _CUT_WINDOW), end + 1)]
            if places:
                end = places[-1]
                break
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # or it warns of every text longer than the model's window
    )["input_ids"]


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
        digest.update(json.dumps(content).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for path in sorted(Path(folder).rglob("*")):
                digest.update(path.name.encode() + path.read_bytes())
    split_special = getattr(tokenizer, "split_special_tokens", False)
    digest.update(json.dumps([beginning(tokenizer), tokenizer.eos_token_id, split_special]).encode())
    return digest.hexdigest()
