"""The Python standard library's own source as a corpus: on every machine, long documents, no network.

The split is by file: a file is held out when the CRC-32 of its path inside the standard library is a
multiple of `HELD_OUT_ONE_IN`, so that the same module is held out whatever the Python version or platform,
and the shipped demo model has never seen one.
"""

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 16
"""One file in this many is held out for evaluation."""

_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data")
"""Folders that are not the library's own text: third-party code, byte code, generated tables."""


def standard_library_folder() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(relative_path: str) -> bool:
    """Whether the module at `relative_path` (posix, inside the standard library) is kept for evaluation.

    >>> [name for name in ("argparse.py", "typing.py", "turtle.py") if is_held_out(name)]
    []
    """
    return zlib.crc32(relative_path.encode()) % HELD_OUT_ONE_IN == 0


def standard_library_files(held_out: bool | None = None, root: Path | None = None) -> Iterator[Path]:
    """The library's source files in a fixed order; `held_out` selects one side of the split, None both."""
    root = root or standard_library_folder()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(part in _LEFT_OUT for part in relative.parts):
            continue
        if held_out is None or is_held_out(relative.as_posix()) == held_out:
            yield path
