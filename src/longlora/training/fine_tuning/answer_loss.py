"""How well a model foretells held-out answers: their mean loss, each example by itself with full attention."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from longlora import ranks
from longlora.corpus.conversations import Example
from longlora.corpus.packing import IGNORED
from longlora.errors import UserError
from longlora.evaluation.perplexity import evaluating
from longlora.model.lm_head import run_token_losses
from longlora.progress import Progress


@dataclass(frozen=True, kw_only=True)
class AnswerLoss:
    """Loss of answers, weighted by token."""

    nll: float
    """Mean negative log-likelihood of an answer's token, in nats."""

    perplexity: float
    """exp(nll)."""

    tokens: int
    """Tokens of the answers."""

    examples: int


def answer_loss(
    model: nn.Module, examples: Sequence[Example], *, chunk: int = 1024, progress: bool = True
) -> AnswerLoss:
    """The loss of the examples' answers, which processes share; the model runs in evaluation mode and keeps its own.

    Args:
        model: a causal language model of transformers, possibly wrapped (PEFT).
        examples: one at least.
        chunk: tokens whose logits exist at one time.
        progress: show on stderr how far it is.

    Raises:
        UserError: the loss is not finite, or the model cannot be scored (`longlora.model.lm_head`).
    """
    device = next(model.parameters()).device

    def summed(example: Example) -> float:
        input_ids = torch.from_numpy(example.tokens).long().to(device)[None]
        labels = torch.full_like(input_ids, IGNORED)
        labels[0, :-1] = torch.from_numpy(example.labels(IGNORED))[1:]
        losses, _ = run_token_losses(model, {"input_ids": input_ids}, labels, chunk)
        return losses.double().sum().item()

    nll, tokens = 0.0, 0
    bar = Progress("loss of held-out answers", "examples", len(examples)) if progress else nullcontext()
    with evaluating(model), bar as shown:
        for number, (example, added) in enumerate(ranks.shared_out(examples, summed), start=1):
            nll += added
            tokens += example.answer_tokens
            if shown is not None:
                shown.show(number, f"{nll / tokens:.3f} so far")
    mean = nll / tokens
    if not mean < math.log(torch.finfo(torch.float64).max):
        raise UserError(
            f"the loss of the held-out answers is {mean}, not a usable number: the model is damaged, or overflows in "
            "float16; load it in bfloat16 or float32."
        )
    return AnswerLoss(nll=mean, perplexity=math.exp(mean), tokens=tokens, examples=len(examples))
