"""`longlora export`: MODEL, its adapter merged, as one GGUF file with the extended positions; or the adapter alone."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter
from transformers import PreTrainedModel

from longlora.errors import UserError
from longlora.model.exporting.lora import write_lora
from longlora.model.exporting.vocabulary import vocabulary
from longlora.model.exporting.weights import add_shape, layout_of, type_name, write_tensors
from longlora.model.gguf_positions import FREQUENCIES, OWN_KEY, gguf_positions
from longlora.model.loading import load, load_config
from longlora.model.positions import present_context
from longlora.progress import Progress
from longlora.settings import ExportSettings


def export(settings: ExportSettings) -> dict[str, Any]:
    """Run `longlora export`.

    Returns:
        `{"model", "gguf", "architecture", "type", "tokenizer": {"model", "pre"}, "parameters", "context",
        "rope_parameters", "bytes", "seconds"}`, sizes in weights, tokens and bytes; with `lora` what `write_lora`
        returns, and `gguf`, `bytes` and `seconds`.

    Raises:
        UserError: MODEL cannot be loaded, is of an architecture or has positions or a tokenizer that cannot be
            exported, or the file is there already or cannot be written.
    """
    began = time.monotonic()
    target = Path(settings.gguf).expanduser()
    if settings.lora:
        with _whole_file(target) as path:
            summary = write_lora(settings, path)
        summary |= {"gguf": str(target), "bytes": target.stat().st_size, "seconds": time.monotonic() - began}
        if not settings.json:
            print(
                f"{target}: LoRA of {summary['parameters']:,} parameters in {summary['type']}\n"
                f"run   llama-cli -m BASE.gguf --lora {target}, of `longlora export {summary['base']} --gguf BASE.gguf`"
            )
        return summary
    loading = settings.loading
    config = load_config(settings.model, trust_remote_code=loading.trust_remote_code, revision=loading.revision)
    layout = layout_of(config)
    architecture = MODEL_ARCH_NAMES[layout.architecture]
    positions = gguf_positions(config, architecture, layout.takes_frequencies)
    context = present_context(config)
    with _whole_file(target) as path:
        model, tokenizer = load(
            settings.model, trust_remote_code=loading.trust_remote_code, revision=loading.revision, merge=True
        )
        assert isinstance(model, PreTrainedModel)
        words = vocabulary(tokenizer, config.vocab_size)
        kind = type_name(settings.type, model)
        writer = GGUFWriter(path, architecture)
        writer.add_type("model")
        writer.add_name(target.stem)
        writer.add_quantization_version(2)
        add_shape(writer, config, context, kind)
        for key, value in positions.keys.items():
            _add(writer, f"{architecture}.rope.{key}", value)
        writer.add_string(OWN_KEY, positions.own)
        words.write(writer, tokenizer)
        more = {} if positions.frequencies is None else {FREQUENCIES: positions.frequencies}
        with Progress("writing", "tensors", len(model.state_dict())) as progress:
            for number in write_tensors(writer, model, layout, kind, more):
                progress.show(number, f"{number} tensors")
        writer.close()
    summary = {
        "model": settings.model,
        "gguf": str(target),
        "architecture": architecture,
        "type": kind,
        "tokenizer": {"model": words.model, "pre": words.pre},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": context,
        "rope_parameters": dict(config.rope_parameters),
        "bytes": target.stat().st_size,
        "seconds": time.monotonic() - began,
    }
    if not settings.json:
        print(_story(summary))
    return summary


def _add(writer: GGUFWriter, key: str, value: str | int | float) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """A file beside `target` that takes its place at the end, or is removed if anything goes wrong."""
    if target.exists():
        raise UserError(f"--gguf {target} is there already: name another file, or remove that one.")
    beside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        beside.touch()  # at once, before the minutes that a model may take to load
    except OSError as error:
        raise UserError(f"--gguf {target} cannot be written ({error.strerror}): name another file.") from error
    try:
        yield beside
        beside.replace(target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"--gguf {target} cannot be written ({error.strerror}): make room, or name another.") from error
    finally:
        beside.unlink(missing_ok=True)


def _story(summary: dict[str, Any]) -> str:
    size = f"{summary['bytes'] / 1e9:.2f} GB" if summary["bytes"] > 1e8 else f"{summary['bytes'] / 1e6:.1f} MB"
    return (
        f"{summary['gguf']}: {summary['parameters']:,} parameters in {summary['type']}, {size}, window "
        f"{summary['context']:,} tokens\n"
        f"run   llama-cli -m {summary['gguf']} -c {summary['context']}"
    )
