"""The paper's own figures (LongLoRA, arXiv 2309.12307), out of `assets/paper.yaml`, to print beside ours."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources

import yaml

Figures = list[float | None]


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """What the paper prints: rows by the name that our table has for them, and rows that only the paper has."""

    says: str
    columns: list[str]
    rows: Mapping[str, Figures] = field(default_factory=dict)
    only_there: Mapping[str, Figures] = field(default_factory=dict)
    left_out: str = ""


_FILE = yaml.safe_load((resources.files("longlora") / "assets" / "paper.yaml").read_text(encoding="utf-8"))

TABLE_7: dict[int, list[float]] = _FILE.pop("table7")
"""Context in tokens -> TFLOP of attention, projection, FFN, others and in total, then attention and total with S²."""

PAPER = {name: PaperTable(**table) for name, table in _FILE.items()}
"""The other tables, by our name for them."""
