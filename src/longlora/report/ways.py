"""Which measurements may stand in one figure: those made in the same way; of the others it is said what differs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from longlora.report.models import Kind, Model
from longlora.report.wording import duration, joined, listed, spread, whole
from longlora.results import LongPPL, Result, Retrieval, Ruler, Short

Thing = TypeVar("Thing")

Group = Sequence[tuple[Model, Kind]]

Way = Mapping[str, str]
"""What must be the same for two measurements to be compared: a name and a value in words."""

UNSAID = ("fingerprint",)
"""Parts of a way that tell measurements apart and mean nothing to a reader."""


def way_of(document: Result) -> Way:
    """How the measurement was made, as far as others must have been made so too."""
    if isinstance(document, Retrieval):
        counts = [cell.trials + cell.skipped for cell in document.results]
        way = {"trials a square": spread(counts), **_prompts(document)}
        if document.task != "passkey":
            return way | {"cases": joined(document.data) or "not said", "seed": document.seed or "–"}
        every = document.interval
        lengths = f"multiples of {every:,} tokens, as the original code estimates them" if every else "–"
        return way | {"keys": document.keys or "–", "seed": document.seed or "–", "lengths": lengths}
    if isinstance(document, Ruler):
        return {
            "average over": joined(document.average_over) or "no task",
            "trials a task and length": str(document.trials or "–"),
            "seed": document.seed or "–",
            **_prompts(document),
            "threshold": "–" if document.threshold is None else f"{100 * document.threshold:.1f}%",
        }
    text = {"text": joined(document.data) or "–", "fingerprint": document.data_fingerprint or "–"}
    if isinstance(document, Short):
        counts = sorted({row.documents for row in document.results})
        way = {"baseline": document.baseline or "–", "stride": document.stride or "–", "score": document.score or "–"}
        return text | way | ({"documents": spread(counts)} if counts else {})
    assert isinstance(document, LongPPL)
    row, short, stride = document.results[0], document.short_context, document.short_stride
    return text | {
        "context": f"{row.context:,} tokens",
        "short context": f"{short:,} to {short + stride - 1:,} tokens" if short and stride else "–",
        "key tokens": f"chosen by {document.evaluator}" if document.evaluator else "each model's own",
        "alpha": document.alpha or "–",
        "beta": document.beta or "–",
        "tokens": whole(row.tokens),
    }


def _prompts(document: Result) -> dict[str, str]:
    """How prompts were written."""
    said = "not said" if document.chat is None else "chat template" if document.chat else "plain text"
    said += " with a system turn" if document.system is not None else ""
    return {"prompts": said} | ({"BOS": document.bos} if document.bos in ("yes", "no") else {})


def alike(things: Sequence[Thing], way: Callable[[Thing], Way]) -> list[list[Thing]]:
    """The things that were made in the same way together; the larger groups first, then in their order."""
    groups: list[list[Thing]] = []
    for thing in things:
        for group in groups:
            if dict(way(group[0])) == dict(way(thing)):
                group.append(thing)
                break
        else:
            groups.append([thing])
    return sorted(groups, key=len, reverse=True)


def grouped(done: Sequence[tuple[Model, Kind]], draw: Callable[[Group[Kind]], dict[str, Any]]) -> list[dict[str, Any]]:
    """What `draw` makes of the models that were measured alike, with how, and why they stand apart from the first."""
    groups = alike(done, lambda each: way_of(each[1]))
    return [
        draw(group)
        | {
            "way": in_words(way_of(group[0][1])),
            "apart": difference(way_of(group[0][1]), way_of(groups[0][0][1])) if group is not groups[0] else "",
            "seconds": listed(
                [f"{duration(found.seconds)} for {model.name}" for model, found in group if found.seconds]
            ),
        }
        for group in groups
    ]


def in_words(way: Way) -> str:
    """
    >>> in_words({"trials": "5", "seed": "0", "fingerprint": "3f"})
    'trials: 5; seed: 0'
    """
    return "; ".join(f"{name}: {value}" for name, value in way.items() if name not in UNSAID and value != "–")


def difference(way: Way, other: Way) -> str:
    """What is not the same in `way` as in `other`, for the sentence that keeps them apart.

    >>> difference({"trials": "5", "seed": "0"}, {"trials": "3", "seed": "0"})
    'trials 5, not 3'
    >>> difference({"text": "a", "fingerprint": "1"}, {"text": "a", "fingerprint": "2"})
    'other text under the same name'
    """
    names = [name for name in dict.fromkeys([*way, *other]) if way.get(name) != other.get(name)]
    said = [f"{name} {way.get(name, '–')}, not {other.get(name, '–')}" for name in names if name not in UNSAID]
    return listed(said) if said else "other text under the same name"
