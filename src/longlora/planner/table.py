"""What `longlora plan` prints for people."""

from typing import Any

PARTS = ("attention", "projection", "ffn", "other", "total")

MOMENTS = {
    "loss": "the loss",
    "layer": "the backward pass of a layer",
    "embedding": "the embedding's gradient",
    "optimizer": "the optimiser's step",
}

SAYS = {
    "chunked_loss": "loss in chunks",
    "gradient_checkpointing": "gradient checkpointing",
    "layer_tiles": "layers in tiles",
    "tiled_mlp": "tiled MLP",
    "offload_activations": "activations offloaded",
    "offload_optimizer": "optimizer offloaded",
    "base_bits": "4-bit base",
    "shard": "sharded over the GPUs",
}

WAYS = {
    "gpu": "CUDA's allocator",
    "fake": "fake tensors: storages counted while they live, nothing computed",
    "process": "peak of this process's resident memory",
}


def table(document: dict[str, Any]) -> str:
    """The whole plan."""
    trainable = sum(document["trainable"].values())
    lines = [
        f"{document['model']}: {document['architecture']}, {document['parameters']:,} parameters, {trainable:,} of "
        f"them train ({', '.join(document['trainable'])})",
        f"context {document['context']:,}, {_attention(document)}",
        *_flops(document),
        *_memory(document),
        *_ladder(document),
        *_time(document),
        *_measured(document),
    ]
    return "\n".join(lines)


def _flops(document: dict[str, Any]) -> list[str]:
    small = document["flops"]["full"]["total"] < 5e11
    lines = ["", _row("GFLOP, forward, one row" if small else "TFLOP, forward, one row", PARTS)]
    for name, label in (("full", "full attention"), ("s2", document["pattern"])):
        giga = {part: count / 1e9 for part, count in document["flops"][name].items()}
        values = giga if small else document["table7"][name]
        lines.append(_row(label, [f"{values[part]:,.1f}" for part in PARTS]))
    pairs = document["pairs"]
    lines.append(
        "2 for each multiply-add, attention not halved for causality (the paper's table 7).\n"
        f"A causal kernel computes {pairs['s2'] / pairs['full']:.1%} of full attention's query-key pairs."
    )
    return lines


def _memory(document: dict[str, Any]) -> list[str]:
    moments = document["moments"]
    names = list(moments[document["peak"]])
    lines = ["", _row("GB a GPU, in", names)]
    for moment, parts in moments.items():
        mark = "  ← peak" if moment == document["peak"] else ""
        lines.append(_row(MOMENTS[moment], [f"{parts[name] / 1e9:,.2f}" for name in names]) + mark)
    gpus = document["gpus"]
    verdict = "fits" if document["fits"] else "does not fit"
    lines.append(
        f"with {_switches(document['switches'])}. It {verdict} into {gpus['count']} × "
        f"{gpus['memory_bytes'] / 1e9:,.0f} GB ({gpus['usable_bytes'] / 1e9:,.1f} GB each after the reserve)."
    )
    if document["host_bytes"]:
        lines.append(f"Offloading takes {document['host_bytes'] / 1e9:,.1f} GB of the host's memory for each GPU.")
    return lines


def _ladder(document: dict[str, Any]) -> list[str]:
    by_switches = {tuple(rung["switches"]): rung for rung in document["contexts"]}
    at = f"GB at {document['context']:,}"
    lines = ["", f"{'longest context that fits':<48}{'tokens':>14}{at:>18}"]
    for switches in map(tuple, document["ladder"]):
        rung = by_switches[switches]
        label = f"+ {SAYS[switches[-1]]}" if switches else "nothing (a plain Trainer)"
        lines.append(f"{label:<48}{rung['max_context']:>14,}{rung['memory_bytes'] / 1e9:>18,.1f}")
    lines.append(f"{'as asked: ' + _switches(document['switches']):<48}{document['max_context']:>14,}")
    lines.append(f"--json has all {len(document['contexts'])} combinations.")
    return lines


def _time(document: dict[str, Any]) -> list[str]:
    time, gpus = document["time"], document["gpus"]
    lines = ["", _row("time", ["a step", "tokens/s", "all steps"])]
    for name, label in (("full", "full attention"), ("s2", document["pattern"])):
        way = time[name]
        seconds = [_seconds(way["seconds_per_step"]), f"{way['tokens_per_second']:,.0f}", _seconds(way["seconds"])]
        lines.append(_row(label, seconds))
    lines.append(
        f"{document['batch']} rows a step, {document['steps']:,} steps, at {time['rate'] / gpus['count'] / 1e12:,.0f} "
        f"TFLOP/s a GPU; transfers not counted."
    )
    for name, label in (("full", "full attention"), ("s2", document["pattern"])):
        if sent := time[name]["sent_bytes_per_step"]:
            lines.append(
                f"Rows in pieces: {label} sends {sent / 1e9:,.2f} GB a step, which takes "
                f"{_seconds(time[name]['transfer_seconds'])}; the piece with most attention has "
                f"{time[name]['imbalance']:.2f} times the mean."
            )
    evaluation = document["evaluation"]
    measured = "what --stride and --max-documents ask for"
    if evaluation["tokens"] is not None:
        measured = f"at most {evaluation['tokens']:,} tokens (--evaluation-tokens), {_seconds(evaluation['seconds'])}"
    return [*lines, f"Measured besides, before, stretched and after: {measured}."]


def _measured(document: dict[str, Any]) -> list[str]:
    measured = document.get("measured")
    if not measured:
        return []
    layers = (
        f", {measured['layers']} of {measured['of_layers']} layers"
        if measured["layers"] < measured["of_layers"]
        else ""
    )
    lines = [
        "",
        f"measured by {WAYS[measured['by']]}; one device{layers}",
        _row("context", ["predicted GB", "measured GB", "ratio", "s a step"]),
    ]
    for result in measured["results"]:
        predicted = f"{result['predicted_bytes'] / 1e9:,.3f}"
        if result["measured_bytes"] is None:
            lines.append(_row(f"{result['context']:,}", [predicted, "out of memory", "", ""]))
            continue
        seconds = "–" if result["seconds"] is None else f"{result['seconds']:.2f}"
        cells = [predicted, f"{result['measured_bytes'] / 1e9:,.3f}", f"{result['ratio']:.3f}", seconds]
        lines.append(_row(f"{result['context']:,}", cells))
    return lines


def _attention(document: dict[str, Any]) -> str:
    if document["pattern"] == "full":
        return "full attention"
    return f"{document['pattern']} in groups of {document['group_size']:,} tokens"


def _row(label: str, cells: Any) -> str:
    return f"{label:<30}" + "".join(f"{cell:>12}" for cell in cells)


def _switches(names: list[str]) -> str:
    return ", ".join(SAYS[name] for name in names) or "no switch"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds / 3600:,.1f} h"
