"""What the benchmarks print for people."""

from collections.abc import Iterator
from typing import Any

from longlora.tables import aligned

SAYS = {"full": "full attention", "plain": "Trainer + PEFT"}


def attention_table(document: dict[str, Any]) -> str:
    """`longlora bench attention`: for each length a line for full attention, the pattern and the bound."""
    grid = [["attention", "length", "group", "forward", "backward", "both", "peak memory", "of full", "of bound"]]
    for result in document["results"]:
        place = [f"{result['length']:,}", f"{result['group_size']:,}"]
        for name, cost, *shares in _attention_rows(result):
            times = [f"{1000 * cost[part]:,.1f} ms" for part in ("forward_seconds", "backward_seconds", "seconds")]
            grid.append([name, *place, *times, _mebibytes(cost["memory_bytes"]), *shares])
    tensors = [
        f"{result['length']:,} tokens: q, k, v {_mebibytes(result['input_bytes'])}, output "
        f"{_mebibytes(result['output_bytes'])}; output and gradients checked"
        for result in document["results"]
    ]
    return "\n".join(
        [
            f"{document['hardware']}; torch {document['torch']}; {document['dtype']}",
            f"causal attention, {document['rows']} × {document['heads']} query heads ({document['key_heads']} KV) of "
            f"{document['head_dim']}; medians of {document['repeats']} rounds, one after the other in each",
            "",
            aligned(grid),
            "",
            *tensors,
            "bound: dense causal attention of the groups, nothing else; of scatter: full attention's time for as many "
            "query-key pairs.",
            "of full: of the same backend's full attention. Peak memory: what forward + backward add.",
            *(f"not measured: {name} ({reason})" for name, reason in document["not_measured"].items()),
        ]
    )


def _attention_rows(result: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, str]]:
    """Name, cost, share of full attention and share of the bound, for each line of one length."""
    for way in (result, *result["others"]):
        by = f", {way['backend']}" if result["others"] else ""
        yield f"full{by}", way["full"], "1.00", "–"
        yield f"{result['pattern']}{by}", way["s2"], f"{way['ratio']:.2f}", f"{way['ratio_to_bound']:.2f}"
    yield "bound", result["bound"], f"{result['bound_ratio']:.2f}", "1.00"


def step_table(document: dict[str, Any]) -> str:
    """`longlora bench step`: for each context a line for each way to take the step."""
    costs = ("seconds", "least – most", "processor", "tokens/s", "memory", "planned", "loss")
    grid = [["step", "context", "group", *costs]]
    said = []
    for result in document["results"]:
        place = [f"{result['context']:,}", f"{result['group_size']:,}"]
        named = SAYS | {"s2": document["pattern"]}
        grid += [[named[name], *place, *_step_cells(cost)] for name, cost in result["ways"].items()]
        said += [f"{result['context']:,} tokens: {each}" for each in _step_sentences(result, document["pattern"])]
    checkpointing = "gradient checkpointing" if document["gradient_checkpointing"] else "no gradient checkpointing"
    layers, rows = f"{document['layers']} of {document['of_layers']} layers", document["rows"]
    return "\n".join(
        [
            f"{document['hardware']}; torch {document['torch']}, transformers {document['transformers']}",
            f"{document['model']}, {layers}, random weights, {document['dtype']}, {checkpointing}; training "
            f"{', '.join(document['trainable'])}; {rows} row{'s' * (rows > 1)}, one optimiser step; medians of "
            f"{document['repeats']} rounds, one after the other in each",
            "",
            aligned(grid),
            "",
            *said,
            "Processor: seconds of this process's threads. Memory: what stands between steps, the weights that all",
            "three share among it, and the most that a step adds; planned: what `longlora plan` makes of it (it takes",
            "what plain PEFT trains in bfloat16, norms and embeddings, as float32).",
        ]
    )


def _step_cells(cost: dict[str, Any] | None) -> list[str]:
    if cost is None:
        return ["does not fit in memory", *[""] * 6]
    return [
        f"{cost['seconds']:,.2f}",
        f"{min(cost['rounds']):,.2f} – {max(cost['rounds']):,.2f}",
        f"{cost['processor_seconds']:,.2f}",
        f"{cost['tokens_per_second']:,.0f}",
        f"{cost['memory_bytes'] / 1e9:,.2f} GB",
        f"{cost['predicted_bytes'] / 1e9:,.2f} GB",
        f"{cost['loss']:.4f}",
    ]


def _step_sentences(result: dict[str, Any], pattern: str) -> Iterator[str]:
    names = {"s2": pattern, **SAYS}
    for one, other in (("s2", "full"), ("s2", "plain"), ("full", "plain")):
        if times := result[f"{one}_over_{other}"]:
            spread = f"{times['least']:.2f} – {times['most']:.2f}"
            yield f"{names[one]} is {times['median']:.2f} times as fast as {names[other]} ({spread})"
    checked = result["checked"]
    losses, norms = checked["loss"], checked["gradient_norm"]
    yield (
        f"checked: attention at this length; at {checked['tokens']:,} tokens loss {losses['full']:.6f} and plainly "
        f"{losses['plain']:.6f}, gradient norm {norms['full']:.5f} and {norms['plain']:.5f}"
    )


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:,.1f} MiB"
