"""What the libraries that read models say: their errors as one sentence, their progress and notes kept down."""

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

import torch
from transformers.utils import logging as hf_logging

from longlora.errors import UserError
from longlora.model.source import first_line


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns what the libraries below raise for a bad file, which may be any exception, into one sentence."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{what} comes as Python code of its own: read that code, and if you trust it give --trust-remote-code."
            ) from error
        raise UserError(f"{what} cannot be read: {first_line(error)}.") from error


@contextmanager
def quiet(gguf: bool = False) -> Iterator[None]:
    """Progress bars only on a terminal, for GGUF (where no setting rules them) never; no notes about old names."""
    bars = hf_logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if bars:
        hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()) if gguf else nullcontext():
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        if bars:
            hf_logging.enable_progress_bar()
