"""Whether a model keeps the documents of a packed row apart: S2-Attn does, and a recurrent layer beside it may not."""

import torch
from torch import nn
from transformers import PreTrainedModel

from longlora.attention.transformers_backend import inference_with_pattern

_DOCUMENT = 8
"""Tokens of each of the two documents that are tried."""

_ROUNDING = 5e-4
"""Share of the largest logit below which nothing is carried on; kept apart, CPUs give 0, and Jamba's state 0.009."""


@torch.no_grad()
def keeps_documents_apart(model: nn.Module) -> bool:
    """Whether what `model` (with S2-Attn) makes of a document is the same whatever stands before it in its row.

    Tried out, since what mixes tokens is any layer's own affair: gated delta nets, Mamba and short convolutions carry
    their state on where positions begin again. Two rows of two documents differ in the first one alone; each
    is there twice, for what a machine makes of the same row at two places of a batch is rounding.
    """
    base = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    device, rows = base.device, base.config.get_text_config().vocab_size
    tokens = torch.randint(rows, (3, _DOCUMENT), generator=torch.Generator().manual_seed(0))
    input_ids = torch.stack([tokens[[0, 2]].flatten(), tokens[[1, 2]].flatten()]).repeat(2, 1).to(device)
    positions = torch.arange(_DOCUMENT, device=device).repeat(4, 2)
    training = model.training
    model.eval()
    try:
        with inference_with_pattern(model):
            outputs = model(input_ids=input_ids, position_ids=positions, use_cache=False)
    finally:
        model.train(training)
    first, second = outputs.logits[:, _DOCUMENT:].double().unflatten(0, (2, 2))
    rounding = (first - second).abs().max()
    return bool((first[0] - first[1]).abs().max() <= 4 * rounding + _ROUNDING * first.abs().max())
