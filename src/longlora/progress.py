"""Progress of long work: a bar with the time left on a terminal, a plain line now and then in a log."""

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

from longlora import ranks

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows how far work has come towards `total` (None: unknown) `unit`s.

    >>> with Progress("tokenising", "bytes", 100) as progress:
    ...     progress.show(50, "3 documents")
    """

    def __init__(self, what: str, unit: str, total: int | None) -> None:
        self.what, self.unit, self.total = what, unit, total

    def __enter__(self) -> "Progress":
        self._began = self._last_line = time.monotonic()
        terminal = sys.stderr.isatty() and ranks.rank() == 0
        self._bar = tqdm(total=self.total, desc=self.what, unit=f" {self.unit}", unit_scale=True) if terminal else None
        return self

    def show(self, done: int, detail: str) -> None:
        """`done` units of the work are finished; `detail` says it in the work's own terms."""
        if self._bar is not None:
            self._bar.set_postfix_str(detail, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        left = ""
        if self.total and done >= self.total / 100:  # earlier the guess is worth nothing
            seconds = (now - self._began) * max(self.total - done, 0) / done
            left = f", {done / self.total:.0%}, {tqdm.format_interval(seconds)} left"
        logger.info("%s: %s%s", self.what, detail, left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
