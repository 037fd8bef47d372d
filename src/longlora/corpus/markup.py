"""HTML pages and EPUB books as plain text, paragraphs apart by a blank line, headings marked `# ` as in Markdown.

lxml parses them, closing what a page leaves open. Of a page from the web trafilatura takes the main content, without
menus, banners and footers; where it would lose much of the running text (a form around the whole page), or the page is
too long for it, the page is read as it stands less what its tags call navigation. An EPUB is a zip archive of pages
whose package document says in which order they are read (EPUB 3.3, section 5).

Strangers write these files: `longlora.corpus.apart` runs this in a process of its own, with limits.
"""

import re
import zipfile
import zlib
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any
from urllib.parse import unquote

from longlora.corpus.apart import UnparsableError
from longlora.corpus.decoding import decoded

EPUB_MOST_BYTES = 64_000_000
"""Unpacked size of an EPUB's pages above which it is taken for a trap (a 'zip bomb'); no book has as much text."""

EPUB_MOST_INDEX_BYTES = 4_000_000
"""The same for each of the files that say which pages there are."""

MAIN_CONTENT_MOST_BYTES = 300_000
"""Longer pages (specifications, books on one page) are read as they stand: trafilatura takes 10 s a megabyte."""

LEAST_OF_RUNNING_TEXT = 0.6
"""Share of a page's running text that its main content must have, or the page is read as it stands."""

_NOT_TEXT = frozenset(
    "script style noscript template nav svg iframe button head input select option textarea datalist dialog "
    "object audio video canvas map".split()
)
_RUNNING_TEXT = frozenset("p h1 h2 h3 h4 h5 h6 li pre blockquote td th dt dd article".split())
_BLOCKS = _RUNNING_TEXT | frozenset(
    "address aside body caption center details div dl fieldset figcaption figure footer form header hr html legend "
    "main ol section summary table tbody tfoot thead tr ul".split()
)
_NOT_CONTENT_ROLES = ("navigation", "contentinfo", "search", "dialog", "alertdialog")
_BANNER = re.compile(r"\b(?:cookie|consent|gdpr)", re.IGNORECASE)


def html_text(page: bytes, encoding: str = "auto") -> str:
    """The text of an HTML page in any encoding that it declares.

    A page without a heading of its first rank begins with its title. Formulas are their TeX where the page has it
    (MathML's `alttext`, which LaTeXML writes).

    Raises:
        UnparsableError: it holds no text, or is nested too deeply.
    """
    root = _parsed(page, encoding)
    text = "" if root is None else _main_content(root, len(page)) or _Writer(root, of_the_web=True).text()
    if not text:
        raise UnparsableError(
            "HTML without text", "is HTML without any text: it may be drawn by scripts, save it as PDF."
        )
    title = " ".join((root.findtext(".//title") or "").split())
    return f"# {title}\n\n{text}" if title and not re.search("^# ", text, re.MULTILINE) else text


def _parsed(page: bytes, encoding: str = "auto") -> Any:
    """The root of the page's tree, formulas made text; None for an empty page."""
    from lxml import etree

    text = decoded(page, encoding, declared=True).replace("\0", "")
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    try:
        root = etree.fromstring(text.encode("utf-8", errors="replace"), parser) if text.strip() else None
    except etree.XMLSyntaxError as error:
        if "unknown error" in str(error) or "Memory" in str(error):  # how libxml2 says that there is no memory left
            raise MemoryError from error
        raise
    if any(error.type_name == "ERR_RESOURCE_LIMIT" for error in parser.error_log):
        raise UnparsableError("damaged HTML", "holds HTML nested too deeply to be a text: save it as plain text.")
    for formula in [] if root is None else list(root.iter("math")):
        tex = formula.get("alttext")
        words = f"${tex}$" if tex else " ".join("".join(formula.itertext()).split())
        for child in list(formula):
            formula.remove(child)
        formula.tag, formula.text = "span", words
    return root


def _main_content(root: Any, size: int) -> str:
    """What trafilatura takes for the page's content; empty where it takes too little of the running text."""
    if size > MAIN_CONTENT_MOST_BYTES:
        return ""
    import copy

    import trafilatura

    page = trafilatura.extract(
        copy.deepcopy(root), output_format="html", include_comments=False, include_formatting=True, favor_recall=True
    )
    content = _parsed(page.encode()) if page else None
    if content is None:
        return ""
    text = _Writer(content, of_the_web=False).text()
    running = _Writer(root, of_the_web=True)
    running.text()
    return text if _letters(text) >= LEAST_OF_RUNNING_TEXT * running.running_letters else ""


def _letters(text: str) -> int:
    return len("".join(text.split()))


class _Writer:
    """Writes a tree as text, in one pass and in time linear in its size."""

    def __init__(self, root: Any, *, of_the_web: bool) -> None:
        self._root, self._of_the_web = root, of_the_web
        self._written: list[str] = []
        self._line: list[str] = []
        self._prefix = ""
        self._lists: list[int | None] = []
        self._within: dict[str, int] = {}
        self._cells: list[str] | None = None
        self._rows = self._running = 0
        self._was_tight = False
        self.running_letters = 0
        """Letters in paragraphs, headings, lists and tables."""

    def text(self) -> str:
        from lxml import etree

        walk = etree.iterwalk(self._root, events=("start", "end"))
        for event, element in walk:
            tag = str(element.tag).lower().rpartition("}")[2]
            if event == "end":
                self._end(tag)
                if element is not self._root:
                    self._say(element.tail)
            elif self._passed_over(element, tag):
                walk.skip_subtree()
            else:
                self._start(element, tag)
                self._say(element.text)
        self._flush()
        return "".join(self._written).strip()

    def _passed_over(self, element: Any, tag: str) -> bool:
        if tag in _NOT_TEXT or "hidden" in element.attrib:
            return True
        if tag == "form":  # a search box; some frameworks put the whole page into one
            return not any(str(each.tag) in _RUNNING_TEXT for each in element.iter())
        if not self._of_the_web:
            return False
        if tag == "footer" and not self._within.get("article"):
            return True
        named = f"{element.get('class', '')} {element.get('id', '')}"
        return element.get("role") in _NOT_CONTENT_ROLES or (
            tag not in ("html", "body") and bool(_BANNER.search(named))
        )

    def _start(self, element: Any, tag: str) -> None:
        self._within[tag] = self._within.get(tag, 0) + 1
        self._running += tag in _RUNNING_TEXT
        if tag == "br":
            self._line.append("\n")
        if tag not in _BLOCKS:
            return
        if tag == "table":
            self._rows = 0
        if tag in ("td", "th") and self._cells is not None:
            self._line.clear()
            return
        if self._within.get("pre", 0) > (tag == "pre"):
            return
        self._flush()
        if tag in ("ul", "ol"):
            self._lists.append(0 if tag == "ol" else None)
        elif tag == "li":
            self._prefix = self._bullet()
        elif tag == "tr":
            blocks = any(
                str(each.tag) in _BLOCKS and str(each.tag) not in ("td", "th", "tr") for each in element.iter()
            )
            self._cells = None if blocks else []  # a table for the layout holds more than words
        elif len(tag) == 2 and tag[0] == "h" and tag[1] in "123456":
            self._prefix = "#" * int(tag[1]) + " "

    def _end(self, tag: str) -> None:
        if self._within.get(tag):
            self._within[tag] -= 1
            self._running -= tag in _RUNNING_TEXT
        if tag in ("td", "th") and self._cells is not None:
            self._cells.append(" ".join("".join(self._line).split()))
            self._line.clear()
            return
        if tag == "tr" and self._cells is not None:
            cells, self._cells = self._cells, None
            self._row(cells)
            return
        if tag == "pre" and not self._within["pre"]:
            self._verbatim()
        elif tag in _BLOCKS and not self._within.get("pre"):
            self._flush()
        if tag in ("ul", "ol") and self._lists:
            self._lists.pop()
        if tag in ("li", "h1", "h2", "h3", "h4", "h5", "h6"):
            self._prefix = ""

    def _say(self, text: str | None) -> None:
        if not text:
            return
        if self._within.get("pre"):
            self._line.append(text)
        elif text.isspace():
            self._line.append(" ")
            return
        else:
            words = " ".join(text.split())
            before, after = " " if text[0].isspace() else "", " " if text[-1].isspace() else ""
            self._line.append(f"{before}{words}{after}")
        if self._running:
            self.running_letters += _letters(text)

    def _bullet(self) -> str:
        indent = "   " * max(0, len(self._lists) - 1)
        if self._lists and self._lists[-1] is not None:
            self._lists[-1] += 1
            return f"{indent}{self._lists[-1]}. "
        return f"{indent}* "

    def _flush(self) -> None:
        """Ends a paragraph."""
        lines = (" ".join(line.split()) for line in "".join(self._line).split("\n"))
        text = "\n".join(lines).strip()
        self._line.clear()
        if text:
            self._write(self._prefix + text, tight=bool(self._lists))
            self._prefix = ""

    def _verbatim(self) -> None:
        lines = [line.rstrip() for line in "".join(self._line).split("\n")]
        self._line.clear()
        if any(lines):
            self._write("```\n" + "\n".join(lines).strip("\n") + "\n```", tight=False)

    def _row(self, cells: list[str]) -> None:
        if any(cells):
            self._write("| " + " | ".join(cells) + " |", tight=self._rows > 0)
            if not self._rows:
                self._write("|" + " --- |" * len(cells), tight=True)
            self._rows += 1

    def _write(self, text: str, tight: bool) -> None:
        self._written += ["\n" if tight and self._was_tight else "\n\n", text]
        self._was_tight = tight or text.startswith("| ")


def epub_text(path: Path) -> str:
    """The text of an EPUB's pages in reading order, after its title; a page that is missing or damaged is passed over.

    Raises:
        UnparsableError: it is damaged, protected against copying, unpacks to too much, or its pages are pictures.
        OSError: it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as book:
            title, pages = _reading_order(book)
            _require_readable(book, pages)
            texts, missing = _page_texts(book, pages)
    except (zipfile.BadZipFile, zlib.error, SyntaxError, KeyError, RuntimeError, ValueError, EOFError) as error:
        if isinstance(error, RuntimeError) and "password" in str(error):
            raise UnparsableError(
                "encrypted EPUB", "is an encrypted EPUB: save it without a password first."
            ) from error
        reason = str(error).strip("'\"").rstrip(".") or type(error).__name__
        raise UnparsableError(
            "damaged EPUB", f"cannot be read as EPUB ({reason}): check that the file is whole."
        ) from error
    if not texts and missing:
        raise UnparsableError("damaged EPUB", f"cannot be read as EPUB ({missing[0]}): check that the file is whole.")
    if not texts:
        raise UnparsableError(
            "EPUB without text", f"has no text on its {len(pages)} pages, they are pictures: run OCR on it first."
        )
    text = "\n\n".join(texts)
    return f"# {title}\n\n{text}" if title and title not in text[: len(title) + 200] else text


def _page_texts(book: zipfile.ZipFile, pages: list[str]) -> tuple[list[str], list[str]]:
    """The pages' texts, and what is wrong with those that cannot be read."""
    texts, missing, left = [], [], EPUB_MOST_BYTES
    for page in pages:
        try:
            content = _member(book, page, left, "pages")
        except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            missing.append(str(error).strip("'\"").rstrip("."))
            continue
        left -= len(content)
        root = _parsed(content)
        if root is not None and (text := _Writer(root, of_the_web=False).text()):
            texts.append(text)
    return texts, missing


def _member(book: zipfile.ZipFile, name: str, most: int, what: str) -> bytes:
    """A file of the archive; what its header says of its size may be a lie."""
    with book.open(name) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnparsableError(
            "oversized EPUB", f"unpacks to more than {most:,} bytes of {what}: give an ordinary book."
        )
    return content


def _reading_order(book: zipfile.ZipFile) -> tuple[str, list[str]]:
    """Title, and the archive's names of the pages from first to last, without the table of contents."""
    container = _index(book, "META-INF/container.xml")
    rootfile = container.find(".//{*}rootfile")
    if rootfile is None:
        raise ValueError("META-INF/container.xml names no package document")
    place = unquote(rootfile.attrib["full-path"])
    package = _index(book, place)
    title = package.findtext(".//{http://purl.org/dc/elements/1.1/}title") or ""
    items = {item.get("id"): item.attrib for item in package.iterfind(".//{*}manifest/{*}item")}
    pages = []
    for reference in package.iterfind(".//{*}spine/{*}itemref"):
        item = items.get(reference.get("idref"), {})
        contents = "nav" in item.get("properties", "").split()
        page = "html" in item.get("media-type", "") or "oeb1-document" in item.get("media-type", "")
        if page and not contents and reference.get("linear") != "no":
            pages.append(normpath(join(dirname(place), unquote(item.get("href", "").partition("#")[0]))))
    return " ".join(title.split()), list(dict.fromkeys(pages))


def _index(book: zipfile.ZipFile, name: str) -> Any:
    from lxml import etree

    content = _member(book, name, EPUB_MOST_INDEX_BYTES, name)
    return etree.fromstring(content, etree.XMLParser(resolve_entities=False, no_network=True))


def _require_readable(book: zipfile.ZipFile, pages: list[str]) -> None:
    if "META-INF/encryption.xml" in book.namelist():
        encryption = _index(book, "META-INF/encryption.xml")
        locked = {unquote(each.get("URI", "")) for each in encryption.iterfind(".//{*}CipherReference")}
        if locked & set(pages):  # fonts are often scrambled, which harms no text
            raise UnparsableError(
                "encrypted EPUB", "is an EPUB protected against copying (DRM): give one without protection."
            )
