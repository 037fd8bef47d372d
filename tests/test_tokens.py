"""Tokenised corpora: the same tokens as one text at a time, kept on disk, whole or not at all."""

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.corpus import encoding, shards, tokens
from longlora.corpus.cache_command import cache
from longlora.corpus.documents import Document, Reading
from longlora.corpus.encoding import encode_documents, tokenizer_fingerprint
from longlora.corpus.standard_library import standard_library_files
from longlora.corpus.tokens import TokenizedCorpus, cache_folder, corpus_key, tokenize_corpus
from longlora.errors import UserError
from longlora.settings import CacheSettings, CorpusSettings

TEXTS = {"a.txt": "first text", "b.txt": "zweiter Täxt 🐍\n\nmore", "c.txt": "x", "d.txt": "last " * 50}
EXPECTED = [token for text in TEXTS.values() for token in [*text.encode(), 256]]
"""The tokens of all texts for a tokenizer of bytes whose end of text is 256."""


@pytest.fixture
def corpus(tmp_path) -> CorpusSettings:
    """Four small files and an empty cache."""
    (tmp_path / "data").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "data" / name).write_text(text, encoding="utf-8")
    return CorpusSettings(data=(str(tmp_path / "data"),), cache=str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Every text that is tokenised while the test runs."""
    seen: list[str] = []
    real = encoding.encode
    monkeypatch.setattr(
        encoding, "encode", lambda tokenizer, texts, *how: seen.extend(texts) or real(tokenizer, texts, *how)
    )
    return seen


def encoded_documents(tokenizer, documents, **options) -> list[tuple[str, list[int]]]:
    """Name and tokens of each document that `encode_documents` gives, put together from its batches."""
    found, going_on = [], []
    for batch in encode_documents(tokenizer, documents, **options):
        begin = 0
        for document, stop in batch.ended:
            found.append((document.name, [*going_on, *batch.tokens[begin:stop].tolist()]))
            begin, going_on = stop, []
        assert (batch.goes_on is not None) == (begin < len(batch.tokens))
        going_on += batch.tokens[begin:].tolist()
    assert not going_on
    return found


def ids(tokenizer, *texts: str) -> list[int]:
    """The tokens of texts, each with the token that ends it."""
    return [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


def with_beginning(tokenizer):
    """`tokenizer`, putting its beginning-of-sequence token before each text as Llama's does."""
    from tokenizers import processors

    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def cache_entries(corpus: CorpusSettings) -> list[Path]:
    folder = cache_folder(corpus) / "corpora"
    return [path for path in folder.iterdir() if path.is_dir()] if folder.exists() else []


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("beginning", [False, True])
def test_documents_are_tokenised_as_one_by_one(corpus, tiny_tokenizer, beginning):
    tokenizer = with_beginning(tiny_tokenizer()) if beginning else tiny_tokenizer()
    made = tokenize_corpus(tokenizer, corpus)
    assert [Path(name).name for name in made.names] == list(TEXTS)
    assert len(made) == len(TEXTS)
    expected = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in TEXTS.values()]
    assert [made.document(number).tolist() for number in range(4)] == expected
    assert (expected[0][0] == tokenizer.bos_token_id) is beginning
    assert made.document(-1).tolist() == expected[-1]
    assert made.largest_token == max(map(max, expected))
    assert made.tokens.dtype == np.uint16
    assert made.offsets.tolist() == [0, *np.cumsum([len(ids) for ids in expected])]
    with pytest.raises(IndexError):
        made.document(4)


def test_a_tokenizer_without_end_token_adds_none(corpus, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert len(tokenize_corpus(tokenizer, corpus).tokens) == sum(len(text.encode()) for text in TEXTS.values())


def test_a_large_vocabulary_takes_four_bytes(corpus, tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(66_000)])
    Path(corpus.data[0], "e.txt").write_text("<65999>", encoding="utf-8")
    made = tokenize_corpus(tokenizer, corpus)
    assert made.tokens.dtype == np.uint32
    assert made.largest_token == made.document(-1)[0] == 257 + 65_999


@pytest.mark.parametrize(("largest", "dtype"), [(65_535, np.uint16), (65_536, np.uint32)])
def test_the_largest_token_of_two_bytes(corpus, tiny_tokenizer, largest, dtype):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(len(tokenizer), largest + 1)])
    Path(corpus.data[0], "e.txt").write_text(f"<{largest}>", encoding="utf-8")
    made = tokenize_corpus(tokenizer, corpus)
    assert made.tokens.dtype == dtype
    assert made.document(-1)[0] == made.largest_token == largest


def demo_tokenizer():
    from transformers import PreTrainedTokenizerFast

    import longlora

    return PreTrainedTokenizerFast.from_pretrained(Path(longlora.__file__).parent / "assets" / "demo_model")


@pytest.mark.parametrize("size", [1_000, 7_777])
def test_long_texts_are_cut_where_no_token_stands(monkeypatch, size):
    """Whole files of real source through the shipped tokenizer: pieces give what the file in one piece gives."""
    tokenizer = demo_tokenizer()
    files = list(standard_library_files(held_out=True))[:12]
    sources = [Document(path.name, path.read_text(encoding="utf-8")) for path in files]
    expected = [tokenizer(document.text, verbose=False)["input_ids"] + [0] for document in sources]
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", size)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 3 * size)
    got = encoded_documents(tokenizer, sources)
    assert sum(len(list(encoding.pieces(document.text))) > 1 for document in sources) > 3
    assert got == list(zip([document.name for document in sources], expected, strict=True))


@settings(max_examples=200, deadline=None)
@given(text=st.text("ab \n", max_size=200), size=st.integers(1, 40))
def test_pieces_make_up_the_text(text, size):
    pieces = [piece for piece, _ in encoding.pieces(text, size)]
    assert [last for _, last in encoding.pieces(text, size)] == [False] * (len(pieces) - 1) + [True]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= size for piece in pieces) or text == ""
    assert len(pieces) <= len(text) + 1


def test_batches_are_bounded_and_end_where_enough_is_read(tiny_tokenizer, monkeypatch):
    read: list[int] = []

    def endless() -> Iterator[Document]:
        while True:
            read.append(len(read))
            yield Document(str(len(read)), "x" * 100)

    sizes: list[int] = []
    real = encoding.encode
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr(
        encoding, "encode", lambda tokenizer, texts, *how: sizes.append(len(texts)) or real(tokenizer, texts, *how)
    )
    stream = encode_documents(tiny_tokenizer(), endless())
    for _ in range(3):
        next(stream)
    stream.close()
    assert sizes == [10, 10, 10, 10]  # one is tokenised while the caller works on the one before
    assert len(read) == 40
    few = encode_documents(tiny_tokenizer(), endless(), lambda: 1)
    next(few)
    assert sizes[4:] == [1]


def test_the_letters_of_special_tokens_are_letters_unless_they_are_meant(corpus, tiny_tokenizer):
    """A log of prompts, or `<s>` in HTML: text, which cannot end a document."""
    tokenizer = tiny_tokenizer()
    text = "The log says <|endoftext|> here."
    Path(corpus.data[0], "a.txt").write_text(text, encoding="utf-8")
    made = tokenize_corpus(tokenizer, corpus)
    before, _, after = text.partition("<|endoftext|>")
    letters = [token for each in text for token in tokenizer(each)["input_ids"]]  # a token a byte
    assert made.document(0).tolist() == [*letters, tokenizer.eos_token_id]
    meant = CorpusSettings(data=corpus.data, cache=corpus.cache, special_tokens=True)
    expected = [
        *tokenizer(before)["input_ids"],
        tokenizer.eos_token_id,
        *tokenizer(after)["input_ids"],
        tokenizer.eos_token_id,
    ]
    assert tokenize_corpus(tokenizer, meant).document(0).tolist() == expected
    assert (
        tokenizer(text)["input_ids"].count(tokenizer.eos_token_id) == 1
    )  # nor is the tokenizer changed for whoever uses it next


@pytest.mark.parametrize("limit", [1, 11, 12, 40, 10_000])
def test_max_tokens_stops_the_reading(corpus, tiny_tokenizer, limit):
    everything = tokenize_corpus(tiny_tokenizer(), corpus).tokens
    limited = CorpusSettings(data=corpus.data, cache=corpus.cache, max_tokens=limit)
    made = tokenize_corpus(tiny_tokenizer(), limited)
    assert made.tokens.tolist() == everything[:limit].tolist()
    assert made.offsets[-1] == len(made.tokens)


def test_what_lies_behind_max_tokens_is_not_read(corpus, tiny_tokenizer):
    (Path(corpus.data[0]) / "e.jsonl").write_text("malformed", encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        tokenize_corpus(tiny_tokenizer(), corpus)
    limited = CorpusSettings(data=corpus.data, cache=corpus.cache, max_tokens=5)
    assert len(tokenize_corpus(tiny_tokenizer(), limited).tokens) == 5


def test_progress_is_told_in_plain_lines(corpus, tiny_tokenizer, monkeypatch, caplog):
    monkeypatch.setattr("longlora.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        tokenize_corpus(tiny_tokenizer(), corpus)
    said = "\n".join(record.message for record in caplog.records)
    assert f"tokenising: 4 documents, {len(EXPECTED)} tokens, 100%" in said
    assert f"{len(EXPECTED)} tokens in 4 documents" in said


# ---------------------------------------------------------------------------------------------------------- cache


def test_the_cache_is_listed_and_pruned(corpus, tiny_tokenizer, capsys):
    """The entry that was used is kept, the one unused for long and on request the unfinished one go."""
    tokenize_corpus(tiny_tokenizer(), corpus)
    old = CorpusSettings(data=corpus.data, cache=corpus.cache, max_tokens=5)
    tokenize_corpus(tiny_tokenizer(), old)
    (kept, gone) = cache_entries(corpus)
    counts = {entry["key"]: entry["documents"] for entry in cache(CacheSettings(cache=corpus.cache))["entries"]}
    if counts[kept.name] == 1:
        kept, gone = gone, kept
    for file in gone.iterdir():
        os.utime(file, (0, 0))
    (gone.parent / "unfinished").mkdir()
    result = cache(CacheSettings(cache=corpus.cache, unused_days=30))
    assert [(each["key"], each["removed"]) for each in result["entries"]][-1] == (gone.name, True)
    assert sum(each["removed"] for each in result["entries"]) == 1
    assert result["removed_bytes"] > 0
    assert f"{kept.name[:8]}" in capsys.readouterr().out
    cache(CacheSettings(cache=corpus.cache, unfinished=True))
    assert cache_entries(corpus) == [kept]
    assert tokenize_corpus(tiny_tokenizer(), corpus).from_cache


def test_the_second_run_reads_no_text(corpus, tiny_tokenizer, encoded, monkeypatch):
    first = tokenize_corpus(tiny_tokenizer(), corpus)
    assert sorted(encoded) == sorted(TEXTS.values())
    assert not first.from_cache
    encoded.clear()
    monkeypatch.setattr(tokens, "read_documents", None)
    second = tokenize_corpus(tiny_tokenizer(), corpus)
    assert encoded == []
    assert second.from_cache
    assert isinstance(second.tokens, np.memmap)
    assert second.tokens.tolist() == first.tokens.tolist()
    assert (second.names, second.largest_token) == (first.names, first.largest_token)
    assert len(cache_entries(corpus)) == 1


def test_whatever_changes_the_tokens_changes_the_key(corpus, tiny_tokenizer, tmp_path, monkeypatch):
    def key(tokenizer=None, held_out=None, revisions=(), **changes):
        options = {"data": corpus.data, "cache": corpus.cache} | changes
        reading = Reading(held_out=held_out, revisions=dict(revisions))
        return corpus_key(tokenizer or tiny_tokenizer(), CorpusSettings(**options), reading)

    one_more = tiny_tokenizer()
    one_more.add_tokens(["word"])
    file = Path(corpus.data[0], "a.txt")
    keys = [
        key(),
        key(text_field="body"),
        key(max_tokens=7),
        key(data=(*corpus.data, str(file))),
        key(data=(str(file),)),
        key(data=("hub:a",)),
        key(data=("hub:b",)),
        key(data=("hub:b",), revisions={"hub:b": "1234567"}),
        key(encoding="latin-1"),
        key(special_tokens=True),
        key(data=("stdlib",)),
        key(data=("stdlib",), held_out=True),
        key(one_more),
        key(with_beginning(tiny_tokenizer())),
    ]
    status = file.stat()
    file.write_text("first texT", encoding="utf-8")  # as long as before
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    keys.append(key())
    file.write_text("longer than before", encoding="utf-8")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    keys.append(key())
    Path(corpus.data[0], "new.txt").write_text("new", encoding="utf-8")
    keys.append(key())
    twin = tmp_path / "twin"  # a folder of files by the same names, sizes and times is another
    shutil.copytree(corpus.data[0], twin)
    for each in Path(corpus.data[0]).iterdir():
        os.utime(twin / each.name, ns=(each.stat().st_atime_ns, each.stat().st_mtime_ns))
    keys.append(key(data=(str(twin),)))
    Path(corpus.data[0], "page.html").write_text("<p>text", encoding="utf-8")
    keys.append(key())
    monkeypatch.setattr(tokens.importlib.metadata, "version", lambda name: "another")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key(data=(str(file),)) == (monkeypatch.undo(), key(data=(str(file),)))[1]  # no page, no extractor

    assert key() == key(cache=str(tmp_path / "elsewhere"), packing="isolate", prefer_long=True)
    assert key() == key(held_out=True)  # means nothing to files
    assert key() == key(skip_malformed=3)  # what was read before is gone on with
    keys.append(key())
    called = tiny_tokenizer()
    called(["a", "bcd"], padding=True, truncation=True, max_length=2)
    assert key(called) == keys[-1]


def test_a_changed_file_is_tokenised_anew(corpus, tiny_tokenizer):
    tokenize_corpus(tiny_tokenizer(), corpus)
    Path(corpus.data[0], "c.txt").write_text("changed", encoding="utf-8")
    made = tokenize_corpus(tiny_tokenizer(), corpus)
    assert not made.from_cache
    assert tiny_tokenizer().decode(made.document(2)[:-1]) == "changed"


@pytest.mark.parametrize("damage", ["tokens.bin", "offsets.bin", "names.bin", "name_ends.bin", "manifest.jsonl"])
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_damaged_entry_is_made_anew(corpus, tiny_tokenizer, damage, kept, caplog):
    expected = tokenize_corpus(tiny_tokenizer(), corpus).tokens.tolist()
    (entry,) = cache_entries(corpus)
    content = (entry / damage).read_bytes()
    (entry / damage).write_bytes(content[: int(kept * len(content))])
    made = tokenize_corpus(tiny_tokenizer(), corpus)
    assert "damaged" in caplog.text or damage == "manifest.jsonl"  # without it nobody knows that there was one
    assert not made.from_cache
    assert made.tokens.tolist() == expected


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("in the tokenizer"), UserError("a sentence")])
def test_a_run_that_fails_before_its_first_document_leaves_nothing(corpus, tiny_tokenizer, monkeypatch, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(encoding, "encode", fail)
    with pytest.raises(type(failure)):
        tokenize_corpus(tiny_tokenizer(), corpus)
    assert cache_entries(corpus) == []


def test_text_that_makes_no_tokens(corpus, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "encode", lambda tokenizer, texts, *_: [[] for _ in texts])
    with pytest.raises(UserError, match="no tokens"):
        tokenize_corpus(tiny_tokenizer(), corpus)
    assert cache_entries(corpus) == []


def test_a_malformed_record_loses_nothing_that_was_done(tiny_tokenizer, encoded, tmp_path, monkeypatch):
    """What came before it is not tokenised again, whether it is then passed over or not."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 200)
    good = [f"record number {number}" for number in range(60)]
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}) for text in good]
    path.write_text("\n".join([*lines[:50], '{"text": "cut', *lines[50:]]), encoding="utf-8")
    settings = {"data": (str(path),), "cache": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"line 51.*--skip-malformed"):
        tokenize_corpus(tiny_tokenizer(), CorpusSettings(**settings))
    done = len(encoded)
    assert done >= 30
    made = tokenize_corpus(tiny_tokenizer(), CorpusSettings(**settings, skip_malformed=1))
    again = len(encoded) - 60
    assert 0 <= again <= 20  # those that were read ahead when the record was met
    assert made.tokens.tolist() == ids(tiny_tokenizer(), *good)
    assert list(made.names) == [f"{path}:{line}" for line in range(1, 62) if line != 51]
    (entry,) = cache_entries(CorpusSettings(**settings))
    last = json.loads((entry / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[-2])
    assert last["malformed"] == [f"{path}, line 51"]


@pytest.mark.parametrize("limit", [None, 70])
def test_shards_are_gone_on_with_after_every_possible_stop(corpus, tiny_tokenizer, monkeypatch, limit):
    """Stopped in every batch in turn, with files longer than what the manifest says, as a kill leaves them."""
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 30)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1)
    expected = ids(tiny_tokenizer(), *TEXTS.values())[:limit]
    for stopped in range(1, 12):
        calls = []

        def stop(tokenizer, texts, *how, calls=calls, stopped=stopped, real=encoding.encode):
            calls.append(texts)
            if len(calls) == stopped:
                raise KeyboardInterrupt
            return real(tokenizer, texts, *how)

        with monkeypatch.context() as patch:
            patch.setattr(encoding, "encode", stop)
            options = {"data": corpus.data, "cache": f"{corpus.cache}-{stopped}", "max_tokens": limit}
            try:
                tokenize_corpus(tiny_tokenizer(), CorpusSettings(**options))
            except KeyboardInterrupt:
                for entry in cache_entries(CorpusSettings(**options)):
                    for name in ("tokens.bin", "offsets.bin", "names.bin", "name_ends.bin", "manifest.jsonl"):
                        with (entry / name).open("ab") as file:
                            file.write(b"{torn")
        made = tokenize_corpus(tiny_tokenizer(), CorpusSettings(**options))
        assert made.tokens.tolist() == expected
        assert [Path(name).name for name in made.names][:3] == list(TEXTS)[:3] if limit is None else True
        assert made.offsets[-1] == len(expected)


def test_a_pickled_corpus_maps_its_file_again(corpus, tiny_tokenizer):
    made = tokenize_corpus(tiny_tokenizer(), CorpusSettings(data=corpus.data * 50, cache=corpus.cache))
    content = pickle.dumps(made)
    assert len(content) < 1_000 < made.tokens.nbytes
    again = pickle.loads(content)
    assert isinstance(again.tokens, np.memmap)
    assert again.tokens.tolist() == made.tokens.tolist()
    in_memory = TokenizedCorpus(np.arange(3, dtype=np.uint16), np.array([0, 3]), ["a"], 2)
    assert pickle.loads(pickle.dumps(in_memory)).document(0).tolist() == [0, 1, 2]


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LONGLORA_CACHE", str(tmp_path / "from_environment"))
    assert cache_folder(CorpusSettings(cache=str(tmp_path / "given"))) == tmp_path / "given"
    assert cache_folder(CorpusSettings()) == tmp_path / "from_environment"
    monkeypatch.delenv("LONGLORA_CACHE")
    assert cache_folder(CorpusSettings()) == tmp_path / ".cache" / "longlora"


def test_a_cache_folder_that_cannot_be(corpus, tiny_tokenizer, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--cache"):
            tokenize_corpus(tiny_tokenizer(), CorpusSettings(data=corpus.data, cache=str(place)))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_sentence(corpus, tiny_tokenizer, monkeypatch, code):
    def full(_descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(UserError, match=f"disk is full.*{corpus.cache}.*--cache"):
        tokenize_corpus(tiny_tokenizer(), corpus)
    monkeypatch.undo()
    assert tokenize_corpus(tiny_tokenizer(), corpus).tokens.tolist() == ids(tiny_tokenizer(), *TEXTS.values())


# ------------------------------------------------------------------------------------------------ other processes

PROGRAM = """
import json, os, resource, signal, sys, time
from longlora.corpus import encoding, shards, tokens
from longlora.errors import UserError
from longlora.settings import CorpusSettings

class Tokenizer:  # quick to import
    bos_token_id, eos_token_id = None, 256
    calls = 0
    def get_vocab(self):
        return {str(number): number for number in range(257)}
    def save_pretrained(self, folder):
        open(os.path.join(folder, "vocabulary"), "w").write("bytes")
    def __call__(self, texts, **options):
        self.calls += 1
        if what == "killed" and self.calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "slow":
            time.sleep(0.1)
        return {"input_ids": [list(text.encode()) for text in texts]}

what, data, cache = sys.argv[1:]
encoding.BATCH_CHARACTERS = 5
shards.SHARD_TOKENS = 1
if what == "full":  # what a full disk does to a write, without filling one
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
print("ready", flush=True)
sys.stdin.readline()
tokenizer = Tokenizer()
try:
    made = tokens.tokenize_corpus(tokenizer, CorpusSettings(data=(data,), cache=cache))
    print(json.dumps([made.from_cache, tokenizer.calls, made.tokens.tolist()]))
except UserError as error:
    print(json.dumps(str(error)))
"""


def start(what: str, corpus: CorpusSettings) -> subprocess.Popen[str]:
    source = str(Path(tokens.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, what, corpus.data[0], str(corpus.cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )


def finish(process: subprocess.Popen[str]):
    said, complaint = process.communicate("go\n", timeout=120)
    assert process.returncode == 0, complaint
    return json.loads(said.splitlines()[-1])


def test_a_killed_run_is_gone_on_with(corpus):
    killed = start("killed", corpus)
    killed.communicate("go\n", timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (entry,) = cache_entries(corpus)
    assert not (entry / "manifest.jsonl").read_text(encoding="utf-8").endswith('{"complete": true}\n')
    from_cache, calls, ids = finish(start("again", corpus))
    assert (from_cache, ids) == (False, EXPECTED)
    assert calls == 2  # of three: the first document was safe
    assert cache_entries(corpus) == [entry]


def test_two_processes_at_once_make_it_once(corpus):
    processes = [start("slow", corpus), start("slow", corpus)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # both begin now, and each takes a while
        process.stdin.write("go\n")
        process.stdin.flush()
    results = [finish(process) for process in processes]
    assert sorted(from_cache for from_cache, _, _ in results) == [False, True]
    assert sorted(calls > 0 for _, calls, _ in results) == [False, True]
    assert [ids for _, _, ids in results] == [EXPECTED, EXPECTED]
    assert len(cache_entries(corpus)) == 1


def test_a_write_that_finds_no_room_is_a_sentence(corpus):
    sentence = finish(start("full", corpus))
    assert "disk is full" in sentence
    assert corpus.cache in sentence
    assert finish(start("again", corpus))[2] == EXPECTED


def test_the_fingerprint_is_the_same_in_another_process():
    program = (
        f"import sys; sys.path[:0] = {[str(Path(tokens.__file__).parents[2]), str(Path(__file__).parent)]!r};"
        "from conftest import make_tiny_tokenizer; from longlora.corpus.encoding import tokenizer_fingerprint;"
        "print(tokenizer_fingerprint(make_tiny_tokenizer()))"
    )
    from conftest import make_tiny_tokenizer

    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.strip() == tokenizer_fingerprint(make_tiny_tokenizer())


@pytest.mark.slow
def test_many_records_take_little_memory_and_little_more_time_than_their_tokens():
    """40,000 here (a million: `python benchmarks/million_records.py`): memory does not grow with their number."""
    program = Path(__file__).parent.parent / "benchmarks" / "million_records.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(tokens.__file__).parents[2])}
    count = os.environ.get("LONGLORA_RECORDS", "40000")
    done = subprocess.run(
        [sys.executable, program, "--records", count, "--shard-tokens", "300000"],
        capture_output=True,
        text=True,
        check=True,
        timeout=3000,
        env=environment,
    )
    figures = json.loads(done.stdout)
    assert figures["records"] == int(count)
    assert figures["more_megabytes"] < 300
    assert figures["records_a_processor_second"]["share"] > 0.6  # 0.9 where nothing runs beside it
    assert int(count) / 2 <= figures["killed_at_documents"] < int(count)
    assert figures["tokens_done_again"] <= 2 * figures["shard_tokens"]  # one, and the batch that made it whole
