"""Trials that survive a kill: one JSON line each, appended as it comes, and what is there already is not done again.

passkey.jsonl   {"about": {…}}                                         what the trials have in common
                {"trial": "1024/0.25/0", "correct": true, …}           one line a trial
passkey.json    the results document, once all trials are there
passkey.1.jsonl passkey.1.json     an earlier evaluation, finished, that another one took the place of
"""

import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from longlora import ranks
from longlora.errors import UserError

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class TrialLog:
    """The trials of one evaluation so far; in a file, or only in memory."""

    def __init__(self, file: Path | None = None) -> None:
        self.file = file
        self.records: dict[str, Record] = {}
        """What each trial came to, by its name."""
        self._handle: Any = None
        self._empty = False

    @staticmethod
    def refuse_to_drop(file: Path | None, resume: bool) -> None:
        """For a check before the work begins: raises where `opened` would because `resume` is off."""
        if file is None or resume or not file.is_file() or file.with_suffix(".json").is_file():
            return
        trials = file.read_bytes().count(b"\n") - 1
        if trials > 0:
            raise UserError(
                f"{file} holds {trials:,} trials of an evaluation that was stopped: give --resume to go on with them, "
                "or name another --output."
            )

    @classmethod
    @contextmanager
    def opened(
        cls, file: Path | None, about: Mapping[str, Any], resume: bool, drop_others: bool = False
    ) -> Iterator["TrialLog"]:
        """The log in `file`, held for this process; without a file, one that is forgotten.

        Of several processes the first one holds and writes the file; the others know what it read, and append the same.

        A last line that a kill cut short is dropped. With the first new trial the results document beside the log goes:
        it is written anew when all trials are there, and so tells a finished evaluation from one that was stopped. What
        ends without a trial leaves everything as it was.

        Args:
            file: created, with its folder, if it is not there.
            about: what the trials depend on (model, seed, …); it must be the same when going on.
            resume: go on with what the file holds; else a finished evaluation there is set aside.
            drop_others: what it holds about something else is dropped, not refused.

        Raises:
            UserError: the file holds trials of an evaluation that was stopped and `resume` is off, or they are about
                something else; the file is held by another process, or cannot be written.
        """
        if file is None:
            yield cls()
            return
        log = cls()
        with ExitStack() as held:

            def read() -> dict[str, Record]:
                nonlocal log
                log = held.enter_context(cls._held(file, about, resume, drop_others))
                return log.records

            log.records = ranks.first_alone(read)
            yield log

    @classmethod
    @contextmanager
    def _held(cls, file: Path, about: Mapping[str, Any], resume: bool, drop_others: bool) -> Iterator["TrialLog"]:
        """`opened`, in the process that writes."""
        log = cls(file)
        cls.refuse_to_drop(file, resume)
        try:
            aside = {} if resume else _set_aside(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = file.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}): name another --output.") from error
        with handle:
            lock = FileLock(file.with_name(f".{file.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(
                    f"{file} is in use by another evaluation: wait until it has ended, or name another --output."
                ) from error
            log._handle = handle
            try:
                log._begin(dict(about), drop_others)
                if aside:
                    logger.info("the earlier results are in %s now", aside[file.with_suffix(".json")])
                yield log
            finally:
                if log._empty:
                    file.unlink(missing_ok=True)
                    for before, now in aside.items():
                        now.rename(before)
                lock.release()
                Path(lock.lock_file).unlink(missing_ok=True)

    def append(self, trial: str, record: Mapping[str, Any]) -> None:
        """Keep what `trial` came to; it is on disk when this returns."""
        if self.file is not None:
            self.file.with_suffix(".json").unlink(missing_ok=True)
        self.records[trial] = dict(record)
        self._empty = False
        self._write({"trial": trial, **record})

    def _begin(self, about: Record, drop_others: bool) -> None:
        about = json.loads(json.dumps(about))
        header, *trials = self._whole_lines() or [{}]
        if not trials or (drop_others and header["about"] != about):
            self._empty = True
            self._handle.truncate(0)
            self._write({"about": about})
            return
        for name in sorted(about | header["about"]):
            before, now = header["about"].get(name), about.get(name)
            if before != now:
                raise UserError(
                    f"--resume: '{name}' was {before!r} for the trials in {self.file} and is now {now!r}; go on with "
                    "the first value, or name another --output."
                )
        self.records = {line.pop("trial"): line for line in trials}

    def _whole_lines(self) -> list[Record]:
        """The file's records; a last line that a kill cut short is removed."""
        self._handle.seek(0)
        *texts, last = self._handle.read().split("\n")
        if last:
            self._handle.truncate(sum(len(text.encode()) + 1 for text in texts))
        lines = []
        for number, text in enumerate(texts, 1):
            try:
                lines.append(json.loads(text))
                lines[-1]["about" if number == 1 else "trial"]
            except (json.JSONDecodeError, TypeError, KeyError) as error:
                raise UserError(
                    f"{self.file}, line {number} is no record of a trial: remove the file, or name another --output."
                ) from error
        return lines

    def _write(self, record: Record) -> None:
        if self._handle is None:
            return
        self._handle.write(json.dumps(record) + "\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())


def _set_aside(file: Path) -> dict[Path, Path]:
    """Rename a finished evaluation's log and document, so that another one can take their place: old names to new."""
    document = file.with_suffix(".json")
    if not (file.is_file() and document.is_file()):
        return {}
    names = (f"{file.stem}.{number}" for number in itertools.count(1))
    name = next(name for name in names if not any(file.parent.glob(f"{name}.json*")))
    aside = {each: each.with_name(name + each.suffix) for each in (file, document)}
    for before, now in aside.items():
        before.rename(now)
    return aside
