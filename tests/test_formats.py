"""HTML pages, EPUB books and difficult PDFs: their text where there is some, and a sentence where there is none."""

import io
import logging
import zipfile
from pathlib import Path

import pytest
from test_documents import mistake, read, write_pdf

from longlora.corpus import apart, markup
from longlora.corpus.apart import UnparsableError
from longlora.corpus.markup import html_text

CONTAINER = (
    '<?xml version="1.0"?><container xmlns="urn:oasis:names:tc:opendocument:xmlns:container" version="1.0"><rootfiles>'
    '<rootfile full-path="OEBPS/book.opf" media-type="application/oebps-package+xml"/></rootfiles></container>'
)


def package(spine: list[tuple[str, str]], title: str = "The  Book", more: str = "") -> str:
    """A package document; `spine` is (name of the page, attributes of its place in the reading order)."""
    items = "".join(
        f'<item id="p{number}" href="{name}" media-type="application/xhtml+xml"/>'
        for number, (name, _) in enumerate(spine)
    )
    references = "".join(f'<itemref idref="p{number}" {attributes}/>' for number, (_, attributes) in enumerate(spine))
    return (
        '<?xml version="1.0" encoding="utf-8"?><package xmlns="http://www.idpf.org/2007/opf" version="3.0">'
        f'<metadata xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></metadata>'
        f"<manifest>{items}{more}</manifest><spine>{references}</spine></package>"
    )


def xhtml(body: str) -> str:
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html>\n'
        '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/><style>p {}</style></head>'
        f"<body>{body}</body></html>"
    )


def write_epub(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as book:
        book.writestr("mimetype", "application/epub+zip")
        for name, content in files.items():
            book.writestr(name, content)
    return path


def ordinary_book(spine: list[tuple[str, str]] | None = None, **pages: str) -> dict[str, str | bytes]:
    names = spine or [(f"{name}.xhtml", "") for name in pages]
    texts = {f"OEBPS/{name}.xhtml": xhtml(body) for name, body in pages.items()}
    return {"META-INF/container.xml": CONTAINER, "OEBPS/book.opf": package(names), **texts}


# ------------------------------------------------------------------------------------------------------------- HTML


def test_html_becomes_paragraphs_and_headings_without_what_is_not_text(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        """<!DOCTYPE html><html><head><title>Not needed</title><script>var hidden = 1;</script></head><body>
        <nav><a href="/">Home</a></nav><h1>A <em>title</em></h1><p>One <b>bold</b> &amp; one
        <a href="x">linked</a> word.<p>Unclosed<br>paragraph, snake_case and 2*3*4.
        <ul><li>first<li>second</ul><h2>Part two</h2><pre>  code\n    indented</pre>
        <table><tr><th>a<th>b<tr><td>1<td>2</table><img src="x.png" alt="a picture">
        <math alttext="\\alpha_1"><mi>junk</mi></math><form>search</form><style>p {}</style></body></html>""",
        encoding="utf-8",
    )
    (document,) = read(path)
    for line in ("# A title", "Unclosed", "* first", "* second", "## Part two", "    indented", "| 1 | 2 |"):
        assert line in document.text.splitlines(), document.text
    assert "One bold & one linked word." in document.text
    assert "snake_case and 2*3*4." in document.text
    assert "$\\alpha_1$" in document.text
    for unwanted in ("Home", "hidden", "search", "junk", "Not needed", "x.png", "<", "{}"):
        assert unwanted not in document.text
    assert "\n\n\n" not in document.text


@pytest.mark.parametrize(
    "page",
    [
        "<title>T</title><meta charset=utf-8><p>naïve – “x”".encode(),
        "<title>T</title><meta charset=windows-1252><p>naïve – “x”".encode("cp1252"),
        "<title>T</title><p>naïve – “x”".encode("utf-16"),
        b"<title>T</title><p>na&iuml;ve &ndash; &#8220;x&#x201d;",
    ],
)
def test_html_in_any_declared_encoding_and_its_title_where_it_has_no_heading(tmp_path, page):
    path = tmp_path / "page.htm"
    path.write_bytes(page)
    assert read(path)[0].text == "# T\n\nnaïve – “x”"


def test_a_thousand_unclosed_paragraphs_are_read():
    text = html_text(("<p>word" * 3000).encode())
    assert text == "\n\n".join(["word"] * 3000)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (b"<html><body><script>draw()</script></body></html>", "without any text"),
        (b"<div>" * 4000 + b"text", "nested too deeply"),
        (b"<pre>" + b" " * 40_000, "without any text"),
    ],
)
def test_html_without_text_says_so(tmp_path, page, words):
    path = tmp_path / "page.html"
    path.write_bytes(page)
    sentence = mistake(path)
    assert words in sentence
    assert "page.html" in sentence


REPORT = "<h1>Annual report</h1>" + "<p>The whole text of the report stands inside the form of the framework.</p>" * 5


@pytest.mark.parametrize("after", ["", "<p>Contact us</p>"])
def test_a_page_that_stands_in_one_form_is_read(tmp_path, after):
    path = tmp_path / "page.html"
    path.write_text(f"<html><body><form id='aspnetForm'>{REPORT}</form>{after}</body></html>", encoding="utf-8")
    text = read(path)[0].text
    assert text.startswith("# Annual report\n\nThe whole text")
    assert text.count("stands inside the form") == 5


def test_of_a_page_from_the_web_the_content_stays_and_the_rest_goes(tmp_path):
    sentence = "The first long paragraph is about whales and the sea and goes on for quite a while, {}."
    content = "".join(f"<p>{sentence.format(number)}</p>" for number in range(8))
    menu = "<nav><a href=/>Home</a></nav><div class='cookie-banner'>We use cookies.<button>Accept</button></div>"
    footer = "<footer>Copyright. Imprint.</footer>"
    for name, main in (("short", content), ("long", content * 700)):
        path = tmp_path / f"{name}.html"
        path.write_text(f"<body>{menu}<main><h1>A title</h1>{main}</main>{footer}</body>", encoding="utf-8")
        text = read(path)[0].text
        assert text.startswith("# A title\n\n" + sentence.format(0)), text[:200]
        assert sentence.format(7) in text
        for unwanted in ("Home", "cookies", "Accept", "Imprint"):
            assert unwanted not in text
    assert html_text(b"<main>A</main><aside>B</aside>") in ("A", "A\n\nB")


def test_a_binary_file_is_no_html(tmp_path):
    path = tmp_path / "page.html"
    path.write_bytes(b"\x89PNG\0\0\0")
    assert "binary" in mistake(path)


# ------------------------------------------------------------------------------------------------------------- EPUB


def test_an_epub_is_read_in_the_order_of_its_spine(tmp_path):
    files = ordinary_book(
        [("b%20two.xhtml", ""), ("a.xhtml", ""), ("notes.xhtml", 'linear="no"')],
        a="<h2>Second</h2><p>It ended.</p>",
        notes="<p>a note</p>",
    )
    files["OEBPS/b two.xhtml"] = xhtml('<h2>First</h2><a id="x"/><p>It caf&eacute; began.</p>')
    path = write_epub(tmp_path / "book.epub", files)
    assert read(path)[0].text == "# The Book\n\n## First\n\nIt café began.\n\n## Second\n\nIt ended."


def test_the_table_of_contents_is_left_out(tmp_path):
    files = ordinary_book(a="<p>text</p>", toc="<p>contents</p>")
    files["OEBPS/book.opf"] = str(files["OEBPS/book.opf"]).replace(
        'href="toc.xhtml"', 'href="toc.xhtml" properties="nav"'
    )
    assert read(write_epub(tmp_path / "book.epub", files))[0].text == "# The Book\n\ntext"


def scrambled(name: str) -> str:
    return (
        '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container" '
        'xmlns:enc="http://www.w3.org/2001/04/xmlenc#"><enc:EncryptedData><enc:CipherData>'
        f'<enc:CipherReference URI="{name}"/></enc:CipherData></enc:EncryptedData></encryption>'
    )


def test_a_protected_epub_says_so_but_a_scrambled_font_does_no_harm(tmp_path):
    files = ordinary_book(a="<p>text</p>")
    free = write_epub(tmp_path / "free.epub", files | {"META-INF/encryption.xml": scrambled("OEBPS/font.otf")})
    assert read(free)[0].text.endswith("text")
    locked = write_epub(tmp_path / "locked.epub", files | {"META-INF/encryption.xml": scrambled("OEBPS/a.xhtml")})
    assert "protected against copying" in mistake(locked)


def test_damaged_and_empty_epubs_are_sentences(tmp_path, monkeypatch):
    cases = {
        "junk.epub": b"PK\x03\x04 this is no archive",
        "cut.epub": write_epub(tmp_path / "whole.epub", ordinary_book(a="<p>text</p>" * 500)).read_bytes()[:900],
        "bare.epub": write_epub(tmp_path / "x.epub", {"a.txt": "x"}).read_bytes(),
        "gap.epub": write_epub(tmp_path / "y.epub", ordinary_book([("gone.xhtml", "")])).read_bytes(),
        "broken.epub": write_epub(
            tmp_path / "z.epub", ordinary_book(a="x") | {"OEBPS/book.opf": "<package"}
        ).read_bytes(),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        sentence = mistake(tmp_path / name)
        assert "cannot be read as EPUB" in sentence, sentence
        assert name in sentence
    assert "they are pictures" in mistake(write_epub(tmp_path / "p.epub", ordinary_book(a='<img src="1.png"/>')))
    bomb = write_epub(tmp_path / "bomb.epub", ordinary_book(a="<p>x</p>" * 1000))
    monkeypatch.setattr(markup, "EPUB_MOST_BYTES", 1000)
    with pytest.raises(UnparsableError, match="unpacks to more than 1,000 bytes of pages"):
        markup.epub_text(bomb)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<spine>", '<spine><itemref idref="cover"/>'),
        ("</manifest><spine>", '<item id="p9" href="c9.xhtml" media-type="application/xhtml+xml"/></manifest><spine>'
         '<itemref idref="p9"/>'),
        ("<manifest>", '<manifest><item href="x.css" media-type="text/css"/>'),
        ('href="c1.xhtml"', 'href="c1.xhtml#top"'),
        ("application/xhtml+xml", "text/x-oeb1-document"),
    ],
    ids=["entry not in the manifest", "page not in the archive", "item without id", "fragment", "OEB 1"],
)  # fmt: skip
def test_one_bad_entry_of_an_epub_costs_no_more_than_itself(tmp_path, old, new):
    files = ordinary_book(c1="<p>Chapter one.</p>", c2="<p>Chapter two.</p>")
    files["OEBPS/book.opf"] = package([("c1.xhtml", ""), ("c2.xhtml", "")], title="").replace(old, new)
    assert read(write_epub(tmp_path / "book.epub", files))[0].text == "Chapter one.\n\nChapter two."


def test_an_external_entity_of_an_epub_is_not_fetched(tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("of the server", encoding="utf-8")
    files = ordinary_book(a="<p>text</p>")
    declared = f'<!DOCTYPE package [<!ENTITY leak SYSTEM "{secret.as_uri()}">]><package'
    files["OEBPS/book.opf"] = package([("a.xhtml", "")], title="&leak;").replace("<package", declared, 1)
    assert "of the server" not in read(write_epub(tmp_path / "book.epub", files))[0].text


# -------------------------------------------------------------------------------------------------------------- PDF


def scan(path: Path, stamp: str, pages: int = 2) -> Path:
    """A PDF whose pages are pictures, with a line of text that scanners stamp on each."""
    import pypdf
    from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, NumberObject

    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(write_pdf(path, [stamp] * pages)))
    picture = DecodedStreamObject()
    picture.set_data(b"\x80" * 12)
    picture |= {
        NameObject("/Type"): NameObject("/XObject"),
        NameObject("/Subtype"): NameObject("/Image"),
        NameObject("/Width"): NumberObject(2),
        NameObject("/Height"): NumberObject(2),
        NameObject("/ColorSpace"): NameObject("/DeviceRGB"),
        NameObject("/BitsPerComponent"): NumberObject(8),
    }
    reference = writer._add_object(picture)
    for page in writer.pages:
        page["/Resources"][NameObject("/XObject")] = DictionaryObject({NameObject("/Im0"): reference})
        drawing = DecodedStreamObject()
        drawing.set_data(b"q 300 0 0 200 0 0 cm /Im0 Do Q " + page["/Contents"].get_object().get_data())
        page[NameObject("/Contents")] = writer._add_object(drawing)
    writer.write(path)
    return path


def test_a_scan_with_a_stamp_on_each_page_is_still_a_scan(tmp_path):
    assert "hardly any text layer on its 2 pages" in mistake(scan(tmp_path / "scan.pdf", "Page"))
    written = "A picture and what its caption says"
    assert read(scan(tmp_path / "pictures.pdf", written))[0].text == f"{written}\n\n{written}"
    assert read(write_pdf(tmp_path / "short.pdf", ["Page"]))[0].text == "Page"


def test_pages_without_text_among_others_are_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=apart.__name__):
        assert read(write_pdf(tmp_path / "a.pdf", ["written", "", "on"]))[0].text == "written\n\non"
    assert "1 of 3 pages have no text" in caplog.text


def test_words_of_a_pdf_whose_blanks_are_only_distances_stay_apart(tmp_path):
    """TeX sets no blanks, it moves on: 0.27 of the font's size between these words, 0 within them."""
    path = tmp_path / "tex.pdf"
    write_pdf(path, ["PLACE"])
    content = path.read_bytes().replace(b"(PLACE) Tj", b"[(two)-270(wor)20(ds)]TJ")
    path.write_bytes(content.replace(b"/Length 37", b"/Length 51"))
    assert read(path)[0].text == "two words"


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_a_rotated_page_is_read_whole(tmp_path, turned):
    import pypdf

    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(write_pdf(tmp_path / "a.pdf", ["Written along the long side"])))
    writer.pages[0].rotate(turned)
    writer.write(tmp_path / "b.pdf")
    assert read(tmp_path / "b.pdf")[0].text == "Written along the long side"


def test_a_parser_that_takes_too_much_is_ended_and_the_next_file_is_read(tmp_path, monkeypatch):
    good = tmp_path / "good.html"
    good.write_text("<p>text", encoding="utf-8")
    bomb = write_epub(tmp_path / "bomb.epub", ordinary_book(a="<p>x</p>" * 1_500_000))
    assert bomb.stat().st_size < 100_000
    assert "takes more than" in mistake(bomb)
    assert read(good)[0].text == "text"
    slow = tmp_path / "slow.html"
    slow.write_text("<p>word" * 100_000, encoding="utf-8")
    monkeypatch.setattr(apart, "WALL_CLOCK", 0.01)
    assert "takes more than" in mistake(slow)
    monkeypatch.undo()
    assert read(good)[0].text == "text"


def test_what_a_folder_passes_over_is_named_by_kind(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("read", encoding="utf-8")
    write_pdf(tmp_path / "b.pdf", ["x"], password="secret")
    scan(tmp_path / "c.pdf", "")
    (tmp_path / "d.pdf").write_bytes(b"%PDF-1.4\nbroken")
    (tmp_path / "e.html").write_bytes(b"<p></p>")
    (tmp_path / "f.epub").write_bytes(b"junk")
    assert [document.text for document in read(tmp_path)] == ["read"]
    for kind in ("encrypted PDF", "scanned PDF, no text layer", "damaged PDF", "HTML without text", "damaged EPUB"):
        assert f"1 files ({kind})" in caplog.text


def test_markup_errors_carry_their_kind():
    with pytest.raises(UnparsableError) as caught:
        markup.epub_text(io.BytesIO(b"junk"))  # type: ignore[arg-type]
    assert caught.value.kind == "damaged EPUB"
