"""Knobs of `longlora chat`."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from longlora.errors import UserError
from longlora.settings.fields import DTYPES, AtLeast, Checked, CommandSettings, LoadSettings, choice
from longlora.settings.fine_tuning import PROMPT_FORMATS
from longlora.settings.longqa import MATERIALS

CHAT_FORMATS = (*PROMPT_FORMATS, "plain")

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(Checked):
    """How the next token is chosen, and how many there may be."""

    answer_tokens: Annotated[int, AtLeast(1, "tokens")] = 512
    """Most tokens of an answer."""

    temperature: Annotated[float, AtLeast(0)] = 0.0
    """Sampling temperature; 0 always takes the likeliest token."""

    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability (nucleus sampling, arXiv 1904.09751)."""

    seed: int | None = None
    """Makes sampled answers repeatable; default a new one each time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p is {self.top_p:g}: it is a probability, above 0 and at most 1.")
        if self.temperature == 0 and (self.top_p != 1 or self.seed is not None):
            raise UserError("--top-p and --seed have no effect at --temperature 0: give a temperature, such as 0.7.")


@dataclass(frozen=True, kw_only=True)
class SinkSettings(Checked):
    """Attention sinks (StreamingLLM, arXiv 2309.17453): conversations longer than the window, of which the model sees
    the first and the latest tokens."""

    attention_sinks: Annotated[int, AtLeast(0, "tokens")] = 0
    """First tokens of the conversation that the model goes on seeing when it is longer than the window (4 in the
    paper); 0 ends a conversation at the window."""

    sink_window: Annotated[int | None, AtLeast(16, "tokens")] = None
    """Latest tokens that it sees besides; default the window less the sinks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_window is not None and not self.attention_sinks:
            raise UserError("--sink-window has no effect without --attention-sinks: give --attention-sinks 4.")


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """The page of `--web`."""

    host: str = LOOPBACK
    """Address that the page is served at. Whoever reaches it can use the model; the default is this machine alone."""

    port: int = 7860
    """Port of the page; 0 takes a free one."""

    upload_megabytes: float = 50.0
    """Largest document that the page takes, in megabytes (10^6 bytes)."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UserError(f"--port is {self.port}: it must be from 0 to 65535.")
        if not self.upload_megabytes > 0:
            raise UserError(f"--upload-megabytes is {self.upload_megabytes:g}: it must be above 0.")


@dataclass(frozen=True, kw_only=True)
class ChatSettings(CommandSettings):
    """Ask MODEL about long documents, in the terminal or on a page in the browser."""

    model: tyro.conf.Positional[str]
    """`demo`, a hub id, a folder, a .gguf file, a run directory or an adapter folder."""

    document: tuple[str, ...] = ()
    """Files to ask about (txt, md, source code, HTML, EPUB, PDF)."""

    section: Annotated[int | None, AtLeast(1)] = None
    """Ask about this section of a document that is longer than the window; they are counted from 1."""

    question: str | None = None
    """Answer this one question and leave."""

    web: bool = False
    """Serve a page on this machine instead of asking in the terminal; needs the extra `longlora[chat]`."""

    material: Annotated[str, choice(MATERIALS)] = "auto"
    """What the documents are, for the words around them (the paper's prompt); `auto` looks at each."""

    prompt_format: Annotated[str, choice(CHAT_FORMATS)] = "auto"
    """`template` is the tokenizer's own chat template, `inst` the original code's [INST]question[/INST], `plain` text
    for a base model to go on with; `auto` is the template where there is one, else `plain`."""

    kept_tokens: Annotated[int | None, AtLeast(0, "tokens")] = None
    """Tokens whose keys and values stay in memory, so that no document is read twice; default two windows."""

    dtype: Annotated[str, choice(DTYPES)] = "auto"
    """Arithmetic of the weights; `auto` is the checkpoint's own, or float32 on a CPU that has no arithmetic of it and
    memory enough."""

    answer: AnswerSettings = AnswerSettings()
    sinks: SinkSettings = SinkSettings()
    page: PageSettings = PageSettings()
    loading: LoadSettings = LoadSettings()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.section is not None and len(self.document) != 1:
            raise UserError(
                f"--section {self.section} is a part of one document: give one --document, not {len(self.document)}."
            )
        if self.question is not None and not self.question.strip():
            raise UserError("--question is empty: say what to ask.")
        if self.web and self.question is not None:
            raise UserError("--question is answered in the terminal: leave --web out, or ask on the page.")
        if self.web and self.section is not None:
            raise UserError("--section has no effect with --web: sections are chosen on the page.")
        if self.json and self.question is None:
            raise UserError("--json needs --question: a conversation is no single JSON object (/save writes one).")
        if not self.web and self.page != PageSettings():
            raise UserError("--host, --port and --upload-megabytes are the page's: give --web too.")
