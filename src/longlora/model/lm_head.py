"""The loss of a causal language model whose logits never exist as a whole.

At 32k tokens and a vocabulary of 128k the logits of one row are 8 GiB in bfloat16, and 16 GiB again in float32. So the
decoder runs once, and the LM head runs on the scored tokens only, some thousand at a time:

    tokens ──► decoder ──► hidden (B, N, E) ──► scored tokens (T, E) ──► chunks ──► LM head, float32 ──► nll (T,)

The model's own forward does the running (with `logits_to_keep=1`), so that PEFT, DDP and FSDP wrappers keep working,
and the LM head is called as a module, so that LoRA, `modules_to_save` and tied embeddings count.

Shapes: B rows, N tokens, E hidden size, V vocabulary, T scored tokens.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, TypeVar, cast
from weakref import WeakSet

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PretrainedConfig, PreTrainedModel

from longlora.errors import UserError
from longlora.model.memory_saving.liger_loss import liger_loss, logit_cap

IGNORED = -100
"""Label of a token that is not scored (torch's and transformers' convention)."""

Read = TypeVar("Read")


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, `torch.compile` and PEFT wrappers (adapters stay in it)."""
    # asking accelerate takes as long as a layer of a small model
    if not isinstance(model, PreTrainedModel | PeftModel):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder of a causal language model: what its `get_decoder` says, or where that is the model itself (Llama 4)
    or its head (ModernBERT), the model inside it."""
    decoder = cast(nn.Module, model.get_decoder())
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inside[0] if len(inside) == 1 and decoder in (model, model.get_output_embeddings()) else decoder


def mixed_precision(
    modules: nn.Module, *dtypes: torch.dtype, device: torch.device | None = None
) -> AbstractContextManager:
    """Autocast to bfloat16 or float16 where parameters (and `dtypes` of inputs) mix it with float32; else nothing.

    What trains is kept in float32 inside a bfloat16 model: outside the Trainer's autocast their products would fail.
    """
    parameters = [parameter for parameter in modules.parameters() if parameter.is_floating_point()]
    device = device or parameters[0].device
    found = {parameter.dtype for parameter in parameters} | set(dtypes)
    half = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found]
    if not half or torch.float32 not in found or torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=half[0])


def final_hidden_states(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    """What enters the LM head, `(B, N, E)`, and the model's own logits of the last token, `(B, 1, V)`, of one pass.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT, DDP, FSDP).
        inputs: keyword arguments of its forward, such as `input_ids (B, N)`; no labels.

    Raises:
        UserError: the model's forward has no `logits_to_keep`, or does not run its decoder exactly once, or its logits
            are not what `token_losses` would make of the hidden states.
    """
    hidden, outputs = _run(model, inputs, lambda hidden: hidden)
    return hidden, outputs.logits


def token_losses(model: nn.Module, hidden: Tensor, labels: Tensor, chunk: int = 1024, *, z_loss: float = 0.0) -> Tensor:
    """Negative log-likelihood of each label in nats, `(B, N)`; 0 where the label is -100, which the LM head never sees.

    At most `chunk` tokens' logits exist at one time, in the backward pass too: it computes them anew. The softmax is in
    float32 (float64 for a float64 model), as in transformers' own loss.

    Args:
        model: the model `hidden` came from.
        hidden: what enters the LM head, `(B, N, E)`.
        labels: `(B, N)`; position i of `hidden` is scored against `labels[:, i]`, so the caller has shifted them.
        chunk: tokens whose logits exist at one time.
        z_loss: what (log Σ exp logits)² of each scored token is added with.
    """
    base = unwrapped(model)
    return losses_in_chunks(lambda hidden: _logits(base, hidden), hidden, labels, chunk, z_loss)


def z_loss_of(model: nn.Module) -> float:
    """The share of its logits' own loss that `model` trains with (Bamba), 0 where it has none."""
    return float(getattr(unwrapped(model), "z_loss_coefficient", 0.0))


def losses_in_chunks(
    to_logits: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, chunk: int, z_loss: float = 0.0
) -> Tensor:
    """`token_losses` under the logits that `to_logits` makes of `chunk` tokens of `hidden` at a time."""

    def score(hidden: Tensor, labels: Tensor, count: int) -> Tensor:
        hidden, wanted = _scored_of(hidden, labels, count)
        logits = to_logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = functional.cross_entropy(logits, wanted.to(logits.device), reduction="none")
        if z_loss:
            losses = losses + z_loss * logits.logsumexp(-1) ** 2
        if count == len(labels):
            return losses
        return losses.new_zeros(labels.shape).masked_scatter((labels != IGNORED).to(losses.device), losses)

    parts = scored_parts(hidden, labels, chunk)
    if torch.is_grad_enabled():
        losses = [checkpoint(score, *part, use_reentrant=False) for part in parts]
    else:
        losses = [score(*part) for part in parts]
    return torch.cat(losses).view(labels.shape)


def scored_parts(hidden: Tensor, labels: Tensor, chunk: int) -> list[tuple[Tensor, Tensor, int]]:
    """Views of neighbouring tokens, their labels, and how many of them are scored: `chunk`, in the last part fewer.

    Views, because the scored tokens taken out of a long row are as large as the row, and so is their gradient.
    """
    labels = labels.to(hidden.device).flatten()
    ends, scored = _ends_of_parts(labels, chunk)
    sizes = [stop - start for start, stop in pairwise([0, *ends])]
    counts = [chunk] * (len(sizes) - 1) + [scored - chunk * (len(sizes) - 1)]
    return list(zip(hidden.flatten(0, 1).split(sizes), labels.split(sizes), counts, strict=True))


def _scored_of(hidden: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == len(labels):
        return hidden, labels
    scored = labels != IGNORED
    return hidden[scored], labels[scored]


def _ends_of_parts(labels: Tensor, chunk: int) -> tuple[list[int], int]:
    """Where each part of `labels (T,)` ends that holds `chunk` scored tokens, the last one `T`; and all scored ones."""
    scored = (labels != IGNORED).nonzero().flatten()
    inner = scored[chunk - 1 :: chunk]
    if len(scored) % chunk == 0:
        inner = inner[:-1]  # what follows the last scored token belongs to it
    return [*(inner + 1).tolist(), len(labels)], len(scored)


def run_token_losses(
    model: nn.Module, inputs: Mapping[str, Any], labels: Tensor, chunk: int = 1024
) -> tuple[Tensor, Any]:
    """`token_losses` of one forward pass, `(B, N)`, and the model's outputs (logits of the last token only).

    The LM head runs where the model itself would call it: under the autocast that a Trainer wraps around the forward,
    and while FSDP holds the weights gathered. `final_hidden_states` followed by `token_losses` runs it outside.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT, DDP, FSDP).
        inputs: keyword arguments of its forward, such as `input_ids (B, N)`; no labels.
        labels: `(B, N)`, shifted, -100 where nothing is to be scored.
        chunk: tokens whose logits exist at one time.

    Raises:
        UserError: as `final_hidden_states`.
    """
    return _run(model, inputs, lambda hidden: token_losses(model, hidden, labels, chunk))


def causal_lm_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    chunk: int = 1024,
    num_items: Tensor | int | None = None,
    kernel: str = "chunked",
) -> Tensor:
    """Next-token loss, a scalar: the sum over scored tokens / `num_items`; equal to `model(**inputs).loss`.

    A router's loss (`output_router_logits`) is taken of each row, where transformers takes it of a batch, and weighted
    by the row's share of `num_items`: so a step's loss is the same however its rows are divided over micro-batches. A
    loss of the logits (`z_loss_coefficient`) is taken of the scored tokens, where transformers takes it of all.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT, DDP, FSDP).
        inputs: keyword arguments of its forward with `labels (B, N)`, not shifted. Packed rows (`position_ids` that
            start again) have -100 at the first token of each document. A piece of a row has one label more, the
            next piece's first.
        chunk: tokens whose logits exist at one time.
        num_items: tokens to divide by, those of all rows that make up one optimiser step; default those scored here.
        kernel: `chunked`, or `liger` for a model that `why_not_liger` has nothing against.

    Raises:
        UserError: as `final_hidden_states`.
    """
    inputs = dict(inputs)
    tokens = inputs["input_ids"].shape[1]
    labels = functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)[:, :tokens]
    scored_here = (labels != IGNORED).sum()
    if num_items is None:
        num_items = scored_here.clamp(min=1)
    rows = len(labels)
    if rows > 1 and getattr(unwrapped(model).config.get_text_config(), "output_router_logits", False):
        # a router's loss is no sum over tokens: row by row, so that it does not depend on which rows share a batch
        parts = ({name: _row(value, row, rows) for name, value in inputs.items()} for row in range(rows))
        return torch.stack([causal_lm_loss(model, part, chunk, num_items, kernel) for part in parts]).sum()
    del inputs["labels"]

    def summed(hidden: Tensor) -> Tensor:
        if kernel == "chunked":
            return token_losses(model, hidden, labels, chunk, z_loss=z_loss_of(model)).sum()
        base, many = unwrapped(model), 32 * chunk  # Liger cuts them once more
        losses = [liger_loss(base, *_scored_of(*part), chunk) for part in scored_parts(hidden, labels, many)]
        return torch.stack(losses).sum()

    losses, outputs = _run(model, inputs, summed)
    loss = losses / torch.as_tensor(num_items, device=losses.device)
    if (router_loss := getattr(outputs, "aux_loss", None)) is not None:
        scored = router_loss.to(loss) * scored_here.to(loss.device)
        loss = loss + _router_coefficient(unwrapped(model)) * scored / torch.as_tensor(num_items, device=loss.device)
    return loss


def _row(value: Any, row: int, rows: int) -> Any:
    """Row `row` of an input `(B, …)`; what is the same for all rows as it is."""
    return value[row : row + 1] if torch.is_tensor(value) and value.ndim > 1 and len(value) == rows else value


def _router_coefficient(base: PreTrainedModel) -> float:
    """What `base` multiplies its router's loss by; families name it differently."""
    config = base.config.get_text_config()
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        for owner in (base, config):
            if (coefficient := getattr(owner, name, None)) is not None:
                return coefficient
    raise UserError(
        f"{type(base).__name__} has a router's loss, but no router_aux_loss_coef: set output_router_logits "
        "to false in its config.json."
    )


_proven: WeakSet[nn.Module] = WeakSet()
"""Models whose logits we have compared with ours."""


def _run(model: nn.Module, inputs: Mapping[str, Any], read: Callable[[Tensor], Read]) -> tuple[Read, Any]:
    """`read(hidden)`, called inside the forward pass before the LM head, and the model's outputs.

    The first pass of each model also proves that `_logits` makes of the last token what the model itself does.
    """
    base = unwrapped(model)
    if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        raise UserError(
            f"{type(base).__name__} cannot be scored without all of its logits: its forward has no 'logits_to_keep'; "
            "use a decoder of transformers that has it (Llama, Mistral, Qwen, Gemma, Phi, GPT-NeoX, …)."
        )
    to_prove = base not in _proven and not _drops_out(base.get_output_embeddings())
    results: list[Read] = []
    ours: list[Tensor] = []

    def before_the_head(_decoder: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0]
        results.append(read(hidden))
        if to_prove:
            with torch.no_grad():
                ours.append(_logits(base, hidden[:, -1:]))

    handle = decoder_of(base).register_forward_hook(before_the_head)
    try:
        outputs = model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    if len(results) != 1:
        raise UserError(
            f"{type(base).__name__} ran its decoder {len(results)} times in one forward pass, where exactly one is "
            "allowed; on several GPUs start one process for each, with `accelerate launch`."
        )
    if to_prove:
        _check_logits(type(base).__name__, ours[0], outputs.logits)
        _proven.add(base)
    return results[0], outputs


def prove_logits(base: PreTrainedModel, hidden: Tensor, logits: Tensor) -> None:
    """Raises UserError, once for each model, unless `logits (B, 1, V)` are what `token_losses` makes of `hidden`."""
    if base not in _proven and not _drops_out(base.get_output_embeddings()):
        with torch.no_grad():
            ours = _logits(base, hidden[:, -1])
        _check_logits(type(base).__name__, ours[:, None], logits)
        _proven.add(base)


def _drops_out(head: nn.Module | None) -> bool:
    """Whether two calls of the head differ by chance, as those of LoRA with dropout do in training."""
    return head is not None and any(
        isinstance(part, nn.Dropout) and part.training and part.p for part in head.modules()
    )


def _check_logits(name: str, ours: Tensor, own: Tensor) -> None:
    """Refuse a model whose own logits `(B, 1, V)` differ from ours by more than rounding."""
    eps = max(torch.finfo(ours.dtype).eps, torch.finfo(own.dtype).eps)
    ours, own = ours.to(own.device).double(), own.detach().double()
    largest = own.where(own.isfinite(), 0).abs().max().item()
    if not torch.allclose(ours, own, rtol=0, atol=4 * eps * largest, equal_nan=True):
        raise UserError(
            f"{name} cannot be scored: its logits (up to {largest:.4g}) differ by up to "
            f"{(ours - own).abs().max().item():.4g} from its LM head's with the post-processing that longlora knows "
            "(final_logit_softcapping, logit_scale, logits_scaling); use a model of another architecture."
        )


def _logits(base: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits `(…, V)` of `hidden (…, E)`, with the model's own post-processing."""
    head = cast(nn.Module, base.get_output_embeddings())
    with mixed_precision(head, hidden.dtype, device=hidden.device), _casts_apart(hidden.device):
        weight = getattr(head, "weight", None)  # `in_features` of a tied head in PEFT is the vocabulary
        if (
            weight is not None
            and weight.ndim == 2
            and weight.is_floating_point()
            and weight.shape[1] != hidden.shape[-1]
        ):
            raise UserError(
                f"{type(base).__name__} cannot be scored: its LM head takes other hidden states than its decoder gives "
                "(Electra); use a model of another architecture."
            )
        return _post_process(base.config.get_text_config(), _caller(head)(hidden))


def _caller(head: nn.Module) -> Callable[[Tensor], Tensor]:
    """The head, or its bare forward while FSDP2 holds it gathered for the forward pass that we are in.

    FSDP2's hooks would run anew at each chunk, and before torch 2.13 the first chunk's backward pass would then scatter
    the weights that the others still need.
    """
    gathered = isinstance(head, FSDPModule) and not any(isinstance(part, DTensor) for part in head.parameters())
    return cast(Callable[[Tensor], Tensor], head.forward if gathered else head)


def _casts_apart(device: torch.device) -> AbstractContextManager:
    """Autocast as it is, but for its cache of weights in low precision: through one cached copy of a trained head, the
    gradients of all chunks would be summed in that precision (64 chunks in bfloat16: errors four times as large)."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)


def _post_process(config: PretrainedConfig, logits: Tensor) -> Tensor:
    """What a model's forward does to its logits, for transformers 5.23's decoders; `_run` proves it."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scaling
    if (cap := logit_cap(config)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
