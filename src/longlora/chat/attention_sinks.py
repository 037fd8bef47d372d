"""Attention sinks: a cache of the first S and the latest W tokens, for conversations without end (StreamingLLM,
arXiv 2309.17453).

    read       0 1 2 3 4 5 6 7 8 9        S = 2, W = 4
    in cache   0 1         6 7 8 9        4 tokens have left
    position   0 1         2 3 4 5        by place in the cache, not in the text (section 3.2 of that paper)

A model that reads on beyond its window fails; with the first few tokens in sight, which draw the attention that has
nowhere else to go, it stays fluent. It does not remember what has left.

The keys in the cache are rotated already, so those that move up are turned back by as many positions as they move.
To turn them at every token, as the paper does, would round them thousands of times in half precision; tokens leave an
eighth of W at a time instead, so that a key is turned eight times at most, and a token sees 7/8 W to W latest ones.
"""

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from longlora.chat.prefix_cache import ReadTokens
from longlora.errors import UserError
from longlora.model.lm_head import unwrapped
from longlora.model.positions import frequencies_change_at

ROTATIONS_OF_A_KEY = 8
"""Tokens leave `recent / ROTATIONS_OF_A_KEY` at a time."""


class SinkWindow:
    """What a model goes on seeing of a conversation longer than its window.

    Args:
        model: decoder of transformers, possibly wrapped, with rotary positions and full attention in every layer.
        sinks: S, first tokens that stay.
        recent: W, latest tokens that stay.

    Raises:
        UserError: the model's keys cannot be turned to other positions: it has no rotary positions, or such as change
            with the length, or layers with a window of their own.
    """

    def __init__(self, model: nn.Module, sinks: int, recent: int) -> None:
        self.sinks, self.recent = sinks, recent
        base = unwrapped(model)
        self._apply = getattr(sys.modules[type(base).__module__], "apply_rotary_pos_emb", None)
        rotary = [module for module in base.modules() if hasattr(module, "inv_freq")]
        self._rotary = cast(Any, rotary[0]) if len(rotary) == 1 else None
        if not self._can_rotate(base):
            raise UserError(
                f"--attention-sinks needs rotary positions that are the same for every length and layer, and full "
                f"attention; {type(base).__name__} here has others: leave it out, or give another model."
            )

    @property
    def size(self) -> int:
        """Most tokens in the cache."""
        return self.sinks + self.recent

    def make_room(self, read: ReadTokens, tokens: int) -> None:
        """Let the oldest tokens after the sinks leave, so that `tokens` (at most `recent`) more have room."""
        surplus = read.slots + tokens - self.size
        if surplus <= 0:
            return
        surplus = min(max(surplus, self.recent // ROTATIONS_OF_A_KEY), read.slots - self.sinks)
        first = self.sinks + surplus
        for layer in cast(Any, read.cache).layers:
            keys, values = layer.keys, layer.values
            moved = self.rotated(keys[:, :, first:], -surplus)
            layer.keys = torch.cat([keys[:, :, : self.sinks], moved], dim=-2)
            layer.values = torch.cat([values[:, :, : self.sinks], values[:, :, first:]], dim=-2)
        read.evicted += surplus

    @torch.no_grad()
    def rotated(self, keys: Tensor, positions: int) -> Tensor:
        """Rotated keys (B, H, N, D) as they would be `positions` later (earlier where negative), same dtype."""
        rotary = cast(Any, self._rotary)
        at = torch.tensor([[positions]], device=keys.device)
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=keys.device), at)
        # YaRN's cos and sin carry a factor for the softmax, which the keys have had already
        scale = getattr(rotary, "attention_scaling", 1.0)
        rotating = keys[..., : cos.shape[-1]].float()
        _, rotating = cast(Any, self._apply)(rotating, rotating, cos / scale, sin / scale)
        return torch.cat([rotating.to(keys.dtype), keys[..., cos.shape[-1] :]], dim=-1)

    @torch.no_grad()
    def _can_rotate(self, base: Any) -> bool:
        """Whether keys of the model itself at one position become, rotated, those at another, in every layer.

        A token alone attends to itself, whatever its position, so its keys differ by the rotation only.
        """
        config = base.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if self._apply is None or self._rotary is None or layer_types != {"full_attention"}:
            return False
        if (windowed and not hasattr(config, "layer_types")) or frequencies_change_at(base) is not None:
            return False
        cache = DynamicCache()
        token = torch.full((2, 1), min(7, config.vocab_size - 1), device=base.device)
        at = torch.tensor([[9], [2]], device=base.device)
        base(input_ids=token, position_ids=at, past_key_values=cache, use_cache=True)
        for layer in cast(Any, cache).layers:
            keys = layer.keys.float()
            error = (self.rotated(keys[:1], -7) - keys[1:]).abs().max()
            if error > 0.05 * keys.abs().max():
                return False
        return True
