"""Packed rows against naive loops: every token once, documents apart where asked, long documents first where asked."""

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longlora.corpus.packing import PackedRows, describe, pack
from longlora.corpus.skipping import skipped_positions
from longlora.corpus.tokens import TokenizedCorpus
from longlora.errors import UserError
from longlora.settings import CorpusSettings


def corpus_of(lengths: list[int]) -> TokenizedCorpus:
    """Documents of these lengths in which every token is different: token k stands at place k of the corpus."""
    offsets = np.array([0, *np.cumsum(lengths)], dtype=np.int64)
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    return TokenizedCorpus(tokens, offsets, [str(i) for i in range(len(lengths))], int(offsets[-1]) - 1)


def document_of(corpus: TokenizedCorpus, token: int) -> int:
    return next(number for number in range(len(corpus)) if corpus.offsets[number] <= token < corpus.offsets[number + 1])


def plain(rows: PackedRows) -> list[dict[str, list[int]]]:
    return [{name: values.tolist() for name, values in row.items()} for row in rows]


def or_none(corpus: TokenizedCorpus, **options) -> PackedRows | None:
    """The rows, or None where a sentence says that there are none."""
    try:
        return pack(corpus, **options)
    except UserError:
        return None


LENGTHS = st.lists(st.integers(0, 40) | st.sampled_from([1, 2, 7, 8, 9, 16, 17]), min_size=1, max_size=25)
CONTEXT = st.integers(2, 20)
SEED = st.integers(0, 2**32)


# --------------------------------------------------------------------------------------------------- concatenate


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=CONTEXT, seed=SEED, prefer_long=st.booleans())
def test_concatenated_rows_are_the_shuffled_documents_cut(lengths, context, seed, prefer_long):
    corpus = corpus_of(lengths)
    prefer_long = prefer_long and max(lengths) >= context
    rows = or_none(corpus, context=context, prefer_long=prefer_long, seed=seed)
    assert (rows is None) == (sum(lengths) < context)
    if rows is None:
        return
    got = plain(rows)
    assert all(row.keys() == {"input_ids", "labels"} and row["labels"] == row["input_ids"] for row in got)
    assert all(len(row["input_ids"]) == context for row in got)
    assert len(got) == sum(lengths) // context
    seen = [token for row in got for token in row["input_ids"]]
    assert len(set(seen)) == len(seen) == sum(lengths) - rows.dropped_tokens
    assert rows.dropped_tokens == sum(lengths) % context

    # Where a row steps from one token to one that does not follow it, a document ends and another begins.
    ends, starts = set((corpus.offsets[1:] - 1).tolist()), set(corpus.offsets[:-1].tolist())
    for row in got:
        for token, following in zip(row["input_ids"], row["input_ids"][1:], strict=False):
            assert following == token + 1 or (token in ends and following in starts)

    # The rows are the documents in the seed's order, joined and cut by a naive loop.
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    if prefer_long:
        order.sort(key=lambda number: lengths[number] < context)
    joined = [token for number in order for token in corpus.document(number).tolist()]
    cut = [joined[begin : begin + context] for begin in range(0, len(joined) - context + 1, context)]
    assert sorted(row["input_ids"] for row in got) == sorted(cut)


def test_concatenation_is_one_stream():
    """With no rows to shuffle, the single row is the start of the joined documents."""
    corpus = corpus_of([3, 4, 5])
    row = pack(corpus, context=12, seed=5)[0]["input_ids"].tolist()
    documents = [corpus.document(number).tolist() for number in range(3)]
    orders = [[a, b, c] for a in range(3) for b in range(3) for c in range(3) if len({a, b, c}) == 3]
    assert row in [[token for number in order for token in documents[number]] for order in orders]


# ------------------------------------------------------------------------------------------------------- isolate


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, context=CONTEXT, seed=SEED, prefer_long=st.booleans())
def test_isolated_rows_by_a_naive_loop(lengths, context, seed, prefer_long):
    corpus = corpus_of(lengths)
    prefer_long = prefer_long and max(lengths) >= context
    rows = or_none(corpus, context=context, packing="isolate", prefer_long=prefer_long, seed=seed)

    # The oracle's pieces: (first token, length), without those that have nothing to predict.
    pieces = [
        (start + begin, min(context, length - begin))
        for start, length in zip(corpus.offsets.tolist(), lengths, strict=False)
        for begin in range(0, length, context)
        if min(context, length - begin) > 1
    ]
    assert (rows is None) == (not pieces)
    if rows is None:
        return

    found = []
    for row in plain(rows):
        assert row.keys() == {"input_ids", "labels", "position_ids", "attention_mask"}
        assert {len(values) for values in row.values()} == {context}
        at = 0
        while at < context and row["attention_mask"][at]:
            first = row["input_ids"][at]
            (length,) = [length for start, length in pieces if start == first]
            found.append((first, length))
            here = slice(at, at + length)
            assert row["input_ids"][here] == list(range(first, first + length))
            assert row["labels"][here] == [-100, *range(first + 1, first + length)]
            assert row["position_ids"][here] == list(range(length))
            assert row["attention_mask"][here] == [1] * length
            at += length
        padding = context - at
        assert row["labels"][at:] == [-100] * padding
        assert row["attention_mask"][at:] == [0] * padding
        assert row["position_ids"][at:] == list(range(padding))
        assert all(token in corpus.tokens for token in row["input_ids"][at:])
        assert any(label != -100 for label in row["labels"])
    assert sorted(found) == sorted(pieces)
    used = sum(length for _, length in pieces)
    assert rows.dropped_tokens == sum(lengths) - used
    assert describe(rows)["padding_share"] == pytest.approx(1 - used / (len(rows) * context))


def one_by_one_best_fit(lengths: list[int], context: int) -> list[int]:
    """Free places of each row after best-fit decreasing, by the book: one piece, one look through all rows."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, places in enumerate(free) if places >= length]
        if fitting:
            free[min(fitting, key=lambda number: free[number])] -= length
        else:
            free.append(context - length)
    return sorted(free)


@settings(max_examples=150, deadline=None)
@given(
    context=st.integers(2, 60),
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80),
    seed=SEED,
)
def test_isolated_rows_are_filled_by_best_fit_decreasing(context, lengths, seed):
    lengths = [min(length, context) for length in lengths]
    rows = pack(corpus_of(lengths), context=context, packing="isolate", seed=seed)
    padding = sorted(int((row["attention_mask"] == 0).sum()) for row in rows)
    assert padding == one_by_one_best_fit(lengths, context)


def test_the_drawing_in_the_docstring():
    a, b, c = [0, 1, 2, 3, 4, 5, 6], [7, 8, 9], [10, 11]
    for seed in range(10):
        full, two, padded = sorted(
            plain(pack(corpus_of([7, 3, 2]), context=5, packing="isolate", seed=seed)),
            key=lambda row: (0 in row["attention_mask"], row["position_ids"] != [0, 1, 2, 3, 4]),
        )
        assert full["input_ids"] == a[:5]
        assert full["labels"] == [-100, *a[1:5]]
        assert sorted(two["input_ids"]) in (sorted(a[5:] + b), b + c)
        assert two["position_ids"] in ([0, 1, 2, 0, 1], [0, 1, 0, 1, 2])
        assert padded["input_ids"][:2] in (a[5:], c)
        assert padded["labels"] == [-100, padded["input_ids"][1], -100, -100, -100]
        assert padded["position_ids"] == [0, 1, 0, 1, 2]
        assert padded["attention_mask"] == [1, 1, 0, 0, 0]


def test_stock_attention_keeps_isolated_documents_apart(tiny_model):
    """In a stock model a packed row gives each document the logits it has alone, told by the positions only."""
    corpus = corpus_of([9, 5, 6, 17, 3])
    model = tiny_model("llama")
    for row in pack(corpus, context=16, packing="isolate"):
        ids, positions, mask = row["input_ids"], row["position_ids"], row["attention_mask"].bool()
        with torch.no_grad():
            together = model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        begins = (positions == 0).nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], 16], strict=True):
            if not mask[begin]:
                continue
            with torch.no_grad():
                alone = model(input_ids=ids[None, begin:end]).logits[0]
            torch.testing.assert_close(together[begin:end], alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- order and long documents


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, context=CONTEXT, seed=SEED, packing=st.sampled_from(["concatenate", "isolate"]))
def test_long_documents_stand_first(lengths, context, seed, packing):
    if max(lengths) < context:
        return
    corpus = corpus_of(lengths)
    rows = pack(corpus, context=context, packing=packing, prefer_long=True, seed=seed)
    kinds = []  # of each row: only long documents, some, none
    for row in plain(rows):
        tokens = row["input_ids"]
        if packing == "isolate":
            tokens = [token for token, real in zip(tokens, row["attention_mask"], strict=True) if real]
        is_long = {lengths[document_of(corpus, token)] >= context for token in tokens}
        kinds.append("only" if is_long == {True} else "none" if is_long == {False} else "some")
    only = sum(length for length in lengths if length >= context) // context
    at_least = sum(length // context for length in lengths)
    if packing == "isolate":
        assert kinds == ["only"] * kinds.count("only") + ["none"] * kinds.count("none")
        assert kinds.count("only") >= at_least
    else:
        assert kinds[:only] == ["only"] * only
        assert kinds[only:].count("some") <= 1
        assert "only" not in kinds[only:]


@settings(max_examples=100, deadline=None)
@given(
    lengths=LENGTHS,
    context=CONTEXT,
    seed=SEED,
    packing=st.sampled_from(["concatenate", "isolate"]),
    long_share=st.sampled_from([0.25, 0.5, 0.6, 0.9]),
    by_source=st.booleans(),
)
def test_a_mix_keeps_its_shares_at_every_row(lengths, context, seed, packing, long_share, by_source):
    corpus = corpus_of(lengths)
    kinds = ["a" if number % 3 else "ab" for number in range(len(lengths))]  # one source's name begins the other's
    corpus = replace(corpus, names=[f"{kind}/{number}" for number, kind in enumerate(kinds)])
    first, second = ("a", "ab") if by_source else ("long", "short")
    if not by_source:
        kinds = ["long" if length >= context else "short" for length in lengths]
    chosen = {kind: [n for n, each in enumerate(kinds) if each == kind] for kind in (first, second)}
    alone = {
        kind: or_none(corpus, context=context, packing=packing, seed=seed, documents=np.array(of_kind, dtype=np.int64))
        for kind, of_kind in chosen.items()
    }
    shares = {first: long_share, second: 1 - long_share}
    mixed = or_none(corpus, context=context, packing=packing, seed=seed, mix=shares)
    if None in alone.values():
        assert mixed is None
        return
    seen: list[str] = []
    for row in plain(mixed):
        tokens = [t for t, real in zip(row["input_ids"], row.get("attention_mask", [1] * context), strict=True) if real]
        (kind,) = {kinds[document_of(corpus, token)] for token in tokens}
        seen.append(kind)
        assert abs(seen.count(first) - long_share * len(seen)) <= 1
    counts = {kind: len(rows) for kind, rows in alone.items()}
    assert all(seen.count(kind) <= counts[kind] for kind in counts)
    # as many rows as the shares allow: the one that runs out is used up but for what half a row's rounding leaves
    assert any(seen.count(kind) >= counts[kind] - 1 for kind in counts)
    every = [
        token for row in plain(mixed) for token, label in zip(row["input_ids"], row["labels"], strict=True) if token
    ]
    assert len(every) == len(set(every))
    assert mixed.dropped_tokens == sum(lengths) - int(mixed.lengths.sum()) or packing == "concatenate"


@pytest.mark.parametrize("packing", ["concatenate", "isolate"])
def test_rows_are_shuffled_by_the_seed_alone(packing):
    corpus = corpus_of(list(range(1, 60)))
    first, again, other = (
        [row["input_ids"].tolist() for row in pack(corpus, context=12, packing=packing, seed=seed)]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    starts = [row[0] for row in first]
    assert starts != sorted(starts)


def test_consecutive_rows_come_from_different_documents():
    """One long document beside many short ones does not stand in neighbouring rows."""
    corpus = corpus_of([400] + [10] * 40)
    rows = pack(corpus, context=10, seed=3)
    long_rows = [int(row["input_ids"].max()) < 400 for row in rows]
    longest = max(len(run) for run in "".join("1" if is_long else " " for is_long in long_rows).split())
    assert sum(long_rows) >= 38
    assert longest < 20


# --------------------------------------------------------------------------------------------- describe, mistakes


def test_describe():
    rows = pack(corpus_of([10, 3, 1, 0, 8]), context=8, packing="isolate")
    assert describe(rows) == {
        "documents": 5,
        "long_documents": 2,
        "tokens": 22,
        "rows": 3,  # 8 | 8 | 3 and the 2 of the first document
        "dropped_tokens": 1,
        "padding_share": pytest.approx(3 / 24),
    }
    rows = pack(corpus_of([10, 3, 1, 0, 8]), context=8)
    assert describe(rows)["dropped_tokens"] == 22 % 8
    assert describe(rows)["padding_share"] == 0


@pytest.mark.parametrize(
    ("lengths", "options", "words"),
    [
        ([3, 4], {"context": 8}, ["7 tokens in 2 documents", "8 tokens", "--context"]),
        ([0], {"context": 8}, ["0 tokens"]),
        ([1, 1], {"context": 8, "packing": "isolate"}, ["2 tokens in 2 documents"]),
        ([3, 9], {"context": 10, "prefer_long": True}, ["--prefer-long", "10 tokens", "has 9"]),
        ([9, 8], {"context": 8, "mix": {"long": 0.5, "short": 0.5}}, ["50%", "'short'", "8 tokens", "--data"]),
        ([9], {"context": 1}, ["--context is 1"]),
        ([9], {"context": 4, "packing": "isolated"}, ["--packing", "Did you mean 'isolate'?"]),
    ],
)
def test_mistakes(lengths, options, words):
    with pytest.raises(UserError) as caught:
        pack(corpus_of(lengths), **options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        (("long=0.6", "other=0.4"), ["long, other", "books, web"]),
        (("long",), ["'long'", "NAME=SHARE"]),
        (("long=0", "short=1"), ["'long=0'", "above 0"]),
        (("long=nan", "short=1"), ["'long=nan'"]),
        (("long=1", "long=2"), ["once"]),
        (("books=1",), ["books, web"]),
    ],
)
def test_mistakes_in_a_mix(mix, words):
    with pytest.raises(UserError) as caught:
        CorpusSettings(data=("books", "web"), mix=mix)
    assert [word for word in words if word not in str(caught.value)] == []
    with pytest.raises(UserError, match="--prefer-long"):
        CorpusSettings(data=("books",), mix=("long=1", "short=1"), prefer_long=True)


def test_rows_are_a_dataset():
    rows = pack(corpus_of([30, 20]), context=8, packing="isolate")
    assert rows[-1]["input_ids"].tolist() == rows[len(rows) - 1]["input_ids"].tolist()
    with pytest.raises(IndexError):
        rows[len(rows)]
    batch = next(iter(torch.utils.data.DataLoader(rows, batch_size=3)))
    assert {name: (values.shape, values.dtype) for name, values in batch.items()} == {
        name: (torch.Size([3, 8]), torch.int64) for name in ("input_ids", "labels", "position_ids", "attention_mask")
    }
    again = pickle.loads(pickle.dumps(rows))
    assert all(torch.equal(again[1][name], values) for name, values in rows[1].items())


def test_a_million_pieces_in_seconds():
    lengths = np.random.default_rng(0).integers(2, 2_000, 1_000_000)
    offsets = np.append(0, np.cumsum(lengths))
    tokens = np.broadcast_to(np.uint16(0), (int(offsets[-1]),))
    corpus = TokenizedCorpus(tokens, offsets, [], 0)
    began = time.process_time()
    rows = pack(corpus, context=4_096, packing="isolate")
    assert time.process_time() - began < 10  # measured: 1.5
    assert describe(rows)["padding_share"] < 0.01


def test_skipped_positions_rise_stay_below_the_context_and_meet_every_distance():
    seen = set()
    for seed in range(3000):
        positions = skipped_positions(8, 32, str(seed))
        assert positions[0] == 0
        assert positions[-1] < 32
        steps = np.diff(positions)
        assert (steps >= 1).all()
        assert (steps > 1).sum() <= 1
        seen |= {int(b - a) for a in positions for b in positions if b > a}
    assert seen == set(range(1, 32))


def test_rows_with_skipping_positions_keep_their_tokens():
    corpus = corpus_of([30, 50, 20])
    rows = pack(corpus, context=8, seed=0)
    before = [row["input_ids"].tolist() for row in rows]
    rows.skip_positions(64, seed=3)
    assert [row["input_ids"].tolist() for row in rows] == before
    positions = [row["position_ids"].tolist() for row in rows]
    assert positions == [row["position_ids"].tolist() for row in rows]
    assert len({tuple(row) for row in positions}) > 1
    assert max(max(row) for row in positions) > 8
