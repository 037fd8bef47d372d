"""Records out of JSON: lines of objects, one array, or one object, in any compression, one record in memory at a time.

Who reads documents and who reads conversations both come here, so that what is no record is told in the same way.
"""

import gzip
import io
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, cast

import orjson

from longlora.corpus.decoding import encodable
from longlora.errors import UserError, nearest

MOST_LINE_BYTES = 64_000_000
"""A longer line is no record: it would take ten times as much memory to read."""

COMPRESSED = (".gz", ".zst")
LINES = (".jsonl", ".ndjson")
_TOLD_EVERY = 1_000_000
"""Bytes after which a file is asked how far it was read, which takes as long as a short line."""

_SHORT_BYTES = 100_000
"""Of a record that orjson reads, at eight times the speed of `json` and in twelve times the record's memory."""

_ZSTD_WINDOW = 2**31
"""The largest that `zstd --long=31` writes."""


@dataclass(slots=True)
class Record:
    """One decoded record."""

    unit: str
    """What is counted: `line`, or `record` of an array."""

    number: int
    """The line's or the record's, from 1."""

    value: Any
    bytes_read: int
    """Bytes of the file consumed so far, compressed bytes of a compressed file, told every million or so."""

    @property
    def where(self) -> str:
        """`line 12`."""
        return f"{self.unit} {self.number}"


class Taking(Protocol):
    """Makes of a record what a reader takes of it; a ValueError says why it is none."""

    key: str
    """Other wherever it would make something else."""

    def __call__(self, record: Any, /) -> Any: ...


class Malformed(NamedTuple):
    """What stands in the place of a record and is none."""

    where: str
    reason: str
    bytes_read: int = 0


def inner_name(path: Path) -> str:
    """The file's name in lower case without the endings of its compression.

    >>> inner_name(Path("A.JSONL.gz")), inner_name(Path("b.txt"))
    ('a.jsonl', 'b.txt')
    """
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, IO[bytes]]]:
    """The file's content as it was before its compression, and the file itself, whose `tell` is how far it was read."""
    with path.open("rb") as raw:
        ending = path.suffix.lower()
        if ending == ".gz":
            yield gzip.GzipFile(fileobj=raw), raw
        elif ending == ".zst":
            import zstandard

            unpacking = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
            try:
                with unpacking.stream_reader(raw, read_across_frames=True, closefd=False) as stream:
                    yield io.BufferedReader(cast(io.RawIOBase, stream), 1 << 20), raw
            except zstandard.ZstdError as error:
                raise OSError(0, f"its Zstandard compression is damaged ({error})") from error
        else:
            yield raw, raw


def read_records(path: Path) -> Generator[Record | Malformed, None, None]:
    """The records of a JSON file, whether lines of objects, an array of them or a single one (its content says which).

    Where the text of an array breaks off or is no JSON, the rest cannot be read: that is the last `Malformed`.

    Raises:
        UserError: it holds neither an object nor an array of them.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    with opened(path) as (stream, raw):
        lines = inner_name(path).endswith(LINES)
        start = stream.peek(4096)[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start == b"[" and not lines:
            yield from _of_array(stream, raw)
        elif start in (b"{", b"") or lines:
            yield from _of_lines(stream, raw, single=not lines)
        else:
            raise UserError(f"'{path}' holds no records: it must be a JSON array, or lines of JSON objects.")


def _of_lines(stream: IO[bytes], raw: IO[bytes], single: bool) -> Iterator[Record | Malformed]:
    """`single`: what begins on a line may be one object over many."""
    number = bytes_read = untold = 0
    while line := stream.readline(MOST_LINE_BYTES + 1):
        number += 1
        untold += len(line)
        if untold > _TOLD_EVERY:
            bytes_read, untold = raw.tell(), 0
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) > MOST_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = stream.readline(MOST_LINE_BYTES)
            yield Malformed(f"line {number}", f"it has more than {MOST_LINE_BYTES:,} bytes", raw.tell())
        elif not line.isspace():
            try:
                yield Record("line", number, _value(line), bytes_read)
            except (ValueError, RecursionError) as error:
                if single and number == 1:
                    yield _whole(line, stream, raw)
                    return
                yield Malformed(f"line {number}", f"it is not valid JSON ({_reason(error)})", raw.tell())


def _whole(line: bytes, stream: IO[bytes], raw: IO[bytes]) -> Record | Malformed:
    text = line + stream.read(MOST_LINE_BYTES)
    if len(text) > MOST_LINE_BYTES:
        return Malformed("record 1", f"it has more than {MOST_LINE_BYTES:,} bytes", raw.tell())
    try:
        return Record("record", 1, _value(text), raw.tell())
    except (ValueError, RecursionError) as error:
        return Malformed("record 1", f"it is not valid JSON ({_reason(error)})", raw.tell())


def _value(text: bytes) -> Any:
    if len(text) < _SHORT_BYTES:
        with suppress(orjson.JSONDecodeError):  # it is strict: NaN and lone surrogates are met in data sets
            return orjson.loads(text)
    return json.loads(text)


def _of_array(stream: IO[bytes], raw: IO[bytes]) -> Iterator[Record | Malformed]:
    import ijson

    number = 0
    try:
        for number, value in enumerate(ijson.items(stream, "item", use_float=True), start=1):
            yield Record("record", number, value, raw.tell())
    except (ijson.JSONError, ValueError, RecursionError) as error:
        reason = f"the array is not valid JSON from here on ({_reason(error)}); the rest was not read"
        yield Malformed(f"record {number + 1}", reason, raw.tell())


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return " ".join(str(error).split())[:160]


def text_of(record: object, text_field: str | Callable[[Any], Any]) -> Any:
    """The text in `text_field` of a record, `doc.text` for a field within one; a null counts as an empty text.

    >>> text_of({"doc": {"text": "a"}}, "doc.text"), text_of({"doc.text": "b"}, "doc.text")
    ('a', 'b')

    Raises:
        ValueError: the reason why the record has none.
    """
    if not isinstance(text_field, str):
        return text_field(record)
    if not isinstance(record, dict):
        raise ValueError(f"the record is a {type(record).__name__}, it must be an object with named fields")
    names = [text_field] if text_field in record else text_field.split(".")
    value: object = record
    for name in names:
        if not isinstance(value, dict) or name not in value:
            raise ValueError(missing_field(text_field, value if isinstance(value, dict) else record))
        value = value[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"field '{text_field}' holds a {type(value).__name__}, it must be text: name another --text-field"
        )
    return encodable(value)


def missing_field(text_field: str, fields: Any) -> str:
    """The sentence, less its full stop, for records that have `fields` but not `text_field`."""
    has = ", ".join(str(field)[:60] for field in list(fields)[:40]) or "none"
    return (
        f"no field '{text_field}'; its fields are: {has}. "
        f"Name the one that holds the text with --text-field. {nearest(text_field, map(str, fields))}".rstrip(". ")
    )
