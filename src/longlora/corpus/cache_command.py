"""`longlora cache`: what tokenised data is kept, and what of it may go."""

import shutil
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from longlora.corpus.shards import read_manifest
from longlora.corpus.tokens import named_cache_folder
from longlora.settings import CacheSettings

_DAY = 86_400


def cache(settings: CacheSettings) -> dict[str, Any]:
    """Run `longlora cache`.

    Returns:
        `{"folder", "entries": [{"key", "data", "documents", "tokens", "bytes", "complete", "days_unused", "removed"}],
        "bytes", "removed_bytes"}`, the entry unused for longest last. An entry that a process is writing stays.
    """
    folder = named_cache_folder(settings.cache) / "corpora"
    entries = sorted(map(_described, folder.glob("*/")), key=lambda entry: entry["days_unused"])
    for entry in entries:
        old = settings.unused_days is not None and entry["days_unused"] >= settings.unused_days
        entry["removed"] = (old or (settings.unfinished and not entry["complete"])) and _remove(folder / entry["key"])
    result = {
        "folder": str(folder),
        "entries": entries,
        "bytes": sum(entry["bytes"] for entry in entries if not entry["removed"]),
        "removed_bytes": sum(entry["bytes"] for entry in entries if entry["removed"]),
    }
    if not settings.json:
        print(_table(result))
    return result


def _described(entry: Path) -> dict[str, Any]:
    manifest = read_manifest(entry)
    facts, last, complete = manifest or ({}, None, False)
    files = [file.stat() for file in entry.iterdir()]
    used = max((file.st_mtime for file in files), default=entry.stat().st_mtime)
    return {
        "key": entry.name,
        "data": facts.get("data", []),
        "documents": last.documents if last else 0,
        "tokens": last.tokens if last else 0,
        "bytes": sum(file.st_size for file in files),
        "complete": complete,
        "days_unused": round(max(0.0, time.time() - used) / _DAY, 2),
    }


def _remove(entry: Path) -> bool:
    try:
        with FileLock(entry.with_name(f"{entry.name}.lock"), timeout=0):
            shutil.rmtree(entry)
    except Timeout:
        return False
    entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
    return True


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['folder']}: {result['bytes'] / 1e6:,.1f} MB"]
    for entry in result["entries"]:
        state = "removed" if entry["removed"] else "" if entry["complete"] else "unfinished"
        lines.append(
            f"  {entry['key'][:8]}  {entry['bytes'] / 1e6:>10,.1f} MB  {entry['documents']:>10,} documents  unused for "
            f"{entry['days_unused']:.1f} days  {state:<10}  {', '.join(entry['data'])}"
        )
    if result["removed_bytes"]:
        lines.append(f"removed {result['removed_bytes'] / 1e6:,.1f} MB")
    return "\n".join(lines)
