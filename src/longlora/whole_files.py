"""Files that are there whole or not at all: written in one step, known by their checksums; and a full disk."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from longlora.errors import UserError

MANIFEST = "manifest.json"
"""Beside the files of a folder: their sizes and checksums."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of the errors that mean a full disk."""


def write_whole(file: Path, text: str) -> None:
    """Replace `file` in one step, so that a reader or a kill never meets half of it."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", errors="replace")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def write_json(file: Path, document: Any, ascii: bool = True) -> None:
    """`write_whole` of a document as JSON; `ascii` writes other letters as their numbers."""
    write_whole(file, json.dumps(document, indent=1, ensure_ascii=ascii) + "\n")


def write_manifest(folder: Path) -> None:
    """Note size and SHA-256 of every file below `folder`: what was written is then known to be whole."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    noted = {str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    write_json(folder / MANIFEST, noted)


def what_is_wrong(folder: Path, verify: bool) -> str | None:
    """What keeps `folder` from being what its manifest says, in words, or None."""
    noted = read_json(folder / MANIFEST)
    if not noted:
        return f"{MANIFEST} is missing or damaged"
    for name, facts in noted.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts["bytes"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {facts['bytes']:,}"
        if verify and _sha256(file) != facts["sha256"]:
            return f"{name} is not as it was written"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def is_full(error: BaseException, folder: Path) -> bool:
    """Whether `error` came of a full disk: libraries that write in other languages lose the number of the error."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) in NO_ROOM:
            return True
        if any(words in str(seen) for words in ("No space left", "os error 28", "os error 122", "quota exceeded")):
            return True
        seen = seen.__cause__ or seen.__context__
    with suppress(OSError):
        return shutil.disk_usage(folder).free < 2**20
    return False


def read_yaml(flag: str, path: str) -> Any:
    """What the YAML file that `flag` names holds.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    import yaml  # here, or `longlora --help` would wait for it

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}): name a YAML file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} is not YAML: {' '.join(str(error).split())}.") from error


def read_json(file: Path) -> dict[str, Any] | None:
    """The table in `file`; None where it is missing or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
