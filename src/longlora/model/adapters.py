"""What trains: LoRA on the attention, norms and embeddings (the paper's LoRA+Norm+Embed), or every weight.

Paper section 3.3 and table 3: LoRA alone does not reach full fine-tuning at long contexts; with the normalisation
and embedding layers, a small share of the weights, it does. What comes out is a stock PEFT model. Modules are found
by type and place, so that any decoder family works: LoRA goes to each linear layer inside an attention module
(separate or fused projections, GPT-2's Conv1D, DeepSeek's low-rank ones), `norm` is each normalisation module that
has weights, `embed` the input embedding. An LM head tied to the embedding trains with it and stays tied; an untied
one stays frozen, as in the paper's code.
"""

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES, EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import longlora.model.saving  # noqa: F401  (whoever saves these adapters, their positions go along)
from longlora.errors import UserError, check_choice
from longlora.model.lm_head import decoder_of
from longlora.model.precision import keep_trainable_in_float32
from longlora.settings import TRAINABLE, TrainableSettings, TrainingSettings


def add_adapters(
    model: PreTrainedModel | PeftModel,
    rank: int | None = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    train: Iterable[str] = ("norm", "embed"),
) -> PreTrainedModel | PeftModel:
    """Freezes `model` and adds what trains; changes the model in place and returns the one to train.

    Args:
        model: a plain causal language model in any dtype. The frozen weights stay as they are; every trainable one
            is float32, because a step of a small learning rate is lost in bfloat16's 8 bits. A retrained norm or
            embedding computes in float32 and hands on the model's own dtype, with or without autocast.
        rank: rank of the LoRA matrices on the attention projections; `None` adds no LoRA.
        alpha: the LoRA update is scaled by `alpha / rank`.
        dropout: dropout before the LoRA matrices, a share.
        train: what trains besides LoRA, `norm` and `embed`; naming `lora` too changes nothing. `("full",)` instead
            makes every weight trainable, in float32, and returns the plain model (`rank` and the rest unused).

    Raises:
        UserError: an unknown part, a rank below 1, nothing to train, adapters already there, no linear layer inside
            an attention module, or a quantised weight among those to train.
    """
    parts = {train} if isinstance(train, str) else set(train)
    for part in sorted(parts):
        check_choice("part to train", part, TRAINABLE)
    if isinstance(model, PeftModel):
        raise UserError("the model already has adapters: merge them first (`longlora merge`), or go on training those.")
    if "full" in parts:
        if parts != {"full"}:
            raise UserError(f"train is {', '.join(sorted(parts))}: 'full' already trains every weight, give it alone.")
        return _full(model)
    if rank is None and "lora" in parts:
        raise UserError("train names 'lora' but the rank is None: give a rank of at least 1.")
    if rank is not None and rank < 1:
        raise UserError(f"the LoRA rank is {rank}: it must be at least 1.")
    if rank is None and not parts:
        raise UserError("nothing would train: give a LoRA rank, or name norm, embed or full in train.")

    projections = attention_projections(model) if rank is not None else {}
    if rank is not None and not projections:
        raise UserError(
            f"{type(model).__name__} has no linear layer inside an attention module, so LoRA has no place to go: "
            "train norm and embed without a rank, or full."
        )
    retrained = norm_modules(model) if "norm" in parts else {}
    if "norm" in parts and not retrained:
        raise UserError(f"{type(model).__name__} has no normalisation layer with weights: leave 'norm' out of train.")
    embedding = _input_embedding(model) if "embed" in parts else {}
    _refuse_quantised(model, [*retrained.values(), *embedding.values()])
    tied = bool(embedding) and _head_is_tied(model)
    # the embedding by its full name, as PEFT itself would add it to the list when it ties the head
    modules_to_save = [*_shortest_suffixes(model, retrained, avoid=projections), *embedding]
    if tied and not any(name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in modules_to_save):
        # PEFT keeps head and embedding one only when it sees a name it knows in this list. GPT-2's `wte` is not
        # one; this entry is, matches no module, and so stays in the saved adapter for the next reader of it.
        modules_to_save.append(f"tied.{EMBEDDING_LAYER_NAMES[0]}")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank or 1,
        lora_alpha=cast(int, int(alpha) if float(alpha).is_integer() else alpha),  # PEFT takes both, says int
        lora_dropout=dropout,
        target_modules=_shortest_suffixes(model, projections) if projections else DUMMY_TARGET_MODULES,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in projections.values()),
        modules_to_save=modules_to_save or None,
        ensure_weight_tying=tied,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT uses an old name of transformers'
        peft_model = get_peft_model(model, config)
    return keep_trainable_in_float32(peft_model)


def add_adapters_from(settings: TrainableSettings, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """`add_adapters` as the command line's settings say, where LoRA trains only if `train` names it."""
    rank = settings.rank if "lora" in settings.train else None
    return add_adapters(model, rank, settings.alpha, settings.lora_dropout, settings.train)


_NAMES_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")
"""What PEFT takes for a part of a mixture of experts wherever it is (its `transformers_weight_conversion`)."""


def attention_projections(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside attention modules by full name: q, k, v and o, however a family lays them out.

    A gate of attention's output that is named as those of experts (AFMoE) is left out.
    """
    modules = _reached_by_text(model)
    inside = [name + "." for name, module in modules.items() if "attention" in type(module).__name__.lower()]
    return {
        name: module
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D)
        and name.startswith(tuple(inside))
        and name.rpartition(".")[2] not in _NAMES_OF_EXPERTS
    }


def norm_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation modules that have weights, by full name."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None

    def is_norm(module: nn.Module) -> bool:
        named_so = isinstance(module, nn.LayerNorm | nn.RMSNorm) or "norm" in type(module).__name__.lower()
        # own parameters and nothing below: some families name whole blocks after their norms
        leaf = any(True for _ in module.parameters(recurse=False)) and not any(True for _ in module.children())
        return named_so and leaf and module is not head

    return {name: module for name, module in _reached_by_text(model).items() if is_norm(module)}


def _reached_by_text(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by full name, that a batch of text passes: the decoder's, and no vision or audio tower's."""
    decoder = decoder_of(model) if isinstance(model, PreTrainedModel) else model
    place = next((name for name, module in model.named_modules() if module is decoder), "")
    return {
        name: module
        for name, module in model.named_modules()
        if not place or name == place or name.startswith(f"{place}.")
    }


def _input_embedding(model: PreTrainedModel) -> dict[str, nn.Module]:
    embedding = model.get_input_embeddings()
    return {name: module for name, module in model.named_modules() if module is embedding}


def _head_is_tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    if tied and getattr(head, "bias", None) is not None:
        raise UserError(
            f"{type(model).__name__} ties its embedding to an LM head that has a bias, which PEFT cannot save: "
            "leave 'embed' out of train."
        )
    return tied


def _shortest_suffixes(model: nn.Module, wanted: dict[str, nn.Module], avoid: Iterable[str] = ()) -> list[str]:
    """The shortest endings of the `wanted` names by which PEFT finds these modules and no others.

    PEFT compares LoRA targets by whole dotted parts, modules_to_save by plain `endswith`, and keeps LoRA off
    whatever lies under a name of modules_to_save; an ending chosen here is safe under all three.
    """
    others = [name for name, _ in model.named_modules() if name not in wanted]
    chosen: list[str] = []
    for name in wanted:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            ending = ".".join(parts[-count:])
            catches_other = any(other.endswith(ending) for other in others)
            covers_target = any(f".{ending}." in f".{target}." for target in avoid)
            if not catches_other and not covers_target:
                break
        if ending not in chosen:
            chosen.append(ending)
    return chosen


def _refuse_quantised(model: PreTrainedModel, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if not all(parameter.is_floating_point() for parameter in module.parameters()):
            raise UserError(
                f"{type(model).__name__} is quantised, and {type(module).__name__} is among the weights to train: "
                "load it unquantised, or train LoRA alone."
            )


def _full(model: PreTrainedModel) -> PreTrainedModel:
    if getattr(model, "is_quantized", False):
        raise UserError("a quantised model cannot be trained in full: load it unquantised, or train LoRA.")
    model.float()
    decoder = decoder_of(model)
    if decoder is model.base_model:
        return model.requires_grad_(True)
    model.requires_grad_(False)
    for module in (decoder, model.get_input_embeddings(), model.get_output_embeddings()):
        cast(nn.Module, module).requires_grad_(True)
    return model


def _group_names(model: nn.Module) -> dict[str, str]:
    """Name of each trainable parameter (tied ones once) -> `lora`, `norm`, `embed`, or `full` and `bias`."""
    plain = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    embedding = set(plain.get_input_embeddings().parameters())
    norms = {parameter for module in norm_modules(plain).values() for parameter in module.parameters()}

    def group(name: str, parameter: nn.Parameter) -> str:
        if ".lora_" in name:
            return "lora"
        if parameter in embedding:
            return "embed"
        if parameter in norms:
            return "norm"
        return "full" if parameter.ndim > 1 else "bias"

    return {name: group(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: nn.Module, training: TrainingSettings) -> list[dict[str, Any]]:
    """Optimiser groups `{"name", "params", "lr", "weight_decay"}`: `lora`, `norm`, `embed`, or `full`, `bias`, ….

    Norms and embeddings have rates of their own because in short runs an embedding trained at the adapter's rate
    hurts (docs/experiments.md). Weight decay falls on matrices only, not on norms and biases (the Trainer's habit).

    Raises:
        UserError: a norm or embedding learning rate is set but none of these train.
    """
    groups: dict[str, list[nn.Parameter]] = {}
    parameters = dict(model.named_parameters())
    for name, group in _group_names(model).items():
        groups.setdefault(group, []).append(parameters[name])
    rates = {"norm": training.norm_lr, "embed": training.embed_lr}
    for group, rate in rates.items():
        if rate is not None and group not in groups:
            raise UserError(
                f"--{group}-lr is {rate} but '{group}' does not train: name it in --train or drop the rate."
            )
    return [
        {
            "name": group,
            "params": groups[group],
            "lr": training.lr if rates.get(group) is None else rates[group],
            "weight_decay": 0.0 if group in ("norm", "bias") else training.weight_decay,
        }
        for group in sorted(groups, key=("lora", "full", "norm", "embed", "bias").index)
    ]


def trainable_summary(model: nn.Module) -> dict[str, Any]:
    """`{"parameters", "trainable", "share", "groups": {name: parameters}}`, tied weights counted once.

    The frozen originals that PEFT keeps beside retrained layers do not count: they are no part of the result.
    """
    names = _group_names(model)
    groups: dict[str, int] = {}
    total = 0
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:
            packed = getattr(parameter, "quant_state", None)  # bitsandbytes puts two numbers of 4 bits in one
            total += parameter.numel() if packed is None else packed.shape.numel()
        if name in names:
            groups[names[name]] = groups.get(names[name], 0) + parameter.numel()
    trainable = sum(groups.values())
    return {"parameters": total, "trainable": trainable, "share": trainable / total, "groups": groups}


def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """The plain model with the adapters folded in, in the dtype of the base.

    PEFT adds the float32 update to the weight in one step, so the sum is rounded once; retrained norms and
    embeddings take the place of the originals. A tied head stays tied where both end the same; LoRA on one of the two
    leaves the other as it was.

    Raises:
        UserError: the adapter is of a kind that cannot be folded in.
    """
    base = cast(Any, model.get_base_model())
    both = [base.get_input_embeddings(), base.get_output_embeddings()]
    embedding, head = (getattr(module, "base_layer", module) for module in both)
    if [embedding, head] != both and head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)
    try:
        plain = cast(Any, model).merge_and_unload()
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"the adapter cannot be merged ({error}): use it as it is.") from error
    return plain
