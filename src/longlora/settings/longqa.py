"""Knobs of `longlora longqa`: long question-answer pairs out of documents (paper appendix, LongAlpaca)."""

import re
from dataclasses import dataclass
from typing import Annotated

import tyro

from longlora.errors import UserError
from longlora.settings.fields import AtLeast, Checked, CommandSettings, LoadSettings, Names, choice
from longlora.settings.fine_tuning import PROMPT_FORMATS

MATERIALS = ("auto", "book", "paper", "material")
PAIR_FILES = (".jsonl", ".json")


@dataclass(frozen=True, kw_only=True)
class EndpointSettings(Checked):
    """How an OpenAI-compatible endpoint is asked."""

    key_variable: str | None = None
    """Environment variable that holds the endpoint's key; without it no key is sent. The key itself is never an option,
    and never written anywhere."""

    timeout: float = 120.0
    """Seconds to wait for an answer."""

    retries: Annotated[int, AtLeast(0)] = 3
    """Times a question is asked again after a timeout, an error of the endpoint or a useless answer."""

    temperature: Annotated[float | None, AtLeast(0)] = None
    """Sampling temperature; default the endpoint's own. A useless answer is asked for again at 0.7 or more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timeout <= 0:
            raise UserError(f"--timeout is {self.timeout}: it must be more than 0 seconds.")
        if self.key_variable is not None and not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", self.key_variable):
            # What was given is not repeated: it may be the key.
            raise UserError(
                "--key-variable must be the name of an environment variable (OPENAI_API_KEY, say), not the key itself."
            )


@dataclass(frozen=True, kw_only=True)
class BuildLongQASettings(CommandSettings):
    """Long question-answer pairs from a folder of books, papers and other documents, answered by a teacher."""

    documents: tuple[str, ...] = ()
    """Files and folders to ask about (txt, md, HTML, EPUB, PDF, jsonl, parquet), `hub:NAME`, or `stdlib`."""

    output: str = ""
    """File of the pairs: `.jsonl` has chat messages, one pair a line; `.json` is LongAlpaca's format, one array."""

    teacher: str | None = None
    """MODEL that answers here: `demo`, a hub id, a folder, a .gguf file, a run directory; with --teacher-url the name
    that the endpoint has for it (default: its only model)."""

    teacher_url: str | None = None
    """OpenAI-compatible endpoint that answers instead, such as http://localhost:8000/v1."""

    endpoint: EndpointSettings = EndpointSettings()

    material: Annotated[str, choice(MATERIALS)] = "auto"
    """What the documents are, which decides the prompt and the questions; `auto` looks at each."""

    section_tokens: Annotated[int, AtLeast(64, "tokens")] = 8192
    """Most tokens of a document in one pair; a longer document is cut at chapters, headings, paragraphs."""

    questions_per_section: Annotated[int, AtLeast(1)] = 2
    """Questions about each section, each of another category while there are enough."""

    pairs_per_document: Annotated[int | None, AtLeast(1)] = None
    """Most pairs of one document, from sections at even distances; default all."""

    max_pairs: Annotated[int | None, AtLeast(1)] = None
    """Most pairs in all."""

    categories: Names = ()
    """Ask only questions of these categories; default all."""

    questions: str | None = None
    """YAML file `category: [question, …]` to ask from instead of the questions that come with longlora."""

    answer_tokens: Annotated[int, AtLeast(16, "tokens")] = 512
    """Most tokens of an answer."""

    parallel: Annotated[int, AtLeast(1)] = 4
    """Questions asked at a time: requests under way at an endpoint, prompts of one pass of a MODEL here."""

    tokenizer: str | None = None
    """MODEL whose tokenizer counts the tokens; default the teacher's, for an endpoint 4 characters a token."""

    text_field: str = "text"
    """Field of a JSONL, parquet or hub record that holds the text."""

    seed: int = 0
    """Which questions are put to which sections."""

    dry_run: bool = False
    """Print what it would cost (calls, tokens in and out), ask nothing and write nothing."""

    resume: bool = False
    """Go on with a file that holds pairs: what is in it is not asked again."""

    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.documents:
            raise UserError("--documents is missing: name the files or folders to ask about.")
        if not self.dry_run:
            if not self.output:
                raise UserError("--output is missing: name the file of the pairs, .jsonl or .json.")
            if not self.teacher and not self.teacher_url:
                raise UserError("a teacher is missing: give --teacher MODEL, or --teacher-url of an endpoint.")
        if self.output and not self.output.endswith(PAIR_FILES):
            raise UserError(f"--output {self.output} must end in .jsonl (chat messages) or .json (LongAlpaca).")
        if self.teacher_url is None and self.endpoint != EndpointSettings():
            raise UserError("--key-variable, --timeout, --retries, --temperature have no effect without --teacher-url.")
        if self.teacher_url is not None and not re.match("https?://[^/]", self.teacher_url):
            raise UserError(f"--teacher-url {self.teacher_url} must begin with http:// or https://.")
        if self.teacher_url is not None and "@" in self.teacher_url.split("/")[2]:
            raise UserError("--teacher-url must hold no password: name the variable of the key with --key-variable.")


@dataclass(frozen=True, kw_only=True)
class CheckLongQASettings(CommandSettings):
    """Lengths, categories, duplicates and faults of a file of question-answer pairs."""

    file: tyro.conf.Positional[str]
    """Pairs in LongAlpaca's JSON or as chat messages in JSONL."""

    tokenizer: str | None = None
    """MODEL whose tokenizer and chat template measure the pairs; without it lengths are characters."""

    context: Annotated[int | None, AtLeast(2, "tokens")] = None
    """Name the pairs that do not fit this many tokens; needs --tokenizer."""

    prompt_format: Annotated[str, choice(PROMPT_FORMATS)] = "auto"
    """As `longlora sft` will be given it."""

    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt_format != type(self).prompt_format and self.tokenizer is None:
            raise UserError("--prompt-format counts tokens: name the MODEL whose tokenizer counts with --tokenizer.")
        if self.context is not None and self.tokenizer is None:
            raise UserError("--context counts tokens: name the MODEL whose tokenizer counts them with --tokenizer.")
