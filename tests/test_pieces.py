"""Pieces of rows, windows, sinks and soft caps: one primitive, against dense float64 attention."""

import itertools

import pytest
import torch
from attention_oracle import key_weights, masked_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import cases, random_qkv
from test_scatter import reading_cases

from longlora.attention.backends import attend
from longlora.attention.block_attention import Halo
from longlora.attention.kernels import FlashKernel, Scoring, WrittenKernel
from longlora.attention.layout import documents_from_segments, first_key, plan
from longlora.attention.patterns import FIRST_DRAW, PLAIN
from longlora.attention.shifted import piece_attention, shifted_attention
from longlora.errors import UserError


def documents_of(case):
    rows, length = case["shape"][0], case["shape"][3]
    ids = case["segment_ids"]
    return (((0, length),),) * rows if ids is None else documents_from_segments(ids)


def gradients_agree(expected, actual, leaves):
    out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    pairs = zip(*(torch.autograd.grad((x * out).sum(), leaves) for x in (expected, actual)), strict=True)
    for want, got in pairs:
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def in_pieces(case, cuts, q, k, v, asked=None):
    """The row put together from its pieces, each given its own tokens and a halo that others made."""
    chosen = {name: case[name] for name in ("pattern", "layer", "backend", "options", "draw") if name in case}
    outputs = []
    for start, stop in itertools.pairwise(cuts):

        def earlier(first, heads, start=start):
            if asked is not None:
                asked.append((start, first, heads))
            return k[:, heads, first:start] * 1.0, v[:, heads, first:start] * 1.0

        own = (x[:, :, start:stop] for x in (q, k, v))
        sizes = (case["group"], start, q.shape[2])
        outputs.append(piece_attention(*own, *sizes, earlier, case["segment_ids"], **chosen))
    return torch.cat(outputs, 2)


@settings(max_examples=300, deadline=None)
@given(st.one_of(cases().filter(lambda case: case["pattern"] != "cyclic"), reading_cases()), st.data())
def test_pieces_are_the_whole_row(case, data):
    rows, heads, key_heads, length, _ = case["shape"]
    q, k, v = random_qkv(case["shape"], case["seed"], case["token_major"], case.get("value_width"))
    inner = data.draw(st.lists(st.integers(1, length - 1), max_size=4, unique=True)) if length > 1 else []
    cuts = [0, *sorted(inner), length]
    plans = plan(
        documents_of(case),
        length,
        heads,
        key_heads,
        case["group"],
        case["pattern"],
        case["layer"],
        case.get("options", PLAIN),
        case.get("draw", FIRST_DRAW),
    )
    expected = masked_attention(q, k, v, key_weights(plans, rows, heads, length))
    gradients_agree(expected, in_pieces(case, cuts, q, k, v), (q, k, v))


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 12), st.data())
def test_windows_sinks_and_soft_caps_in_pieces(case, window, data):
    rows, heads, key_heads, length, _ = case["shape"]
    q, k, v = leaves = random_qkv(case["shape"], case["seed"], case["token_major"])
    sinks = torch.linspace(-1, 2, heads, dtype=torch.float64).requires_grad_() if data.draw(st.booleans()) else None
    softcap = data.draw(st.sampled_from([None, None, 0.8]))
    where = torch.full((rows, length), -1)
    for row, found in enumerate(documents_of(case)):
        for number, (start, size) in enumerate(found):
            where[row, start : start + size] = number
    i = torch.arange(length)
    seen = (where[:, :, None] == where[:, None]) & (where >= 0)[:, None] & (i <= i[:, None]) & (i[:, None] - i < window)
    weights = seen[:, None].expand(rows, heads, length, length).double()
    expected = masked_attention(q, k, v, weights, None, sinks, softcap)
    cut, outputs = data.draw(st.integers(0, length - 1)), []
    scoring = Scoring(None, 0.0, softcap, sinks)
    for start, stop in ((0, cut), (cut, length)):
        if start == stop:
            continue
        plans = plan(documents_of(case), length, heads, key_heads, 2, "full", window=window, piece=(start, stop))
        halo, needed = None, first_key(plans, start)
        if needed:
            first, a, b = needed
            assert first >= start - window + 1
            halo = Halo(first, a, k[:, a:b, first:start], v[:, a:b, first:start])
        own = (x[:, :, start:stop] for x in (q, k, v))
        outputs.append(
            attend(*own, plans, scoring, case["backend"] if softcap is None else "auto", start=start, halo=halo)
        )
    gradients_agree(expected, torch.cat(outputs, 2), leaves if sinks is None else [*leaves, sinks])


def test_a_halo_is_half_a_group_of_the_heads_that_shift_and_else_nothing():
    case = {"group": 8, "segment_ids": None, "pattern": "shift"}
    asked = []
    in_pieces(case, [0, 16, 32, 40], *random_qkv((1, 8, 4, 40, 4), 0), asked)
    assert asked == [(16, 12, slice(2, 4)), (32, 28, slice(2, 4))]
    for pattern, expected in (("plain", []), ("full", [(16, 0, slice(0, 4)), (32, 0, slice(0, 4))])):
        asked.clear()
        in_pieces(case | {"pattern": pattern}, [0, 16, 32, 40], *random_qkv((1, 8, 4, 40, 4), 0), asked)
        assert asked == expected


def test_a_piece_of_what_reads_the_end_of_the_row_is_refused():
    q, k, v = random_qkv((1, 2, 2, 24, 4), 0)
    with pytest.raises(UserError, match="a piece of a row cannot have it"):
        piece_attention(q[:, :, :12], k[:, :, :12], v[:, :, :12], 8, 0, 24, None, pattern="cyclic")
    whole_row = piece_attention(q, k, v, 8, 0, 24, None, pattern="cyclic")
    assert torch.equal(whole_row, shifted_attention(q, k, v, 8, pattern="cyclic"))


def test_dropout_drops_weights_and_its_gradient_knows_which():
    q, k, v = random_qkv((1, 2, 1, 10, 2), 0)
    plans = plan((((0, 10),),), 10, 2, 1, 4, "scatter")

    def dropped(*inputs):
        torch.manual_seed(3)
        return attend(*inputs, plans, Scoring(dropout=0.3), "auto")

    assert torch.autograd.gradcheck(dropped, (q, k, v))
    wide = [x.detach().expand(300, -1, -1, -1) for x in (q, k, v)]
    many = plan((((0, 10),),) * 300, 10, 2, 1, 4, "scatter")
    kept = attend(q, k, v, plans, Scoring())
    assert (attend(*wide, many, Scoring(dropout=0.3)).mean(0) - kept).abs().max() < 0.2
    assert (dropped(q, k, v) - kept).abs().max() > 0.3


@pytest.mark.parametrize("kernel", [FlashKernel(0.5), WrittenKernel(0.5), WrittenKernel(0.5, softcap=0.7)])
@pytest.mark.parametrize("causal", [True, False])
def test_a_kernel_says_the_logarithm_of_what_it_divides_by(kernel, causal, monkeypatch):
    monkeypatch.setattr("longlora.attention.kernels.LARGEST", 40)  # several tiles
    q, k, v = (x.detach() for x in random_qkv((2, 4, 2, 9, 4), 0))
    keys = k if causal else torch.cat([k, -k], 2)
    values = v if causal else torch.cat([v, v], 2)
    scores = q @ keys.repeat_interleave(2, 1).mT * 0.5
    if getattr(kernel, "softcap", None):
        scores = 0.7 * torch.tanh(scores / 0.7)
    if causal:
        scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    output, lse = kernel.forward(q, keys, values, causal, 0)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=0, atol=1e-12)
    torch.testing.assert_close(output, scores.softmax(-1) @ values.repeat_interleave(2, 1), rtol=0, atol=1e-12)
