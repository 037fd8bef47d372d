"""Whether a model keeps the documents of a packed row apart: S2-Attn does, and a recurrent layer beside it may not."""

import torch
from torch import nn
from transformers import PreTrainedModel

from longlora.attention.transformers_backend import inference_with_pattern

_DOCUMENT = 8
"""Tokens of each of the two documents that are tried."""


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether what `model` (with S2-Attn) makes of a document is the same whatever stands before it in its row.

    Tried out, since what mixes tokens is any layer's own affair: gated delta nets, Mamba and short convolutions carry
    their state on where positions begin again. Two rows of two documents differ in the first one alone.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    device, rows = base.device, base.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (3, _DOCUMENT), generator=torch.Generator().manual_seed(0))
    input_ids = torch.stack([tokens[[0, 2]].flatten(), tokens[[1, 2]].flatten()]).to(device)
    positions = torch.arange(_DOCUMENT, device=device).repeat(2, 2)
    training = model.training
    model.eval()
    try:
        with inference_with_pattern(model):
            outputs = model(input_ids=input_ids, position_ids=positions, use_cache=False)
    finally:
        model.train(training)
    one, other = outputs.logits[:, _DOCUMENT:].double()
    # far above rounding in the numbers' own precision, and far below what a state changes
    tolerance = torch.finfo(outputs.logits.dtype).eps ** 0.5
    return bool((one - other).abs().max() <= tolerance * one.abs().max())
