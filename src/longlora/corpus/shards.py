"""An entry of the cache, written shard by shard so that a kill, a full disk or a malformed record loses one at most.

    tokens.bin       all documents end to end, uint16 or uint32
    offsets.bin      (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
    names.bin        the names end to end, UTF-8
    name_ends.bin    (documents,) int64: where each ends in names.bin
    manifest.jsonl   what the tokens were made from; a line for each shard, with how far the sources had been read; and
                     a last line when all of them are

The files only grow, and what lies beyond the manifest's last shard is cut off before an entry is gone on with: 16 bytes
and the name are kept of each document, and none of it in memory.
"""

import io
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np

from longlora.corpus.documents import Position
from longlora.corpus.encoding import Encoded

logger = logging.getLogger(__name__)

SHARD_TOKENS = 4_000_000
"""Tokens after which a shard is complete (a few seconds of work)."""

_FILES = {"tokens": "tokens.bin", "offsets": "offsets.bin", "names": "names.bin", "name_ends": "name_ends.bin"}


@dataclass(frozen=True)
class Shard:
    """What a line of the manifest says: counts from the beginning of the entry, and how far the sources were read."""

    documents: int = 0
    tokens: int = 0
    names_bytes: int = 0
    largest_token: int = 0
    file: int = 0
    texts: int = 0
    skipped: Mapping[str, int] = field(default_factory=dict)
    malformed: Sequence[str] = ()

    def sizes(self, token_bytes: int) -> dict[str, int]:
        """Bytes of each file at its end."""
        return {
            "tokens": self.tokens * token_bytes,
            "offsets": 8 * (self.documents + 1),
            "names": self.names_bytes,
            "name_ends": 8 * self.documents,
        }


class Names(Sequence[str]):
    """The names of an entry's documents, read from the disk as they are asked for."""

    def __init__(self, names: np.ndarray, ends: np.ndarray) -> None:
        self._names, self._ends = names, ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = int(self._ends[index - 1]) if index else 0
        return self._names[begin : int(self._ends[index])].tobytes().decode("utf-8", errors="replace")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents end to end as tokens; all of it stays on disk."""

    tokens: np.ndarray
    """(T,) uint16 or uint32, memory-mapped."""

    offsets: np.ndarray
    """(documents + 1,) int64: where each document begins, and the end of the last; memory-mapped."""

    names: Sequence[str]
    """(documents,) names, as `Document.name`."""

    largest_token: int
    """The largest token id, to be checked against the model's vocabulary."""

    from_cache: bool = False
    """The tokens were there already; nothing was tokenised."""

    folder: Path | None = None
    """The cache entry; None for a corpus made in memory."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, (n,), a view."""
        index = range(len(self))[index]
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def __reduce__(self) -> tuple[Any, ...]:
        # A data loader's worker process maps the file again: pickling a memory map would copy all of it.
        if self.folder is None:
            return TokenizedCorpus, (self.tokens, self.offsets, self.names, self.largest_token, self.from_cache)
        return open_entry, (self.folder, self.from_cache)


def read_manifest(folder: Path) -> tuple[dict[str, Any], Shard, bool] | None:
    """An entry's facts, its last shard, and whether it is complete; None where there is no manifest to read."""
    try:
        lines = (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        facts, *shards = [json.loads(line) for line in lines if line.endswith("\n")]
        complete = bool(shards) and shards[-1] == {"complete": True}
        last = Shard(**shards[-2 if complete else -1]) if len(shards) > complete else Shard()
        np.dtype(facts["dtype"])
        return facts, last, complete
    except (OSError, ValueError, TypeError, KeyError):
        return None


def open_entry(folder: Path, from_cache: bool = False) -> TokenizedCorpus | None:
    """The entry in `folder`; None where it is not there, not complete or damaged."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest[2]:
        return None
    facts, last, _ = manifest
    sizes = last.sizes(np.dtype(facts["dtype"]).itemsize)
    try:
        if any((folder / name).stat().st_size != sizes[kind] for kind, name in _FILES.items()):
            raise ValueError("a size is not the manifest's")
        kinds = {"tokens": facts["dtype"], "offsets": "int64", "names": "uint8", "name_ends": "int64"}
        maps = {kind: np.memmap(folder / name, dtype=kinds[kind], mode="r") for kind, name in _FILES.items()}
        if int(maps["offsets"][-1]) != last.tokens:
            raise ValueError("the offsets do not end with the tokens")
    except (OSError, ValueError):
        logger.warning("the tokens in %s are damaged: making them anew", folder)
        shutil.rmtree(folder)
        return None
    names = Names(maps["names"], maps["name_ends"])
    return TokenizedCorpus(maps["tokens"], maps["offsets"], names, last.largest_token, from_cache, folder)


class Shards:
    """Writes an entry, after what is there of it already."""

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder, self.facts = folder, dict(facts)
        self._token_type = np.dtype(self.facts["dtype"])
        self.last = Shard()
        """The last shard that is safe."""
        self.tokens = self.documents = self._names_bytes = self._largest = 0
        self._begun = 0
        """Tokens of the document that goes on in the next batch."""

    def __enter__(self) -> "Shards":
        manifest = read_manifest(self.folder)
        sizes = manifest[1].sizes(self._token_type.itemsize) if manifest else {}
        whole = manifest is not None and manifest[0] == self.facts
        for kind, name in _FILES.items():
            path = self.folder / name
            whole = whole and path.exists() and path.stat().st_size >= sizes[kind]
        if not whole:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            (self.folder / _FILES["offsets"]).write_bytes(np.zeros(1, np.int64).tobytes())
            self._note(self.facts)
        elif manifest:
            self.last = manifest[1]
            with (self.folder / "manifest.jsonl").open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)  # a line that a kill cut short
        self._files: dict[str, io.BufferedWriter] = {}
        for kind, size in self.last.sizes(self._token_type.itemsize).items():
            self._files[kind] = (self.folder / _FILES[kind]).open("ab")
            self._files[kind].truncate(size)
        self.tokens, self.documents = self.last.tokens, self.last.documents
        self._names_bytes, self._largest = self.last.names_bytes, self.last.largest_token
        self._malformed = self.last.malformed
        self._reached = Position(self.last.file, self.last.texts, self.last.skipped, len(self._malformed))
        return self

    def add(self, batch: Encoded, malformed: Sequence[str] = (), limit: int | None = None) -> None:
        """Append a batch, of which tokens beyond `limit` in all are cut off.

        Args:
            batch: the tokens.
            malformed: places of malformed records passed over, at least to the last document's position.
            limit: most tokens of the entry.
        """
        room = len(batch.tokens) if limit is None else min(len(batch.tokens), limit - self.tokens)
        self._files["tokens"].write(batch.tokens[:room].astype(self._token_type).data)
        ending = batch.ended
        if batch.goes_on and room < len(batch.tokens):
            ending = [*ending, (batch.goes_on, room)]
        stops = np.minimum(np.array([stop for _, stop in ending], dtype=np.int64), room)
        # where none, the tokenizer makes nothing of the text, or it begins behind the limit
        kept = np.flatnonzero(np.diff(stops, prepend=-self._begun))
        names = [ending[index][0].name.encode("utf-8", errors="backslashreplace") for index in kept]
        name_ends = self._names_bytes + np.cumsum([len(name) for name in names], dtype=np.int64)
        self._files["names"].write(b"".join(names))
        self._files["offsets"].write((self.tokens + stops[kept]).data)
        self._files["name_ends"].write(name_ends.data)
        self._largest = max(self._largest, int(batch.tokens[:room].max(initial=0)))
        self.documents += len(kept)
        self.tokens += room
        self._begun += room
        if len(kept):
            self._names_bytes, self._begun = int(name_ends[-1]), room - int(stops[-1])
            self._reached = ending[kept[-1]][0].position
        self._malformed = malformed
        if self.tokens - self._begun - self.last.tokens >= SHARD_TOKENS:
            self._keep()

    def _keep(self) -> None:
        """The documents that have ended are safe from here on."""
        tokens = self.tokens - self._begun
        if tokens == self.last.tokens:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        reached = self._reached
        shard = Shard(
            documents=self.documents,
            tokens=tokens,
            names_bytes=self._names_bytes,
            largest_token=self._largest,
            file=reached.file,
            texts=reached.texts,
            skipped=dict(reached.skipped),
            malformed=list(self._malformed[: reached.malformed]),
        )
        self._note(asdict(shard))
        self.last = shard

    def finish(self) -> None:
        """The entry is whole."""
        self._keep()
        self._note({"complete": True})

    def _note(self, line: Mapping[str, Any]) -> None:
        with (self.folder / "manifest.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is not None:
                with suppress(OSError):  # the disk may be what is wrong
                    self._keep()
        finally:
            for file in self._files.values():
                with suppress(OSError):
                    file.close()
            if error is not None and not self.last.documents:
                shutil.rmtree(self.folder, ignore_errors=True)
