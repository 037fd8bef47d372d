"""LongLoRA for every decoder in Hugging Face transformers: train short, attend long.

    import longlora
    model, tokenizer = longlora.load("demo")
    longlora.extend_positions(model, context=4096)
    longlora.use_shifted_attention(model, group_size=1024)
    model = longlora.add_adapters(model, rank=8, train=("norm", "embed"))

Everything is imported when it is first used, so that `import longlora` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlora.attention.shifted import shifted_attention
    from longlora.attention.transformers_backend import use_shifted_attention
    from longlora.errors import UserError
    from longlora.model.adapters import add_adapters
    from longlora.model.loading import load
    from longlora.model.merging import merge
    from longlora.model.positions import extend_positions

__all__ = [
    "UserError",
    "add_adapters",
    "extend_positions",
    "load",
    "merge",
    "shifted_attention",
    "use_shifted_attention",
]

_HOMES = {
    "UserError": "errors",
    "add_adapters": "model.adapters",
    "extend_positions": "model.positions",
    "load": "model.loading",
    "merge": "model.merging",
    "shifted_attention": "attention.shifted",
    "use_shifted_attention": "attention.transformers_backend",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"longlora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'longlora' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
