"""The LoRA of an adapter as a GGUF of its own, which llama.cpp puts on its base's GGUF (`--lora`)."""

from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES, GGUFWriter, Keys, get_tensor_name_map
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from longlora.errors import UserError
from longlora.model.exporting.weights import layout_of, write_weights
from longlora.model.loading import load, load_config
from longlora.model.source import TRAINED_PARTS, locate
from longlora.progress import Progress
from longlora.settings import ExportSettings

_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
"""PEFT's `init_lora_weights` that leave the base's own weights as they are."""

_A, _B = ".lora_A.weight", ".lora_B.weight"

_FOLD = "fold it into a base (`longlora merge RUN --output DIR --keep-lora`), and export DIR and DIR/adapter"


def write_lora(settings: ExportSettings, path: Path) -> dict[str, Any]:
    """Write the adapter of `settings.model` to `path`.

    Each B, with its rows as its layer's, is `strength / alpha` times the adapter's, where `alpha` is the one that the
    file has for all: llama.cpp multiplies B A by alpha / rank, PEFT by a scaling of each layer's own.

    Returns:
        `{"model", "base", "architecture", "type", "parameters"}`.

    Raises:
        UserError: MODEL is no adapter or cannot be loaded, or is more than LoRA of linear layers on its base as it is.
    """
    source, loading = locate(settings.model, settings.loading.revision), settings.loading
    refused = f"--lora: the adapter of '{settings.model}'"
    if not source.is_adapter or source.base is None:
        raise UserError(f"--lora: MODEL '{settings.model}' is no adapter: leave --lora out to export it as a model.")
    code, revision = loading.trust_remote_code, loading.revision
    config = load_config(settings.model, trust_remote_code=code, revision=revision)
    base = load_config(source.base, trust_remote_code=code, revision=source.base_revision)
    layout = layout_of(config)
    if any(getattr(config, key) != getattr(base, key) for key in ("rope_parameters", "max_position_embeddings")):
        raise UserError(f"{refused} has positions of its own, not those of '{source.base}': {_FOLD}.")
    if source.file(TRAINED_PARTS).is_file():
        raise UserError(f"{refused} has norms and embeddings beside it ({TRAINED_PARTS}): {_FOLD}.")
    model, _ = load(settings.model, trust_remote_code=code, revision=revision)
    names = get_tensor_name_map(layout.architecture, config.num_hidden_layers)
    pairs = _pairs(model, refused)
    places = {module: names.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in pairs}
    for module, place in places.items():
        if place is None or (module == "lm_head" and config.tie_word_embeddings):
            raise UserError(
                f"{refused} has LoRA of {module}, for which llama.cpp has no place: export it without --lora."
            )
    alpha = max((strength for _, _, strength in pairs.values()), key=abs) or 1.0
    weights = []
    for module, (a, b, strength) in pairs.items():
        weights.append((f"{module}.lora_a.weight", f"{places[module]}.lora_a", a))
        weights.append((f"{module}.weight", f"{places[module]}.lora_b", b.float() * (strength / alpha)))
    kind = "f32" if settings.type == "auto" else settings.type
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[layout.architecture])
    writer.add_type("adapter")
    writer.add_name(Path(settings.gguf).stem)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    with Progress("writing", "tensors", len(weights)) as progress:
        for number in write_weights(writer, weights, layout, config, kind, {}):
            progress.show(number, f"{number} tensors")
    writer.close()
    return {
        "model": settings.model,
        "base": source.base,
        "architecture": MODEL_ARCH_NAMES[layout.architecture],
        "type": kind,
        "parameters": sum(tensor.numel() for _, _, tensor in weights),
    }


def _pairs(model: Any, refused: str) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Layer -> its A (r, in), its B (out, r), and its scaling times r."""
    adapter = model.peft_config["default"] if isinstance(model, PeftModel) else None
    weights = {} if adapter is None else get_peft_model_state_dict(model, save_embedding_layers=False)
    layers = {key.removesuffix(_A): model.get_submodule(key.removesuffix(_A)) for key in weights if key.endswith(_A)}
    if not isinstance(adapter, LoraConfig) or not layers:
        raise UserError(f"{refused} has no LoRA of linear layers: export it without --lora.")
    if any(layer.lora_variant for layer in layers.values()) or adapter.layer_replication:
        raise UserError(f"{refused} is a variant of LoRA, which llama.cpp does not compute: export it without --lora.")
    others = [key for key in weights if key.removesuffix(_A).removesuffix(_B) not in layers]
    if others:
        raise UserError(
            f"{refused} is more than LoRA of linear layers ({others[0]}), all that llama.cpp takes: {_FOLD}."
        )
    if adapter.init_lora_weights not in _INITIALISATIONS:
        raise UserError(
            f"{refused} changes its base's weights (init_lora_weights {adapter.init_lora_weights}): convert it by "
            "PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)."
        )
    pairs = {}
    for path, layer in layers.items():
        a, b = weights[path + _A], weights[path + _B]
        pairs[path.removeprefix("base_model.model.")] = a, b, layer.scaling["default"] * len(a)
    return pairs
