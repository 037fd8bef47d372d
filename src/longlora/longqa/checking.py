"""`longlora longqa check`: how long the pairs are, what they ask, which are malformed, too long or there twice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from longlora.corpus.conversations import ConversationFormat
from longlora.errors import UserError, printable
from longlora.longqa.answers import plain
from longlora.longqa.pair_files import Malformed, iterate_pairs
from longlora.longqa.pairs import Pair
from longlora.progress import Progress
from longlora.settings import CheckLongQASettings
from longlora.tables import aligned

SHOWN = 10
"""Places named to people for each kind of fault; the JSON names all."""

UNNAMED = "not named"


def check_pairs(settings: CheckLongQASettings) -> dict[str, Any]:
    """Run `longlora longqa check`.

    Returns:
        `{"file", "pairs", "malformed": [{"where", "reason"}], "categories": {name: count}, "teachers": {name: count},
        "unit": "tokens" | "characters", "lengths": {"prompt" | "answer" | "pair": {"least", "median", "p90",
        "most", "total"}}, "duplicates": {"pairs" | "prompts" | "answers": [[where, where, …], …]}, "too_long":
        {"context", "where": […]} | null}`. In tokens a pair is as long as `longlora sft` will find it: the prompt with
        all that the chat template writes before the last answer, the answer with the end of its turn. A pair that the
        chat template cannot write counts as malformed.

    Raises:
        UserError: the file cannot be read or holds no record, or the tokenizer cannot be loaded.
    """
    measure = _characters if settings.tokenizer is None else _tokens_in_training(settings)
    malformed: list[dict[str, str]] = []
    categories: Counter[str] = Counter()
    teachers: Counter[str] = Counter()
    places: dict[str, dict[int, list[str]]] = {kind: defaultdict(list) for kind in ("pairs", "prompts", "answers")}
    lengths: list[tuple[int, int, int]] = []
    too_long: list[str] = []
    with Progress("checking", "pairs", None) as progress:
        for pair in iterate_pairs(settings.file):
            if isinstance(pair, Malformed):
                malformed.append({"where": pair.where, "reason": pair.reason})
                continue
            try:
                length = measure(pair)
            except UserError as error:
                malformed.append({"where": pair.where, "reason": str(error)})
                continue
            lengths.append(length)
            categories[pair.category or UNNAMED] += 1
            teachers[str(pair.source.get("teacher", UNNAMED))] += 1
            prompt, answer = hash(plain(pair.prompt)), hash(plain(pair.answer))
            for kind, key in (("pairs", hash((prompt, answer))), ("prompts", prompt), ("answers", answer)):
                places[kind][key].append(pair.where)
            if settings.context is not None and length[2] > settings.context:
                too_long.append(pair.where)
            progress.show(len(lengths), f"{len(lengths):,} pairs")
    if not lengths and not malformed:
        raise UserError(f"'{settings.file}' holds no pairs: give a file that `longlora longqa build` wrote.")
    columns = list(zip(*lengths, strict=True)) or [(), (), ()]
    result = {
        "file": settings.file,
        "pairs": len(lengths),
        "malformed": malformed,
        "categories": dict(categories.most_common()),
        "teachers": dict(teachers.most_common()),
        "unit": "characters" if settings.tokenizer is None else "tokens",
        "lengths": {name: _spread(column) for name, column in zip(("prompt", "answer", "pair"), columns, strict=True)},
        "duplicates": _duplicates(places),
        "too_long": None if settings.context is None else {"context": settings.context, "where": too_long},
    }
    if not settings.json:
        print(printable(report(result)))
    return result


Measure = Callable[[Pair], tuple[int, int, int]]
"""Lengths of what stands before the last answer, of that answer, and of the whole pair."""


def _characters(pair: Pair) -> tuple[int, int, int]:
    return len(pair.prompt), len(pair.answer), sum(len(message.content) for message in pair.messages)


def _tokens_in_training(settings: CheckLongQASettings) -> Measure:
    from longlora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(str(settings.tokenizer), **vars(settings.loading))
    conversations = ConversationFormat(tokenizer, settings.prompt_format)

    def measure(pair: Pair) -> tuple[int, int, int]:
        start, stop = conversations.example(pair.conversation()).answers[-1]
        return start, stop - start, stop

    return measure


def _spread(column: Iterable[int]) -> dict[str, int] | None:
    values = sorted(column)
    if not values:
        return None
    return {
        "least": values[0],
        "median": values[len(values) // 2],
        "p90": values[min(len(values) * 9 // 10, len(values) - 1)],
        "most": values[-1],
        "total": sum(values),
    }


def _duplicates(places: dict[str, dict[int, list[str]]]) -> dict[str, list[list[str]]]:
    """Groups of places; those that are the same pair are not named again for their prompt and their answer."""
    groups = {kind: [where for where in found.values() if len(where) > 1] for kind, found in places.items()}
    same = {tuple(where) for where in groups["pairs"]}
    for kind in ("prompts", "answers"):
        groups[kind] = [where for where in groups[kind] if tuple(where) not in same]
    return groups


def report(result: dict[str, Any]) -> str:
    """The check for people."""
    lines = [f"{result['file']}: {result['pairs']:,} pairs, {len(result['malformed']):,} malformed records"]
    if result["pairs"]:
        names = ("least", "median", "p90", "most", "total")
        sizes = [[f"{spread[name]:,}" for name in names] for spread in result["lengths"].values()]
        grid = [[part, *row] for part, row in zip(result["lengths"], sizes, strict=True)]
        lines += ["", aligned([[result["unit"], *names[:2], "90%", *names[3:]], *grid])]
        for what in ("categories", "teachers"):
            if set(result[what]) != {UNNAMED}:
                lines += ["", f"{what}: " + ", ".join(f"{name} {count:,}" for name, count in result[what].items())]
    said = {"pairs": "the same pair", "prompts": "the same prompt", "answers": "the same answer"}
    for kind, groups in result["duplicates"].items():
        lines += _listed([f"{said[kind]}: {_named(where)}" for where in groups])
    lines += _listed([f"malformed: {each['where']}: {each['reason']}" for each in result["malformed"]])
    if result["too_long"] is not None:
        long = result["too_long"]["where"]
        fit = f"{len(long):,} of {result['pairs']:,} pairs do not fit {result['too_long']['context']:,} tokens"
        lines += ["", f"{fit}: {_named(long)}" if long else f"every pair fits {result['too_long']['context']:,} tokens"]
    return "\n".join(lines)


def _named(where: list[str]) -> str:
    more = f" and {len(where) - SHOWN:,} more" if len(where) > SHOWN else ""
    return ", ".join(where[:SHOWN]) + more


def _listed(lines: list[str]) -> list[str]:
    more = [f"… and {len(lines) - SHOWN:,} more (--json names all)"] if len(lines) > SHOWN else []
    return ["", *lines[:SHOWN], *more] if lines else []
