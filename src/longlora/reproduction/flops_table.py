"""The paper's table 7, computed: FLOPs of one forward pass by part, with full attention and with S²."""

from pathlib import Path
from typing import Any

from longlora.planner.flops import forward_flops
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.reproduction.page import write_result
from longlora.reproduction.paper import TABLE_7
from longlora.run_directory import versions
from longlora.settings import LoadSettings, ReproduceSettings, TrainableSettings
from longlora.tables import aligned, markdown

MODEL = "llama2-7b"
PARTS = ("attention", "projection", "ffn", "other", "total")
COLUMNS = ("attention", "projection", "FFN", "others", "total", "S² attention", "S² total")


def flops_table(settings: ReproduceSettings) -> dict[str, Any]:
    """Run `longlora reproduce table7`; nothing is trained, and MODEL is always the paper's Llama-2 7B.

    Returns:
        `{"name", "title", "model", "columns", "rows": [{"context", "ours", "paper"}], "equal", "versions"}`, TFLOP,
        also written to OUTPUT/table7.json.
    """
    anatomy = read_anatomy(find_config(MODEL, LoadSettings()), TrainableSettings())
    ours = {}
    for context in TABLE_7:
        full, s2 = (forward_flops(anatomy, context, group).table7() for group in (None, context // 4))
        ours[context] = [*(full[part] for part in PARTS), s2["attention"], s2["total"]]
    document: dict[str, Any] = {
        "name": settings.name,
        "title": "TFLOP of one forward pass of one sequence, Llama-2 7B",
        "model": MODEL,
        "columns": list(COLUMNS),
        "rows": [{"context": c, "ours": ours[c], "paper": paper} for c, paper in TABLE_7.items()],
        "equal": ours == TABLE_7,
        "versions": versions(),
    }
    lines = [["context", *COLUMNS]]
    for context in TABLE_7:
        for name, figures in (("ours", ours[context]), ("paper", TABLE_7[context])):
            lines.append([f"{context:,} {name}", *(f"{figure:,.1f}" for figure in figures)])
    said = "Every figure equals the paper's." if document["equal"] else "Some figures differ from the paper's."
    parts = [f"# {document['title']}", "`longlora reproduce table7`, computed, not measured.", markdown(lines), said]
    text = "\n\n".join(parts) + "\n"
    write_result(settings, Path(settings.output or "runs/reproduce"), document, text, {"table7": lines})
    if not settings.json:
        print(f"{document['title']}\n\n{aligned(lines)}\n\n{said}")
    return document
