"""Blocks that read more than themselves: `scatter`, sinks, varying offsets, against dense float64 attention."""

import pytest
import torch
from attention_oracle import key_weights, masked_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import cases, random_qkv

from longlora.attention.layout import documents_from_segments, plan, query_key_pairs
from longlora.attention.patterns import Cut, Draw, head_sets, partition
from longlora.attention.shifted import shifted_attention
from longlora.attention.transformers_backend import draw_from, use_shifted_attention
from longlora.errors import UserError
from longlora.settings import PatternOptions
from longlora.settings.model import CONTIGUOUS


@st.composite
def reading_cases(draw):
    case = draw(cases())
    pattern = draw(st.sampled_from(["scatter", "scatter", *CONTIGUOUS]))
    chosen = {"sink_tokens": draw(st.sampled_from([0, 0, 1, 3, 9])), "vary_offset": draw(st.booleans())}
    if pattern == "scatter" or draw(st.booleans()):
        chosen |= {
            "scatter_pieces": draw(st.integers(1, 4)),
            "scatter_piece_size": draw(st.sampled_from([None, 1, 3, 7])),
            "scatter_weighted": draw(st.booleans()),
        }
    if pattern == "scatter":
        chosen["scatter_heads"] = draw(st.sampled_from(["all", "half"]))
    draws = Draw(draw(st.integers(0, 999)), draw(st.integers(0, 9)))
    value_width = draw(st.sampled_from([None, None, 4]))
    return case | {"pattern": pattern, "options": PatternOptions(**chosen), "draw": draws, "value_width": value_width}


def whole(case):
    """What the case draws: (documents, plans)."""
    rows, heads, key_heads, length, _ = case["shape"]
    ids = case["segment_ids"]
    documents = (((0, length),),) * rows if ids is None else documents_from_segments(ids)
    arguments = (length, heads, key_heads, case["group"], case["pattern"], case["layer"], case["options"], case["draw"])
    return documents, plan(documents, *arguments)


@settings(max_examples=150, deadline=None)
@given(reading_cases())
def test_equals_dense_attention_given_the_draw_forward_and_backward(case):
    q, k, v = random_qkv(case["shape"], case["seed"], case["token_major"], case["value_width"])
    rows, heads, _, length, _ = case["shape"]
    _, plans = whole(case)
    weights = key_weights(plans, rows, heads, length)
    assert int((weights > 0).sum()) == query_key_pairs(plans)
    expected = masked_attention(q, k, v, weights)
    out = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * out).sum(), (q, k, v))
    names = ("pattern", "layer", "backend", "options", "draw")
    chosen = {name: case[name] for name in names}
    actual = shifted_attention(q, k, v, case["group"], case["segment_ids"], **chosen)
    gradients = torch.autograd.grad((actual * out).sum(), (q, k, v))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@settings(max_examples=120, deadline=None)
@given(reading_cases())
def test_no_key_is_later_or_of_another_document_and_every_query_sees_itself(case):
    rows, heads, _, length, _ = case["shape"]
    documents, plans = whole(case)
    seen = key_weights(plans, rows, heads, length) > 0
    same = torch.zeros(rows, length, length, dtype=torch.bool)
    for row, found in enumerate(documents):
        for start, size in found:
            same[row, start : start + size, start : start + size] = torch.ones(size, size, dtype=torch.bool).tril()
    assert not (seen & ~same[:, None]).any()
    own = torch.diagonal(same, dim1=-2, dim2=-1)
    assert torch.equal(torch.diagonal(seen, dim1=-2, dim2=-1), own[:, None].expand(rows, heads, length))


@settings(max_examples=60, deadline=None)
@given(reading_cases(), st.integers(1, 9))
def test_a_document_is_the_same_alone_and_behind_another(case, before):
    length = case["shape"][3]
    case = case | {"shape": (1, *case["shape"][1:]), "segment_ids": None}
    chosen = {name: case[name] for name in ("pattern", "layer", "options", "draw")}
    alone = random_qkv(case["shape"], case["seed"])
    other = random_qkv((1, *case["shape"][1:3], before, case["shape"][4]), case["seed"] + 1)
    ids = torch.tensor([[0] * before + [1] * length])
    joined = [torch.cat([o, a], 2) for a, o in zip(alone, other, strict=True)]
    expected = shifted_attention(*alone, case["group"], **chosen)
    actual = shifted_attention(*joined, case["group"], ids, **chosen)[:, :, before:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_scatter_reads_itself_and_one_earlier_half_group():
    cut = Cut("scatter", pieces=1, seed="anything")
    found = partition(cut, 1000, 100)
    assert [len(block) for block in found.blocks] == [50] * 20
    assert [read.query_start for read in found.reads] == list(range(50, 1000, 50))
    for read in found.reads:
        ((start, stop),) = read.pieces
        assert stop - start == 50
        assert start % 50 == 0
        assert stop <= read.query_start
        assert read.weight == 1


def test_every_earlier_piece_is_drawn_equally_often():
    counts = torch.zeros(7)
    for step in range(1000):
        (head_set, *_) = head_sets("scatter", 4, 4, 3, draw=Draw(5, step))
        last = partition(head_set.cut, 32, 8).reads[-1]
        counts[last.pieces[0][0] // 4] += 1
    # 1,000 draws among 7: a count is 143 with a standard deviation of 11.1
    assert (counts - 1000 / 7).abs().max() < 4 * 11.1


def test_draws_differ_by_step_turn_layer_and_heads_and_repeat_for_equal_ones():
    def reads(draw, layer=0, which=0):
        return partition(head_sets("scatter", 8, 8, layer, draw=draw)[which].cut, 4096, 256).reads

    first = reads(Draw(1, 2, 3))
    assert first == reads(Draw(1, 2, 3))
    others = [reads(Draw(2, 2, 3)), reads(Draw(1, 3, 3)), reads(Draw(1, 2, 4)), reads(Draw(1, 2, 3), layer=1)]
    others.append(reads(Draw(1, 2, 3), which=1))
    assert all(other != first for other in others)


def test_weighted_pieces_estimate_the_whole_without_bias():
    """Over all draws, the mean of the weighted sums of exp(score) is the sum over everything earlier."""
    total = torch.zeros(24)
    for step in range(3000):
        cut = head_sets("scatter", 4, 4, options=PatternOptions(scatter_pieces=2, scatter_weighted=True,
                        scatter_piece_size=3), draw=Draw(0, step))[0].cut  # fmt: skip
        for read in partition(cut, 24, 8).reads:
            if read.query_start == 20:
                for start, stop in read.pieces:
                    total[start:stop] += read.weight
    # a key's weight is 7/2 with probability 2/7: mean 1, standard deviation 1.58, over 3,000 draws 0.029
    assert (total[:20] / 3000 - 1).abs().max() < 4 * 0.029
    assert not total[20:].any()


def test_one_piece_of_everything_is_full_attention():
    q, k, v = random_qkv((2, 4, 2, 37, 5), 0)
    everything = PatternOptions(scatter_pieces=99, scatter_weighted=True)
    actual = shifted_attention(q, k, v, 8, pattern="scatter", options=everything)
    torch.testing.assert_close(actual, shifted_attention(q, k, v, 8, pattern="full"), rtol=0, atol=1e-12)


def test_a_varying_offset_moves_both_halves_of_shift_together():
    starts = set()
    for step in range(200):
        plain, shifted = head_sets("shift", 2, 2, options=PatternOptions(vary_offset=True), draw=Draw(0, step))
        a, b = (partition(each.cut, 64, 16).blocks[0].stop % 16 for each in (plain, shifted))
        assert (a + 8) % 16 == b
        starts.add(a)
    assert starts == set(range(16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_parts_are_as_exact_as_one_pass_at_the_same_precision(dtype):
    """FlashAttention's measure: at most twice the error that plain PyTorch makes at this precision."""
    q, k, v = (x.detach().to(dtype) for x in random_qkv((2, 4, 2, 256, 32), 3))
    options = PatternOptions(scatter_pieces=3, scatter_piece_size=16, scatter_weighted=True)
    plans = plan((((0, 256),),) * 2, 256, 4, 2, 64, "scatter", 0, options)
    weights = key_weights(plans, 2, 4, 256)

    def forward_and_gradients(function, width):
        inputs = [x.to(width).requires_grad_() for x in (q, k, v)]
        out = function(*inputs)
        out.backward(torch.ones_like(out) * torch.linspace(-1, 1, out.shape[2])[:, None].to(width))
        return [out, *(x.grad for x in inputs)]

    exact = forward_and_gradients(lambda *x: masked_attention(*x, weights), torch.float64)
    plain = forward_and_gradients(lambda *x: masked_attention(*x, weights.to(dtype)), dtype)
    ours = forward_and_gradients(lambda *x: shifted_attention(*x, 64, pattern="scatter", options=options), dtype)
    for true, theirs, mine in zip(exact, plain, ours, strict=True):
        assert (mine.double() - true).abs().max() <= 2 * (theirs.double() - true).abs().max()


def test_an_option_that_a_pattern_cannot_have_is_refused():
    q, k, v = random_qkv((1, 2, 2, 40, 4), 0)
    with pytest.raises(UserError, match="--scatter-heads is for the patterns scatter: the pattern is 'shift'"):
        shifted_attention(q, k, v, 8, options=PatternOptions(scatter_heads="half"))
    with pytest.raises(UserError, match="--scatter-weighted says what scattered pieces are like, and there are none"):
        shifted_attention(q, k, v, 8, options=PatternOptions(scatter_weighted=True))
    with pytest.raises(UserError, match="--sink-tokens is for the patterns shift, shift-layers, plain.*'dilated'"):
        shifted_attention(q, k, v, 8, pattern="dilated", options=PatternOptions(sink_tokens=2))


class TestInAModel:
    def losses(self, model, count, **chosen):
        use_shifted_attention(model, 8, "scatter", **chosen)
        model.train()
        ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
        return [model(ids, labels=ids, use_cache=False).loss.item() for _ in range(count)]

    def test_each_pass_draws_anew_and_a_step_repeats(self, tiny_model):
        model = tiny_model("llama")
        first = self.losses(model, 3, draw=Draw(3))
        assert len(set(first)) == 3
        assert self.losses(model, 3, draw=Draw(3)) == first
        draw_from(model, Draw(3))
        ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
        assert [model(ids, labels=ids, use_cache=False).loss.item() for _ in range(3)] == first

    def test_full_layers_keep_full_attention(self, tiny_model):
        model = tiny_model("llama")
        layers = model.config.num_hidden_layers
        scattered = self.losses(model, 1)
        assert self.losses(model, 1, full_layers=(0, -1)) != scattered
        every = self.losses(model, 1, full_layers=range(layers))[0]
        use_shifted_attention(model, 8, "full")
        ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
        assert every == pytest.approx(model(ids, labels=ids, use_cache=False).loss.item(), abs=1e-7)
        with pytest.raises(UserError, match=rf"full-attention layer {layers} is not there"):
            use_shifted_attention(model, 8, full_layers=(layers,))

    def test_layers_drawn_for_full_attention_differ_from_pass_to_pass_and_share_their_number(self, tiny_model):
        model = tiny_model("llama")
        use_shifted_attention(model, 8, "shift", full_layers_share=0.1, draw=Draw(2))
        model.train()
        ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))

        def loss(**chosen):
            use_shifted_attention(model, 8, "shift", **chosen)
            return model(ids, labels=ids, use_cache=False).loss.item()

        layers = range(model.config.num_hidden_layers)
        fixed = {loss(full_layers=(layer,)) for layer in layers}
        use_shifted_attention(model, 8, "shift", full_layers_share=0.1, draw=Draw(2))
        drawn = {model(ids, labels=ids, use_cache=False).loss.item() for _ in range(20)}
        assert drawn == fixed
        assert loss(full_layers_share=1.0) == pytest.approx(loss(full_layers=layers), abs=1e-7)

    def test_drawing_without_shifted_attention_says_what_to_call(self, tiny_model):
        with pytest.raises(UserError, match="use_shifted_attention"):
            draw_from(tiny_model("llama"), Draw())
