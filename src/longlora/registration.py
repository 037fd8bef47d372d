"""`import longlora` is enough for transformers to know `s2_attn`, and costs nothing where transformers is not used."""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

HOME = "transformers.modeling_utils"
"""Where transformers keeps its attention implementations."""


def register_with_transformers() -> None:
    """Register the attention implementation now, or as soon as transformers has been imported."""
    if HOME in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTransformers())


def _register() -> None:
    importlib.import_module("longlora.attention.transformers_backend")


class _AfterTransformers(MetaPathFinder):
    """Finds nothing by itself: it lets transformers be found as ever, and registers when it has been imported."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
