"""The sources a user names (files, folders, `stdlib`, `hub:NAME`) as one lazy stream of documents.

What a file of each format holds is the business of `longlora.corpus.formats`; here are the paths, their order,
what is passed over, and the sentences for what is missing.
"""

import logging
import os
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from longlora.corpus.formats import Text, UnreadableFileError, hub_address, read_file, read_hub
from longlora.corpus.standard_library import standard_library_files, standard_library_folder
from longlora.errors import UserError, nearest

logger = logging.getLogger(__name__)

_CACHE_FOLDERS = ("__pycache__", "node_modules")
_CACHE_TAG = "CACHEDIR.TAG"
"""A file of this name marks its folder as a cache (bford.info/cachedir)."""


@dataclass(frozen=True)
class Document:
    """A text that belongs together: a book, a module, a record."""

    name: str
    """Where it comes from: a path, a path with `:line`, `stdlib/argparse.py`, `hub:NAME:record`."""

    text: str
    """The whole text, never empty."""


@dataclass(frozen=True)
class SourceFile:
    """A file that a source stands for, with what tells a changed file from an unchanged one."""

    path: Path
    name: str
    """The path as the user will recognise it."""

    named: bool
    """The user named this very file; False for one met in a folder."""

    size: int
    """Bytes."""

    modified_ns: int
    """Time of the last change, nanoseconds."""


@dataclass
class Tally:
    """What a reading has met so far."""

    documents: int = 0
    bytes_read: int = 0
    """Bytes of all files read so far, compressed bytes for a compressed file; hub records do not count."""

    skipped: Counter[str] = field(default_factory=Counter)
    """Files and documents passed over, by kind."""

    def sentence(self) -> str:
        """What was passed over, in words; empty when nothing was."""
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.skipped.items()))
        return f"passed over while reading: {counts}" if counts else ""


def read_documents(
    sources: Sequence[str], *, text_field: str = "text", held_out: bool | None = None, tally: Tally | None = None
) -> Generator[Document, None, None]:
    """The documents of all `sources` in the order given, one in memory at a time.

    A source is `stdlib` (the standard library's source; `held_out` selects one side of its split and means nothing
    to other sources), `hub:NAME[:CONFIG][:SPLIT]`, a file, or a folder. A folder is walked in sorted order; hidden
    entries, symbolic links to folders and caches are left out, binary files, PDFs without text and empty documents
    are counted and logged in one sentence at the end.

    Args:
        sources: what to read.
        text_field: the field that holds the text in JSONL, parquet and hub records.
        held_out: True for the standard library's held-out modules, False for the others, None for all.
        tally: filled with counts while reading, for a progress display.

    Raises:
        UserError: on the first document asked for or later: a source is missing, empty, unreadable or malformed.
    """
    if not sources:
        raise UserError("no data was given: name files, folders, 'hub:NAME' or 'stdlib' with --data.")
    tally = tally or Tally()
    try:
        for source in sources:
            before = tally.documents
            yield from _documents_of(source, text_field, held_out, tally)
            if tally.documents == before:
                detail = tally.sentence()
                raise UserError(f"'{source}' holds no text{' (' + detail + ')' if detail else ''}: give other --data.")
    finally:
        if tally.skipped:
            logger.warning("%s", tally.sentence())


def _documents_of(source: str, text_field: str, held_out: bool | None, tally: Tally) -> Iterator[Document]:
    if is_hub(source):
        with closing(read_hub(source, text_field)) as texts:
            yield from _counted(texts, source, 0, tally)
        return
    for file in source_files(source, held_out):
        begun_at = tally.bytes_read
        if file.size == 0:
            tally.skipped["empty documents"] += 1
            continue
        try:
            with closing(read_file(file.path, text_field)) as texts:
                yield from _counted(texts, file.name, begun_at, tally)
        except UnreadableFileError as unreadable:
            if file.named:
                raise
            tally.skipped[f"files ({unreadable.kind})"] += 1
        tally.bytes_read = begun_at + file.size


def _counted(texts: Iterator[Text], name: str, begun_at: int, tally: Tally) -> Iterator[Document]:
    for where, text, bytes_read in texts:
        tally.bytes_read = begun_at + bytes_read
        if not text or text.isspace():
            tally.skipped["empty documents"] += 1
            continue
        tally.documents += 1
        yield Document(name + where, text)


def is_hub(source: str) -> bool:
    """Whether `source` names a data set of the hub rather than files.

    Raises:
        UserError: it begins with `hub:` and goes on malformed.
    """
    if not source.startswith("hub:"):
        return False
    hub_address(source)
    return True


def source_files(source: str, held_out: bool | None = None) -> Iterator[SourceFile]:
    """The files that `source` (not a hub data set) stands for, in reading order; their contents are not opened.

    Raises:
        UserError: the path is missing, is neither file nor folder, or is empty; the standard library has no sources.
    """
    if source == "stdlib":
        root = standard_library_folder()
        found = [
            _source_file(p, f"stdlib/{p.relative_to(root).as_posix()}", False) for p in standard_library_files(held_out)
        ]
        if not found:
            raise UserError(
                f"'stdlib' is empty: this Python ships no standard library sources in {root}. "
                "Use another Python, or give --data a file or a folder."
            )
        yield from found
        return
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            yield from _folder_files(path, source)
        elif path.is_file():
            file = _source_file(path, source, True)
            if file.size == 0:
                raise UserError(f"'{source}' is empty (0 bytes): give a file with text.")
            yield file
        elif path.exists():
            raise UserError(f"'{source}' is neither a file nor a folder: give --data one of these.")
        else:
            raise _missing(source, path)
    except OSError as error:
        raise UserError(f"'{error.filename or source}' cannot be read: {error.strerror}.") from error


def _folder_files(folder: Path, source: str) -> Iterator[SourceFile]:
    def stop(error: OSError) -> None:
        raise error

    any_file = False
    for current, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and name not in _CACHE_FOLDERS
            and not os.path.exists(os.path.join(current, name, _CACHE_TAG))
        )
        for name in sorted(names):
            path = Path(current, name)
            if not name.startswith(".") and path.is_file():
                any_file = True
                yield _source_file(path, os.path.join(source, path.relative_to(folder)), False)
    if not any_file:
        raise UserError(f"folder '{source}' has no files to read (hidden files and caches do not count).")


def _source_file(path: Path, name: str, named: bool) -> SourceFile:
    status = path.stat()
    return SourceFile(path, name, named, status.st_size, status.st_mtime_ns)


def _missing(source: str, path: Path) -> UserError:
    parent = path.parent
    if not parent.is_dir():
        return UserError(f"'{source}' does not exist: there is no folder '{parent}'.")
    hint = nearest(path.name, [*os.listdir(parent), "stdlib"])
    return UserError(f"'{source}' does not exist: give a file, a folder, 'hub:NAME' or 'stdlib'. {hint}".rstrip())
