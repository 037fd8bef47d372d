"""Files of pairs: LongAlpaca's JSON array and chat messages in JSONL, read with line numbers, written as they come."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from longlora.corpus.decoding import encodable
from longlora.corpus.records import Malformed, read_records
from longlora.errors import UserError
from longlora.longqa.pairs import MalformedPairError, Pair, longalpaca_record, messages_record, pair_from_record


def read_pairs(path: str | Path) -> list[Pair]:
    """All pairs of a file, in either format (which one, its content says, not its name).

    Raises:
        UserError: it cannot be read, holds no pairs, or a record is malformed; the sentence names the line.
    """
    pairs: list[Pair] = []
    for pair in iterate_pairs(path):
        if isinstance(pair, Malformed):
            raise UserError(
                f"'{path}', {pair.where}: {pair.reason}. Mend or remove it; `longlora longqa check {path}` lists all."
            )
        pairs.append(pair)
    if not pairs:
        raise UserError(f"'{path}' holds no pairs: give a file that `longlora longqa build` wrote, or LongAlpaca's.")
    return pairs


def iterate_pairs(path: str | Path) -> Iterator[Pair | Malformed]:
    """The pairs of a file as they are read, with a `Malformed` in the place of each record that is none.

    Raises:
        UserError: the file cannot be read, or holds neither a JSON array nor JSON objects.
    """
    try:
        for record in read_records(Path(path)):
            yield record if isinstance(record, Malformed) else _pair(record.value, record.where)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"'{path}' cannot be read ({reason}): name a file of pairs.") from error


def _pair(record: Any, where: str) -> Pair | Malformed:
    try:
        return pair_from_record(record, where)
    except MalformedPairError as error:
        return Malformed(where, str(error))


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
    return encodable(json.dumps(record, ensure_ascii=False))


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
            for pair in _lines_of(self.lines, _whole_lines(self.lines)):
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
        self._lock = FileLock(self.lines.with_name(f".{self.lines.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
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
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)
        if self.lines.exists() and not self.lines.stat().st_size:
            self.lines.unlink()


def _lines_of(path: Path, size: int) -> Iterator[Pair | Malformed]:
    """The pairs in the first `size` bytes."""
    with path.open("rb") as file:
        for number, line in enumerate(file.read(size).splitlines(), start=1):
            if line.strip():
                try:
                    yield _pair(json.loads(line), f"line {number}")
                except (ValueError, RecursionError) as error:
                    yield Malformed(f"line {number}", f"it is not valid JSON ({error})")


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
