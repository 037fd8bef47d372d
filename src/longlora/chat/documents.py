"""A file that a person wants to ask about: its text, its length in tokens, its sections where it is too long."""

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longlora.corpus.documents import Document
from longlora.corpus.encoding import count_tokens
from longlora.corpus.formats import MOST_TEXT_BYTES, Text, read_file
from longlora.corpus.records import inner_name
from longlora.errors import UserError
from longlora.longqa.planning import material_of, title_of
from longlora.longqa.sections import Section, cut

_DATA_SETS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class ChatDocument:
    """A document, or a section of one, as it goes into a prompt."""

    name: str
    """The file's name without its folder."""

    text: str

    tokens: int
    """Of the text alone."""

    material: str
    """`book`, `paper` or `material`."""

    title: str
    """Empty where neither the text nor the file's name has one."""

    section: int | None = None
    """Which section this is, from 1; None for the whole document."""

    heading: str = ""
    """Of the section."""

    _sections: dict[int, list[Section]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def label(self) -> str:
        """The name for people.

        >>> ChatDocument("a.txt", "", 0, "book", "", section=2, heading="Chapter 5").label
        'a.txt, section 2 (Chapter 5)'
        """
        if self.section is None:
            return self.name
        return f"{self.name}, section {self.section}" + (f" ({self.heading})" if self.heading else "")

    def sections(self, budget: int, tokenizer: Any) -> list[Section]:
        """The document cut at sensible places into sections of at most `budget` tokens."""
        if budget not in self._sections:
            self._sections[budget] = list(cut(self.text, budget, tokenizer))
        return self._sections[budget]

    def part(self, number: int, budget: int, tokenizer: Any) -> "ChatDocument":
        """Section `number`, from 1, of `sections(budget)`.

        Raises:
            UserError: there is no such section.
        """
        sections = self.sections(budget, tokenizer)
        if not 1 <= number <= len(sections):
            raise UserError(f"'{self.name}' has no section {number}: its sections are 1 to {len(sections)}.")
        chosen = sections[number - 1]
        text = self.text[chosen.begin : chosen.end]
        return ChatDocument(self.name, text, chosen.tokens, self.material, self.title, number, chosen.heading)


def read_document(
    path: Path,
    tokenizer: Any,
    *,
    material: str = "auto",
    name: str | None = None,
    most_bytes: int = MOST_TEXT_BYTES,
) -> ChatDocument:
    """The document in a file.

    Args:
        path: the file; its ending says its format, an unknown one means UTF-8 text.
        tokenizer: counts its tokens.
        material: `book`, `paper`, `material`, or `auto`: by its looks.
        name: what it is called, in messages too; default the file's own name.
        most_bytes: of plain text, once it is unpacked.

    Raises:
        UserError: it is missing, empty, binary, encrypted, scanned, damaged, or a data set.
    """
    shown = name or str(path)
    if path.is_dir():
        raise UserError(f"'{shown}' is a folder: give the files in it that you want to ask about.")
    if not path.exists():
        raise UserError(f"'{shown}' does not exist: give a file (txt, md, source code, HTML, EPUB, PDF).")
    if inner_name(path).endswith(_DATA_SETS):
        raise UserError(f"'{shown}' is a data set, not a document: give a txt, md, HTML, EPUB or PDF file.")
    try:
        with closing(read_file(path, "text", most_bytes=most_bytes)) as texts:
            text = "\n\n".join(found.text for found in texts if isinstance(found, Text)).strip()
    except UserError as error:
        raise UserError(str(error).replace(str(path), shown)) from error
    if not text:
        raise UserError(f"'{shown}' is empty: there is no text in it to ask about.")
    name = name or path.name
    document = Document(name, text)
    tokens = count_tokens(tokenizer, text)
    kind = material_of(document) if material == "auto" else material
    return ChatDocument(name, text, tokens, kind, title_of(document))
