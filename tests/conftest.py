"""What every test file shares: a closed environment, and tiny models and a tokenizer made in memory.

Nothing here reaches a network or a person's own caches, and torch is imported only by the tests that use it.
"""

import gc
import os
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Set at import, because the libraries read these when they are imported themselves; child processes inherit them.
_CACHE = tempfile.TemporaryDirectory(prefix="longlora-tests-")
os.environ.update(
    LONGLORA_CACHE=f"{_CACHE.name}/longlora",
    HF_HOME=f"{_CACHE.name}/huggingface",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)
# On tensors as small as these a second thread costs more than it brings; a second test process (-n 2) does help.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gpt_neox", "olmo2", "gemma")
"""The families that the package promises to serve (transformers' `model_type`), each with full attention."""

_SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Ten times the usual spread: attention far from uniform, so that a token seen or not seen shows in the logits.
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_PECULIARITIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "phi3": {"num_key_value_heads": 2, "original_max_position_embeddings": 64},
    "gpt_neox": {},
    "olmo2": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
}


def make_tiny_model(architecture: str, *, seed: int = 0, **overrides: Any) -> "PreTrainedModel":
    """A random float32 decoder of two layers, in evaluation mode: hidden 64, 4 heads, vocabulary 97, window 64 tokens.

    The same arguments give the same weights. `overrides` are fields of the architecture's config, such as
    `tie_word_embeddings=True`, `num_key_value_heads=1` or `vocab_size=len(tokenizer)`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **(_SIZES | _PECULIARITIES[architecture] | overrides))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_tiny_tokenizer() -> "PreTrainedTokenizerFast":
    """A byte-level tokenizer of 257 entries, one for each byte and the end of text (id 0): any text survives it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    entries = [end, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={entry: number for number, entry in enumerate(entries)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


@pytest.fixture(scope="session")
def tiny_model() -> "Callable[..., PreTrainedModel]":
    """`tiny_model(architecture, **overrides)`: see `make_tiny_model`."""
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "Callable[[], PreTrainedTokenizerFast]":
    """`tiny_tokenizer()`: see `make_tiny_tokenizer`."""
    return make_tiny_tokenizer


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each served family in turn."""
    return request.param


def pytest_collection_finish() -> None:
    """A collection of garbage passes over what was imported, most of a second each time; training asks for many."""
    gc.collect()
    gc.freeze()


_MISSING: list[str] = []


def _note_missing(report: Any) -> None:
    reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
    if "not installed" in reason or "no Chromium is installed" in reason:
        _MISSING.append(f"{report.nodeid}: {reason}")


def pytest_collectreport(report: Any) -> None:
    _note_missing(report)


def pytest_runtest_logreport(report: Any) -> None:
    _note_missing(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In `make check` a test that is skipped for want of a package is a failure: CI runs what the README claims."""
    if _MISSING and os.environ.get("LONGLORA_NOTHING_MISSING") and session.exitstatus == 0:
        print("\nskipped, and nothing may be:", *sorted(set(_MISSING)), sep="\n  ")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
