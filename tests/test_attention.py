"""S2-Attn and every other pattern against the dense float64 oracle; causality; documents kept apart."""

import pytest
import torch
from attention_oracle import attention_reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longlora.attention import block_attention
from longlora.attention.kernels import FlashKernel
from longlora.attention.layout import plan
from longlora.attention.shifted import shifted_attention
from longlora.errors import UserError
from longlora.settings import PATTERNS as ALL_PATTERNS

PATTERNS = [pattern for pattern in ALL_PATTERNS if pattern != "scatter"]
"""Those that the oracle knows; `scatter` has a file of its own, since its oracle must be told the draw."""

CAUSAL_PATTERNS = [pattern for pattern in PATTERNS if pattern != "cyclic"]


@st.composite
def cases(draw):
    key_heads = draw(st.integers(1, 5))
    heads = key_heads * draw(st.integers(1, 4))
    rows, width = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8]))
    length = draw(st.integers(1, 40))
    same_rows = draw(st.booleans())
    row_layouts = []
    for row in range(rows):
        if row and same_rows:
            row_layouts.append(row_layouts[0])
            continue
        ids, document = [], draw(st.integers(0, 3))
        while len(ids) < length:
            size = draw(st.integers(1, length - len(ids)))
            padding = draw(st.integers(0, 4)) == 0
            ids += [-1 if padding else document] * size
            document += 1
        row_layouts.append(ids)
    segment_ids = None if draw(st.booleans()) else torch.tensor(row_layouts)
    assume(segment_ids is None or bool((segment_ids >= 0).any()))  # a batch of nothing has no gradient to compare
    return {
        "shape": (rows, heads, key_heads, length, width),
        "group": draw(st.integers(2, 24)),
        "segment_ids": segment_ids,
        "pattern": draw(st.sampled_from(PATTERNS)),
        "layer": draw(st.integers(0, 3)),
        "backend": draw(st.sampled_from(["sdpa", "sdpa", "eager"])),
        "token_major": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def random_qkv(shape, seed, token_major=False, value_width=None):
    """Leaf tensors in (B, H, N, D), stored as models store them (B, N, H, D) when `token_major`."""
    rows, heads, key_heads, length, width = shape
    generator = torch.Generator().manual_seed(seed)
    out = []
    for count, size in ((heads, width), (key_heads, width), (key_heads, value_width or width)):
        x = torch.randn(rows, length, count, size, generator=generator, dtype=torch.float64)
        x = x.transpose(1, 2) if token_major else x.transpose(1, 2).contiguous()
        out.append(x.requires_grad_())
    return out


@settings(max_examples=300, deadline=None)
@given(cases())
def test_equals_the_oracle_forward_and_backward(case):
    q, k, v = random_qkv(case["shape"], case["seed"], case["token_major"])
    options = {"pattern": case["pattern"], "layer": case["layer"]}
    expected = attention_reference(q, k, v, case["group"], case["segment_ids"], **options)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    actual = shifted_attention(q, k, v, case["group"], case["segment_ids"], backend=case["backend"], **options)
    gradients = torch.autograd.grad((actual * weights).sum(), (q, k, v))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pattern", CAUSAL_PATTERNS)
@pytest.mark.parametrize("length", [13, 24, 31])
def test_no_output_depends_on_a_later_token(pattern, length):
    q, k, v = random_qkv((1, 8, 4, length, 4), seed=0)
    for token in range(length):
        out = shifted_attention(q, k, v, 6, pattern=pattern)[:, :, token].sum()
        for gradient in torch.autograd.grad(out, (q, k, v)):
            assert gradient[:, :, token + 1 :].abs().max() == 0 if token + 1 < length else True


def test_cyclic_leaks_as_the_original_does_and_says_so(caplog):
    q, k, v = random_qkv((1, 2, 2, 16, 4), seed=0)
    with caplog.at_level("WARNING", logger="longlora"):
        shifted_attention(q, k, v, 8)
        assert not caplog.records
        shifted_attention(q, k, v, 8, pattern="cyclic")
    assert "lets the first tokens of a row see the last ones" in caplog.text
    gradient = torch.autograd.grad(shifted_attention(q, k, v, 8, pattern="cyclic")[:, 1, 0].sum(), v)[0]
    assert gradient[0, 1, 12:].abs().min() > 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(2, 12), st.integers(1, 9), st.sampled_from(PATTERNS), st.integers(0, 999))
def test_a_document_alone_padded_and_packed_is_the_same(length, group, padding, pattern, seed):
    heads = (1, 8, 4, length, 4)
    alone = random_qkv(heads, seed)
    other = random_qkv((1, 8, 4, padding, 4), seed + 1)
    ids, blank = torch.zeros(1, length, dtype=torch.long), torch.full((1, padding), -1)
    expected = shifted_attention(*alone, group, pattern=pattern)
    left = [torch.cat([o, a], 2) for a, o in zip(alone, other, strict=True)]
    right = [torch.cat([a, o], 2) for a, o in zip(alone, other, strict=True)]
    for joined, segment_ids, at in (
        (left, torch.cat([blank, ids], 1), padding),
        (right, torch.cat([ids, blank], 1), 0),
        (left, torch.cat([ids[:, :1].expand(1, padding), ids + 1], 1), padding),
    ):
        actual = shifted_attention(*joined, group, segment_ids, pattern=pattern)
        torch.testing.assert_close(actual[:, :, at : at + length], expected, rtol=0, atol=1e-12)


def test_padding_gets_zeros_and_no_gradient():
    q, k, v = random_qkv((1, 2, 2, 9, 4), seed=3)
    segment_ids = torch.tensor([[-1, -1, 0, 0, 0, 0, 0, -1, -1]])
    out = shifted_attention(q, k, v, 2, segment_ids)
    assert out[:, :, [0, 1, 7, 8]].abs().max() == 0
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient[:, :, [0, 1, 7, 8]].abs().max() == 0


def test_a_batch_of_nothing_but_padding_is_zero():
    q, k, v = random_qkv((2, 2, 1, 5, 4), seed=3)
    assert shifted_attention(q, k, v, 2, torch.full((2, 5), -1)).abs().max() == 0


def test_values_may_be_wider_than_keys():
    q, k, v = random_qkv((2, 4, 2, 11, 3), seed=4, value_width=5)
    torch.testing.assert_close(shifted_attention(q, k, v, 4), attention_reference(q, k, v, 4), rtol=0, atol=1e-10)


def test_one_group_is_full_attention_to_the_bit():
    q, k, v = (x.float() for x in random_qkv((2, 4, 4, 32, 8), seed=5))
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(shifted_attention(q, k, v, 32), full)


def largest_allocation(function) -> int:
    """Bytes of the largest single allocation that `function` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # profile.events() leaves out what operators allocate inside
    return max(event.nbytes() for event in events if event.name() == "[memory]")


def test_nothing_of_size_n_by_n_is_allocated_and_keys_are_not_repeated():
    length, heads, key_heads, width = 4096, 8, 1, 8
    q, k, v = (x.float().detach().requires_grad_() for x in random_qkv((1, heads, key_heads, length, width), 0, True))
    output_bytes = heads * length * width * 4
    assert largest_allocation(lambda: shifted_attention(q, k, v, 512).sum().backward()) <= output_bytes
    assert largest_allocation(lambda: q @ k.mT) >= heads * length * length * 4  # the measure sees what it must not


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"group_size": 1}, "group_size is 1: it must be a whole number of at least 2"),
        ({"pattern": "shfit"}, "Did you mean 'shift'?"),
        ({"backend": "flashy"}, "unknown attention backend 'flashy'"),
        ({"segment_ids": torch.zeros(1, 3, dtype=torch.long)}, "segment_ids is (1, 3): it must be (B, N) = (1, 8)"),
        ({"segment_ids": torch.tensor([[0, 0, 1, 1, 0, 0, 0, 0]])}, "an id stands in two places"),
        ({"key": torch.zeros(1, 3, 8, 4), "value": torch.zeros(1, 3, 8, 4)}, "4 query heads and 3 key/value heads"),
        ({"key": torch.zeros(1, 4, 7, 4)}, "B, N and D must agree"),
        ({"query": torch.zeros(4, 8, 4)}, "four dimensions"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(change, sentence):
    arguments = {name: torch.zeros(1, 4, 8, 4) for name in ("query", "key", "value")} | {"group_size": 4} | change
    with pytest.raises(UserError) as caught:
        shifted_attention(**arguments)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("pattern", ["shift", "full"])
def test_heads_that_share_keys_leave_no_thread_of_a_cpu_idle(pattern, monkeypatch):
    """PyTorch's backward pass on a CPU gives each thread a KV head of a block."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    plans = plan((((0, 4096),),), 4096, 8, 2, 512, pattern)
    calls = list(block_attention._calls(plans, FlashKernel(1.0), torch.device("cpu"), 0, None))
    units = [call.part.count * (call.key_heads.stop - call.key_heads.start) for call in calls]
    assert units.count(1) <= 1  # seven blocks in twos
    assert (len(calls) == 1) == (pattern == "full")  # whose one result needs no place to be copied to
