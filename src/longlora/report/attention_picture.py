"""What each head sees in training, drawn small from the pattern that the training itself uses."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from longlora.attention.patterns import PLAIN, Cut, HeadSet, head_sets, partition, random_choices
from longlora.report.reading import at
from longlora.report.svg import Drawing
from longlora.results import whole
from longlora.settings import PatternOptions

TOKENS = 16
"""Rows and columns of a picture."""

TONES = 4
"""Groups are told apart by this many tones in turn."""

_CUTS = {
    "full": "every earlier token",
    "plain": "groups side by side",
    "shifted": "groups shifted by half a group",
    "rolled": "rolled by half a group: the first tokens share a group with the last",
    "strided": "tokens a fixed stride apart",
    "scatter": "half-groups side by side",
}

_SHARES = {(1, 1): "all heads", (1, 2): "half of the heads", (1, 4): "a quarter of the heads"}


@dataclass(frozen=True)
class Panel:
    """One picture: which heads, in which layers, see what."""

    who: str
    what: str
    svg: str
    leaks: bool
    """Some token sees a later one."""


def group_in_picture(group_size: int, context: int) -> int:
    """The group of the picture: the same share of `TOKENS` as `group_size` is of the context, at least 2.

    >>> group_in_picture(1024, 4096)
    4
    """
    return min(TOKENS, max(2, round(TOKENS * group_size / context)))


def panels(pattern: str, group: int, config: dict[str, Any], options: PatternOptions = PLAIN) -> list[Panel]:
    """A panel for each way in which `pattern` cuts `TOKENS` tokens into groups of `group`.

    Args:
        pattern: a name of `longlora.settings.PATTERNS`.
        group: tokens a group in the picture.
        config: the model's config.json; its head counts are used where it has them.
        options: additions to the pattern, in tokens of the picture; what is drawn at random is one draw of many.

    Raises:
        UserError: unknown pattern, or an option that it cannot have.
    """
    text = config.get("text_config", config)
    heads = whole(at(text, "num_attention_heads"))
    key_heads = whole(at(text, "num_key_value_heads")) or heads
    known = heads is not None and key_heads is not None and heads % key_heads == 0
    sizes = (heads, key_heads) if known and heads and key_heads else (8, 8)
    even, odd = (head_sets(pattern, *sizes, layer=layer, options=options) for layer in (0, 1))
    alike = even == odd or (random_choices(pattern, options) and pattern != "shift-layers")
    layers = [("", even)] if alike else [("even layers, ", even), ("odd layers, ", odd)]
    return [
        _panel(layer + _heads(sets, sizes[0], known), cut, group)
        for layer, all_sets in layers
        for cut, sets in _by_cut(all_sets)
    ]


def visible_pairs(cut: Cut, tokens: int, group: int) -> Iterator[tuple[int, int, int]]:
    """`(i, j, block)` for every token `i`, in `block`, and each token `j` that it sees."""
    cuts, blocks = partition(cut, tokens, group), {}
    for block, members in enumerate(cuts.blocks):
        blocks[members.start] = block
        yield from ((token, earlier, block) for rank, token in enumerate(members) for earlier in members[: rank + 1])
    for read in cuts.reads:
        yield from (
            (token, earlier, blocks[read.query_start])
            for token in range(read.query_start, read.query_stop)
            for piece in read.pieces
            for earlier in range(*piece)
        )


def _by_cut(sets: Sequence[HeadSet]) -> list[tuple[Cut, list[HeadSet]]]:
    found: dict[Cut, list[HeadSet]] = {}
    for head_set in sets:
        found.setdefault(head_set.cut, []).append(head_set)
    return list(found.items())


def _heads(sets: Sequence[HeadSet], heads: int, known: bool) -> str:
    """`heads 1–4 of 8`, or only their share where the number of heads is not known."""
    count = sum(each.query_stop - each.query_start for each in sets)
    common = math.gcd(count, heads)
    share = _SHARES.get((count // common, heads // common))
    if not known or count == heads:
        return share or f"{count} of {heads} heads"
    first, last = sets[0].query_start + 1, sets[-1].query_stop
    return f"heads {first}–{last} of {heads}" if last > first else f"head {first} of {heads}"


def _panel(who: str, cut: Cut, group: int) -> Panel:
    what = _CUTS.get(cut.kind, cut.kind)
    if cut.kind == "dilated":
        what = "groups side by side" if cut.dilation == 1 else f"every {_ordinal(cut.dilation)} token"
    what += "".join(
        words
        for words, given in (
            (", from a place drawn anew", cut.offset_seed),
            (", with the first tokens", cut.sink_tokens),
            (f", with {cut.pieces} earlier {'piece' if cut.pieces == 1 else 'pieces'} drawn at random", cut.pieces),
        )
        if given
    )
    cells = list(visible_pairs(cut, TOKENS, group))
    side, gap = 12, 1
    size = TOKENS * side
    drawing = Drawing(size, size, f"{who}: {what}. Token by token, the earlier tokens that each one sees.")
    drawing.add("rect", x=0, y=0, width=size, height=size, class_="unseen")
    for block in sorted({block for _, _, block in cells}):
        for late in (False, True):
            path = "".join(
                f"M{side * j + gap / 2:g} {side * i + gap / 2:g}h{side - gap}v{side - gap}h-{side - gap}z"
                for i, j, of in cells
                if of == block and (j > i) == late
            )
            if path:
                drawing.add("path", d=path, class_="leak" if late else f"group-{block % TONES}")
    return Panel(who[:1].upper() + who[1:], what, str(drawing), any(j > i for i, j, _ in cells))


def _ordinal(count: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(count, f"{count}th")
