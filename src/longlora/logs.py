"""What a command says while it works: our own lines on stderr, and nothing of the libraries' chatter."""

import logging
import os
import sys
import warnings

from longlora import ranks


def quiet_libraries() -> None:
    """Set up logging for a process that runs a command, before it imports transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    # of several processes the first speaks for all
    logging.getLogger("longlora").setLevel(logging.INFO if ranks.rank() == 0 else logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # PEFT looks for a vocabulary change beside a base that is a .gguf file; this package never changes one
    warnings.filterwarnings("ignore", message="Could not find a config file in .*gguf")
