"""Documents as tokens on disk: tokenised once, in parallel, then memory-mapped by every later run.

    <cache>/corpora/<key>/tokens.bin     all documents end to end, uint16 or uint32
                          offsets.npy    (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
                          names.txt      one name a line
                          info.json      counts, and what the tokens were made from

The key is made from the tokenizer's content and from the path, size and time of change of every file, so that a
second run opens the tokens without reading a text. An entry appears whole or not at all: it is written beside its
place under a lock and renamed at the end.
"""

import errno
import hashlib
import io
import json
import logging
import os
import shutil
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from longlora.corpus.documents import Tally, is_hub, read_documents, source_files
from longlora.corpus.encoding import encode_documents, tokenizer_fingerprint
from longlora.errors import UserError
from longlora.progress import Progress
from longlora.settings import CorpusSettings

logger = logging.getLogger(__name__)

CACHE_FORMAT = 2
"""Raised when the meaning of the cached files changes, so that old entries are not read."""


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents end to end as tokens; the tokens stay on disk."""

    tokens: np.ndarray
    """(T,) uint16 or uint32, memory-mapped."""

    offsets: np.ndarray
    """(documents + 1,) int64: where each document begins, and the end of the last."""

    names: Sequence[str]
    """(documents,) names, as `Document.name`."""

    largest_token: int
    """The largest token id, to be checked against the model's vocabulary."""

    from_cache: bool = False
    """The tokens were there already; nothing was tokenised."""

    folder: Path | None = None
    """The cache entry; None for a corpus made in memory."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, (n,), a view."""
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        # A data loader's worker process maps the file again: pickling a memory map would copy all of it.
        if self.folder is None:
            return TokenizedCorpus, (self.tokens, self.offsets, self.names, self.largest_token, self.from_cache)
        return _open_entry, (self.folder, self.from_cache)


def tokenize_corpus(tokenizer: Any, corpus: CorpusSettings, *, held_out: bool | None = None) -> TokenizedCorpus:
    """The tokens of `corpus.data`, from the cache when nothing has changed.

    A document is its text's tokens, after the beginning-of-sequence token if the tokenizer adds one by itself, and
    before the end-of-sequence token if there is one. Reading stops at `corpus.max_tokens`: the last document may be
    cut there.

    Args:
        tokenizer: a transformers tokenizer.
        corpus: what to read and where to cache it.
        held_out: side of the split of `stdlib`, see `read_documents`.

    Raises:
        UserError: a source is at fault (see `read_documents`), or the cache folder cannot be written or is full.
    """
    key = corpus_key(tokenizer, corpus, held_out)
    folder = cache_folder(corpus) / "corpora"
    entry = folder / key
    with _disk_errors(folder):
        made = _open_entry(entry, from_cache=True)
        if made is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _lock(folder / f"{key}.lock"):
                made = _open_entry(entry, from_cache=True)  # another process may have made it meanwhile
                if made is None:
                    _make_entry(entry, tokenizer, corpus, held_out)
                    made = _open_entry(entry, from_cache=False)
    assert made is not None, f"{entry} was made and cannot be opened"
    origin = f", kept from before in {entry}" if made.from_cache else ""
    logger.info("%s tokens in %s documents%s", f"{len(made.tokens):,}", f"{len(made):,}", origin)
    return made


def cache_folder(corpus: CorpusSettings) -> Path:
    """`corpus.cache`, else `$LONGLORA_CACHE`, else `~/.cache/longlora`."""
    return Path(corpus.cache or os.environ.get("LONGLORA_CACHE") or "~/.cache/longlora").expanduser().absolute()


def corpus_key(tokenizer: Any, corpus: CorpusSettings, held_out: bool | None = None) -> str:
    """The name of the cache entry, 32 hexadecimal digits; no file is opened to make it.

    Raises:
        UserError: a source is missing or empty.
    """
    digest = hashlib.sha256()
    settings = [CACHE_FORMAT, corpus.text_field, corpus.max_tokens, held_out if "stdlib" in corpus.data else None]
    digest.update(json.dumps([*settings, tokenizer_fingerprint(tokenizer)]).encode())
    for source in corpus.data:
        digest.update(b"\nsource\n")
        if is_hub(source):
            digest.update(source.encode())
            continue
        for file in source_files(source, held_out):
            digest.update(json.dumps([str(file.path.absolute()), file.size, file.modified_ns]).encode() + b"\n")
    return digest.hexdigest()[:32]


def _make_entry(entry: Path, tokenizer: Any, corpus: CorpusSettings, held_out: bool | None) -> None:
    """Tokenises into a folder beside `entry` and renames it to `entry`; whatever happens, nothing else stays."""
    for left_behind in entry.parent.glob(f"{entry.name}.building-*"):  # by a process that was killed
        shutil.rmtree(left_behind)
    building = entry.with_name(f"{entry.name}.building-{uuid.uuid4().hex[:8]}")
    try:
        building.mkdir()
        _write_entry(building, tokenizer, corpus, held_out)
        if entry.exists():  # damaged, or it would have been opened
            shutil.rmtree(entry)
        building.rename(entry)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _write_entry(folder: Path, tokenizer: Any, corpus: CorpusSettings, held_out: bool | None) -> None:
    limit = corpus.max_tokens
    dtype = np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 65536 else np.uint32)
    offsets, total, largest, tally = array("q", [0]), 0, 0, Tally()
    all_files = not any(map(is_hub, corpus.data))
    size = sum(file.size for source in corpus.data for file in source_files(source, held_out)) if all_files else None

    def wanted_tokens() -> int | None:
        return None if limit is None else limit - total

    documents = read_documents(corpus.data, text_field=corpus.text_field, held_out=held_out, tally=tally)
    with (
        (folder / "tokens.bin").open("wb") as tokens_file,
        (folder / "names.txt").open("w", encoding="utf-8", errors="backslashreplace") as names_file,
        Progress("tokenising", "tokens" if limit else "bytes", limit or size) as progress,
        closing(documents),
    ):
        for name, ids in encode_documents(tokenizer, documents, wanted_tokens):
            if not len(ids):
                tally.skipped["empty documents"] += 1
                continue
            if limit is not None:
                ids = ids[: limit - total]
            tokens_file.write(ids.astype(dtype).data)
            names_file.write(name.replace("\n", " ").replace("\r", " ") + "\n")
            total += len(ids)
            largest = max(largest, int(ids.max()))
            offsets.append(total)
            progress.show(total if limit else tally.bytes_read, f"{len(offsets) - 1:,} documents, {total:,} tokens")
            if limit and total >= limit:
                break
    if total == 0:
        raise UserError(f"the tokenizer makes no tokens of the text in {', '.join(corpus.data)}: give other --data.")
    with (folder / "offsets.npy").open("wb") as offsets_file:
        buffer = io.BytesIO()  # np.save to a file does not say why it failed, which must be known when the disk is full
        np.save(buffer, np.frombuffer(offsets, dtype=np.int64))
        offsets_file.write(buffer.getbuffer())
    info = {
        "format": CACHE_FORMAT,
        "data": list(corpus.data),
        "held_out": held_out,
        "documents": len(offsets) - 1,
        "tokens": total,
        "dtype": dtype.name,
        "largest_token": largest,
        "passed_over": tally.skipped,
    }
    (folder / "info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def _open_entry(entry: Path, from_cache: bool) -> TokenizedCorpus | None:
    """The corpus in the cache folder `entry`; None when it is not there or not whole."""
    try:
        info = json.loads((entry / "info.json").read_text(encoding="utf-8"))
        offsets = np.load(entry / "offsets.npy")
        names = (entry / "names.txt").read_text(encoding="utf-8").split("\n")[:-1]
        tokens = np.memmap(entry / "tokens.bin", dtype=info["dtype"], mode="r")
        whole = len(tokens) == info["tokens"] == offsets[-1] and len(names) == info["documents"] == len(offsets) - 1
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, EOFError):
        whole = False
    if not whole:
        logger.warning("the tokens in %s are damaged: making them anew", entry)
        return None
    return TokenizedCorpus(tokens, offsets, names, info["largest_token"], from_cache, entry)


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
                f"the disk is full: the tokens do not fit in '{folder}' ({error.strerror}), and what was written is "
                f"removed. Free some space there, or {elsewhere}."
            ) from error
        raise UserError(f"the cache folder '{folder}' cannot be used ({error}): {elsewhere}.") from error
