"""The sources a user names (files, folders, `stdlib`, `hub:NAME`) as one lazy stream of documents.

What a file of each format holds is the business of `longlora.corpus.formats`; here are the paths, their order,
what is passed over, and the sentences for what is missing.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora.corpus.formats import Text, UnreadableFileError, hub_address, read_file, read_hub
from longlora.corpus.records import Malformed, Taking
from longlora.corpus.standard_library import standard_library_files, standard_library_folder
from longlora.errors import UserError, nearest

logger = logging.getLogger(__name__)

_CACHE_FOLDERS = ("__pycache__", "node_modules")
_CACHE_TAG = "CACHEDIR.TAG"
"""A file of this name marks its folder as a cache (bford.info/cachedir)."""


NAMED = 3
"""Places of malformed records named to people."""


@dataclass(slots=True)
class Position:
    """How far the sources have been read, and what was passed over so far."""

    file: int = 0
    """The number of the file or hub data set, from 1."""

    texts: int = 0
    """Texts and malformed records of it."""

    skipped: Mapping[str, int] = field(default_factory=dict)
    malformed: int = 0


@dataclass(slots=True)
class Document:
    """A text that belongs together: a book, a module, a record."""

    name: str
    """Where it comes from: a path, a path with `:line`, `stdlib/argparse.py`, `hub:NAME:record`."""

    text: str
    """The whole text, never empty; or what a `Taking` made of a record."""

    position: Position = field(default_factory=Position, compare=False, repr=False)


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

    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files and documents passed over, by kind; never changed, but replaced."""

    malformed: list[str] = field(default_factory=list)
    """Places of the records passed over because they are malformed."""

    file: int = 0
    """Files and hub data sets begun, the present one among them."""

    texts: int = 0
    """Texts and malformed records met in the present one."""

    def skip(self, kind: str) -> None:
        """One file or document more is passed over."""
        self.skipped = {**self.skipped, kind: self.skipped.get(kind, 0) + 1}

    def sentence(self) -> str:
        """What was passed over, in words; empty when nothing was."""
        counts = [f"{count:,} {kind}" for kind, count in sorted(self.skipped.items())]
        if self.malformed:
            more = f" and {len(self.malformed) - NAMED:,} more" if len(self.malformed) > NAMED else ""
            counts.append(f"{len(self.malformed):,} malformed records ({', '.join(self.malformed[:NAMED])}{more})")
        return f"passed over while reading: {', '.join(counts)}" if counts else ""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How sources are read."""

    text_field: str | Taking = "text"
    """The field that holds the text in JSON, parquet and hub records; `doc.text` for one within another."""

    encoding: str = "auto"
    """Of text and HTML files."""

    skip_malformed: int = 0
    """Malformed records that may be passed over."""

    held_out: bool | None = None
    """True for the standard library's held-out modules, False for the others, None for all."""

    revisions: Mapping[str, str | None] = field(default_factory=dict)
    """Commits at which hub data sets are read."""


def read_documents(
    sources: Sequence[str], reading: Reading = Reading(), tally: Tally | None = None, *, begin: tuple[int, int] = (0, 0)
) -> Generator[Document, None, None]:
    """The documents of all `sources` in the order given, one in memory at a time.

    A source is `stdlib` (the standard library's source), `hub:NAME[:CONFIG][:SPLIT]`, a file, or a folder. A folder is
    walked in sorted order; hidden entries, symbolic links to folders and caches are left out, binary files, PDFs
    without text and empty documents are counted and logged in one sentence at the end.

    Args:
        sources: what to read.
        reading: how.
        tally: filled with counts while reading, for a progress display; when reading goes on, with what was met before.
        begin: `(tally.file, tally.texts)` after the last document of an earlier reading of the same sources: goes on
            with the next one.

    Raises:
        UserError: on the first document asked for or later: a source is missing, empty or unreadable, or more records
            are malformed than may be.
    """
    if not sources:
        raise UserError("no data was given: name files, folders, 'hub:NAME' or 'stdlib' with --data.")
    tally = tally or Tally()
    tally.file = tally.texts = tally.bytes_read = 0
    try:
        for source in sources:
            before, first = tally.documents, tally.file + 1
            yield from _documents_of(source, reading, tally, begin)
            if tally.documents == before and first > begin[0]:
                detail = tally.sentence()
                raise UserError(f"'{source}' holds no text{' (' + detail + ')' if detail else ''}: give other --data.")
    finally:
        if tally.sentence():
            logger.warning("%s", tally.sentence())


def _documents_of(source: str, reading: Reading, tally: Tally, begin: tuple[int, int]) -> Iterator[Document]:
    taking = reading.text_field
    field = taking if isinstance(taking, str) else _once(taking, tally, begin)
    if is_hub(source):
        tally.file += 1
        texts = read_hub(source, field, reading.revisions.get(source))
        with closing(texts):
            yield from _counted(texts, source, 0, reading, tally, begin)
        return
    for file in source_files(source, reading.held_out):
        tally.file += 1
        begun_at = tally.bytes_read
        if tally.file < begin[0]:
            tally.bytes_read += file.size
            continue
        if file.size == 0:
            tally.skip("empty documents")
            continue
        try:
            with closing(read_file(file.path, field, reading.encoding)) as texts:
                yield from _counted(texts, file.name, begun_at, reading, tally, begin)
        except UnreadableFileError as unreadable:
            if file.named:
                raise
            tally.skip(f"files ({unreadable.kind})")
        tally.bytes_read = begun_at + file.size


def _once(taking: Taking, tally: Tally, begin: tuple[int, int]) -> Callable[[Any], Any]:
    """`taking`, for those records that an earlier reading has not come to."""
    return lambda record: None if (tally.file, tally.texts + 1) <= begin else taking(record)


def _counted(
    texts: Iterator[Text | Malformed], name: str, begun_at: int, reading: Reading, tally: Tally, begin: tuple[int, int]
) -> Iterator[Document]:
    tally.texts = 0
    for found in texts:
        tally.texts += 1
        tally.bytes_read = begun_at + found.bytes_read
        if (tally.file, tally.texts) <= begin:
            continue
        if isinstance(found, Malformed):
            _pass_over(found, name, reading, tally)
        elif isinstance(found.text, str) and (not found.text or found.text.isspace()):
            tally.skip("empty documents")
        else:
            tally.documents += 1
            position = Position(tally.file, tally.texts, tally.skipped, len(tally.malformed))
            yield Document(name + found.where, found.text, position)


def _pass_over(found: Malformed, name: str, reading: Reading, tally: Tally) -> None:
    if len(tally.malformed) >= reading.skip_malformed:
        more = f" {len(tally.malformed):,} before it were passed over." if tally.malformed else ""
        raise UserError(
            f"'{name}', {found.where}: {found.reason}. Mend or remove it, or let so many malformed records be passed "
            f"over with --skip-malformed N.{more}"
        )
    tally.malformed.append(f"{name}, {found.where}")


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
