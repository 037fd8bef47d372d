"""The chunked loss as a Trainer's `compute_loss_func`."""

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from longlora.errors import UserError
from longlora.model.lm_head import IGNORED, losses_in_chunks, prove_logits, token_losses, unwrapped, z_loss_of


class ChunkedLoss:
    """`causal_lm_loss` for `Trainer(model, …, compute_loss_func=longlora.ChunkedLoss(model))`.

    A Trainer hands its loss function the outputs of a forward pass without labels, and so with all logits. While the
    model trains, its own LM head therefore sees the last token alone; what was to enter it waits here and goes through
    it in chunks. In evaluation the model makes its logits as ever, for `compute_metrics` may want them.
    """

    def __init__(self, model: nn.Module, chunk: int = 1024) -> None:
        """
        Args:
            model: the one that the Trainer is given, adapters included.
            chunk: tokens whose logits exist at one time.

        Raises:
            UserError: a mixture of experts that adds a loss of its router.
        """
        self.base, self.chunk = unwrapped(model), chunk
        if getattr(self.base.config.get_text_config(), "output_router_logits", False):
            raise UserError(
                f"{type(self.base).__name__} adds a loss of its router, which is no part of this one: override the "
                "Trainer's compute_loss and call longlora.causal_lm_loss there (docs/integrations.md)."
            )
        self.waiting: tuple[Tensor, AbstractContextManager] | None = None
        cast(nn.Module, self.base.get_output_embeddings()).register_forward_pre_hook(self._before_the_head)

    def _before_the_head(self, head: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = arguments[0]
        if not (head.training and torch.is_grad_enabled() and hidden.ndim == 3):  # the chunks have two dimensions
            return None
        kind = hidden.device.type
        autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.waiting = hidden, autocast
        return (hidden[:, -1:], *arguments[1:])

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The summed loss of `labels (B, N)`, not shifted, over `num_items_in_batch` or the tokens scored here."""
        labels = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        z_loss = z_loss_of(self.base)
        if self.waiting is None:
            losses = losses_in_chunks(lambda logits: logits, outputs["logits"], labels, self.chunk, z_loss)
        else:
            (hidden, autocast), self.waiting = self.waiting, None
            with autocast:  # as the model's own head would run
                prove_logits(self.base, hidden, outputs["logits"])
                losses = token_losses(self.base, hidden, labels, self.chunk, z_loss=z_loss)
        items = (labels != IGNORED).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return losses.sum() / torch.as_tensor(items, device=losses.device)
