"""Files of pairs: LongAlpaca's JSON array and chat messages in JSONL, read with line numbers, written as they come."""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from longlora.errors import UserError
from longlora.longqa.pairs import MalformedPairError, Pair, longalpaca_record, messages_record, pair_from_record

_LONE_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANKS = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Malformed:
    """A record that is no pair."""

    where: str
    """`line 12`, or `record 3 (line 40)` of an array."""

    reason: str


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a file, in either format (which one, its content says, not its name).

    Raises:
        UserError: it cannot be read, holds no pairs, or a record is malformed; the sentence names its line.
    """
    pairs = []
    for pair in iterate_pairs(path):
        if isinstance(pair, Malformed):
            raise UserError(
                f"'{path}', {pair.where}: {pair.reason}. Mend or remove it; "
                f"`longlora longqa check {path}` lists every malformed pair."
            )
        pairs.append(pair)
    if not pairs:
        raise UserError(f"'{path}' holds no pairs: give a file that `longlora longqa build` wrote, or LongAlpaca's.")
    return pairs


def iterate_pairs(path: str | Path) -> Iterator[Pair | Malformed]:
    """The pairs of a file as they are read, with a `Malformed` in the place of each record that is none.

    Records of both formats may stand side by side. Where the text of a JSON array breaks off or is no JSON, the rest
    cannot be read: that is the last `Malformed`.

    Raises:
        UserError: the file cannot be read, or is neither a JSON array nor lines of JSON.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        if start == b"[":
            yield from _of_array(path.read_text(encoding="utf-8-sig"))
        elif start in (b"{", b""):
            with path.open(encoding="utf-8-sig") as lines:
                yield from _of_lines(lines)
        else:
            raise UserError(f"'{path}' is no file of pairs: it must be a JSON array or lines of JSON objects.")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): name a file of pairs.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text ({error.reason} at byte {error.start}).") from error


def _of_lines(lines: Iterable[str]) -> Iterator[Pair | Malformed]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"line {number}"
            try:
                yield pair_from_record(json.loads(line), where)
            except (json.JSONDecodeError, RecursionError) as error:
                yield Malformed(where, f"it is not valid JSON ({error})")
            except MalformedPairError as error:
                yield Malformed(where, str(error))


def _of_array(text: str) -> Iterator[Pair | Malformed]:
    """Record by record, so that each has its line and one that is no pair does not hide those after it."""
    decoder = json.JSONDecoder()
    at = _after_blanks(text, text.index("[") + 1)
    number, line, counted_to = 0, 1, 0
    while text[at : at + 1] != "]":
        number += 1
        line, counted_to = line + text.count("\n", counted_to, at), at
        where = f"record {number} (line {line})"
        try:
            record, at = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError) as error:
            yield Malformed(where, f"the array is not valid JSON from here on ({error}); the rest was not read")
            return
        try:
            yield pair_from_record(record, where)
        except MalformedPairError as error:
            yield Malformed(where, str(error))
        at = _after_blanks(text, at)
        if text[at : at + 1] == ",":
            at = _after_blanks(text, at + 1)
        elif text[at : at + 1] != "]":
            yield Malformed(where, "no comma or closing bracket follows; the rest was not read")
            return


def _after_blanks(text: str, at: int) -> int:
    match = _BLANKS.match(text, at)
    return match.end() if match else at


def write_pairs(path: str | Path, pairs: Iterable[Pair]) -> int:
    """Write `pairs`, as LongAlpaca's array if the name ends in `.json`, else as lines of chat messages; their number.

    The file is replaced in one step; pairs are taken one at a time.

    Raises:
        UserError: a pair has a system message or several turns, and the format is LongAlpaca's.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with beside.open("w", encoding="utf-8") as file:
            for count, pair in enumerate(pairs, start=1):
                if path.suffix == ".json":
                    file.write("[\n" if count == 1 else ",\n")
                file.write(_record_line(pair, path))
                file.write("" if path.suffix == ".json" else "\n")
            if path.suffix == ".json":
                file.write("\n]\n" if count else "[]\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return count


def _record_line(pair: Pair, path: Path) -> str:
    try:
        record = longalpaca_record(pair) if path.suffix == ".json" else messages_record(pair)
    except ValueError as error:
        raise UserError(f"LongAlpaca's JSON has one question and one answer, but {error}: write .jsonl.") from error
    return _LONE_SURROGATES.sub("\ufffd", json.dumps(record, ensure_ascii=False))


class GrowingPairs:
    """A file of pairs that grows by one whole record at a time, so that a kill loses nothing that was there.

    JSONL grows in its place. An array would have to be rewritten for each pair: it grows as lines in
    `FILE.json.part.jsonl`, and becomes the array when the work is done.
    """

    def __init__(self, path: str | Path, resume: bool) -> None:
        """Look at what is there; nothing is written before `with`.

        Raises:
            UserError: it holds something and `resume` is off, is no file of pairs, or its folder does not exist.
        """
        self.path = Path(path)
        self.lines = self.path if self.path.suffix != ".json" else self.path.with_name(self.path.name + ".part.jsonl")
        there = [file for file in dict.fromkeys((self.path, self.lines)) if file.exists() and file.stat().st_size]
        if there and not resume:
            raise UserError(f"--output {there[0]} already holds pairs: give --resume to go on, or name another file.")
        if not self.path.parent.is_dir():
            raise UserError(f"--output {path}: there is no folder '{self.path.parent}', make it or name another file.")

    def present(self) -> list[Pair]:
        """The pairs that an earlier run left; a last line that a kill cut short does not count.

        Raises:
            UserError: a record is malformed.
        """
        if self.lines.exists():
            pairs = []
            with self.lines.open("rb") as file:
                kept = file.read(_whole_lines(self.lines)).decode("utf-8")
            for pair in _of_lines(kept.split("\n")):
                if isinstance(pair, Malformed):
                    raise UserError(f"--resume: '{self.lines}', {pair.where}: {pair.reason}. Mend or remove the line.")
                pairs.append(pair)
            return pairs
        return read_pairs(self.path) if self.path.exists() and self.path.stat().st_size else []

    def __enter__(self) -> "GrowingPairs":
        if not self.lines.exists() and self.path.exists() and self.path.stat().st_size:
            write_pairs(self.lines, self.present())
        try:
            self._file: IO[bytes] = self.lines.open("ab")
        except OSError as error:
            raise UserError(f"--output {self.lines} cannot be written ({error.strerror}).") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise UserError(f"--output {self.path} is in use by another run: wait, or name another file.") from error
        self._file.truncate(_whole_lines(self.lines))
        return self

    def append(self, pair: Pair) -> None:
        """Add one pair; it is on its way to the disk when this returns."""
        self._file.write((_record_line(pair, self.lines) + "\n").encode())
        self._file.flush()

    def finish(self) -> None:
        """The work is done: an array gets its final form."""
        if self.lines != self.path:
            write_pairs(self.path, self.present())
            self.lines.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if self.lines.exists() and not self.lines.stat().st_size:
            self.lines.unlink()


def _whole_lines(path: Path) -> int:
    """Bytes of `path` up to its last end of a line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - 1_048_576)
            file.seek(begin)
            newline = file.read(end - begin).rfind(b"\n")
            if newline >= 0:
                return begin + newline + 1
            end = begin
    return 0
