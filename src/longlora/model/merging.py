"""RUN -> plain Hugging Face folder: what any tool that knows the base model's architecture can load.

With `keep_lora` the LoRA stays apart, in a stock adapter of linear layers alone, and only norms and embeddings go into
the folder: vLLM and SGLang refuse or mistake an adapter with `modules_to_save`, and llama.cpp's converter takes none.

The folder is written under a temporary name beside the output and renamed once it is whole, so that a killed run or
a full disk leaves no half-written model.
"""

import copy
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from longlora.errors import UserError
from longlora.model.loading import load, load_config, window
from longlora.model.reading import quiet
from longlora.model.source import ADAPTER_WEIGHTS, ModelSource, base_of, first_line, locate
from longlora.model.stopping import stop_at_end_of_turn
from longlora.settings import MergeSettings


def merge_run(settings: MergeSettings) -> dict[str, Any]:
    """Run `longlora merge`; what it returns and raises is `merge`'s."""
    result = merge(settings.model, settings.output, dtype=settings.dtype, keep_lora=settings.keep_lora)
    if not settings.json:
        print(
            f"{result['output']}: {result['parameters']:,} parameters in {result['dtype']}, "
            f"window {result['context']:,} tokens; any Hugging Face tool loads it."
        )
        if result["adapter"]:
            print(f"{result['adapter']}: the LoRA, a stock adapter of linear layers alone, for that folder.")
    return result


def merge(
    model: str,
    output: str | Path,
    *,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    keep_lora: bool = False,
) -> dict[str, Any]:
    """Writes the model of a run or adapter folder, weights merged, to the new folder `output`.

    The folder holds safetensors weights (LoRA folded in with float32 arithmetic, tied weights still tied), the
    config with the extended `rope_parameters` and `max_position_embeddings`, the base's generation config, and the
    tokenizer with its chat template and `model_max_length` at the new context.

    Args:
        model: MODEL, a run directory (of an adapter or of full fine-tuning) or an adapter folder.
        output: folder to make; it may be there if it is empty.
        dtype: of the written weights; `auto` is the base model's.
        trust_remote_code: run Python code that comes with the base model.
        keep_lora: fold in norms, embeddings and positions only; the LoRA goes to `output/adapter`, a stock adapter of
            linear layers alone whose base is `output`.

    Returns:
        `{"model", "output", "adapter", "base", "parameters", "dtype", "context", "rope_parameters", "tied", "bytes",
        "seconds"}`, sizes in weights, tokens and bytes; `adapter` is None without `keep_lora`.

    Raises:
        UserError: there is nothing to merge or no LoRA to keep, MODEL cannot be loaded, `output` is not empty or cannot
            be written.
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
            model,
            dtype=_dtype(source, dtype, trust_remote_code),
            trust_remote_code=trust_remote_code,
            merge=not keep_lora,
        )
        apart = _lora_apart(plain, model) if keep_lora else None
        plain = apart[0] if apart else plain
        assert isinstance(plain, PreTrainedModel)
        context = window(plain.config)
        tokenizer.model_max_length = context or tokenizer.model_max_length
        generation = plain.generation_config
        stop_at_end_of_turn(generation, tokenizer)
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
        if apart:
            _write_lora(folder, output, *apart[1:])
        head = plain.get_output_embeddings()
        summary = {
            "model": str(model),
            "output": str(output),
            "adapter": str(output / "adapter") if keep_lora else None,
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


def _lora_apart(model: Any, name: str) -> tuple[PreTrainedModel, LoraConfig, dict[str, Tensor]]:
    """The plain model with retrained norms and embeddings in it, and the LoRA of its linear layers."""
    adapted = isinstance(model, PeftModel)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False) if adapted else {}
    lora = {key: tensor for key, tensor in weights.items() if key.endswith((".lora_A.weight", ".lora_B.weight"))}
    if not lora:
        raise UserError(f"--keep-lora: '{name}' trained no LoRA that could be kept: leave it out.")
    config: LoraConfig = copy.deepcopy(model.peft_config["default"])
    others = [key for key in weights if (".lora_" in key or "trainable_tokens" in key) and key not in lora]
    if others or config.bias != "none":
        raise UserError(
            f"--keep-lora: the adapter of '{name}' is more than LoRA of linear layers ({(others or ['bias'])[0]}), "
            "which servers do not take: leave it out."
        )
    config.modules_to_save, config.ensure_weight_tying, config.inference_mode = None, False, True
    # PiSSA and its like take their start out of the base when they are loaded, and it is out of this base already
    config.init_lora_weights = True
    plain = model.unload()
    head = plain.get_output_embeddings()
    if head is not None and head.weight is not plain.get_input_embeddings().weight:
        plain.config.tie_word_embeddings = False  # as PEFT says where it merges
    return plain, config, lora


def _write_lora(folder: Path, output: Path, config: LoraConfig, lora: dict[str, Tensor]) -> None:
    """`adapter/` inside `folder`, on the base that `folder` will be as `output`."""
    adapter = folder / "adapter"
    adapter.mkdir()
    config.base_model_name_or_path = str(output.absolute())
    config.save_pretrained(str(adapter))
    save_file({key: tensor.contiguous() for key, tensor in lora.items()}, adapter / ADAPTER_WEIGHTS, {"format": "pt"})
    shutil.copy(folder / "config.json", adapter)


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
