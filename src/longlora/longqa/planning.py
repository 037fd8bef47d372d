"""Which questions are put to which sections of which documents, and what asking them all would cost.

The plan follows from the settings and the documents alone: a second run asks the same, so that what is there already
can be left out. It is made as documents are read, one in memory at a time.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from longlora.corpus.documents import Document, Reading, read_documents
from longlora.errors import UserError
from longlora.longqa.pairs import Pair
from longlora.longqa.prompts import material_prompt
from longlora.longqa.question_bank import Question, check_categories, choose, questions, read_questions
from longlora.longqa.sections import Section, chapters, count, cut
from longlora.progress import Progress
from longlora.settings import BuildLongQASettings

logger = logging.getLogger(__name__)

LEAST_TOKENS = 32
"""A section of fewer tokens (a title page, a stray line) is nothing to ask about."""

CHAPTERS_OF_A_BOOK = 3
FRAME_TOKENS = 24
"""Tokens that a chat template and the words around the material add to a prompt, about."""

# a line with some marks and a number before the word: bounded, or they would read a page of numbers again for each line
_ABSTRACT = re.compile(r"^[^A-Za-z\n]{0,40}abstract\b", re.IGNORECASE | re.MULTILINE)
_REFERENCES = re.compile(
    r"^[^A-Za-z\n]{0,40}(?:references|bibliography|literature cited)[^A-Za-z\n]{0,40}$", re.IGNORECASE | re.MULTILINE
)


@dataclass(frozen=True)
class Task:
    """One question about one section, still without an answer."""

    prompt: str
    """The paper's prompt: the section and the question."""

    prompt_tokens: int
    """About; of the section exactly as the tokenizer counts."""

    category: str

    source: dict[str, Any]
    """Where it comes from: `document`, `title`, `material`, `section` (number from 1), `sections`, `heading`,
    `characters` [begin, end) in the document's text, `tokens`, `sha256` of the section's text (16 digits),
    `question` (as asked) and `question_id`."""

    @property
    def key(self) -> tuple[str, str]:
        """What makes two tasks the same: the section's text and the question, wherever the document lies."""
        return self.source["sha256"], self.source["question"]


def task_key(pair: Pair) -> tuple[str, str]:
    """The `Task.key` of the task that `pair` answered; of two empty strings for one from elsewhere."""
    return str(pair.source.get("sha256", "")), str(pair.source.get("question", ""))


@dataclass
class Estimate:
    """What the tasks of a plan amount to."""

    documents: int = 0
    sections: int = 0
    calls: int = 0
    """Questions still to be asked; each retry is one more."""

    tokens_in: int = 0
    tokens_out: int = 0
    """At most."""

    longest_prompt: int = 0
    """Tokens, about."""

    already: int = 0
    """Questions of the plan whose pairs are there."""

    categories: Counter[str] = field(default_factory=Counter)

    materials: Counter[str] = field(default_factory=Counter)
    """Documents of each kind."""

    def document(self) -> dict[str, Any]:
        """The JSON of the estimate."""
        return asdict(self) | {"categories": dict(self.categories), "materials": dict(self.materials)}

    def lines(self) -> list[str]:
        """The estimate for people."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.materials.most_common())
        asked = ", ".join(f"{name} {count:,}" for name, count in self.categories.most_common())
        return [
            f"documents {self.documents:,} ({kinds or 'none'}), sections {self.sections:,}",
            f"to ask: {self.calls:,} calls, about {self.tokens_in:,} tokens in, at most {self.tokens_out:,} out",
            *([f"by category: {asked}"] if asked else []),
            *([f"there already: {self.already:,} pairs of this plan"] if self.already else []),
        ]


class QuestionPlan:
    """The tasks of the settings."""

    def __init__(self, settings: BuildLongQASettings, tokenizer: Any = None) -> None:
        """
        Args:
            settings: of `longlora longqa build`.
            tokenizer: counts the section budget; None counts characters.

        Raises:
            UserError: the question file or a category does not fit.
        """
        self.settings, self.tokenizer = settings, tokenizer
        self.own = read_questions(settings.questions) if settings.questions else None
        check_categories(settings.categories, self.own)

    def estimate(self, done: Collection[tuple[str, str]] = ()) -> Estimate:
        """What it would cost to ask all tasks but those whose keys are in `done`.

        Raises:
            UserError: there is nothing to ask, or a document cannot be read.
        """
        estimate = Estimate()
        passed_over: Counter[str] = Counter()
        sections, documents = set(), set()
        with Progress("planning", "questions", self.settings.max_pairs) as progress:
            for count, task in enumerate(self.tasks(passed_over), start=1):
                document = task.source["document"]
                if document not in documents:
                    documents.add(document)
                    estimate.materials[task.source["material"]] += 1
                sections.add(task.source["sha256"])
                progress.show(count, f"{count:,} questions, {len(documents):,} documents")
                if task.key in done:
                    estimate.already += 1
                    continue
                estimate.calls += 1
                estimate.tokens_in += task.prompt_tokens
                estimate.longest_prompt = max(estimate.longest_prompt, task.prompt_tokens)
                estimate.categories[task.category] += 1
        estimate.documents, estimate.sections = len(documents), len(sections)
        estimate.tokens_out = estimate.calls * self.settings.answer_tokens
        if passed_over:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed_over.items()))
            logger.info("not asked about: %s", counts)
        if not documents:
            raise UserError(
                "--documents hold nothing to ask about"
                + (f" ({counts})" if passed_over else "")
                + ": give longer documents, or other --categories."
            )
        return estimate

    def tasks(self, passed_over: Counter[str] | None = None) -> Iterator[Task]:
        """Every task once, document by document, section by section.

        Args:
            passed_over: filled with what was not asked about, by kind.

        Raises:
            UserError: a document cannot be read, or there is none.
        """
        passed_over = Counter() if passed_over is None else passed_over
        texts: set[str] = set()
        seen: set[tuple[str, str]] = set()
        count = 0
        for document in self._documents():
            digest = _digest(document.text)
            if digest in texts:
                passed_over["documents that stand there twice"] += 1
                continue
            texts.add(digest)
            for task in self._tasks_of(document, digest, passed_over):
                if task.key in seen:
                    passed_over["questions about a section that stands there twice"] += 1
                    continue
                if count == self.settings.max_pairs:
                    return
                seen.add(task.key)
                count += 1
                yield task

    def _documents(self) -> Iterator[Document]:
        try:
            with closing(
                read_documents(self.settings.documents, Reading(text_field=self.settings.text_field))
            ) as documents:
                yield from documents
        except UserError as error:  # the corpus names its own flag
            raise UserError(str(error).replace("--data", "--documents")) from error

    def _tasks_of(self, document: Document, digest: str, passed_over: Counter[str]) -> Iterator[Task]:
        settings = self.settings
        material = material_of(document) if settings.material == "auto" else settings.material
        bank = questions(material) if self.own is None else self.own
        bank = [each for each in bank if not settings.categories or each.category in settings.categories]
        if not bank:
            passed_over[f"documents ({material}) without a question of these categories"] += 1
            return
        sections = list(cut(document.text, settings.section_tokens, self.tokenizer))
        wide = [(number, each) for number, each in enumerate(sections, start=1) if each.tokens >= LEAST_TOKENS]
        if len(wide) < len(sections):
            passed_over[f"sections of fewer than {LEAST_TOKENS} tokens"] += len(sections) - len(wide)
        title = title_of(document) if material == "book" else ""
        left = settings.pairs_per_document
        if left is not None:
            wide = _spread(wide, -(-left // settings.questions_per_section))
        chosen = choose(bank, settings.questions_per_section, f"{settings.seed} {digest}")
        for (number, section), asked in zip(wide, chosen, strict=False):
            for question in asked[:left]:
                yield self._task(document, material, title, section, number, len(sections), question)
            if left is not None:
                left -= len(asked[:left])

    def _task(
        self,
        document: Document,
        material: str,
        title: str,
        section: Section,
        number: int,
        sections: int,
        question: Question,
    ) -> Task:
        text = document.text[section.begin : section.end]
        words = question.about(material, part=sections > 1)
        source = {
            "document": document.name,
            "title": title,
            "material": material,
            "section": number,
            "sections": sections,
            "heading": section.heading,
            "characters": [section.begin, section.end],
            "tokens": section.tokens,
            "sha256": _digest(text),
            "question": words,
            "question_id": question.id,
        }
        around = count(material_prompt("", words, material, title), self.tokenizer)
        prompt = material_prompt(text, words, material, title)
        return Task(prompt, section.tokens + around + FRAME_TOKENS, question.category, source)


def material_of(document: Document) -> str:
    """`paper` if it has an abstract near its beginning and references, `book` if an EPUB or in chapters, `material`.

    >>> material_of(Document("a.txt", "Chapter 1\\n\\n…\\n\\nChapter 2\\n\\n…\\n\\nChapter 3\\n\\n…"))
    'book'
    """
    text = document.text
    if _ABSTRACT.search(text, 0, 5000) and _REFERENCES.search(text, len(text) // 2):
        return "paper"
    return "book" if document.name.lower().endswith(".epub") or chapters(text) >= CHAPTERS_OF_A_BOOK else "material"


def title_of(document: Document) -> str:
    """A first line `# Title` (HTML and EPUB have it), else the file's name in words, else nothing.

    >>> title_of(Document("books/pride_and-prejudice.txt", "It is a truth …"))
    'Pride And Prejudice'
    """
    first = document.text.lstrip().partition("\n")[0].strip()
    if first.startswith("# "):
        return first[2:].strip()
    stem = Path(document.name).stem if re.search(r"\.[A-Za-z]{2,5}$", document.name) else ""
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    return " ".join(word[0].upper() + word[1:] for word in words.split()) if re.search(r"[^\W\d_]{2}", words) else ""


def _spread(sections: list[tuple[int, Section]], count: int) -> list[tuple[int, Section]]:
    """`count` of the sections at even distances, the middle of each stretch; all where there are no more."""
    if len(sections) <= count:
        return sections
    return [sections[(2 * index + 1) * len(sections) // (2 * count)] for index in range(count)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", errors="replace")).hexdigest()[:16]
