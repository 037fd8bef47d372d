"""Records of JSONL as tokens: memory above the start, speed beside the tokenizer library's own, a kill at half.

    python benchmarks/million_records.py [--records 1000000]

Prints one JSON line. Speeds are of the same records in turn, in one process: the library's `encode_batch_fast` with the
texts in memory already, and `tokenize_corpus` from file to cache. Memory is that of one run over all records, less the
pages of the files that it writes. At last a run is killed at half and gone on with: what was done twice is counted, and
the tokens must be those of the run that nobody killed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import PreTrainedTokenizerFast

import longlora
from longlora.corpus import encoding, shards, tokens
from longlora.settings import CorpusSettings

WORDS = Path(encoding.__file__).read_text(encoding="utf-8").split()
TURNS = 5
"""Times that library and corpus take turns, each over a twentieth of the records."""


def write_records(path: Path, first: int, count: int) -> None:
    """Lines of 15 words, no two alike."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(first, first + count):
            begin = number * 7 % (len(WORDS) - 15)
            file.write(json.dumps({"text": f"{number} {' '.join(WORDS[begin : begin + 15])}"}) + "\n")


def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(Path(longlora.__file__).parent / "assets" / "demo_model")


def tokenized(
    path: Path, cache: Path, shard_tokens: int = shards.SHARD_TOKENS, by: Any = None
) -> tokens.TokenizedCorpus:
    shards.SHARD_TOKENS = shard_tokens
    return tokens.tokenize_corpus(by or tokenizer(), CorpusSettings(data=(str(path),), cache=str(cache)))


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def in_turn(folder: Path, count: int) -> dict[str, dict[str, float]]:
    """Records a second, and a second of the processors, of the library and of the corpus."""
    by = tokenizer()
    backend, spent = by.backend_tokenizer, {"library": np.zeros(2), "corpus": np.zeros(2)}
    backend.encode_batch_fast(WORDS)  # its threads are there
    for turn in range(TURNS):
        path = folder / f"turn{turn}.jsonl"
        write_records(path, turn * count, count)
        texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
        began = clocks()
        for at in range(0, count, 1000):
            [each.ids for each in backend.encode_batch_fast(texts[at : at + 1000], add_special_tokens=False)]
        spent["library"] += clocks() - began
        began = clocks()
        assert len(tokenized(path, folder / "turns", by=by)) == count
        spent["corpus"] += clocks() - began
        path.unlink()
    speeds = {name: TURNS * count / each for name, each in spent.items()}
    shares = speeds["corpus"] / speeds["library"]
    return {
        kind: {name: round(each[at], 1) for name, each in speeds.items()} | {"share": round(shares[at], 3)}
        for at, kind in enumerate(("records_a_second", "records_a_processor_second"))
    }


def more_memory(path: Path, cache: Path) -> tuple[int, tokens.TokenizedCorpus]:
    """Bytes above the start at most, and the tokens."""
    process = psutil.Process()
    start = peak = process.memory_info().rss
    add = shards.Shards.add

    def looked_at(self: Any, *arguments: Any) -> None:
        nonlocal peak
        add(self, *arguments)
        peak = max(peak, process.memory_info().rss - self.tokens * 2)

    shards.Shards.add = looked_at  # type: ignore[method-assign]
    try:
        made = tokenized(path, cache)
    finally:
        shards.Shards.add = add  # type: ignore[method-assign]
    return peak - start, made


def kept_in(cache: Path) -> tuple[Path | None, int]:
    """The entry that is being written, and the documents that are safe in it."""
    for manifest in cache.glob("corpora/*/manifest.jsonl"):
        if (known := shards.read_manifest(manifest.parent)) is not None:
            return manifest.parent, known[1].documents
    return None, 0


def killed_at_half(path: Path, cache: Path, whole: tokens.TokenizedCorpus, shard_tokens: int) -> dict[str, int]:
    """Tokens that a run had written when it was killed, and those that another did again."""
    child = multiprocessing.get_context("spawn").Process(target=tokenized, args=(path, cache, shard_tokens))
    child.start()
    while child.is_alive() and kept_in(cache)[1] < len(whole) / 2:
        time.sleep(0.01)
    child.kill()
    child.join()
    folder, documents = kept_in(cache)
    assert folder is not None
    written = (folder / "tokens.bin").stat().st_size // whole.tokens.dtype.itemsize
    again = written - int(whole.offsets[documents])
    made = tokenized(path, cache)
    assert np.array_equal(made.tokens, whole.tokens)
    assert np.array_equal(made.offsets, whole.offsets)
    return {"killed_at_documents": documents, "tokens_done_again": again, "shard_tokens": shard_tokens}


def measured(count: int, shard_tokens: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speeds = in_turn(folder, max(1, count // 20))
        path = folder / "all.jsonl"
        write_records(path, 0, count)
        more, whole = more_memory(path, folder / "whole")
        figures = {"records": len(whole), "tokens": len(whole.tokens), "more_megabytes": round(more / 1e6, 1)}
        figures |= speeds | killed_at_half(path, folder / "killed", whole, shard_tokens)
    return figures | {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "date": time.strftime("%Y-%m-%d")}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--shard-tokens", type=int, default=shards.SHARD_TOKENS, help="of the run that is killed")
    given = parser.parse_args()
    print(json.dumps(measured(given.records, given.shard_tokens)))
