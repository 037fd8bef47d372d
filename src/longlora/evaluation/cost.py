"""What an evaluation will take, said before it starts, and how much of it fits a forward pass."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import nn
from tqdm import tqdm

from longlora import ranks
from longlora.model.lm_head import IGNORED, run_token_losses, unwrapped

logger = logging.getLogger(__name__)

CPU_TOKENS, GPU_TOKENS = 8192, 131072
"""Most tokens of a forward pass: more in one are no faster, and cost more when one of several processes has none."""

PROBE_TOKENS = {"cpu": 128, "cuda": 2048}
"""Tokens of the pass that is timed."""


def announce(what: str, model: nn.Module, rows: Sequence[int], new_tokens: int = 0) -> None:
    """Log the tokens to be read, and about how long that takes here; one short pass is timed for it.

    Args:
        what: is measured.
        model: in evaluation mode.
        rows: tokens of each row to be read.
        new_tokens: generated after each row, at most.
    """
    if not rows:
        return
    config: Any = unwrapped(model).config.get_text_config()
    device = next(model.parameters()).device
    length = min(max(rows), PROBE_TOKENS.get(device.type, 2048))
    probe = torch.zeros(1, length, dtype=torch.long, device=device)
    labels = torch.full_like(probe, IGNORED)
    labels[0, -1] = 0
    weights, (width, _, _) = sum(parameter.numel() for parameter in model.parameters()), _widths(config)

    def work(tokens: int) -> float:
        """Multiply-adds of a row, roughly."""
        return tokens * (weights + config.num_hidden_layers * width * tokens)

    seconds = 0.0
    for _ in range(2):  # the first pass has memory to find and kernels to choose
        began = time.monotonic()
        run_token_losses(model, {"input_ids": probe}, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.monotonic() - began
    total = sum(map(work, rows)) / work(length) * seconds / ranks.together()
    # a new token reads all weights, as does the probe where it is short
    total += new_tokens * len(rows) * seconds * min(1.0, 8 / length) / ranks.together()
    if ranks.rank() == 0:
        shared = f", shared by {ranks.together()} processes" if ranks.together() > 1 else ""
        logger.info(
            "%s: %s tokens to read in %s rows of up to %s, about %s on this %s%s",
            what,
            f"{sum(rows):,}",
            f"{len(rows):,}",
            f"{max(rows):,}",
            tqdm.format_interval(total),
            "GPU" if device.type == "cuda" else "CPU",
            shared,
        )


def tokens_a_pass(model: nn.Module, length: int, cached: bool = False) -> int:
    """Tokens of a forward pass with rows of up to `length` tokens that half of the free memory holds; at least a row.

    Args:
        model: on its device.
        length: tokens of the longest row.
        cached: the keys and values of all layers are kept, and rows are padded.
    """
    config: Any = unwrapped(model).config.get_text_config()
    device = next(model.parameters()).device
    if device.type == "cuda":
        free, most = torch.cuda.mem_get_info(device)[0], GPU_TOKENS
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free, most = psutil.virtual_memory().available, CPU_TOKENS
    width, key_width, inner = _widths(config)
    numbers = 8 * config.hidden_size + 3 * inner + 3 * width
    if cached:
        numbers += 2 * config.num_hidden_layers * key_width + length  # and a mask (length, length) a row
    bytes_a_token = numbers * unwrapped(model).dtype.itemsize
    return max(length, min(most, int(free / 2 / bytes_a_token)))


def _widths(config: Any) -> tuple[int, int, int]:
    """Numbers a token of queries, of keys, and inside the feed-forward part; of the widest layer where layers differ.

    Their configs say so by lists (Gemma 3n), or by refusing to be asked for all layers at once (Gemma 4).
    """

    def widest(name: str) -> int | None:
        layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
        found = [getattr(layer, name, None) for layer in layers]
        return max(
            (x for each in found for x in (each if isinstance(each, list | tuple) else [each]) if x), default=None
        )

    heads = widest("num_attention_heads") or 1  # a state space model has none
    size = widest("head_dim") or config.hidden_size // heads
    key_heads = widest("num_key_value_heads") or heads
    return heads * size, key_heads * size, widest("intermediate_size") or 4 * config.hidden_size
