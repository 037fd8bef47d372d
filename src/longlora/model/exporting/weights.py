"""A model's weights and shape as llama.cpp's tensors and keys, for the architectures whose layout is known here."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quants,
)
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from longlora.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays out a transformers model type."""

    architecture: MODEL_ARCH
    interleaved: bool
    """Its rotary pairs are neighbours, where transformers has halves: rows of query and key change places."""
    takes_frequencies: bool
    """It reads `rope_freqs.weight`."""


LAYOUTS = {
    "llama": Layout(MODEL_ARCH.LLAMA, interleaved=True, takes_frequencies=True),
    "mistral": Layout(MODEL_ARCH.LLAMA, interleaved=True, takes_frequencies=True),
    "qwen2": Layout(MODEL_ARCH.QWEN2, interleaved=False, takes_frequencies=False),
    "qwen3": Layout(MODEL_ARCH.QWEN3, interleaved=False, takes_frequencies=False),
}
"""transformers' `model_type` -> llama.cpp's layout."""

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}

_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def layout_of(config: PreTrainedConfig) -> Layout:
    """Where llama.cpp puts the parts of such a model.

    Raises:
        UserError: longlora does not know, or llama.cpp would compute something else.
    """
    merged = "merge it (`longlora merge`) and try llama.cpp's own convert_hf_to_gguf.py on the folder"
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise UserError(f"a {config.model_type} model cannot be exported, only {', '.join(LAYOUTS)}: {merged}.")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise UserError(
            f"the {config.model_type} model attends to the last {window:,} tokens only (sliding_window), and llama.cpp "
            "would let it attend to all: set sliding_window to null in its config.json if it is to."
        )
    if config.hidden_act != "silu":
        raise UserError(
            f"the {config.model_type} model has hidden_act {config.hidden_act}, where llama.cpp has silu: it cannot be "
            "exported."
        )
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"the {config.model_type} model rotates a part of each head only: {merged}.")
    return layout


def type_name(asked: str, model: PreTrainedModel) -> str:
    """`asked`, or for `auto` the type of the model's own weights."""
    return _OF_DTYPE.get(model.dtype, "f32") if asked == "auto" else asked


def add_shape(writer: GGUFWriter, config: PreTrainedConfig, context: int, file_type: str) -> None:
    """The keys that say how large the model is."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(TYPES[file_type][1])


def write_tensors(
    writer: GGUFWriter, model: PreTrainedModel, layout: Layout, type_name: str, more: dict[str, np.ndarray]
) -> Iterator[int]:
    """Write header, keys and every tensor, one in memory at a time; gives the number of tensors written so far.

    Args:
        writer: with all keys added.
        model: a plain model.
        layout: its layout.
        type_name: a name of `TYPES`, for the matrices; a row of no whole number of blocks, and what is no matrix,
            stays float32.
        more: further tensors by name, float32.
    """
    names = get_tensor_name_map(layout.architecture, model.config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights: list[tuple[str, str, Tensor]] = []
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise UserError(f"llama.cpp has no place for the model's {name}: it cannot be exported.")
        weights.append((name, gguf_name, tensor))
    yield from write_weights(writer, weights, layout, model.config, type_name, more)


def write_weights(
    writer: GGUFWriter,
    weights: list[tuple[str, str, Tensor]],
    layout: Layout,
    config: PreTrainedConfig,
    type_name: str,
    more: dict[str, np.ndarray],
) -> Iterator[int]:
    """`write_tensors` of (name, llama.cpp's name, tensor); rows are ordered as those of the weight that `name` is."""
    kinds = [_type_of(tensor, type_name) for _, _, tensor in weights]
    for (_, gguf_name, tensor), kind in zip(weights, kinds, strict=True):
        block, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(
            gguf_name, list(tensor.shape), np.dtype(np.float32), tensor.numel() // block * size, raw_dtype=kind
        )
    for name, array in more.items():
        writer.add_tensor_info(name, list(array.shape), array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, ((name, _, tensor), kind) in enumerate(zip(weights, kinds, strict=True), start=1):
        array = _laid_out(name, tensor.float(), layout, config).cpu().numpy()
        writer.write_tensor_data(quants.quantize(array, kind))
        yield number
    for array in more.values():
        writer.write_tensor_data(array)


def _type_of(tensor: Tensor, name: str) -> GGMLQuantizationType:
    kind = TYPES[name][0]
    fits = tensor.ndim > 1 and tensor.shape[-1] % GGML_QUANT_SIZES[kind][0] == 0
    return kind if fits else GGMLQuantizationType.F32


def _laid_out(name: str, tensor: Tensor, layout: Layout, config: PreTrainedConfig) -> Tensor:
    """Rows of query and key projections in the order of llama.cpp's rotary pairs: (0, d/2, 1, d/2 + 1, …) a head."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if not layout.interleaved or heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)
