"""How one file, or one hub data set, becomes texts: plain text, HTML, EPUB, PDF, records in JSON and parquet.

Every reader is lazy and yields `Text`: at most one text (one batch of `PARQUET_ROWS` rows for parquet) is in memory.
"""

import csv
import io
import logging
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longlora.corpus.apart import UnparsableError, parse_apart
from longlora.corpus.decoding import UnknownEncodingError, decoded, encodable
from longlora.corpus.records import (
    COMPRESSED,
    LINES,
    MOST_LINE_BYTES,
    Malformed,
    inner_name,
    missing_field,
    opened,
    read_records,
    text_of,
)
from longlora.errors import UserError

logger = logging.getLogger(__name__)

PARQUET_ROWS = 32
"""Rows of a parquet file decoded at a time."""

MOST_TEXT_BYTES = 1_000_000_000
"""A longer file is no single document."""

_SNIFFED_BYTES = 8192
PARSED = {".html": "html", ".htm": "html", ".xhtml": "html", ".epub": "epub", ".pdf": "pdf"}
"""Endings whose files are read by `longlora.corpus.apart`, and their format."""

TABLES = {".csv": ",", ".tsv": "\t"}
"""Endings of tables of texts, and what stands between their columns."""

_KNOWN = "text, .html, .epub, .pdf, .json, .jsonl, .ndjson, .csv, .tsv (.gz and .zst of these), .parquet or a folder"


@dataclass(slots=True)
class Text:
    """One text of a file, where in the file it stood, and how far the file has been read."""

    where: str
    """Empty for a whole file, `:12` for line (JSONL), row (parquet) or record (JSON, hub) 12."""

    text: Any
    """The text, always encodable as UTF-8; or what a `Taking` made of a record."""

    bytes_read: int
    """Bytes of the file consumed so far; 0 for the hub, whose size is not known."""


class UnreadableFileError(UserError):
    """A file that holds no text to read. Named by the user it is his mistake; met in a folder it is passed over."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def read_file(
    path: Path, text_field: str | Callable[[Any], Any], encoding: str = "auto", most_bytes: int = MOST_TEXT_BYTES
) -> Generator[Text | Malformed, None, None]:
    """The texts of the file at `path`, in the format its name says; an unknown ending means text, or records in JSON.

    A record that is none, or has no text in `text_field`, is `Malformed`; plain text has at most `most_bytes` unpacked.

    Raises:
        UnreadableFileError: it is binary, or a PDF, EPUB or HTML that is encrypted, damaged or without text.
        UserError: it cannot be opened or is damaged.
    """
    try:
        yield from _reader(path, text_field, most_bytes)(path, text_field, encoding)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"'{path}' cannot be read: {reason}. Check its permissions and that it is whole.") from error


def _reader(
    path: Path, text_field: str | Callable[[Any], Any], most_bytes: int
) -> Callable[[Path, Any, str], Iterator[Text | Malformed]]:
    name = inner_name(path)
    if path.suffix.lower() == ".parquet":
        return _read_parquet
    if name.endswith((*LINES, ".json")) or not isinstance(text_field, str):
        return _read_json
    if name.endswith(tuple(TABLES)):
        return _read_table
    return _read_parsed if Path(name).suffix in PARSED else partial(_read_text, most_bytes=most_bytes)


def _read_text(path: Path, text_field: str, encoding: str, most_bytes: int) -> Iterator[Text]:
    with opened(path) as (stream, _):
        content = stream.read(_SNIFFED_BYTES)
        if b"\0" in content and encoding == "auto" and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UnreadableFileError("binary or in no known encoding", f"'{path}' is a binary file: give {_KNOWN}.")
        content += stream.read(max(0, most_bytes + 1 - len(content)))
    if len(content) > most_bytes:
        raise UnreadableFileError("too large", f"'{path}' has more than {most_bytes:,} bytes of text: split it.")
    try:
        text = decoded(content, encoding)
    except UnknownEncodingError as error:
        raise UnreadableFileError(
            "binary or in no known encoding",
            f"'{path}' is {error}: name its encoding with --encoding, or give {_KNOWN}.",
        ) from error
    yield Text("", text, path.stat().st_size)


def _read_parsed(path: Path, text_field: str, encoding: str) -> Iterator[Text]:
    name = inner_name(path)
    if path.suffix.lower() in COMPRESSED:
        raise UnreadableFileError("compressed twice", f"'{path}' is compressed: unpack it first.")
    kind = PARSED[Path(name).suffix]
    if kind == "html":
        with path.open("rb") as file:
            head = file.read(_SNIFFED_BYTES)
        if b"\0" in head and not head.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise UnreadableFileError("binary or in no known encoding", f"'{path}' is a binary file: give {_KNOWN}.")
    try:
        yield Text("", parse_apart(path, kind, encoding), path.stat().st_size)
    except UnparsableError as error:
        raise UnreadableFileError(error.kind, f"'{path}' {error}") from error


def _read_json(path: Path, text_field: str | Callable[[Any], Any], encoding: str) -> Iterator[Text | Malformed]:
    for record in read_records(path):
        if isinstance(record, Malformed):
            yield record
            continue
        try:
            yield Text(f":{record.number}", text_of(record.value, text_field), record.bytes_read)
        except ValueError as error:
            yield Malformed(record.where, str(error), record.bytes_read)


def _read_table(path: Path, text_field: str, encoding: str) -> Iterator[Text | Malformed]:
    csv.field_size_limit(MOST_LINE_BYTES)
    delimiter = TABLES[Path(inner_name(path)).suffix]
    with opened(path) as (stream, raw):
        known = "utf-8-sig" if encoding == "auto" else encoding
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding=known, newline=""), delimiter=delimiter)
        number = 0
        try:
            if text_field not in (names := rows.fieldnames or []):
                raise UserError(f"'{path}': {missing_field(text_field, names)}.")
            for number, row in enumerate(rows, start=1):
                text = row[text_field]
                if text is None:
                    yield Malformed(f"row {number}", "it has too few columns", raw.tell())
                else:
                    yield Text(f":{number}", encodable(text), raw.tell())
        except (csv.Error, UnicodeError) as error:
            raise UserError(
                f"'{path}' cannot be read as a table after row {number} ({error}): name its encoding with --encoding, "
                "or check that it is whole."
            ) from error


def _read_parquet(path: Path, text_field: str | Callable[[Any], Any], encoding: str) -> Iterator[Text | Malformed]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            columns = names
            if isinstance(text_field, str):
                columns = [text_field if text_field in names else text_field.partition(".")[0]]
                if columns[0] not in names:
                    raise UserError(f"'{path}': {missing_field(text_field, names)}.")
            row, rows, size = 0, file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for values in zip(*batch.columns, strict=True):
                    row += 1
                    record = {column: value.as_py() for column, value in zip(columns, values, strict=True)}
                    try:
                        yield Text(f":{row}", text_of(record, text_field), size * row // rows)
                    except ValueError as error:
                        yield Malformed(f"row {row}", str(error), size * row // rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"'{path}' cannot be read as parquet: {error}. Check that the file is whole.") from error


def read_hub(
    source: str, text_field: str | Callable[[Any], Any], revision: str | None = None
) -> Generator[Text | Malformed, None, None]:
    """The texts of `hub:NAME[:CONFIG][:SPLIT]`, streamed: nothing is downloaded ahead or kept.

    The split is `train` unless given; a single part that is `train`, `validation` or `test` is a split,
    any other a config.

    Raises:
        UserError: the address is malformed, the data set, config or split is unknown, or the hub cannot be reached.
    """
    name, config, split = hub_address(source)
    import datasets

    try:
        records = datasets.load_dataset(name, config, split=split, streaming=True, revision=revision)
        for number, record in enumerate(records):
            try:
                yield Text(f":{number}", text_of(record, text_field), 0)
            except ValueError as error:
                yield Malformed(f"record {number}", str(error))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"hub data set '{name}' is unknown or private: check the name, or log in to the hub."
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"hub data set '{name}' cannot be reached ({error}): check the network, or give --data a file or a folder."
        ) from error
    except Exception as error:  # datasets passes on whatever its file readers and decoders raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"hub data set '{source.removeprefix('hub:')}' cannot be read: {reason}.") from error


def hub_revision(source: str) -> str | None:
    """The commit that a hub data set stands at now; None for a local folder, or where the hub does not say."""
    name = hub_address(source)[0]
    if Path(name).exists():
        return None
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return huggingface_hub.HfApi().dataset_info(name, timeout=20).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        logger.info("the hub does not tell the revision of '%s' (%s)", name, type(error).__name__)
        return None


def hub_address(source: str) -> tuple[str, str | None, str]:
    """Name, config and split of a `hub:` source.

    >>> hub_address("hub:deepmind/pg19"), hub_address("hub:wikitext:wikitext-2-raw-v1:test")
    (('deepmind/pg19', None, 'train'), ('wikitext', 'wikitext-2-raw-v1', 'test'))
    >>> hub_address("hub:deepmind/pg19:validation")
    ('deepmind/pg19', None, 'validation')
    """
    name, *parts = source.removeprefix("hub:").split(":")
    if not name or len(parts) > 2:
        raise UserError(f"'{source}' is no hub data set: write hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT.")
    if len(parts) == 1 and parts[0] in ("train", "validation", "test"):
        parts.insert(0, "")
    config, split = [*parts, "", ""][:2]
    return name, config or None, split or "train"
