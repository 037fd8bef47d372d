"""HTML pages and EPUB books as plain text, paragraphs apart by a blank line, headings marked `# ` as in Markdown.

Beautiful Soup (on lxml, which closes what a page leaves open) decodes the HTML, markdownify writes it; emphasis, links
and pictures leave only their words. An EPUB is a zip archive of such pages whose package document says in which order
they are read (EPUB 3.3, section 5).
"""

import re
import warnings
import zipfile
import zlib
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import unquote

EPUB_MOST_BYTES = 256_000_000
"""Unpacked size of an EPUB's pages above which it is taken for a trap (a 'zip bomb'); no book has as much text."""

_NOT_TEXT = ("script", "style", "noscript", "template", "nav", "svg", "iframe", "form", "button", "head")
_WORDS_ONLY = ["a", "b", "strong", "i", "em", "img", "video", "audio", "sub", "sup", "del", "s"]


class MarkupError(Exception):
    """A page or book without text to read: its `kind` in two words, and as message what is wrong and what to do."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def html_text(page: bytes) -> str:
    """The text of an HTML page in any encoding that it declares; scripts, navigation and forms are left out.

    A page without a heading of its first rank begins with its title. Formulas are their TeX where the page has it
    (MathML's `alttext`, which LaTeXML writes).

    Raises:
        MarkupError: it holds no text, or is nested too deeply.
    """
    text = _page_text(page)
    if not text:
        raise MarkupError("HTML without text", "is HTML without any text: it may be drawn by scripts, save it as PDF.")
    return text


def _page_text(page: bytes) -> str:
    import bs4
    import markdownify
    from bs4.element import CData, PreformattedString

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)  # XHTML and odd encodings: we ask for the lenient reading
        soup = bs4.BeautifulSoup(page, "lxml")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    for tag in soup(_NOT_TEXT):
        tag.decompose()
    for formula in soup("math"):
        tex = formula.get("alttext")
        formula.replace_with(f"${tex}$" if tex else formula.get_text(" ", strip=True))
    for piece in soup.find_all(string=lambda each: isinstance(each, PreformattedString)):
        if not isinstance(piece, CData):  # <?xml …?> and the like would be taken for text
            piece.extract()
    has_heading = soup.find("h1") is not None
    converter = markdownify.MarkdownConverter(
        heading_style="ATX", strip=_WORDS_ONLY, escape_asterisks=False, escape_underscores=False
    )
    try:
        text = converter.convert_soup(soup)
    except RecursionError as error:
        raise MarkupError(
            "damaged HTML", "holds HTML nested too deeply to be a text: save it as plain text."
        ) from error
    text = re.sub(r"[ \t\xa0]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"# {title}\n\n{text}" if text and title and not has_heading else text


def epub_text(path: Path) -> str:
    """The text of an EPUB's pages in reading order, after its title.

    Raises:
        MarkupError: it is damaged, protected against copying, unpacks to too much, or its pages are pictures.
        OSError: it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as book:
            title, pages = _reading_order(book)
            _require_readable(book, pages)
            texts = [text for text in (_page_text(book.read(page)) for page in pages) if text]
    except (zipfile.BadZipFile, zlib.error, SyntaxError, KeyError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, RuntimeError) and "password" in str(error):
            raise MarkupError("encrypted EPUB", "is an encrypted EPUB: save it without a password first.") from error
        reason = str(error).strip("'\"").rstrip(".") or type(error).__name__
        raise MarkupError(
            "damaged EPUB", f"cannot be read as EPUB ({reason}): check that the file is whole."
        ) from error
    if not texts:
        raise MarkupError(
            "EPUB without text", f"has no text on its {len(pages)} pages, they are pictures: run OCR on it first."
        )
    text = "\n\n".join(texts)
    return f"# {title}\n\n{text}" if title and title not in text[: len(title) + 200] else text


def _reading_order(book: zipfile.ZipFile) -> tuple[str, list[str]]:
    """Title, and the archive's names of the pages from first to last, without the table of contents."""
    container = _xml(book.read("META-INF/container.xml"))
    rootfile = container.find(".//{*}rootfile")
    if rootfile is None:
        raise ValueError("META-INF/container.xml names no package document")
    place = unquote(rootfile.attrib["full-path"])
    package = _xml(book.read(place))
    title = package.findtext(".//{http://purl.org/dc/elements/1.1/}title") or ""
    items = {item.attrib["id"]: item.attrib for item in package.iterfind(".//{*}manifest/{*}item")}
    pages = []
    for reference in package.iterfind(".//{*}spine/{*}itemref"):
        item = items[reference.attrib["idref"]]
        contents = "nav" in item.get("properties", "").split()
        if "html" in item.get("media-type", "") and not contents and reference.get("linear") != "no":
            pages.append(normpath(join(dirname(place), unquote(item["href"]))))
    return " ".join(title.split()), pages


def _xml(content: bytes) -> Any:
    from lxml import etree

    return etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True))


def _require_readable(book: zipfile.ZipFile, pages: list[str]) -> None:
    if "META-INF/encryption.xml" in book.namelist():
        encryption = _xml(book.read("META-INF/encryption.xml"))
        locked = {unquote(each.attrib["URI"]) for each in encryption.iterfind(".//{*}CipherReference")}
        if locked & set(pages):  # fonts are often scrambled, which harms no text
            raise MarkupError(
                "encrypted EPUB", "is an EPUB protected against copying (DRM): give one without protection."
            )
    size = sum(book.getinfo(page).file_size for page in pages)
    if size > EPUB_MOST_BYTES:
        raise MarkupError(
            "oversized EPUB",
            f"unpacks to {size:,} bytes of pages, the most is {EPUB_MOST_BYTES:,}: give an ordinary book.",
        )
