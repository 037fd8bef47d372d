"""`longlora chat` in the terminal: a prompt, answers that stream, a meter, and a few commands that begin with `/`."""

import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from longlora.chat.answering import Reading
from longlora.chat.documents import ChatDocument, read_document
from longlora.chat.exporting import as_json, as_markdown
from longlora.chat.session import Answer, ChatModel, ChatSession
from longlora.errors import UserError, nearest, printable
from longlora.progress import Progress

HELP = {
    "/documents": "what is being asked about, and its sections",
    "/open FILE": "ask about this file instead, in a new conversation",
    "/section N": "ask about section N of the document, in a new conversation",
    "/new": "a new conversation about the same documents",
    "/save FILE": "write the conversation: .json, or Markdown",
    "/help": "this list",
    "/quit": "leave (or Ctrl-D)",
}
_PROMPT = "› "

WORTH_A_BAR = 256
"""Tokens to read that take long enough to show how far they are."""


def answer_once(session: ChatSession, question: str, *, show: bool) -> Answer:
    """Ask one question; with `show` the answer streams to standard output, the rest goes to standard error.

    Ctrl-C stops the answer, a second one the program.

    Raises:
        UserError: as `ChatSession.ask`.
    """
    stop, answer, begun = threading.Event(), None, False
    with _stopped_by_ctrl_c(stop), ExitStack() as bars:
        bar: Progress | None = None
        for each in session.ask(question, stop):
            if isinstance(each, Reading):
                if bar is None and each.total - each.done > WORTH_A_BAR:
                    bar = bars.enter_context(Progress("reading", "tokens", each.total - each.reused))
                if bar is not None:
                    bar.show(each.done - each.reused, f"{each.done:,} of {each.total:,} tokens")
                if each.done == each.total:
                    bars.close()
            elif isinstance(each, Answer):
                answer = each
            elif show:
                # a plain prompt leaves the blank after "Answer:" to the answer
                print(printable(each if begun else each.removeprefix(" ")), end="", flush=True)
                begun = True
    assert answer is not None
    if show:
        print(flush=True)
        _note(answer.meter() + _ending(answer))
    return answer


def _ending(answer: Answer) -> str:
    return {
        "stopped": " · stopped",
        "length": " · cut off by --answer-tokens",
        "window": " · cut off by the window: /new begins again",
    }.get(answer.finish, "")


@contextmanager
def _stopped_by_ctrl_c(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C sets `stop`, so that no pass through the model is torn; the second is an interrupt as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask_to_stop(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask_to_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _note(text: str) -> None:
    """A line beside the conversation, dim on a terminal."""
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{printable(text)}{plain}", file=sys.stderr, flush=True)


class Conversation:
    """The prompt, and what its commands do."""

    def __init__(self, model: ChatModel, documents: list[ChatDocument], section: int | None = None) -> None:
        """
        Raises:
            UserError: there is no such section.
        """
        self.model = model
        self.whole = documents
        """The documents as they were opened, not cut."""
        self.session = ChatSession(model, list(documents))
        if section is not None:
            self._section(str(section))

    def run(self) -> None:
        """Until `/quit` or the end of the input."""
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  (lines can be edited, and the arrow keys bring back what was asked)
        self._greet()
        while True:
            try:
                line = input(_PROMPT if sys.stdin.isatty() else "").strip()
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return
            except KeyboardInterrupt:
                _note("\n/quit or Ctrl-D leaves")
                continue
            if not line:
                continue
            try:
                if line in ("/quit", "/exit"):
                    return
                if line.startswith("/"):
                    self._command(line)
                elif self._fits():
                    answer_once(self.session, line, show=True)
            except UserError as error:
                _note(f"longlora: {error}")

    def _greet(self) -> None:
        seen = f"sees {self.model.reach:,} tokens" if self.model.reach else "has a window of unknown length"
        _note(f"{self.model.name} {seen} ({self.model.prompts.name} prompts). /help lists the commands.")
        self._documents()

    def _command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        actions = {
            "/documents": lambda: self._documents(sections=True),
            "/open": lambda: self._open(rest),
            "/section": lambda: self._section(rest),
            "/new": self._begin_again,
            "/save": lambda: self._save(rest),
            "/help": lambda: _note("\n".join(f"{name:<12} {what}" for name, what in HELP.items())),
        }
        if word not in actions:
            raise UserError(
                f"there is no command {word}. {nearest(word, actions)} /help lists them.".replace("  ", " ")
            )
        actions[word]()

    def _documents(self, sections: bool = False) -> None:
        for each in self.session.documents:
            share = f", {each.tokens / self.model.reach:.0%} of the window" if self.model.reach else ""
            _note(f"{each.label}: {each.tokens:,} tokens{share}")
        if sections and not self.session.documents:
            _note("no document: /open FILE asks about one")
        surplus = self.model.surplus(self.session.documents)
        if surplus:
            _note(self.model.too_long(self.session.documents) + ".")
        if len(self.whole) == 1 and (surplus or (sections and self.session.documents[0].section)):
            self._list_sections()

    def _list_sections(self) -> None:
        document = self.whole[0]
        found = document.sections(self.model.section_budget(document), self.model.tokenizer)
        room = max(20, shutil.get_terminal_size().columns - 24)
        _note("\n".join(f"{at:>5}  {each.tokens:>7,}  {each.heading[:room]}" for at, each in enumerate(found, start=1)))
        _note(f"/section N asks about one of these {len(found)} sections.")

    def _fits(self) -> bool:
        """Whether there is something to ask about; says what to do where not."""
        if not self.model.surplus(self.session.documents):
            return True
        what = "choose a section with /section N" if len(self.whole) == 1 else "/open one of them alone"
        _note(f"{self.model.too_long(self.session.documents)}: {what}.")
        return False

    def _begin_again(self) -> None:
        self.session.begin_again()
        _note("a new conversation" + (" about " + self._names() if self.session.documents else ""))

    def _names(self) -> str:
        return " and ".join(each.label for each in self.session.documents)

    def _open(self, name: str) -> None:
        if not name:
            raise UserError("/open needs the name of a file.")
        document = read_document(Path(name).expanduser(), self.model.tokenizer, material=self.model.settings.material)
        self.whole = [document]
        self.session = ChatSession(self.model, [document])
        self._documents()

    def _section(self, number: str) -> None:
        if len(self.whole) != 1:
            raise UserError(f"/section chooses a part of one document, and there are {len(self.whole)}: /open one.")
        if not number.isdigit():
            raise UserError(f"/section needs the number of a section, not '{number}': /documents lists them.")
        document = self.whole[0]
        part = document.part(int(number), self.model.section_budget(document), self.model.tokenizer)
        self.session = ChatSession(self.model, [part])
        _note(f"asking about {part.label}: {part.tokens:,} tokens")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file, .json or .md.")
        if not self.session.turns:
            raise UserError("there is nothing to save yet: ask something first.")
        path = Path(name).expanduser()
        write = as_json if path.suffix == ".json" else as_markdown
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(write(self.model.name, self.session.documents, self.session.turns))
        except FileExistsError as error:
            raise UserError(f"'{name}' is there already: give another name.") from error
        except OSError as error:
            raise UserError(f"'{name}' cannot be written ({error.strerror}): give another name.") from error
        _note(f"saved to {name}")
