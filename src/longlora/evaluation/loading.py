"""A model as an evaluation wants it: on this process's device, its positions maybe stretched without training."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from longlora.corpus.tokens import TokenizedCorpus
from longlora.errors import UserError
from longlora.evaluation.prompting import PromptFormat
from longlora.model.lm_head import unwrapped
from longlora.model.loading import load, load_config, load_tokenizer
from longlora.model.positions import extend_positions
from longlora.model.precision import to_quick_dtype
from longlora.settings import CorpusSettings, EvaluatedModelsSettings, RetrievalSettings


def load_evaluated(name: str, settings: EvaluatedModelsSettings) -> tuple[Any, Any, str]:
    """The model that `name` names, its tokenizer, and the label of its results.

    Raises:
        UserError: as `longlora.model.loading.load`, or `extend_to` is no longer than the model's window.
    """
    model, tokenizer = load(
        name,
        dtype=settings.dtype,
        device="auto" if settings.device_map == "one" else None,
        trust_remote_code=settings.loading.trust_remote_code,
        revision=settings.loading.revision,
    )
    if settings.dtype == "auto":
        to_quick_dtype(model)
    label = name
    if settings.extend_to:
        extension = extend_positions(model, settings.extend_to, settings.method)
        if not extension.changed:
            raise UserError(f"--extend-to is {settings.extend_to:,}: {extension.message}")
        label = f"{name}, {settings.method} to {settings.extend_to:,}, not trained"
    if settings.device_map == "auto":
        _spread(unwrapped(model))
    return model, tokenizer, label


def _spread(network: Any) -> None:
    """Lay the layers of a model of transformers over all devices, in order, with what moves activations on."""
    whole = list(network._no_split_modules or [])
    memory = get_balanced_memory(network, no_split_module_classes=whole)
    dispatch_model(network, infer_auto_device_map(network, memory, whole))


@dataclass(frozen=True)
class Asked:
    """Whom questions are put to: a model, or the server that has its weights."""

    model: Any
    """None where a server answers."""
    config: Any
    tokenizer: Any
    form: PromptFormat
    about: dict[str, Any]
    """What a results document says of it and of the way prompts are written."""


def whom_to_ask(name: str, settings: RetrievalSettings) -> Asked:
    """The model that `name` names, or its config and tokenizer where `settings` names a server.

    Raises:
        UserError: as `load_evaluated` and `PromptFormat`.
    """
    if settings.server:
        trust, revision = settings.loading.trust_remote_code, settings.loading.revision
        model, label, dtype = None, f"{name} at {settings.server}", "the server's"
        config = load_config(name, trust_remote_code=trust, revision=revision)
        tokenizer = load_tokenizer(name, trust_remote_code=trust, revision=revision)
    else:
        model, tokenizer, label = load_evaluated(name, settings)
        config, dtype = unwrapped(model).config, str(unwrapped(model).dtype).removeprefix("torch.")
    form = PromptFormat(tokenizer, chat=settings.chat, bos=settings.bos, system=settings.system)
    about = {"model": name, "label": label, **stretching(settings), "dtype": dtype, **form.description}
    return Asked(model, config, tokenizer, form, about)


def stretching(settings: EvaluatedModelsSettings) -> dict[str, Any]:
    """How positions were stretched for this evaluation, for a results document; nothing where they were not."""
    return {"extend_to": settings.extend_to, "method": settings.method} if settings.extend_to else {}


def data_name(corpus: CorpusSettings) -> str:
    """What the documents are called in results: names of files and folders without where they lie."""
    return ", ".join(Path(source).name if Path(source).exists() else source for source in corpus.data)


def held_out(corpus: CorpusSettings) -> bool | None:
    """Which side of `stdlib` to measure on: the modules that no run of this package trains on."""
    return True if "stdlib" in corpus.data else None


def same_tokens(one: TokenizedCorpus, other: TokenizedCorpus) -> bool:
    """Whether two tokenizers made the same tokens of the same documents, so that losses can be compared by token."""
    return np.array_equal(one.offsets, other.offsets) and np.array_equal(one.tokens, other.tokens)


def require_lm_eval(flag: str) -> None:
    """Raises UserError where lm-eval, with what its RULER tasks need, is not installed; `flag` asked for it."""
    missing = [name for name in ("lm_eval", "nltk", "wonderwords", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{flag} needs {', '.join(missing)}: install the extra with `pip install 'longlora[eval]'`.")
