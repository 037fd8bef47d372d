"""How one file, or one hub data set, becomes texts: plain text, HTML, EPUB, PDF, JSONL (plain, gzip, Zstandard),
parquet, hub.

Every reader is lazy and yields `Text`: at most one text (one batch of `PARQUET_ROWS` rows for parquet) is in memory.
"""

import gzip
import io
import json
import logging
import re
import threading
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from longlora.corpus.markup import MarkupError, epub_text, html_text
from longlora.errors import UserError, nearest

logger = logging.getLogger(__name__)

PARQUET_ROWS = 32
"""Rows of a parquet file decoded at a time."""

SCANNED_LETTERS = 20
"""A PDF whose pages have fewer letters than this on average, and hold pictures, is a scan: stamps and page numbers."""

_SNIFFED_BYTES = 8192
_HTML = (".html", ".htm", ".xhtml")
_PDFIUM = threading.Lock()
"""PDFium serves one caller at a time."""

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")


class Text(NamedTuple):
    """One text of a file, where in the file it stood, and how far the file has been read."""

    where: str
    """Empty for a whole file, `:12` for line (JSONL), row (parquet) or record (hub) 12."""

    text: str
    """The text, always encodable as UTF-8."""

    bytes_read: int
    """Bytes of the file consumed so far; 0 for the hub, whose size is not known."""


class UnreadableFileError(UserError):
    """A file that holds no text to read. Named by the user it is his mistake; met in a folder it is passed over."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


def read_file(path: Path, text_field: str) -> Generator[Text, None, None]:
    """The texts of the file at `path`, in the format its name says; an unknown ending means UTF-8 text.

    Raises:
        UnreadableFileError: it is binary, or a PDF, EPUB or HTML that is encrypted, damaged or without text.
        UserError: it cannot be opened, is damaged, or a record is malformed or lacks `text_field`.
    """
    try:
        yield from _reader(path)(path, text_field)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"'{path}' cannot be read: {reason}. Check its permissions and that it is whole.") from error


def _reader(path: Path) -> Callable[[Path, str], Iterator[Text]]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return _read_jsonl
    readers = {".parquet": _read_parquet, ".pdf": _read_pdf, ".epub": _read_epub}
    return readers.get(path.suffix.lower(), _read_html if name.endswith(_HTML) else _read_text)


def _read_text(path: Path, text_field: str) -> Iterator[Text]:
    kind = "binary or not UTF-8"
    if _head(path).startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UnreadableFileError(kind, f"'{path}' is UTF-16 text: save it as UTF-8.")
    _refuse_binary(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableFileError(
            kind, f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start}): convert it to UTF-8."
        ) from error
    yield Text("", text, path.stat().st_size)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_SNIFFED_BYTES)


def _refuse_binary(path: Path) -> None:
    if b"\0" in _head(path):
        raise UnreadableFileError(
            "binary or not UTF-8",
            f"'{path}' is a binary file: give UTF-8 text, .html, .epub, .pdf, .jsonl, .jsonl.gz, .jsonl.zst, "
            ".parquet or a folder.",
        )


def _read_html(path: Path, text_field: str) -> Iterator[Text]:
    if not _head(path).startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, whose every other byte may be zero
        _refuse_binary(path)
    yield _from_markup(path, lambda: html_text(path.read_bytes()))


def _read_epub(path: Path, text_field: str) -> Iterator[Text]:
    yield _from_markup(path, lambda: epub_text(path))


def _from_markup(path: Path, text_of: Callable[[], str]) -> Text:
    try:
        return Text("", _encodable(text_of()), path.stat().st_size)
    except MarkupError as error:
        raise UnreadableFileError(error.kind, f"'{path}' {error}") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[Text]:
    with path.open("rb") as raw:
        stream: IO[bytes] = raw
        if path.suffix.lower() == ".gz":
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif path.suffix.lower() == ".zst":
            from pyarrow import CompressedInputStream

            stream = io.BufferedReader(CompressedInputStream(raw, "zstd"), 1 << 20)
        for number, line in enumerate(stream, start=1):
            if line.isspace():
                continue
            place = f"'{path}', line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{place}: not valid JSON ({error}). Each line must be one object "
                    f'such as {{"{text_field}": "…"}}: mend or remove the line.'
                ) from error
            yield Text(f":{number}", _field(record, text_field, place), raw.tell())


def _field(record: object, text_field: str, place: str) -> str:
    """The text in `text_field` of a record; a null counts as an empty text.

    Raises:
        UserError: `record` is no object, has no such field, or holds something other than text there.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: the record is a {type(record).__name__}, it must be an object with named fields.")
    if text_field not in record:
        raise missing_field(text_field, list(record), place)
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(
            f"{place}: field '{text_field}' holds a {type(text).__name__}, it must be text: name another --text-field."
        )
    return _encodable(text)


def missing_field(text_field: str, fields: list[str], place: str) -> UserError:
    """The sentence for records that have `fields` but not `text_field`."""
    has = ", ".join(str(field) for field in fields) or "none"
    return UserError(
        f"{place}: no field '{text_field}'; its fields are: {has}. "
        f"Name the one that holds the text with --text-field. {nearest(text_field, map(str, fields))}".rstrip()
    )


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which JSON and PDF can carry but UTF-8 cannot, replaced by U+FFFD."""
    return _LONE_SURROGATES.sub("\ufffd", text)


def _read_parquet(path: Path, text_field: str) -> Iterator[Text]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            if text_field not in file.schema_arrow.names:
                raise missing_field(text_field, file.schema_arrow.names, f"'{path}'")
            row, rows, size = 0, file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    row += 1
                    text = _field({text_field: value.as_py()}, text_field, f"'{path}', row {row}")
                    yield Text(f":{row}", text, size * row // rows)
    except pyarrow.ArrowException as error:
        raise UserError(f"'{path}' cannot be read as parquet: {error}. Check that the file is whole.") from error


def _read_pdf(path: Path, text_field: str) -> Iterator[Text]:
    """By PDFium, which tells words apart where others run them together: it knows where each letter stands."""
    import pypdfium2
    from pypdfium2 import raw

    try:
        with _PDFIUM, pypdfium2.PdfDocument(path) as document:
            pages, pictures = [], False
            for page in document:
                pages.append(_pdf_page(page.get_textpage().get_text_bounded()))
                pictures = pictures or any(True for _ in page.get_objects(filter=[raw.FPDF_PAGEOBJ_IMAGE]))
    except pypdfium2.PdfiumError as error:
        if error.err_code in (raw.FPDF_ERR_PASSWORD, raw.FPDF_ERR_SECURITY):
            raise UnreadableFileError(
                "encrypted PDF", f"'{path}' is an encrypted PDF: save it without a password first."
            ) from error
        raise UnreadableFileError(
            "damaged PDF", f"'{path}' cannot be read as PDF ({error}): check that the file is whole."
        ) from error
    empty = sum(not page for page in pages)
    scanned = pictures and sum(map(_letters, pages)) < SCANNED_LETTERS * len(pages)
    if empty == len(pages) or scanned:
        raise UnreadableFileError(
            "scanned PDF, no text layer",
            f"'{path}' has {'no' if empty == len(pages) else 'hardly any'} text layer on its {len(pages)} pages, they "
            "are pictures: run OCR on it first (ocrmypdf).",
        )
    if empty:
        logger.info("'%s': %d of %d pages have no text (pictures or blank)", path, empty, len(pages))
    yield Text("", "\n\n".join(page for page in pages if page), path.stat().st_size)


def _pdf_page(text: str) -> str:
    r"""A page's text as PDFium has it, words that were broken at the end of a line made whole.

    >>> _pdf_page("The hyphen\x02ated US\x02ASCII\r\nline. ")
    'The hyphenated US-ASCII\nline.'
    """
    text = re.sub("(?<=[^\\W\\dA-Z_])\x02(?=[^\\W\\dA-Z_])", "", text).replace("\x02", "-")
    return _encodable(text.replace("\r\n", "\n").replace("\0", "")).strip()


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def read_hub(source: str, text_field: str) -> Generator[Text, None, None]:
    """The texts of `hub:NAME[:CONFIG][:SPLIT]`, streamed: nothing is downloaded ahead or kept.

    The split is `train` unless given; a single part that is `train`, `validation` or `test` is a split,
    any other a config.

    Raises:
        UserError: the address is malformed, the data set, config or split is unknown, the hub cannot be reached,
            or a record lacks `text_field`.
    """
    name, config, split = hub_address(source)
    import datasets

    try:
        records = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(records):
            yield Text(f":{number}", _field(record, text_field, f"'{source}', record {number}"), 0)
    except UserError:
        raise
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
