"""Reads a model's anatomy from its config, on PyTorch's meta device (shapes without storage).

The model and what trains in it are built by transformers and by `longlora.model.adapters` themselves, so that every
family counts as it really is: fused projections, grouped queries, normalised heads, experts, windows, tied heads.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from longlora.attention.transformers_backend import use_shifted_attention
from longlora.errors import UserError
from longlora.model.adapters import add_adapters_from, attention_projections, norm_modules, trainable_summary
from longlora.model.loading import window
from longlora.model.memory_saving.layer_tiles import refuse_layer_tiles
from longlora.model.memory_saving.tiled_mlp import decoder_layers, feedforward_modules
from longlora.model.reading import quiet
from longlora.model.source import first_line
from longlora.planner.anatomy import Anatomy, LayerShape, Trainees
from longlora.settings import TrainableSettings

EXPERTS_A_TOKEN = ("num_experts_per_tok", "moe_topk", "top_k_experts")
"""Names under which configs say how many experts serve a token."""


def read_anatomy(config: PreTrainedConfig, trainable: TrainableSettings, trust_remote_code: bool = False) -> Anatomy:
    """The sizes of the model that `config` describes and of what `trainable` trains in it; allocates no weights.

    Raises:
        UserError: transformers makes no decoder of this config, S2-Attn cannot serve it, nothing in it can train as
            asked, or some of its layers are no attention.
    """
    model = build_without_storage(config, trust_remote_code=trust_remote_code)
    use_shifted_attention(model, 2)  # refuses what it cannot serve
    text = config.get_text_config()
    projections, norms = attention_projections(model), norm_modules(model)
    layers = decoder_layers(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    latent = getattr(text, "qk_rope_head_dim", None)
    if latent:  # DeepSeek's latent attention: a rotary and a plain part, values of their own width, K for every head
        head_width, key_heads = latent + text.qk_nope_head_dim, text.num_attention_heads
    value_width = getattr(text, "v_head_dim", None) or head_width
    rope = getattr(text, "rope_parameters", None) or {}
    turned = latent or int(head_width * rope.get("partial_rotary_factor", 1.0))
    heads = text.num_attention_heads
    sizes = _HeadSizes(heads, key_heads, head_width, value_width)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
    if "layer_types" not in vars(text) and getattr(text, "sliding_window", None):
        kinds = ["sliding_attention"] * len(layers)
    shapes = tuple(
        _layer(layer, sizes, projections, norms, text, text.sliding_window if kind == "sliding_attention" else None)
        for layer, kind in zip(layers, kinds, strict=True)
    )
    inside = {id(module) for layer in layers for module in layer.modules()}
    return Anatomy(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden=text.hidden_size,
        heads=heads,
        key_heads=key_heads,
        head_width=head_width,
        value_width=value_width,
        vocabulary=cast(torch.Tensor, head.weight).shape[0],
        window=window(config),
        rotary=turned * (heads + key_heads) if rope else 0,
        tied=head.weight is embedding.weight,
        written_out=bool(getattr(text, "attn_logit_softcapping", None)),
        tiles=_can(feedforward_modules, model),
        layer_tiles=_can(refuse_layer_tiles, model),
        checkpoints=model.supports_gradient_checkpointing,
        final_norm_operations=sum(_norm_operations(norm, 1) for norm in norms.values() if id(norm) not in inside),
        layers=shapes,
        trainees=_trainees(model, trainable),
    )


def build_without_storage(
    config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of `config`, which stays as it is, on the meta device.

    Raises:
        UserError: transformers makes no decoder of it.
    """
    try:
        with torch.device("meta"), quiet():
            own = copy.deepcopy(config)  # into which, say, its attention will be written
            return AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise UserError(f"no model can be built from this {config.model_type} config: {first_line(error)}.") from error


def _can(find: Callable[[PreTrainedModel], object], model: PreTrainedModel) -> bool:
    try:
        find(model)
    except UserError:
        return False
    return True


@dataclass(frozen=True)
class _HeadSizes:
    heads: int
    key_heads: int
    key_width: int
    value_width: int


def _layer(
    layer: nn.Module,
    sizes: _HeadSizes,
    projections: dict[str, nn.Module],
    norms: dict[str, nn.Module],
    config: PreTrainedConfig,
    reach: int | None,
) -> LayerShape:
    own = {id(module) for module in layer.modules()}
    attention = [module for module in projections.values() if id(module) in own]
    matrices = [_matrix(module) for module in attention]
    in_attention = {id(part) for module in layer.modules() if _is_attention(module) for part in module.modules()}
    hidden_norms = late_norms = head_norms = norm_operations = 0
    for name, norm in norms.items():
        if id(norm) not in own:
            continue
        times, last = 1, name.rpartition(".")[2]
        if id(norm) in in_attention:
            if _width(norm) == sizes.key_width and last[0] in "qk":
                times = sizes.heads if last[0] == "q" else sizes.key_heads
            head_norms += _width(norm) * times
        else:
            hidden_norms += 1
            late_norms += last.startswith(("post_feedforward", "post_mlp"))
        norm_operations += _norm_operations(norm, times)
    weights, up, middle, experts = _feedforward(layer, in_attention, config)
    tensors = [parameter.numel() for parameter in layer.parameters()]
    reads = [_input_width(module) for module in attention]
    if sizes.heads * sizes.value_width not in reads:  # the output projection's
        raise UserError(
            f"the layers of this {config.model_type} model are not all attention as plan knows it (recurrent ones, or "
            "with other widths), so it cannot count them: run `longlora extend` with --steps 1 at a small context, and "
            "see what its log says of memory and time."
        )
    reads.remove(sizes.heads * sizes.value_width)
    return LayerShape(
        projection_weights=sum(matrix.numel() for matrix in matrices),
        feedforward_weights=weights,
        weights=sum(tensors),
        largest_weight=max(tensors),
        query=sizes.heads * sizes.key_width,
        key=sizes.key_heads * sizes.key_width,
        value=sizes.key_heads * sizes.value_width,
        output=sizes.heads * sizes.value_width,
        projection_inputs=sum(reads),
        projection_sources=sum(set(reads)),
        fused=len(attention) == 2,
        up=up,
        middle=middle,
        experts=experts,
        hidden_norms=hidden_norms,
        late_norms=late_norms,
        head_norms=head_norms,
        norm_operations=norm_operations,
        centred_norms=any(isinstance(norm, nn.LayerNorm) for norm in norms.values() if id(norm) in own),
        window=reach,
    )


def _is_attention(module: nn.Module) -> bool:
    return "attention" in type(module).__name__.lower()


def _matrix(module: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, module.weight)


def _input_width(module: nn.Module) -> int:
    rows, columns = _matrix(module).shape
    return rows if isinstance(module, Conv1D) else columns


def _width(norm: nn.Module) -> int:
    return max(parameter.numel() for parameter in norm.parameters())


def _norm_operations(norm: nn.Module, times: int) -> int:
    """Elementwise operations a token: square, sum, scale, weigh; a LayerNorm also sums, subtracts and adds a bias."""
    centred = isinstance(norm, nn.LayerNorm) or hasattr(norm, "bias")
    return _width(norm) * times * (7 if centred else 4)


def _feedforward(layer: nn.Module, in_attention: set[int], config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """Weights, up width, middle width and experts, of those experts that serve a token.

    The matrices of one module belong together; the last of them projects down (all families list it last).
    """
    chosen = next((value for name in EXPERTS_A_TOKEN if (value := getattr(config, name, None))), 1)
    weights = up = middle = experts = 0
    for module in layer.modules():
        if id(module) in in_attention:
            continue
        stacked = [p for name, p in module.named_parameters(recurse=False) if p.ndim == 3 and "bias" not in name]
        linear = [child.weight for child in module.children() if isinstance(child, nn.Linear | Conv1D)]
        router = [p for name, p in module.named_parameters(recurse=False) if p.ndim == 2 and name == "weight"]
        if isinstance(module, nn.Linear | Conv1D):
            continue  # counted with the module that holds it
        if not stacked and not linear:
            weights += sum(p.numel() for p in router)
            continue
        matrices = cast("list[torch.Tensor]", stacked or linear)
        share = chosen / len(matrices[0]) if stacked else 1.0
        sizes = [round(matrix.numel() * share) for matrix in matrices]
        weights += sum(sizes)
        experts += chosen if stacked else 0
        if len(sizes) > 1:
            up += sum(sizes[:-1]) // config.hidden_size
            middle += sizes[-1] // config.hidden_size
    return weights, up, middle, experts


def _trainees(model: PreTrainedModel, trainable: TrainableSettings) -> Trainees:
    """Adds what trains to `model` and counts it."""
    head = _matrix(cast(nn.Module, model.get_output_embeddings()))
    linear = [_matrix(module) for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.device("meta"):
        trained = add_adapters_from(trainable, model)
    frozen = [parameter.numel() for parameter in trained.parameters() if not parameter.requires_grad]
    return Trainees(
        groups=trainable_summary(trained)["groups"],
        frozen=sum(frozen),
        frozen_linear=sum(weight.numel() for weight in linear if weight is not head and not weight.requires_grad),
        largest=max(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad),
    )
