"""LongLoRA for every decoder in Hugging Face transformers: train short, attend long.

    import longlora
    model, tokenizer = longlora.load("demo")
    longlora.extend_positions(model, context=4096)
    longlora.use_shifted_attention(model, group_size=1024)
    model = longlora.add_adapters(model, rank=8, train=("norm", "embed"))
    loss = longlora.causal_lm_loss(model, inputs)
    longlora.save_adapter(model, "adapter", tokenizer)

`__all__` is what the package promises; docs/integrations.md shows it with Trainer, TRL and a loop of one's own.
Everything is imported when it is first used, so that `import longlora` costs nothing. Transformers then knows
`attn_implementation="s2_attn"`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from longlora.registration import register_with_transformers

if TYPE_CHECKING:
    from longlora.attention.patterns import Draw
    from longlora.attention.shifted import shifted_attention
    from longlora.attention.transformers_backend import draw_from, use_shifted_attention
    from longlora.errors import UserError
    from longlora.model.adapters import add_adapters
    from longlora.model.lm_head import causal_lm_loss
    from longlora.model.loading import load
    from longlora.model.merging import merge
    from longlora.model.positions import extend_positions
    from longlora.model.saving import save_adapter
    from longlora.model.trainer_loss import ChunkedLoss

__all__ = [
    "ChunkedLoss",
    "Draw",
    "UserError",
    "add_adapters",
    "causal_lm_loss",
    "draw_from",
    "extend_positions",
    "load",
    "merge",
    "save_adapter",
    "shifted_attention",
    "use_shifted_attention",
]

_HOMES = {
    "ChunkedLoss": "model.trainer_loss",
    "Draw": "attention.patterns",
    "UserError": "errors",
    "add_adapters": "model.adapters",
    "causal_lm_loss": "model.lm_head",
    "draw_from": "attention.transformers_backend",
    "extend_positions": "model.positions",
    "load": "model.loading",
    "merge": "model.merging",
    "save_adapter": "model.saving",
    "shifted_attention": "attention.shifted",
    "use_shifted_attention": "attention.transformers_backend",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"longlora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'longlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
