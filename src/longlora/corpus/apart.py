"""Files in formats whose parsers strangers can lead astray (HTML, EPUB, PDF), read in a process of their own.

It may take so much processor time and memory for a file and no more: a file that takes more is refused with a sentence,
and so is one on which the parser itself breaks down. The process is kept for the next file.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

SECONDS, SECONDS_A_MEGABYTE = 2, 3
"""Processor time for a file and for each 10^6 of its bytes; measured: a page from the web takes 1 to 2 s a megabyte."""

WALL_CLOCK = 6
"""So many times longer it may take by the clock, on a machine that has other things to do."""

MEGABYTES, MEGABYTES_A_MEGABYTE, MOST_MEGABYTES = 120, 40, 2000
"""Memory for a file, for each 10^6 of its bytes, and for any file at all, in 10^6 bytes."""

STARTING = 90
"""Seconds more by the clock for the first file of a format, whose parsers the process has yet to import."""

KEPT = 2
"""Processes that wait for the next file."""

_PARSERS = {
    "html": "longlora.corpus.markup:html_text",
    "epub": "longlora.corpus.markup:epub_text",
    "pdf": "longlora.corpus.pdf:pdf_text",
}
_LIBRARIES = {"html": ("lxml.etree", "trafilatura"), "epub": ("lxml.etree",), "pdf": ("pypdfium2",)}
_idle: list["_Process"] = []

logger = logging.getLogger(__name__)


class UnparsableError(Exception):
    """The file holds no text to read: its `kind` in two words, and as message what is wrong and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_apart(path: Path, format_name: str, encoding: str = "auto") -> str:
    """The text of the file at `path`, which is `html`, `epub` or `pdf`.

    Raises:
        UnparsableError: it is damaged, without text, or takes too much time or memory.
        OSError: it cannot be opened.
    """
    size = path.stat().st_size
    try:
        process = _idle.pop()
    except IndexError:
        process = _Process()
    seconds = SECONDS + SECONDS_A_MEGABYTE * size / 1e6
    memory = min(MEGABYTES + MEGABYTES_A_MEGABYTE * size / 1e6, MOST_MEGABYTES)
    request = {"path": str(path.absolute()), "format": format_name, "encoding": encoding}
    reply = process.ask(request | {"seconds": seconds, "memory": int(memory * 1e6)}, WALL_CLOCK * seconds)
    if reply is None:
        raise UnparsableError("takes too much to read", _too_much(f"{seconds:.0f} s, or breaks its reader"))
    if reply.pop("whole", True) and len(_idle) < KEPT:
        _idle.append(process)
    else:
        process.end()
    if "memory" in reply:
        raise UnparsableError("takes too much to read", _too_much(f"{memory:.0f} MB of memory"))
    for note in reply.get("notes", ()):
        logger.info("'%s': %s", path, note)
    if "kind" in reply:
        raise UnparsableError(reply["kind"], reply["message"])
    return str(reply["text"])


def _too_much(what: str) -> str:
    return f"takes more than {what} to read, which no ordinary document does: save it as plain text."


class _Process:
    """The other end."""

    def __init__(self) -> None:
        package = str(Path(__file__).parents[2])
        code = f"import sys; sys.path.insert(0, {package!r}); from longlora.corpus.apart import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._in, self._out = self._process.stdin, self._process.stdout
        self._knows: set[str] = set()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The reply; None where the process does not live to give one."""
        assert self._in
        assert self._out
        if request["format"] not in self._knows:
            seconds += STARTING
            self._knows.add(request["format"])
        clock = threading.Timer(seconds, self._process.kill)
        clock.start()
        reply = None
        try:
            self._in.write(json.dumps(request).encode() + b"\n")
            self._in.flush()
            line = self._out.readline()
            reply = json.loads(line) if line.endswith(b"\n") else None
        except OSError:  # it ended before it was asked
            pass
        finally:
            clock.cancel()
            if reply is None:
                self.end()
        return reply

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._in, self._out):
            with contextlib.suppress(OSError):
                assert stream
                stream.close()


class _Notes(logging.Handler):
    """Keeps what a parser has to say of the file."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def serve() -> None:
    """What the process does: a line of JSON in, a line out, until there are no more."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no reply
    notes = _Notes()
    logging.getLogger("longlora").setLevel(logging.INFO)
    logging.getLogger("longlora").addHandler(notes)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        notes.said.clear()
        try:
            for name in _LIBRARIES[request["format"]]:
                import_module(name)
            _limit(request["seconds"], request["memory"])
            reply: dict[str, Any] = {"text": _parse(request), "notes": notes.said}
        except MemoryError:
            reply = {"memory": True, "whole": False}
        except UnparsableError as error:
            reply = {"kind": error.kind, "message": str(error)}
        except Exception as error:  # whatever else a parser raises for what it cannot read
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            message = f"cannot be read ({reason}): check that the file is whole."
            reply = {"kind": f"damaged {request['format'].upper()}", "message": message, "whole": False}
        try:
            written = json.dumps(reply).encode()
        except MemoryError:
            written = b'{"memory": true, "whole": false}'
        out.write(written + b"\n")
        out.flush()
        del reply, written


def _parse(request: dict[str, Any]) -> str:
    module, _, function = _PARSERS[request["format"]].partition(":")
    parser = getattr(import_module(module), function)
    path = Path(request["path"])
    return parser(path.read_bytes(), request["encoding"]) if request["format"] == "html" else parser(path)


def _limit(seconds: float, memory: int) -> None:
    """What this process may still take. Windows has no such limits; there the clock alone ends it."""
    try:
        import resource
    except ImportError:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + seconds) + 1, most))
    with contextlib.suppress(OSError, ValueError):  # macOS tells no process its size, and keeps to no limit
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, most))
