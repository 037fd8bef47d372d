"""A model as an evaluation wants it: on this process's device, its positions maybe stretched without training."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import get_balanced_memory

from longlora.corpus.tokens import TokenizedCorpus
from longlora.errors import UserError
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


def load_served(name: str, settings: RetrievalSettings) -> tuple[Any, Any, str]:
    """As `load_evaluated` where a server has the weights: the config of `name`, its tokenizer, and the label."""
    trust, revision = settings.loading.trust_remote_code, settings.loading.revision
    config = load_config(name, trust_remote_code=trust, revision=revision)
    return config, load_tokenizer(name, trust_remote_code=trust, revision=revision), f"{name} at {settings.server}"


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
