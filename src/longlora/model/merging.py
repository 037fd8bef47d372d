"""RUN -> plain Hugging Face folder: what any tool that knows the base model's architecture can load.

The folder is written under a temporary name beside the output and renamed once it is whole, so that a killed run or
a full disk leaves no half-written model.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from longlora.errors import UserError
from longlora.model.loading import load, load_config, quiet, window
from longlora.model.source import ModelSource, base_of, first_line, locate
from longlora.settings import MergeSettings


def merge_run(settings: MergeSettings) -> dict[str, Any]:
    """Run `longlora merge`; what it returns and raises is `merge`'s."""
    result = merge(settings.model, settings.output, dtype=settings.dtype)
    if not settings.json:
        print(
            f"{result['output']}: {result['parameters']:,} parameters in {result['dtype']}, "
            f"window {result['context']:,} tokens; any Hugging Face tool loads it."
        )
    return result


def merge(model: str, output: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False) -> dict[str, Any]:
    """Writes the model of a run or adapter folder, weights merged, to the new folder `output`.

    The folder holds safetensors weights (LoRA folded in with float32 arithmetic, tied weights still tied), the
    config with the extended `rope_parameters` and `max_position_embeddings`, the base's generation config, and the
    tokenizer with its chat template and `model_max_length` at the new context.

    Args:
        model: MODEL, a run directory (of an adapter or of full fine-tuning) or an adapter folder.
        output: folder to make; it may be there if it is empty.
        dtype: of the written weights; `auto` is the base model's.
        trust_remote_code: run Python code that comes with the base model.

    Returns:
        `{"model", "output", "base", "parameters", "dtype", "context", "rope_parameters", "tied", "bytes",
        "seconds"}`, sizes in weights, tokens and bytes.

    Raises:
        UserError: there is nothing to merge, MODEL cannot be loaded, `output` is not empty or cannot be written.
    """
    source = locate(model)
    if source.base is None:
        raise UserError(
            f"MODEL '{model}' has no adapter, there is nothing to merge: give a run directory or an adapter folder."
        )
    start = time.monotonic()
    output = Path(output).expanduser()
    with _whole_or_nothing(output) as folder:
        plain, tokenizer = load(
            model, dtype=_dtype(source, dtype, trust_remote_code), trust_remote_code=trust_remote_code, merge=True
        )
        assert isinstance(plain, PreTrainedModel)
        context = window(plain.config)
        tokenizer.model_max_length = context or tokenizer.model_max_length
        generation = plain.generation_config
        # Llama 2's max_length is its window: where the base generates up to its end, so does the merged model.
        if context is not None and generation.max_length in _windows_below(source, trust_remote_code):
            generation.max_length = context
        # Written by itself, because transformers refuses to save with the model one that has a fault of the base's,
        # such as Llama 2's temperature without sampling.
        plain.generation_config = GenerationConfig()
        with quiet():
            plain.save_pretrained(folder)
        generation.to_json_file(folder / "generation_config.json")
        tokenizer.save_pretrained(folder)
        head = plain.get_output_embeddings()
        summary = {
            "model": str(model),
            "output": str(output),
            "base": source.base,
            "parameters": sum(parameter.numel() for parameter in plain.parameters()),
            "dtype": str(plain.dtype).removeprefix("torch."),
            "context": context,
            "rope_parameters": getattr(plain.config.get_text_config(), "rope_parameters", None),
            "tied": head is not None and head.weight is plain.get_input_embeddings().weight,
            "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        }
    summary["seconds"] = time.monotonic() - start
    return summary


def _dtype(source: ModelSource, dtype: str, trust_remote_code: bool) -> str:
    """A full fine-tuning keeps its weights in float32, so `auto` asks the model that it started from."""
    if dtype != "auto" or source.is_adapter:
        return dtype
    base = load_config(base_of(source).name, trust_remote_code=trust_remote_code, revision=source.base_revision).dtype
    return "auto" if base is None else str(base).removeprefix("torch.")


def _windows_below(source: ModelSource, trust_remote_code: bool) -> set[int]:
    """The windows, in tokens, of the models that `source` was trained from."""
    windows: set[int] = set()
    while source.base is not None:
        source = base_of(source)
        config = load_config(source.name, trust_remote_code=trust_remote_code, revision=source.revision)
        windows |= {below} if (below := window(config)) is not None else set()
    return windows


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` at the end, or is removed if anything goes wrong."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output '{output}' is there already and not empty: give a new folder, or remove that one.")
    partial = output.absolute().with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output '{output}' cannot be written ({first_line(error)}): nothing is left of it; give a folder on a "
            "disk with room that you may write to."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
