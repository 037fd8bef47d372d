"""Run directories with every piece that a report draws, and what evaluations leave in them."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import yaml

from longlora.report.recipe import defaults

CONTEXTS = (256, 512, 1024, 2048, 4096)


def asked_by(words: str) -> dict[str, list[str]]:
    """The command line that a result keeps."""
    return {"command": words.split()}


def perplexities(label: str, values: Any, contexts: Any = CONTEXTS, **more: Any) -> dict[str, Any]:
    rows = [
        {"context": context, "perplexity": value, "nll": 3.0, "tokens": 402113, "documents": 35}
        for context, value in zip(contexts, values, strict=True)
    ]
    return {"label": label, "model": "demo", "data": "stdlib", "stride": 256, "score": "last", "results": rows} | more


def whole_run() -> dict[str, Any]:
    """Every piece that a run can hold, by its path in the run directory."""
    groups = {"embed": 1048576, "lora": 98304, "norm": 3328}
    trained = sum(groups.values())
    settings = {name: default for name, default in defaults() if default is not dataclasses.MISSING}
    settings |= {"model": "demo", "context": 4096, "lr": 4e-4, "embed_lr": 4e-5, "steps": 300, "data": ["stdlib"]}
    versions = {"python": "3.11.2", "torch": "2.13.0"}
    rng = random.Random(0)
    rates = [4e-4 * min(1, step / 20) for step in range(301)]
    metrics = [{"step": n, "loss": 3 + rng.gauss(0, 0.1), "learning_rate": rates[n]} for n in range(1, 301)]
    metrics += [{"step": n, "eval_loss": 3.2 - n / 1e4, "eval_perplexity": 24.0} for n in (100, 200, 300)]
    return {
        "settings.yaml": {"command": "extend", **settings, "versions": versions, "commit": "0123abc"},
        "metrics.jsonl": metrics,
        "evaluation/perplexity-base.json": perplexities("base model", (26.83, 24.3712, 47.2, 128.9, 310.27)),
        "evaluation/perplexity-untrained-linear.json": perplexities("PI, not trained", (126, 126, 125, 127, 127.3)),
        "evaluation/perplexity-untrained.json": perplexities("YaRN, not trained", (27.9, 26.31, 26, 26.4, 28.1)),
        "evaluation/perplexity-trained.json": perplexities("longlora", (26.4, 24.12, 23.31, 22.92, 23.104)),
        "evaluation/summary.json": {
            "model": "demo",
            "positions": {"method": "yarn", "original_context": 512, "previous_context": 512, "context": 4096}
            | {"factor": 8.0, "changed": True, "message": ""},
            "attention": {"pattern": "shift", "group_size": 1024},
            "trainable": {"parameters": 5865728, "trainable": trained, "share": trained / 5865728, "groups": groups},
            "training": {"steps": 300, "loss": 2.97, "tokens": 4915200, "seconds": 421.25}
            | {"tokens_per_second": 11012.5, "memory_bytes": 3328599654},
            "data": {"name": "stdlib", "documents": 1514, "tokens": 9123456, "rows": 2227},
        },
        "evaluation/costs.json": {
            "hardware": "2 cores",
            "dtype": "float32",
            "what": "a training step",
            "rows": [
                {"length": length, "group_size": length // 4}
                | {"full": {"seconds": 0.4 * scale * scale, "memory_bytes": 9e8 * scale}}
                | {"s2": {"seconds": 0.3 * scale, "memory_bytes": 8e8 * scale}}
                for length, scale in ((2048, 1), (4096, 2), (8192, 4))
            ],
        },
        "adapter/config.json": {"num_attention_heads": 4, "num_key_value_heads": 4},
        "adapter/adapter_config.json": {"base_model_name_or_path": "owner/base"},
    }


def write_run(folder: Path, pieces: dict[str, Any]) -> Path:
    for name, piece in pieces.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".yaml"):
            file.write_text(yaml.safe_dump(plain(piece), sort_keys=False), encoding="utf-8")
        elif name.endswith(".jsonl"):
            file.write_text("".join(json.dumps(record) + "\n" for record in piece), encoding="utf-8")
        else:
            file.write_text(json.dumps(piece), encoding="utf-8")
    return folder


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def passkey(found: dict[int, float], **more: Any) -> dict[str, Any]:
    """`passkey.json` with the share found at each context; at a depth of 1 nothing is lost."""
    rows = [
        {"context": context, "depth": depth, "accuracy": share if depth < 1 else 1.0, "trials": 5, "skipped": 0}
        | {"tokens": context - 6}
        for context, share in found.items()
        for depth in (0.0, 0.5, 1.0)
    ]
    asked = {"task": "passkey", "model": "demo", "label": "demo", "chat": False, "bos": "auto", "system": None}
    asked |= asked_by(f"longlora eval passkey RUN --trials 5 --contexts {','.join(map(str, found))} --depths 3 --json")
    return asked | {"seed": 0, "keys": 1, "interval": None, "window": 4096, "seconds": 61.5, "results": rows} | more


def listed(task: str, found: dict[int, float | None], **more: Any) -> dict[str, Any]:
    """`topics.json` or `lines.json` with the share right for each number; None did not fit."""
    rows = [
        {"context": 22 * number, task: number, "accuracy": share, "tokens": 22 * number}
        | {"trials": 0 if share is None else 10, "skipped": 10 if share is None else 0}
        for number, share in found.items()
    ]
    asked = {"task": task, "model": "demo", "label": "demo", "chat": True, "bos": "auto", "system": None}
    asked |= asked_by(f"longlora eval {task} RUN --chat yes --trials 10 --{task} {','.join(map(str, found))}")
    return asked | {"seed": 0, "data": ["new cases"], "window": 4096, "seconds": 12.0, "results": rows} | more


def ruler(means: dict[int, float], **more: Any) -> dict[str, Any]:
    """`ruler.json` of two tasks, one above its average and one below."""
    tasks = ("niah_single_1", "ruler_vt")
    rows = [
        {"context": context, "task": task, "accuracy": mean + (0.05 if task == tasks[0] else -0.05), "trials": 20}
        | {"skipped": 0, "tokens": context - 9, "seconds": 3.0}
        for context, mean in means.items()
        for task in tasks
    ]
    reached = [context for context, mean in means.items() if mean >= 0.856]
    return {
        "task": "ruler",
        **asked_by("longlora eval ruler RUN --tasks niah_single_1,ruler_vt --threshold 0.856 --trials 20 --bos yes"),
        "model": "demo",
        "label": "demo",
        "chat": False,
        "bos": "auto",
        "system": None,
        "seed": 0,
        "trials": 20,
        "window": 4096,
        "seconds": 240.0,
        "results": rows,
        "average_over": list(tasks),
        "averages": [{"context": context, "accuracy": mean} for context, mean in means.items()],
        "threshold": 0.856,
        "threshold_from": "given",
        "effective_length": max(reached, default=None),
        "left_out": [{"task": "ruler_qa_squad", "context": None, "reason": "asks questions of SQuAD"}],
    } | more


def told(before: float, after: float) -> str:
    change = f"by {abs(after / before - 1):.1%}"
    return "unchanged" if before == after else f"{'regressed' if after > before else 'improved'} {change}"


def short(before: dict[int, float], after: dict[int, float], **more: Any) -> dict[str, Any]:
    rows = [
        {"context": context, "before": one, "after": after[context], "tokens": 9000, "documents": 3}
        | {"verdict": told(one, after[context]), "skipped_documents": 0}
        for context, one in before.items()
    ]
    measured = {"task": "short", "model": "demo", "label": "demo", "baseline": "demo", "data": "stdlib", "stride": 256}
    return measured | {"score": "last", "data_fingerprint": "3f", "results": rows, "tasks": [], "seconds": 9.0} | more


def longppl(key: float | None, plain_one: float, **more: Any) -> dict[str, Any]:
    row = {"context": 4096, "longppl": key, "perplexity": plain_one, "key_tokens": 812, "tokens": 20480}
    measured = {"task": "longppl", "model": "demo", "label": "demo", "data": "stdlib", "data_fingerprint": "3f"}
    measured |= asked_by("longlora eval longppl RUN --data stdlib --context 4096 --evaluator a/judge --output X")
    measured |= {"evaluator": "a/judge", "short_context": 384, "short_stride": 128, "alpha": 2.0, "beta": -2.0}
    return measured | {"results": [row | {"documents": 5, "skipped_documents": 60}], "seconds": 30.0} | more
