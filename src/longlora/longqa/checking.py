"""`longlora longqa check`: how long the pairs are, what they ask, which are malformed, too long or there twice."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from longlora.errors import UserError
from longlora.longqa.pair_files import Malformed, iterate_pairs
from longlora.longqa.pairs import Pair
from longlora.progress import Progress
from longlora.settings import CheckLongQASettings

SHOWN = 10
"""Places named to people for each kind of fault; the JSON names all."""

PAIRS_A_BATCH = 32
UNNAMED = "not named"


def check_pairs(settings: CheckLongQASettings) -> dict[str, Any]:
    """Run `longlora longqa check`.

    Returns:
        `{"file", "pairs", "malformed": [{"where", "reason"}], "categories": {name: count}, "teachers": {name: count},
        "unit": "tokens" | "characters", "lengths": {"prompt" | "answer" | "pair": {"least", "median", "p90",
        "most", "total"}}, "duplicates": {"pairs" | "prompts" | "answers": [[where, where, …], …]}, "too_long":
        {"context", "where": […]} | null}`. A pair's length includes what the chat template adds.

    Raises:
        UserError: the file cannot be read or holds no record, or the tokenizer cannot be loaded.
    """
    measure = _characters if settings.tokenizer is None else _token_measure(settings)
    malformed: list[dict[str, str]] = []
    categories: Counter[str] = Counter()
    teachers: Counter[str] = Counter()
    places: dict[str, dict[int, list[str]]] = {kind: defaultdict(list) for kind in ("pairs", "prompts", "answers")}
    lengths: list[tuple[int, int, int]] = []
    too_long: list[str] = []
    with Progress("checking", "pairs", None) as progress:
        for batch in _batches(_well_formed(settings.file, malformed)):
            for pair, length in zip(batch, measure(batch), strict=True):
                lengths.append(length)
                categories[pair.category or UNNAMED] += 1
                teachers[str(pair.source.get("teacher", UNNAMED))] += 1
                prompt, answer = hash(_plain(pair.prompt)), hash(_plain(pair.answer))
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
        print(report(result))
    return result


def _well_formed(file: str, malformed: list[dict[str, str]]) -> Iterator[Pair]:
    for pair in iterate_pairs(file):
        if isinstance(pair, Malformed):
            malformed.append({"where": pair.where, "reason": pair.reason})
        else:
            yield pair


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    waiting = iter(pairs)
    while batch := list(islice(waiting, PAIRS_A_BATCH)):
        yield batch


Measure = Callable[[list[Pair]], list[tuple[int, int, int]]]
"""Lengths of the prompt (its material and question), the answer and the whole pair."""


def _characters(pairs: list[Pair]) -> list[tuple[int, int, int]]:
    return [
        (len(pair.prompt), len(pair.answer), sum(len(message.content) for message in pair.messages)) for pair in pairs
    ]


def _token_measure(settings: CheckLongQASettings) -> Measure:
    from longlora.corpus.encoding import beginning
    from longlora.models import load_tokenizer

    tokenizer: Any = load_tokenizer(
        str(settings.tokenizer),
        trust_remote_code=settings.loading.trust_remote_code,
        revision=settings.loading.revision,
    )

    def counts(texts: list[str]) -> list[int]:
        ids = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return [len(each) for each in ids]

    def measure(pairs: list[Pair]) -> list[tuple[int, int, int]]:
        prompts, answers = (counts([getattr(pair, part) for pair in pairs]) for part in ("prompt", "answer"))
        if tokenizer.chat_template is None:
            frame = len(beginning(tokenizer)) + (tokenizer.eos_token_id is not None)
            whole = [sum(counts([message.content for message in pair.messages])) + frame for pair in pairs]
        else:
            whole = counts([tokenizer.apply_chat_template(pair.conversation(), tokenize=False) for pair in pairs])
        return list(zip(prompts, answers, whole, strict=True))

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


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def report(result: dict[str, Any]) -> str:
    """The check for people."""
    lines = [f"{result['file']}: {result['pairs']:,} pairs, {len(result['malformed']):,} malformed records"]
    if result["pairs"]:
        names = ("least", "median", "p90", "most", "total")
        titles = ("least", "median", "90%", "most", "total")
        lines += ["", f"{result['unit']:<12}" + "".join(f"{title:>14}" for title in titles)]
        for part, spread in result["lengths"].items():
            lines.append(f"{part:<12}" + "".join(f"{spread[name]:>14,}" for name in names))
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
