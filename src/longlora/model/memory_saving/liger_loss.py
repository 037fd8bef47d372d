"""Cross-entropy fused with the LM head, by Liger's Triton kernel (arXiv 2410.10989): logits are computed once.

The chunked loss of `longlora.model.lm_head` computes them twice, in the forward and the backward pass; Liger computes
the gradient with the loss. It cuts the tokens by the width of the model, so that for long rows its logits grow with
them; here it gets as many tokens at a time as make its pieces `chunk` tokens long.
"""

import importlib.util
import logging

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from longlora.errors import UserError

logger = logging.getLogger(__name__)


def choose_loss_kernel(asked: str, model: PreTrainedModel) -> str:
    """`chunked` or `liger` for `--loss-kernel`; what `auto` took, and why, is logged.

    Raises:
        UserError: `liger` is asked for and cannot serve `model` here.
    """
    reason = why_not_liger(model) if asked != "chunked" else None
    if asked == "liger" and reason:
        raise UserError(f"--loss-kernel liger cannot act here: {reason}. Give chunked or auto.")
    taken = "chunked" if asked == "chunked" or reason else "liger"
    if asked == "auto":
        logger.info("loss kernel: %s", f"chunked (not Liger's: {reason})" if reason else "Liger's")
    return taken


def refuse_liger_here() -> None:
    """Raises UserError where no model could be served by Liger's loss."""
    if reason := _why_not_here():
        raise UserError(f"--loss-kernel liger cannot act here: {reason}. Give chunked or auto.")


def _why_not_here() -> str | None:
    if not torch.cuda.is_available():
        return "it runs on CUDA only, and there is no GPU here"
    if importlib.util.find_spec("liger_kernel") is None:
        return "Liger is not installed (pip install 'longlora[gpu]')"
    return None


def why_not_liger(model: PreTrainedModel) -> str | None:
    """What keeps Liger's loss from serving `model` here, in words, or None where nothing does."""
    if reason := _why_not_here():
        return reason
    if plain_head(model) is None:
        return f"the LM head of {type(model).__name__} is no plain linear layer"
    config = model.config.get_text_config()
    scaled = [name for name in ("logit_scale", "logits_scaling") if getattr(config, name, None) not in (None, 1.0)]
    if scaled:
        return f"{type(model).__name__} scales its logits ({scaled[0]})"
    if getattr(model, "z_loss_coefficient", 0.0):
        return f"{type(model).__name__} has a loss of its logits besides (z_loss_coefficient)"
    return None


def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The linear layer that makes the logits, out of the wrapper in which PEFT trains it; None where it is another."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[head.active_adapters[0]]
    return head if type(head) is nn.Linear else None


def liger_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, chunk: int) -> Tensor:
    """Sum of the negative log-likelihoods of `labels (T,)` after `hidden (T, E)`, in nats, float32.

    Args:
        model: one that `why_not_liger` has nothing against.
        chunk: tokens whose logits exist at one time.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    head = plain_head(model)
    assert head is not None, "asked why_not_liger before"
    cap = logit_cap(model.config.get_text_config())
    dtype = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
    weight, bias = (part if part is None or dtype is None else part.to(dtype) for part in (head.weight, head.bias))
    hidden = hidden.to(weight.dtype)
    if not len(hidden):
        return hidden.sum(dtype=torch.float32)
    pieces = -(-weight.shape[0] // weight.shape[1])  # into which Liger cuts what it gets
    losses = [
        LigerFusedLinearCrossEntropyFunction.apply(
            part, weight, wanted, bias, None, -100, 0.0, 0.0, "sum", cap, False, torch.float32
        )[0]
        for part, wanted in zip(hidden.split(chunk * pieces), labels.split(chunk * pieces), strict=True)
    ]
    return torch.stack(losses).sum()


def logit_cap(config: PreTrainedConfig) -> float | None:
    """What logits are capped at (Gemma 2 and later; RecurrentGemma by a name of its own)."""
    return getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
