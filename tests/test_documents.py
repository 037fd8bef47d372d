"""Documents out of files, folders, the standard library and hub data sets; and a sentence for whatever is wrong."""

import gzip
import io
import json
import logging
import os
import tempfile
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.corpus import documents, formats, records, standard_library
from longlora.corpus.documents import Document, Reading, Tally, read_documents, source_files
from longlora.errors import UserError


def write_jsonl(path: Path, records: list[object]) -> Path:
    content = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        import pyarrow

        # Two frames, cut in the middle of a line, as parallel compressors write them.
        parts = content[: len(content) // 2], content[len(content) // 2 :]
        frames = []
        for part in parts:
            frame = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(frame, "zstd") as stream:
                stream.write(part)
            frames.append(frame.getvalue().to_pybytes())
        content = b"".join(frames)
    path.write_bytes(content)
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return path


def write_pdf(path: Path, pages: list[str], password: str | None = None) -> Path:
    """A PDF with one line of text a page, written by hand so that the reader is not checked by its own writer."""
    objects = ["<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>")
    objects.append("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for number, text in enumerate(pages):
        drawing = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream")
    content, places = "%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(content))
        content += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(content)}\n%%EOF\n"
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}"
    path.write_text(content, encoding="ascii")
    if password is not None:
        import pypdf

        writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(path))
        writer.encrypt(password, algorithm="RC4-128")
        writer.write(path)
    return path


def read(*sources: object, **options: object) -> list[Document]:
    tally = options.pop("tally", None)
    return list(read_documents([str(source) for source in sources], Reading(**options), tally))  # type: ignore[arg-type]


def mistake(*sources: object, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read(*sources, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ------------------------------------------------------------------------------------------------------- formats


def test_a_text_file_is_one_document_without_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf# T\xc3\xa4xt\r\nline two\r\n")
    assert read(path) == [Document(str(path), "# Täxt\nline two\n")]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_each_line_of_jsonl_is_a_document(tmp_path, ending):
    texts = [f"text {number}\nünï " + "x" * number for number in range(300)]
    path = write_jsonl(tmp_path / f"books{ending}", [{"body": text, "other": 1} for text in texts])
    got = read(path, text_field="body")
    assert [document.text for document in got] == texts
    assert [document.name for document in got] == [f"{path}:{line}" for line in range(1, 301)]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "cp1251", "gb18030", "shift_jis"])
def test_a_text_in_another_encoding_is_read_as_what_it_is(tmp_path, encoding):
    texts = {
        "utf-16": "naïve",
        "latin-1": "L'été dernier, nous avons visité la forêt près de la rivière.",
        "cp1251": "Привет, это обычный русский текст о море и китах, который мы читаем. " * 2,
        "gb18030": "这是一个普通的中文文本，关于海洋和鲸鱼。" * 3,
        "shift_jis": "これは海と鯨についての普通の日本語の文章です。" * 3,
    }
    path = tmp_path / "a.txt"
    path.write_bytes(texts[encoding].encode(encoding))
    assert read(path)[0].text == texts[encoding]
    path.write_bytes("Zażółć".encode("cp1250"))
    assert read(path, encoding="cp1250")[0].text == "Zażółć"
    assert "not ascii text" in mistake(path, encoding="ascii")


RECORDS = [{"text": "First document."}, {"text": "Second document."}]


@pytest.mark.parametrize("name", ["array.json", "lines.json", "lines.ndjson", "array.json.gz", "lines.ndjson.zst"])
def test_records_are_read_by_their_content_under_whatever_name(tmp_path, name):
    """A JSON array, or lines as `datasets` writes them under `.json`: never the raw JSON."""
    import gzip

    import zstandard

    content = json.dumps(RECORDS, indent=1) if "array" in name else "\n".join(map(json.dumps, RECORDS))
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    path = tmp_path / name
    path.write_bytes(pack(content.encode()))
    got = read(path)
    assert [document.text for document in got] == ["First document.", "Second document."]
    assert [document.name for document in got] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
def test_the_rows_of_a_table_are_documents(tmp_path, ending, separator):
    import gzip

    rows = [["id", "text"], ["1", '"One, ""two""\n\tünï"'], ["2", "three"]]
    content = "\r\n".join(separator.join(row) for row in rows).encode()
    path = tmp_path / f"a{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    assert [document.text for document in read(path)] == ['One, "two"\n\tünï', "three"]
    assert [document.name for document in read(path)] == [f"{path}:1", f"{path}:2"]
    assert "no field 'body'; its fields are: id, text" in mistake(path, text_field="body")


def test_a_table_that_breaks_off_or_is_in_another_encoding(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,one\n2\n")
    assert "row 2: it has too few columns" in mistake(path)
    path.write_bytes("text\nnaïve\n".encode("latin-1"))
    assert "name its encoding with --encoding" in mistake(path)
    assert [document.text for document in read(path, encoding="latin-1")] == ["naïve"]


def test_one_object_over_many_lines_a_field_within_a_field_and_what_is_no_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"doc": {"text": "within", "id": 3}}, indent=2), encoding="utf-8")
    assert [document.text for document in read(path, text_field="doc.text")] == ["within"]
    assert "its fields are: text, id" in mistake(path, text_field="doc.words")
    path.write_text('"only a string"', encoding="utf-8")
    assert "holds no records" in mistake(path)
    parquet = write_parquet(tmp_path / "a.parquet", {"doc": [{"text": "one"}, {"text": "two"}]})
    assert [document.text for document in read(parquet, text_field="doc.text")] == ["one", "two"]


def test_a_long_window_of_zstandard_and_a_compressed_text(tmp_path):
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    line = json.dumps({"text": "far apart"}).encode() + b"\n"
    path = tmp_path / "a.jsonl.zst"
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(packer.compress(line) + packer.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 2**31  # more than readers take unasked
    assert [document.text for document in read(path)] == ["far apart"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("naïve\n".encode()))
    assert read(tmp_path / "b.txt.gz")[0].text == "naïve\n"


def test_malformed_records_are_passed_over_up_to_a_number_and_named(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "one"}', b'{"text": "cut', b'{"txet": "x"}', b"[3]", b'{"text": "two"}', b"[" * 200_000]
    path.write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read(path, skip_malformed=4)] == ["one", "two"]
    assert f"4 malformed records ({path}, line 2, {path}, line 3, {path}, line 4 and 1 more)" in caplog.text
    assert "line 6: it is not valid JSON (nested too deeply)" in mistake(path, skip_malformed=3)
    assert "line 2" in mistake(path)


def test_a_line_without_end_is_no_record_and_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MOST_LINE_BYTES", 100_000)
    path = tmp_path / "long.jsonl"
    path.write_text('{"text": "one"}\n' + "[" * 5_000_000 + '\n{"text": "three"}\n')
    tracemalloc.start()
    assert [document.name for document in read(path, skip_malformed=1)] == [f"{path}:1", f"{path}:3"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 600_000
    assert "line 2: it has more than 100,000 bytes" in mistake(path)


def test_reading_goes_on_where_it_was(tmp_path):
    """After every document in turn: the rest, and the same counts at the end as in one go."""
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" ", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"text": "1"}\n{"text": ""}\nbad\n{"text": "2"}\n', encoding="utf-8")
    (tmp_path / "d.bin").write_bytes(b"\0")
    (tmp_path / "e.txt").write_text("e", encoding="utf-8")
    whole = Tally()
    all_of_it = read(tmp_path, skip_malformed=1, tally=whole)
    assert [document.text for document in all_of_it] == ["a", "1", "2", "e"]
    for done, document in enumerate(all_of_it, start=1):
        at = document.position
        tally = Tally(documents=done, skipped=at.skipped, malformed=whole.malformed[: at.malformed])
        how = Reading(skip_malformed=1)
        rest = list(read_documents([str(tmp_path)], how, tally, begin=(at.file, at.texts)))
        assert rest == all_of_it[done:]
        assert (tally.skipped, tally.malformed, tally.documents) == (whole.skipped, whole.malformed, 4)
        assert tally.bytes_read == whole.bytes_read


def test_parquet_rows_are_documents_over_several_batches(tmp_path):
    texts = [f"row {number}" for number in range(2 * formats.PARQUET_ROWS + 5)]
    path = write_parquet(tmp_path / "a.parquet", {"id": list(range(len(texts))), "text": texts})
    tally = Tally()
    got = read(path, tally=tally)
    assert [document.text for document in got] == texts
    assert got[-1].name == f"{path}:{len(texts)}"
    assert tally.documents == len(texts)
    assert tally.bytes_read == path.stat().st_size


def test_a_pdf_is_one_document_of_all_its_pages(tmp_path):
    path = write_pdf(tmp_path / "a.pdf", ["First page", "Second page"])
    assert read(path) == [Document(str(path), "First page\n\nSecond page")]


def test_a_pdf_that_opens_without_a_password_is_read(tmp_path):
    assert read(write_pdf(tmp_path / "a.pdf", ["Only printing is forbidden"], password=""))[0].text.startswith("Only")


def test_a_hub_data_set_is_streamed(tmp_path):
    """datasets reads a local folder just as it reads one of the hub."""
    write_jsonl(tmp_path / "train.jsonl", [{"text": "one"}, {"text": ""}, {"text": "three"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "held back"}])
    source = f"hub:{tmp_path}"
    assert read(source) == [Document(f"{source}:0", "one"), Document(f"{source}:2", "three")]
    assert [document.text for document in read(f"{source}:test")] == ["held back"]
    assert [document.text for document in read(f"{source}:default:test")] == ["held back"]
    assert "nonesuch" in mistake(f"{source}:nonesuch")
    assert "validation" in mistake(f"{source}:validation")
    assert "its fields are: text" in mistake(source, text_field="body")


def test_a_hub_data_set_out_of_reach_is_a_sentence():
    sentence = mistake("hub:someone/books")  # the test environment forbids the network
    assert "someone/books" in sentence
    assert "network" in sentence


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=6))
def test_any_text_survives_jsonl(texts):
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder, "a.jsonl"), [{"text": "first"}, *({"text": text} for text in texts)])
        expected = ["first"] + [text for text in texts if text.strip()]
        assert [document.text for document in read(path)] == expected


def test_lone_surrogates_become_replacement_characters(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n', encoding="utf-8")
    assert read(path)[0].text == "a\ufffdb"


# ------------------------------------------------------------------------------------------- folders and collections


def test_a_folder_is_walked_in_order_and_what_is_passed_over_is_counted(tmp_path, caplog):
    kept = {
        "a.txt": b"a", "c.py": b"c", "sub/b.txt": b"b", "sub/deep/a.rst": b"deep", "z/a.txt": b"z",
    }  # fmt: skip
    left_out = {
        ".hidden": b"no", ".git/config": b"no", "sub/__pycache__/b.txt": b"no", "node_modules/x.js": b"no",
        "cached/CACHEDIR.TAG": b"Signature: 8a477f597d28d172789f06886806bc55", "cached/x.txt": b"no",
        "picture.png": b"\x89PNG\0\0", "noise.txt": bytes(range(1, 256)) * 8, "empty.txt": b"", "blank.txt": b" \n",
    }  # fmt: skip
    for name, content in (kept | left_out).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_jsonl(tmp_path / "sub" / "c.jsonl", [{"text": "one"}, {"text": None}, {"text": "two"}])
    write_pdf(tmp_path / "scan.pdf", [""])
    with caplog.at_level(logging.WARNING):
        got = read(tmp_path)
    assert [(os.path.relpath(document.name, tmp_path), document.text) for document in got] == [
        ("a.txt", "a"), ("c.py", "c"), ("sub/b.txt", "b"), ("sub/c.jsonl:1", "one"), ("sub/c.jsonl:3", "two"),
        ("sub/deep/a.rst", "deep"), ("z/a.txt", "z"),
    ]  # fmt: skip
    (record,) = caplog.records
    assert (
        "3 empty documents, 2 files (binary or in no known encoding), 1 files (scanned PDF, no text layer)"
        in record.message
    )


def test_sources_come_in_the_order_given_and_bytes_are_counted(tmp_path):
    (tmp_path / "b.txt").write_text("bbb", encoding="utf-8")
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    tally = Tally()
    assert [document.text for document in read(tmp_path / "b.txt", tmp_path / "a.txt", tally=tally)] == ["bbb", "a"]
    assert (tally.bytes_read, tally.documents, tally.sentence()) == (4, 2, "")


def test_the_standard_library_in_two_disjoint_parts():
    trained, held_out, all_of_it = (
        [file.name for file in source_files("stdlib", side)] for side in (False, True, None)
    )
    assert set(trained) | set(held_out) == set(all_of_it)
    assert len(trained) + len(held_out) == len(all_of_it) > 100
    first = next(read_documents(["stdlib"], Reading(held_out=True)))
    assert first.name in held_out
    assert all(name.startswith("stdlib/") for name in all_of_it)


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        documents, "read_file", lambda path, *how: opened.append(path.name) or formats.read_file(path, *how)
    )
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("text", encoding="utf-8")
    reading = read_documents([str(tmp_path)])
    assert opened == []
    list(islice(reading, 2))
    assert opened == ["0.txt", "1.txt"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    size = 300_000
    texts = [chr(97 + number % 26) * size for number in range(40)]
    path = tmp_path / f"long{ending}"
    if ending == ".parquet":
        write_parquet(path, {"text": texts})  # its batches are outside Python's heap
    else:
        write_jsonl(path, [{"text": text} for text in texts])
    del texts
    tracemalloc.start()
    assert sum(len(document.text) for document in read_documents([str(path)])) == 40 * size
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * size  # of 40; a few copies of one document, plus the buffers


# ------------------------------------------------------------------------------------------------------- mistakes


def test_a_missing_path_names_the_nearest_one(tmp_path):
    (tmp_path / "books.txt").write_text("x", encoding="utf-8")
    assert "Did you mean 'books.txt'?" in mistake(tmp_path / "boks.txt")
    assert f"no folder '{tmp_path / 'nowhere'}'" in mistake(tmp_path / "nowhere" / "a.txt")
    assert "'stdlib'" in mistake("stdlb")


def test_mistakes_of_a_file_named_directly(tmp_path):
    cases = {
        "zero.txt": (b"", "empty"),
        "blank.txt": (b"  \n", "no text"),
        "a.bin": (b"\x7fELF\0\0", "binary"),
        "noise.txt": (bytes(range(1, 256)) * 8, "in no encoding that can be told"),
        "a.parquet": (b"PAR1 is not enough", "parquet"),
        "a.pdf": (b"%PDF-1.4\nbroken", "PDF"),
        "a.jsonl.gz": (b"not compressed", "cannot be read"),
        "b.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 999)[:-9], "cannot be read"),
        "a.jsonl.zst": (b"not compressed", "cannot be read"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        sentence = mistake(tmp_path / name)
        assert words in sentence, sentence
        assert name in sentence


def test_an_empty_folder_and_one_with_nothing_to_read(tmp_path):
    assert "no files" in mistake(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\0")
    assert "1 files (binary or in no known encoding)" in mistake(tmp_path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"text": "\xff"}', "not valid JSON"),
        (b'"just a string"', "is a str"),
        (b'{"txet": "x", "id": 3}', "its fields are: txet, id"),
        (b'{"text": ["x"]}', "holds a list"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    reading = read_documents([str(path)])
    assert next(reading).text == "fine"
    with pytest.raises(UserError, match="line 3") as caught:
        next(reading)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_field_suggests_the_nearest(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"content": "x"}])
    assert "Did you mean 'content'?" in mistake(path, text_field="contents")
    path = write_parquet(tmp_path / "a.parquet", {"content": ["x"]})
    assert "its fields are: content" in mistake(path)
    assert "holds a int" in mistake(write_parquet(tmp_path / "b.parquet", {"text": [1]}))


def test_pdf_mistakes(tmp_path):
    assert "encrypted" in mistake(write_pdf(tmp_path / "a.pdf", ["x"], password="secret"))
    assert "no text layer" in mistake(write_pdf(tmp_path / "b.pdf", ["", ""]))


def test_a_python_without_library_sources(tmp_path, monkeypatch):
    for module in (documents, standard_library):
        monkeypatch.setattr(module, "standard_library_folder", lambda: tmp_path)
    assert "no standard library sources" in mistake("stdlib")


def test_other_mistakes(tmp_path):
    assert "--data" in mistake()
    assert "hub:NAME" in mistake("hub:")
    assert "hub:NAME" in mistake("hub:a:b:c:d")
    assert "neither a file nor a folder" in mistake(os.devnull)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("secret", encoding="utf-8")
    path.chmod(0)
    assert "Permission denied" in mistake(path)


def test_reading_stopped_early_closes_its_file(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    files: list[io.BufferedReader] = []
    real_open = Path.open

    def remembered(self, *arguments, **options):
        files.append(real_open(self, *arguments, **options))
        return files[-1]

    monkeypatch.setattr(Path, "open", remembered)
    reading = read_documents([str(path)])
    next(reading)
    reading.close()
    assert [file.closed for file in files] == [True]
