"""Fifty files and more, of at most 1 MB, that strangers could send: bombs, nests, runs of blanks, lies about sizes."""

import gzip
import io
import json
import random
import zipfile
from collections.abc import Iterator

import zstandard

MEGABYTE = 1_000_000

CONTAINER = (
    '<container version="1.0" xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile '
    'full-path="book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def _repeated(text: str, size: int = MEGABYTE) -> bytes:
    return (text * (size // len(text.encode()) + 1)).encode()[:size]


def _epub(page: bytes, package: bytes = b"", pages: int = 1) -> bytes:
    items = "".join(f'<item id="p{n}" href="p{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(pages))
    spine = "".join(f'<itemref idref="p{n}"/>' for n in range(pages))
    opf = f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest><spine>{spine}</spine></package>'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("META-INF/container.xml", CONTAINER)
        book.writestr("book.opf", package or opf)
        for number in range(pages):
            book.writestr(f"p{number}.xhtml", page)
    return archive.getvalue()


def _pdf(stream: bytes, pages: int = 1) -> bytes:
    import zlib

    packed = zlib.compress(stream, 9)
    kids = " ".join(["4 0 R"] * pages)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {pages} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 200] /Contents 5 0 R "
        b"/Resources << /Font << /F1 3 0 R >> >> >>",
        b"<< /Filter /FlateDecode /Length %d >>\nstream\n" % len(packed) + packed + b"\nendstream",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = len(content)
    return content + b"xref\n0 6\n0000000000 65535 f \n" + table + (
        b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % end
    )  # fmt: skip


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Name and content of each."""
    texts = {
        "numbers": "1 2.5\n", "empty lines": "\n", "blanks": " ", "blank lines": " \n", "tabs": "\t",
        "dots": ".",
        "marks": "-", "hashes": "#", "heading": "# ", "capitals": "A", "chapters": "\n\nChapter ",
        "roman": "I",
        "quotes": '."', "newline and blank": "\n ", "sections": "\n\n1.", "crlf": "\r\n", "cr": "\r",
        "tex": "\\section",
        "controls": "\x01\x1b[31m", "surrogates": "🐍", "combining": "a\u0301\u0301\u0301", "wide": "漢",
        "nbsp": "\xa0",
        "word": "a", "abstract": "\n1 Abstract", "references": "References 1\n", "special": "<|endoftext|>",
    }  # fmt: skip
    for name, text in texts.items():
        yield f"{name}.txt", _repeated(text, MEGABYTE // 8)
    pages = {
        "divs": "<div>", "pre": "<pre>" + " " * 40_000, "bold blanks": "<b> </b>", "items": "<li>", "rows": "<tr><td>",
        "lists": "<ul><li>", "forms": "<form><p>a", "tables": "<table>", "breaks": "<br>", "entities": "&amp;",
        "comments": "<!--", "attributes": "<p " + "a=1 " * 50, "math": "<math><mi>x", "open tags": "<",
    }  # fmt: skip
    for name, page in pages.items():
        yield f"{name}.html", _repeated(page, MEGABYTE if name in ("pre", "open tags", "attributes") else MEGABYTE // 8)
    yield "bomb.epub", _epub(b"<p>x</p>" * 9 * MEGABYTE)
    yield "many pages.epub", _epub(b"<p>" + b"x" * MEGABYTE, pages=150)
    yield "index bomb.epub", _epub(b"", package=b"<package>" + b" " * 60 * MEGABYTE)
    entity = b'<!DOCTYPE p [<!ENTITY a "aaaaaaaaaa">' + b"".join(
        b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10 if n else b"&a;" * 10) for n in range(9)
    ) + b"]><package><metadata>&a8;</metadata></package>"  # fmt: skip
    yield "laughs.epub", _epub(b"", package=entity)
    yield "noise.pdf", b"%PDF-1.7\n" + random.Random(0).randbytes(MEGABYTE // 2)
    yield "stream bomb.pdf", _pdf(b"q " * 60 * MEGABYTE)
    yield "text bomb.pdf", _pdf(b"BT /F1 12 Tf (" + b"word " * 4 * MEGABYTE + b") Tj ET")
    yield "one page many times.pdf", _pdf(b"BT /F1 12 Tf 20 100 Td (words) Tj ET", pages=50_000)
    yield "text.txt.gz", gzip.compress(b"a" * 60 * MEGABYTE)
    yield (
        "window.txt.zst",
        zstandard.ZstdCompressor(
            compression_params=zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
        ).compress(b"a" * 60 * MEGABYTE),
    )
    yield "deep.json", b"[" * MEGABYTE
    yield "deep objects.json", b'{"a":' * 150_000
    yield "escapes.jsonl", json.dumps({"text": "\ud800" * 100_000}).encode()[:MEGABYTE]
