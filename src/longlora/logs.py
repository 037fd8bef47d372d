"""What a command says while it works: our own lines on stderr, and nothing of the libraries' chatter."""

import logging
import os
import sys
import warnings

from longlora import ranks
from longlora.errors import printable


class _Stderr(logging.StreamHandler):
    """The stderr of the moment, for whoever runs several commands in one process and reads what each of them says."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def quiet_libraries() -> None:
    """Set up logging for a process that runs a command, before it imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(handlers=[_Stderr()], level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Printable("%(message)s"))
    # of several processes the first speaks for all
    logging.getLogger("longlora").setLevel(logging.INFO if ranks.rank() == 0 else logging.ERROR)
    # where it is installed it says on stdout that there is no GPU, in the midst of --json
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for a vocabulary change beside a base that is a .gguf file; this package never changes one
    warnings.filterwarnings("ignore", message="Could not find a config file in .*gguf")


class _Printable(logging.Formatter):
    """Names of files, headings and what teachers say stand in messages: nothing in them commands the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))
