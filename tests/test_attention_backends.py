"""The backends of block attention against dense float64 oracles, forward and gradients; who may act, and who not.

The CUDA kernels themselves run only where there is a GPU. What hands them their inputs (sequences, gathered tokens,
several rows, padding, grouped heads, reads) is proved everywhere, with a dense reference in the place of the kernel's
own function and under its own signature.
"""

import functools
import inspect
import sys
import types
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from attention_oracle import attention_reference, key_weights, masked_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import cases, random_qkv
from test_scatter import reading_cases, whole
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention import varlen as torch_varlen

from longlora.attention import backends, varlen_kernels
from longlora.attention.backends import VARLEN, attend, check_backend, choose_backend, why_not
from longlora.attention.flex import TILE, layout_mask
from longlora.attention.kernels import Scoring
from longlora.attention.layout import plan
from longlora.attention.shifted import shifted_attention
from longlora.attention.transformers_backend import use_shifted_attention
from longlora.attention.varlen_layout import varlen_layout
from longlora.errors import UserError
from longlora.settings import ATTENTION_BACKENDS, AttentionSettings, PatternOptions
from longlora.training.callbacks import AttentionSchedule

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU: this kernel is not run"
)


def dense_varlen(q, k, v, query_starts, key_starts, longest_query, longest_key, scale):
    """What every varlen kernel promises, written out: causal from the bottom right in each sequence."""
    for starts, x in ((query_starts, q), (key_starts, k), (key_starts, v)):
        assert starts.dtype == torch.int32
        assert starts[0] == 0
        assert starts[-1] == len(x)
        assert x.stride(-1) == 1
    outputs = []
    for i in range(len(query_starts) - 1):
        here, there = slice(*query_starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
        queries, keys, values = q[here], *(x[there].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        assert len(queries) <= longest_query
        assert len(keys) <= longest_key
        seen = torch.ones(len(queries), len(keys), dtype=torch.bool).tril(len(keys) - len(queries))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def like_torch(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert window_size == (-1, 0), "causal"
    assert enable_gqa or query.shape[1] == key.shape[1]
    return dense_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def like_flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert causal
    assert not dropout_p
    return dense_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale), "lse"


@contextmanager
def kernels_replaced():
    """`varlen` and `flash` on the CPU in float64, the dense reference in the place of their library's function."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("varlen", "flash"):
            allowed = replace(VARLEN[name], missing=lambda: None, refuses=lambda query, value: None)
            patch.setitem(VARLEN, name, allowed)
        patch.setattr(torch_varlen, "varlen_attn", like_torch)
        patch.setattr(varlen_kernels, "flash_attn_function", lambda device: like_flash_attn)
        yield


@pytest.fixture
def references():
    with kernels_replaced():
        yield


def forward_and_gradients(function, inputs):
    output = function(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = weights.to(output.dtype).to(output.device)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def assert_equal_to(expected, actual):
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------- what the kernels are given is right


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from(["varlen", "flash"]))
def test_every_pattern_through_variable_lengths_equals_the_oracle(case, backend):
    inputs = random_qkv(case["shape"], case["seed"], case["token_major"])
    chosen = {"pattern": case["pattern"], "layer": case["layer"]}
    arguments = (case["group"], case["segment_ids"])
    expected = forward_and_gradients(lambda *x: attention_reference(*x, *arguments, **chosen), inputs)
    with kernels_replaced():
        actual = forward_and_gradients(lambda *x: shifted_attention(*x, *arguments, backend=backend, **chosen), inputs)
    assert_equal_to(expected, actual)


@settings(max_examples=60, deadline=None)
@given(reading_cases().filter(lambda case: not case["options"].scatter_weighted), st.sampled_from(["varlen", "flash"]))
def test_blocks_that_read_others_are_served_by_unequal_lengths(case, backend):
    inputs = random_qkv(case["shape"], case["seed"], case["token_major"], case["value_width"])
    rows, heads, _, length, _ = case["shape"]
    weights = key_weights(whole(case)[1], rows, heads, length)
    chosen = {name: case[name] for name in ("pattern", "layer", "options", "draw")}
    expected = forward_and_gradients(lambda *x: masked_attention(*x, weights), inputs)
    arguments = (case["group"], case["segment_ids"])
    with kernels_replaced():
        actual = forward_and_gradients(lambda *x: shifted_attention(*x, *arguments, backend=backend, **chosen), inputs)
    assert_equal_to(expected, actual)


def test_a_scale_of_ones_own_reaches_the_kernel(references):
    inputs = random_qkv((2, 4, 2, 21, 8), 0)
    expected = attention_reference(*inputs, 6, scale=0.9)
    for backend in ("varlen", "flash"):
        actual = shifted_attention(*inputs, 6, backend=backend, scale=0.9)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_the_references_have_the_signatures_of_the_libraries():
    real = inspect.signature(torch_varlen.varlen_attn).parameters
    mine = inspect.signature(like_torch).parameters
    assert [name for name, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == [
        name for name, p in real.items() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert set(mine) - {"enable_gqa"} <= set(real)  # which torch 2.11 has not


def test_sequences_of_both_head_sets_of_a_row_of_two_documents():
    plans = plan((((0, 10), (12, 5)), ((0, 17),)), 17, 2, 2, 4, "shift")
    plain, shifted = (varlen_layout(head_set, 17, CPU) for head_set in plans)
    assert plain.query_starts.tolist() == [0, 4, 8, 10, 14, 15, 19, 23, 27, 31, 32]
    assert shifted.query_starts.tolist() == [0, 2, 6, 10, 12, 15, 17, 21, 25, 29, 32]
    for layout in (plain, shifted):
        assert layout.query_order.tolist() == [*range(10), *range(12, 34)]  # all but the two tokens of padding
        assert layout.key_starts.tolist() == layout.query_starts.tolist()
        assert (layout.longest_query, layout.longest_key, layout.keys_repeat) == (4, 4, False)


def test_both_head_sets_are_views_of_what_the_model_hands_over(references, monkeypatch):
    given = []

    @functools.wraps(like_torch)
    def record(q, k, v, *arguments, **keywords):
        given.append((q, k, v))
        return like_torch(q, k, v, *arguments, **keywords)

    monkeypatch.setattr(torch_varlen, "varlen_attn", record)
    inputs = random_qkv((3, 8, 4, 24, 8), 0, token_major=True)
    shifted_attention(*inputs, 8, backend="varlen")
    assert [tuple(x.shape for x in one) for one in given] == [((72, 4, 8), (72, 2, 8), (72, 2, 8))] * 2
    for one in given:
        for mine, whole_tensor in zip(one, inputs, strict=True):
            assert mine.untyped_storage().data_ptr() == whole_tensor.untyped_storage().data_ptr()


# --------------------------------------------------------------------------------------------------- FlexAttention

LAYOUTS = {
    "shift": (((0, 300),), 70, "shift", PatternOptions()),
    "two documents": (((3, 200), (210, 77)), 128, "shift", PatternOptions()),
    "dilated": (((0, 300),), 40, "dilated", PatternOptions()),
    "scatter": (((0, 290),), 64, "scatter", PatternOptions()),
    "sinks": (((0, 129), (129, 171)), 50, "shifted", PatternOptions(sink_tokens=5)),
    "full": (((0, 300),), 300, "full", PatternOptions()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_tiles_are_what_the_whole_mask_says(name):
    row, group, pattern, options = LAYOUTS[name]
    for head_set in plan((row, row), 300, 4, 4, group, pattern, 0, options):
        layout = varlen_layout(head_set, 300, CPU)
        mask = layout_mask(layout)
        queries, keys = int(layout.query_starts[-1]), int(layout.key_starts[-1])
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        seen = torch.zeros(queries, keys, dtype=torch.bool)
        for s in range(layout.sequences):  # bottom right, sequence by sequence
            a, b = layout.query_starts[s : s + 2].tolist()
            c, d = layout.key_starts[s : s + 2].tolist()
            seen[a:b, c:d] = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a)
        assert torch.equal(mask.mask_mod(None, None, i, j), seen)
        some, every = tiles_of(seen, False).any(-1), tiles_of(seen, True).all(-1)
        touched, full = torch.zeros_like(some), torch.zeros_like(some)
        kinds = ((touched, mask.kv_num_blocks, mask.kv_indices), (full, mask.full_kv_num_blocks, mask.full_kv_indices))
        for found, counts, indices in kinds:
            for tile, count in enumerate(counts[0, 0].tolist()):
                found[tile, indices[0, 0, tile, :count].long()] = True
        assert torch.equal(touched | full, some), "a tile is computed exactly where there is something to see"
        assert not (touched & full).any()
        assert not (full & ~every).any(), "a tile called full is not"


def tiles_of(seen, beyond):
    """(Q, K) bool -> (query tiles, key tiles, TILE²); queries beyond the last count as `beyond`, keys as unseen."""
    seen = torch.nn.functional.pad(seen, (0, -seen.shape[1] % TILE))
    seen = torch.nn.functional.pad(seen, (0, 0, 0, -seen.shape[0] % TILE), value=beyond)
    return seen.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).transpose(1, 2).flatten(2)


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention's own dense implementation, whose backward it keeps from the CPU for want of a fused one."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    allowed = replace(VARLEN["flex"], missing=lambda: None, refuses=lambda query, value: None)
    monkeypatch.setitem(VARLEN, "flex", allowed)


@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_equals_the_oracle_forward_and_backward(flex_on_cpu, name):
    row, group, pattern, options = LAYOUTS[name]
    plans = plan((row, row), 300, 4, 2, group, pattern, 0, options)
    inputs = random_qkv((2, 4, 2, 300, 16), 0, token_major=True)
    weights = key_weights(plans, 2, 4, 300)
    expected = forward_and_gradients(lambda *x: masked_attention(*x, weights), inputs)
    actual = forward_and_gradients(lambda *x: attend(*x, plans, Scoring(), "flex"), inputs)
    assert_equal_to(expected, actual)


# -------------------------------------------------------------------- error at most twice that of plain PyTorch

CASES = [
    ("sdpa", torch.float32),
    ("sdpa", torch.bfloat16),
    ("eager", torch.float32),
    ("eager", torch.bfloat16),
    *(
        pytest.param(backend, dtype, marks=needs_cuda)
        for backend in ("sdpa", "varlen", "flex", "flash")
        for dtype in (torch.bfloat16, torch.float16)
    ),
]


@pytest.mark.parametrize("pattern", ["shift", "dilated", "scatter"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_the_error_is_at_most_twice_that_of_plain_pytorch(request, backend, dtype, pattern):
    device = "cuda" if any(mark.name == "skipif" for mark in request.node.iter_markers()) else "cpu"
    if device == "cuda" and backend in VARLEN and (reason := VARLEN[backend].missing()):
        pytest.skip(reason)
    inputs = [x.detach().to(device, dtype) for x in random_qkv((2, 4, 2, 320, 32), 3, token_major=True)]
    plans = plan((((0, 320),), ((0, 200), (200, 110))), 320, 4, 2, 64, pattern)
    weights = key_weights(plans, 2, 4, 320).to(device)

    def run(function, precision):
        return forward_and_gradients(function, [x.to(precision).requires_grad_() for x in inputs])

    exact = run(lambda *x: masked_attention(*x, weights), torch.float64)
    plain = [run(lambda *x: masked_attention(*x, weights), dtype)]
    if dtype is torch.float32:
        # PyTorch's fused kernel on CPU has a fast exponential: given the whole mask, its queries' gradients are off by
        # up to 3.6 times what attention written out is off by.
        plain.append(run(lambda *x: fused_with_the_whole_mask(*x, weights > 0), dtype))
    ours = run(lambda *x: attend(*x, plans, Scoring(), backend), dtype)
    for number, true in enumerate(exact):
        error, *others = ((found[number].double() - true).abs().max() for found in (ours, *plain))
        assert error <= 2 * max(others)


def fused_with_the_whole_mask(q, k, v, seen):
    blank = ~seen.any(-1, keepdim=True)
    output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen | blank, enable_gqa=True)
    return torch.where(blank, 0, output)


# ------------------------------------------------------------------------------------------- who may act, and who not


def tensors(dtype=torch.bfloat16, width=16, value_width=None, device="cpu"):
    return [torch.empty(1, 2, 8, size, dtype=dtype, device=device) for size in (width, value_width or width)]


def test_auto_takes_sdpa_and_eager_where_sdpa_cannot():
    assert choose_backend("auto", *tensors(), (), Scoring()) == "sdpa"
    assert choose_backend("auto", *tensors(), (), Scoring(dropout=0.1)) == "eager"
    assert choose_backend("auto", *tensors(), (), Scoring(softcap=30.0)) == "eager"
    assert choose_backend("auto", *tensors(), (), Scoring(sinks=torch.zeros(2))) == "sdpa"


@pytest.mark.parametrize("backend", ["varlen", "flex", "flash"])
def test_a_backend_that_cannot_act_here_is_an_error_that_says_why(monkeypatch, tiny_model, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(varlen_kernels, "_installed", lambda module: not module.startswith("flash"))
    reason = "no flash-attn is installed" if backend == "flash" else "it needs a CUDA GPU, and PyTorch finds none here"
    sentence = f"attention backend '{backend}' cannot act here: {reason}.*Give 'auto'"
    with pytest.raises(UserError, match=sentence):
        check_backend(backend)
    with pytest.raises(UserError, match=sentence):
        shifted_attention(*random_qkv((1, 2, 2, 8, 8), 0), 4, backend=backend)
    with pytest.raises(UserError, match=sentence):
        use_shifted_attention(tiny_model("llama"), 8, backend=backend)
    with pytest.raises(UserError, match="unknown attention backend 'flsh'.*Did you mean 'flash'"):
        check_backend("flsh")
    with pytest.raises(UserError, match="unknown --attention-backend 'flsh'.*Did you mean 'flash'"):
        AttentionSettings(attention_backend="flsh")


class OnGpu:
    """Looks like a tensor on a GPU to those who only ask."""

    def __init__(self, dtype=torch.bfloat16, width=64):
        self.dtype, self.shape, self.device = dtype, (1, 2, 8, width), types.SimpleNamespace(type="cuda")


@pytest.mark.parametrize(
    ("query", "value", "capability", "reason"),
    [
        (OnGpu(), OnGpu(), (8, 0), None),
        (OnGpu(), OnGpu(), (7, 5), "it needs compute capability 8.0, and Some GPU has less"),
        (OnGpu(torch.float32), OnGpu(), (9, 0), "it computes in bfloat16 or float16, and these are float32"),
        (OnGpu(), OnGpu(width=128), (9, 0), "it needs values as wide as keys, and these are 128 and 64 wide"),
        (OnGpu(width=320), OnGpu(width=320), (9, 0), "a multiple of 8 up to 256, and these are 320 wide"),
        (OnGpu(width=60), OnGpu(width=60), (9, 0), "a multiple of 8 up to 256, and these are 60 wide"),
    ],
)
def test_tensors_that_flash_kernels_do_not_take(monkeypatch, query, value, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    found = varlen_kernels.why_not_these(query, value)
    assert found == reason if reason is None else reason in found


def test_tensors_on_the_cpu_are_refused_by_what_needs_a_gpu():
    assert varlen_kernels.why_not_these(*tensors()) == "it needs tensors on a CUDA GPU, and these are on cpu"
    assert backends.VARLEN["flex"].refuses(*tensors()).startswith("FlexAttention has a backward on CUDA only")


@pytest.mark.parametrize("backend", ["sdpa", "varlen", "flash"])
@pytest.mark.parametrize(
    ("scoring", "options", "reason"),
    [
        (Scoring(softcap=20.0), PatternOptions(), "the model caps its attention scores"),
        (Scoring(sinks=torch.zeros(4)), PatternOptions(), "the model has attention sinks"),
        (Scoring(dropout=0.1), PatternOptions(), "it has no attention dropout, and the model asks for 0.1"),
        (Scoring(), PatternOptions(scatter_weighted=True), "it reads each key once"),
    ],
)
def test_what_a_kernel_cannot_compute_is_refused(references, backend, scoring, options, reason):
    plans = plan((((0, 64),),), 64, 4, 4, 8, "scatter", 0, options)
    found = why_not(backend, *tensors(), plans, scoring)
    if backend == "sdpa" and (scoring.sinks is not None or options.scatter_weighted):
        assert found is None
    else:
        assert reason in found
    assert why_not("eager", *tensors(), plans, scoring) is None


@pytest.mark.parametrize(
    ("installed", "capability", "chosen"),
    [
        ({"flash_attn"}, (8, 0), "flash_attn"),
        ({"flash_attn", "flash_attn_interface", "flash_attn.cute"}, (8, 6), "flash_attn"),
        ({"flash_attn", "flash_attn_interface", "flash_attn.cute"}, (9, 0), "flash_attn_interface"),
        ({"flash_attn", "flash_attn_interface", "flash_attn.cute"}, (10, 0), "flash_attn.cute"),
        ({"flash_attn", "flash_attn_interface"}, (10, 0), "flash_attn"),
        ({"flash_attn_interface"}, (8, 0), None),
        (set(), (9, 0), None),
    ],
)
def test_which_flash_attn_is_taken(monkeypatch, installed, capability, chosen):
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        module = types.ModuleType(name)
        module.flash_attn_varlen_func = name
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(varlen_kernels, "_installed", lambda module: module in installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen_kernels.flash_attn_function.__wrapped__(CPU) == chosen


def test_version_4_alone_leaves_an_empty_folder_for_version_2(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # no varlen function in it
    monkeypatch.setattr(varlen_kernels, "_installed", lambda module: module == "flash_attn")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert varlen_kernels.flash_attn_function.__wrapped__(CPU) is None


# ------------------------------------------------------------------------------------------------------- in a model


def test_the_backend_of_the_settings_computes_the_model(references, tiny_model, monkeypatch):
    calls = []

    def record(*arguments, **keywords):
        calls.append(arguments)
        return like_flash_attn(*arguments, **keywords)

    monkeypatch.setattr(varlen_kernels, "flash_attn_function", lambda device: record)
    model = tiny_model("qwen3").double().train()
    ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    losses = {}
    for backend in ("auto", "sdpa", "eager", "varlen"):
        chosen = AttentionSettings(group_size=8, attention_backend=backend)
        schedule = AttentionSchedule(chosen, 64, seed=0)
        state = types.SimpleNamespace(global_step=0, max_steps=10)
        schedule.on_step_begin(None, state, None, model=model)
        losses[backend] = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.item()
    assert losses["auto"] == losses["sdpa"]
    assert losses["eager"] == pytest.approx(losses["sdpa"], abs=1e-12)
    assert losses["varlen"] == pytest.approx(losses["sdpa"], abs=1e-12)
    assert not calls
    use_shifted_attention(model, 8, backend="flash")
    assert model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.item() == pytest.approx(
        losses["sdpa"], abs=1e-12
    )
    assert len(calls) == 2 * model.config.num_hidden_layers  # two sets of heads


def test_every_backend_is_described_where_they_are_chosen():
    for name in ATTENTION_BACKENDS[1:]:
        assert f"| `{name}` |" in backends.__doc__
