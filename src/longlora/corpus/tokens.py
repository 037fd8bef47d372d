"""Documents as tokens on disk: tokenised once, in parallel, then memory-mapped by every later run.

The key is made from the tokenizer's content, from the path, size and time of change of every file, from the commit of a
hub data set, and from the versions of what reads pages and PDFs, so that a second run opens the tokens without reading
a text. `longlora.corpus.shards` says what lies in an entry; one that a kill left unfinished is gone on with.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from longlora.corpus.documents import Reading, Tally, is_hub, read_documents, source_files
from longlora.corpus.encoding import encode_documents, encode_records, tokenizer_fingerprint
from longlora.corpus.formats import PARSED, hub_revision
from longlora.corpus.records import Taking
from longlora.corpus.shards import Shards, TokenizedCorpus, open_entry
from longlora.errors import UserError
from longlora.progress import Progress
from longlora.settings import CorpusSettings

logger = logging.getLogger(__name__)

CACHE_FORMAT = 3
"""Raised when the meaning of the cached files, or what conversations become, changes: old entries are not read."""

EXTRACTION = 2
"""Raised when our own way of making text of pages and PDFs changes."""

_EXTRACTORS = ("trafilatura", "lxml", "pypdfium2")


def tokenize_corpus(
    tokenizer: Any, corpus: CorpusSettings, *, held_out: bool | None = None, taking: Taking | None = None
) -> TokenizedCorpus:
    """The tokens of `corpus.data`, from the cache when nothing has changed.

    A document is its text's tokens, after the beginning-of-sequence token if the tokenizer adds one by itself, and
    before the end-of-sequence token if there is one. Reading stops at `corpus.max_tokens`: the last document may be
    cut there.

    Args:
        tokenizer: a transformers tokenizer.
        corpus: what to read and where to cache it.
        held_out: side of the split of `stdlib`, see `Reading`.
        taking: makes of each record documents as (the beginning of) their name and their tokens, uint32, itself.

    Raises:
        UserError: a source is at fault (see `read_documents`), or the cache folder cannot be written or is full.
    """
    reading = reading_of(corpus, held_out, taking)
    made = cached(
        cache_folder(corpus) / "corpora" / corpus_key(tokenizer, corpus, reading),
        lambda folder: _write_entry(folder, tokenizer, corpus, reading),
    )
    origin = f", kept from before in {made.folder}" if made.from_cache else ""
    logger.info("%s tokens in %s documents%s", f"{len(made.tokens):,}", f"{len(made):,}", origin)
    return made


def cached(folder: Path, write: Any) -> TokenizedCorpus:
    """What is in the cache entry `folder`, after `write(folder)` has finished it where it was not whole.

    Of several processes on a machine one writes and the others wait.

    Raises:
        UserError: the folder cannot be written, or is full.
    """
    with _disk_errors(folder.parent):
        entry = open_entry(folder, from_cache=True)
        if entry is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.with_name(f"{folder.name}.lock")):
                entry = open_entry(folder, from_cache=True)  # another process may have made it meanwhile
                if entry is None:
                    write(folder)
                    entry = open_entry(folder)
        (folder / "manifest.jsonl").touch()  # when it was last of use
    assert entry is not None, f"the cache entry {folder} is gone"
    return entry


def cache_folder(corpus: CorpusSettings) -> Path:
    """`corpus.cache`, else `$LONGLORA_CACHE`, else `~/.cache/longlora`."""
    return named_cache_folder(corpus.cache)


def named_cache_folder(name: str | None) -> Path:
    """The folder `name`, else `$LONGLORA_CACHE`, else `~/.cache/longlora`."""
    return Path(name or os.environ.get("LONGLORA_CACHE") or "~/.cache/longlora").expanduser().absolute()


def corpus_key(tokenizer: Any, corpus: CorpusSettings, reading: Reading) -> str:
    """The name of the cache entry, 32 hexadecimal digits; no file is opened to make it.

    Raises:
        UserError: a source is missing or empty.
    """
    digest = hashlib.sha256()
    held_out = reading.held_out if "stdlib" in corpus.data else None
    taken = corpus.text_field if isinstance(reading.text_field, str) else [reading.text_field.key]
    settings = [CACHE_FORMAT, taken, corpus.encoding, corpus.special_tokens, corpus.max_tokens, held_out]
    digest.update(json.dumps([*settings, tokenizer_fingerprint(tokenizer)]).encode())
    parsed = False
    for source in corpus.data:
        digest.update(b"\nsource\n")
        if is_hub(source):
            digest.update(json.dumps([source, reading.revisions.get(source)]).encode())
            continue
        for file in source_files(source, reading.held_out):
            digest.update(json.dumps([str(file.path.absolute()), file.size, file.modified_ns]).encode() + b"\n")
            parsed = parsed or file.path.suffix.lower() in PARSED
    if parsed:
        digest.update(json.dumps([EXTRACTION, *map(importlib.metadata.version, _EXTRACTORS)]).encode())
    return digest.hexdigest()[:32]


def reading_of(corpus: CorpusSettings, held_out: bool | None, taking: Taking | None = None) -> Reading:
    """How the sources of `corpus` are read, hub data sets at the commits that they have now."""
    return Reading(
        text_field=taking or corpus.text_field,
        encoding=corpus.encoding,
        skip_malformed=corpus.skip_malformed,
        held_out=held_out,
        revisions={source: hub_revision(source) for source in corpus.data if is_hub(source)},
    )


def _write_entry(folder: Path, tokenizer: Any, corpus: CorpusSettings, reading: Reading) -> None:
    limit = corpus.max_tokens
    texts = isinstance(reading.text_field, str)
    dtype = np.dtype(np.uint16 if texts and max(tokenizer.get_vocab().values()) < 65536 else np.uint32)
    all_files = not any(map(is_hub, corpus.data))
    sources = [file for source in corpus.data for file in source_files(source, reading.held_out)] if all_files else []
    size = sum(file.size for file in sources) if all_files else None
    about = {"data": list(corpus.data), "held_out": reading.held_out, "revisions": dict(reading.revisions)}
    with Shards(folder, {"dtype": dtype.name, **about}) as shards:
        tally = Tally(skipped=shards.last.skipped, malformed=list(shards.last.malformed), documents=shards.documents)
        if shards.documents:
            logger.info("going on after %s documents that were tokenised before", f"{shards.documents:,}")

        def wanted_tokens() -> int:
            assert limit is not None
            return limit - shards.tokens

        begin = (shards.last.file, shards.last.texts)
        documents = read_documents(corpus.data, reading, tally, begin=begin)
        if texts:
            batches = encode_documents(
                tokenizer,
                documents if limit is None or shards.tokens < limit else iter(()),
                None if limit is None else wanted_tokens,
                special_tokens=corpus.special_tokens,
            )
        else:
            batches = encode_records(documents)
        with (
            Progress("tokenising", "tokens" if limit else "bytes", limit or size) as progress,
            closing(documents),
            closing(batches),
        ):
            for batch in batches:
                shards.add(batch, tally.malformed, limit)
                done = f"{shards.documents:,} documents, {shards.tokens:,} tokens"
                progress.show(shards.tokens if limit else tally.bytes_read, done)
                if limit and shards.tokens >= limit:
                    break
        if shards.tokens == 0:
            raise UserError(
                f"the tokenizer makes no tokens of the text in {', '.join(corpus.data)}: give other --data."
            )
        shards.finish()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Holds the lock file at `path`; says so when that means waiting for another process."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is tokenising the same data: waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns the errors of writing under `folder` into sentences for the user."""
    elsewhere = "name another folder with --cache or $LONGLORA_CACHE"
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the disk is full: the tokens do not fit in '{folder}' ({error.strerror}). Free some space there "
                f"(`longlora cache` lists what is kept) and give the same command again, it goes on where it was; or "
                f"{elsewhere}."
            ) from error
        raise UserError(f"the cache folder '{folder}' cannot be used ({error}): {elsewhere}.") from error
