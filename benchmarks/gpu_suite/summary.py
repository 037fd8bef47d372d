"""`summary.md`: what was asked of a GPU, beside what was found; then every table."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpu_suite.cases import Case

Records = list[dict[str, Any]]


def summary(records: Records, cases: Sequence[Case]) -> str:
    """Markdown of the last result of each case; never raises, whatever a result lacks."""
    last = {f"{each['part']}/{each['case']}": each for each in records}
    found = {key: each["result"] for key, each in last.items() if "result" in each}
    lines = ["# One GPU, one go"]
    sections: list[tuple[str, Callable[[dict[str, Any]], Iterator[str]]]] = [
        ("The machine", _environment),
        ("What was asked", _asked),
        ("Parity with float64", _parity),
        ("Attention, forward + backward", _attention),
        ("A whole training step", _steps),
        ("The longest context, switch by switch", _ladder),
        ("Memory: predicted and measured", _memory),
    ]
    for title, section in sections:
        try:
            body = list(section(found))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            body = [f"(cannot be told: {type(error).__name__}: {error}; see results.jsonl)"]
        if body:
            lines += ["", f"## {title}", "", *body]
    failed = {key: each["error"] for key, each in last.items() if "error" in each and key not in found}
    missing = [case.key for case in cases if case.key not in last]
    if failed or missing:
        lines += ["", "## Not measured", ""]
        lines += [f"- {key}: {' '.join(error.split())[:400]}" for key, error in failed.items()]
        lines += [f"- {key}: not run" for key in missing]
    return "\n".join(lines) + "\n"


def _environment(found: dict[str, Any]) -> Iterator[str]:
    for _, result in _part(found, "environment"):
        libraries = ", ".join(f"{name} {version}" for name, version in result["libraries"].items())
        memory = f", {result['device_bytes'] / 2**30:.0f} GiB" if result["device_bytes"] else ""
        host = f", {result['host_bytes'] / 2**30:.0f} GiB free on the host" if result["host_bytes"] else ""
        yield (
            f"{result['hardware']}{memory}; driver {result['driver']}, CUDA {result['cuda']}; {result['processors']} "
            f"processors{host}; {libraries}; commit {result['commit']}."
        )


def _asked(found: dict[str, Any]) -> Iterator[str]:
    rows = [("asked", "wanted", "found", "")]
    for _, result in _part(found, "attention"):
        for each in result["results"]:
            best = _best(each)
            at = f"{each['length']:,} tokens, {best['backend']}"
            rows.append((f"S² / bound, {at}", "≤ 1.10", *_verdict(best["ratio_to_bound"], most=1.10)))
            if each["length"] >= 32768:
                faster = 1 / best["ratio_to_fastest_full"]
                rows.append((f"faster than the fastest full, {at}", "≥ 3.3", *_verdict(faster, least=3.3)))
    for _, result in _part(found, "scatter"):
        for each in result["results"]:
            best = _best(each)
            rows.append(
                (
                    f"scatter / its bound, {each['length']:,} tokens, {best['backend']}",
                    "≤ 1.15",
                    *_verdict(best["ratio_to_bound"], most=1.15),
                )
            )
    for _, result in _part(found, "step"):
        for each in result["results"]:
            if each["s2_over_full"] and (wanted := {32768: 1.7, 102400: 2.2}.get(each["context"])):
                faster = each["s2_over_full"]["median"]
                rows.append((f"step, {each['context']:,} tokens", f"≥ {wanted}", *_verdict(faster, least=wanted)))
    trained = [
        each["context"]
        for _, result in _part(found, "step")
        for each in result["results"]
        if each["ways"].get("s2") and not result["memory"]["offload_activations"]
    ]
    without = trained + [
        each["longest"] for _, each in _part(found, "ladder") if each.get("longest") and not _offloads(each)
    ]
    offloaded = [each["longest"] for _, each in _part(found, "ladder") if each.get("longest") and _offloads(each)]
    if without:
        rows.append(("longest context, nothing offloaded", "≥ 100,000", *_verdict(max(without), least=100_000)))
    if offloaded:
        rows.append(("longest context, offloaded", "≥ 512,000", *_verdict(max(offloaded), least=512_000)))
    if len(rows) > 1:
        yield from _table(rows)


def _parity(found: dict[str, Any]) -> Iterator[str]:
    rows = [("backend", "cases right", "worst error / allowed", "refuses")]
    for _, result in _part(found, "parity"):
        right = sum(each["right"] for each in result["results"])
        worst = max((max(each["errors"].values()) for each in result["results"]), default=None)
        wrong = [
            f"{each['pattern']}, {each['shape']}, {each['dtype']}" for each in result["results"] if not each["right"]
        ]
        notes = [*result["refused"], *(f"WRONG: {each}" for each in wrong[:4])]
        rows.append(
            (
                result["backend"],
                f"{right} of {len(result['results'])}",
                "–" if worst is None else f"{worst:.2f}",
                "; ".join(notes),
            )
        )
    if len(rows) > 1:
        yield from _table(rows)
        yield ""
        yield "Allowed: twice plain PyTorch's own error in the same type against float64; output and all gradients."


def _attention(found: dict[str, Any]) -> Iterator[str]:
    rows = [("pattern", "tokens", "backend", "S² ms", "its full ms", "bound ms", "S² / bound", "S² / fastest full")]
    notes = []
    for key, result in [*_part(found, "attention"), *_part(found, "scatter")]:
        if result.get("without"):
            notes.append(f"{key}: {result['without'][:300]}")
        for each in result["results"]:
            rows += [_attention_row(each, one) for one in [each, *each["others"]]]
    if len(rows) > 1:
        yield from _table(rows)
        yield from (f"\n{note}" for note in notes)


def _attention_row(result: dict[str, Any], backend: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["pattern"],
        f"{result['length']:,}",
        backend["backend"],
        f"{1000 * backend['s2']['seconds']:.2f}",
        f"{1000 * backend['full']['seconds']:.2f}",
        f"{1000 * result['bound']['seconds']:.2f}",
        f"{backend['ratio_to_bound']:.2f}",
        f"{backend['ratio_to_fastest_full']:.3f}",
    )


def _steps(found: dict[str, Any]) -> Iterator[str]:
    rows = [("tokens", "step", "seconds", "tokens/s", "memory GB", "faster than full")]
    for _, result in _part(found, "step"):
        for each in result["results"]:
            for name, cost in each["ways"].items():
                if cost is None:
                    rows.append((f"{each['context']:,}", name, "out of memory", "", "", ""))
                    continue
                faster = each["s2_over_full"] if name == "s2" else None
                rows.append(
                    (
                        f"{each['context']:,}",
                        name,
                        f"{cost['seconds']:.2f}",
                        f"{cost['tokens_per_second']:,.0f}",
                        f"{cost['memory_bytes'] / 1e9:.1f}",
                        f"{faster['median']:.2f}" if faster else "",
                    )
                )
    if len(rows) > 1:
        yield from _table(rows)


def _ladder(found: dict[str, Any]) -> Iterator[str]:
    rows = [("rung", "longest trained", "GB there", "s a step", "planned", "host allows", "would fit", "note")]
    for _, result in _part(found, "ladder"):
        steps = [each for each in result.get("steps", []) if each["measured_bytes"]]
        last = steps[-1] if steps else None
        rows.append(
            (
                result["rung"],
                f"{result['longest']:,}" if result.get("longest") else "–",
                f"{last['measured_bytes'] / 1e9:.1f}" if last else "–",
                f"{last['seconds']:.1f}" if last and last["seconds"] else "–",
                *(f"{result[name]:,}" if result.get(name) else "–" for name in ("planned", "host_limit", "would_fit")),
                result.get("note") or "",
            )
        )
    if len(rows) > 1:
        yield from _table(rows)


def _memory(found: dict[str, Any]) -> Iterator[str]:
    rows = [("tokens", "step", "rung", "predicted GB", "measured GB", "ratio")]
    for _, result in _part(found, "ladder"):
        for each in result.get("steps", []):
            predicted, measured = each["predicted_bytes"], each["measured_bytes"]
            told = (f"{measured / 1e9:.2f}", f"{predicted / measured:.3f}") if measured else ("out of memory", "")
            rows.append((f"{each['context']:,}", result["way"], result["rung"], f"{predicted / 1e9:.2f}", *told))
    if len(rows) > 1:
        yield from _table(rows)


def _part(found: dict[str, Any], part: str) -> list[tuple[str, dict[str, Any]]]:
    return [(key, result) for key, result in found.items() if key.startswith(f"{part}/")]


def _best(result: dict[str, Any]) -> dict[str, Any]:
    """Of the backends that were measured, the one with the fastest pattern."""
    return min([result, *result["others"]], key=lambda each: each["s2"]["seconds"])


def _offloads(rung: dict[str, Any]) -> bool:
    return "offload_activations" in rung["switches"] or "offload_optimizer" in rung["switches"]


def _verdict(value: float, *, least: float | None = None, most: float | None = None) -> tuple[str, str]:
    good = (least is None or value >= least) and (most is None or value <= most)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}", "yes" if good else "NO"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"
        if number == 0:
            yield "|" + "---|" * len(row)
