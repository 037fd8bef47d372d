"""The benchmark itself: wrong results get no speed, rounds alternate, medians and bytes are what they say."""

import json
from itertools import pairwise

import pytest
import torch
from attention_oracle import attention_reference, key_weights, masked_attention

from longlora import cli
from longlora.attention.layout import plan
from longlora.attention.shifted import shifted_attention
from longlora.bench import attention as bench
from longlora.bench import correctness, machine
from longlora.bench.attention import bench_attention
from longlora.bench.correctness import TOLERANCE, find_wrong
from longlora.bench.machine import peak_bytes
from longlora.errors import UserError
from longlora.settings import PATTERNS, BenchAttentionSettings

CPU = torch.device("cpu")


def settings(**changes) -> BenchAttentionSettings:
    small = {"length": (48,), "group": 12, "heads": 4, "head_dim": 8, "repeats": 1, "device": "cpu", "json": True}
    return BenchAttentionSettings(**(small | changes))


def tensors(shape, dtype=torch.float32):
    """Leaves (B, N, heads, D) and the output's gradient (B, H, N, D)."""
    rows, length, heads, key_heads, width = shape
    generator = torch.Generator().manual_seed(0)
    *inputs, gradient = (
        torch.randn(rows, length, count, width, generator=generator, dtype=torch.float64).to(dtype)
        for count in (heads, key_heads, key_heads, heads)
    )
    return [x.requires_grad_() for x in inputs], gradient.transpose(1, 2)


# ------------------------------------------------------------------------------------------- wrong results get no speed


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(
    "shape", [(2, 37, 5, 5, 3), (1, 40, 8, 4, 4), (1, 33, 6, 1, 4), (1, 29, 8, 2, 5), (1, 6, 2, 2, 4)]
)
def test_the_check_agrees_with_the_dense_oracle(pattern, shape):
    inputs, gradient = tensors(shape)
    for layer in (0, 1):

        def dense(q, k, v, layer=layer):
            if pattern != "scatter":
                return attention_reference(q, k, v, 7, pattern=pattern, layer=layer)
            rows, heads, length, _ = q.shape
            plans = plan((((0, length),),) * rows, length, heads, k.shape[1], 7, "scatter", layer)
            return masked_attention(q, k, v, key_weights(plans, rows, heads, length))

        assert find_wrong(dense, inputs, gradient, pattern, 7, layer) is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rounding_is_not_taken_for_an_error(pattern, dtype):
    inputs, gradient = tensors((1, 700, 8, 2, 32), dtype)
    assert (
        find_wrong(lambda q, k, v: shifted_attention(q, k, v, 128, pattern=pattern), inputs, gradient, pattern, 128)
        is None
    )


def dense_attention(q, k, v, mask):
    """Masked softmax written out, (H, N, N) or (N, N) mask."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v.float()).to(q.dtype)


def right_mask(heads, length, group):
    i = torch.arange(length)
    block = torch.stack([i // group, (i + group - group // 2) // group]).repeat_interleave(heads // 2, 0)
    return (block[:, :, None] == block[:, None, :]) & (i[:, None] >= i)


def one_later_token(mask):
    mask[:, 0, 1] = True


def one_key_of_a_neighbouring_block(mask):
    mask[0, 12, 11] = True


def one_key_too_few(mask):
    mask[-1, 47, 45] = False


def heads_exchanged(mask):
    mask[:] = mask.flip(0)


def nothing_cut(mask):
    mask[:] = torch.ones(mask.shape[1:], dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "change", [one_later_token, one_key_of_a_neighbouring_block, one_key_too_few, heads_exchanged, nothing_cut]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_pattern_that_sees_the_wrong_tokens_is_refused(monkeypatch, capsys, change, dtype):
    mask = right_mask(4, 48, 12)
    monkeypatch.setattr(correctness, "shifted_attention", lambda q, k, v, *_, **__: dense_attention(q, k, v, mask))
    assert bench_attention(settings(dtype=dtype))["results"][0]["correct"] is True
    change(mask)
    monkeypatch.setattr(bench.Variant, "seconds", lambda self: pytest.fail("a wrong result was timed"))
    with pytest.raises(UserError, match=r"is wrong at token .* No speed is given for a wrong result"):
        bench_attention(settings(dtype=dtype, json=False))
    assert capsys.readouterr().out == ""


class HalvedValueGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            lambda q, k, v, g: shifted_attention(q, k, HalvedValueGradient.apply(v), g),
            "the value's gradient of KV head 0",
        ),
        (lambda q, k, v, g: shifted_attention(q, k.detach() + 0 * k, v, g), "the key's gradient of KV head 0"),
        (lambda q, k, v, g: shifted_attention(2 * q, k, v, g), "the output of head 0"),
        (lambda q, k, v, g: shifted_attention(q, k, v, g) * float("nan"), "nan instead of"),
        (lambda q, k, v, g: shifted_attention(q, k.flip(1), v.flip(1), g), "the output of head 0"),
        (lambda q, k, v, g: shifted_attention(q, k, v, g).roll(1, 2), "the output of head 0"),
    ],
)
def test_wrong_numbers_are_refused(monkeypatch, wrong, sentence):
    monkeypatch.setattr(correctness, "shifted_attention", lambda q, k, v, group, **_: wrong(q, k, v, group))
    with pytest.raises(UserError, match=sentence):
        bench_attention(settings(key_heads=2, dtype="float32"))


def test_the_command_line_prints_no_speed_for_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(correctness, "shifted_attention", lambda q, k, v, *_, **__: shifted_attention(q, k, v, 11))
    with pytest.raises(SystemExit) as caught:
        cli.main("bench attention --length 48 --group 12 --heads 4 --head-dim 8 --device cpu --json".split())
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert "No speed is given" in said.err


# ------------------------------------------------------------------------------------------------- rounds and medians


def test_the_three_take_turns_round_by_round(monkeypatch):
    calls = []
    dense = torch.nn.functional.scaled_dot_product_attention

    def record_dense(q, k, v, **options):
        calls.append("full" if q.shape[2] == 48 else "bound")
        return dense(q, k, v, **options)

    def record_pattern(q, k, v, *arguments, **options):
        assert q.stride() == (48 * 4 * 8, 8, 4 * 8, 1), "a view of (B, N, H, D), as models hand it over"
        calls.append("s2")
        return shifted_attention(q, k, v, *arguments, **options)

    monkeypatch.setattr(bench, "scaled_dot_product_attention", record_dense)
    monkeypatch.setattr(correctness, "shifted_attention", record_pattern)
    bench_attention(settings(repeats=3))
    check, warm_up_and_rounds = calls[:1], calls[1:]
    assert check == ["s2"]
    assert warm_up_and_rounds == ["full", "s2", "bound"] * 4


def test_times_and_ratios_are_medians_over_the_rounds(monkeypatch):
    rounds = [  # forward and backward seconds of full, s2 and bound: a busy machine slowed the second round
        ((1.0, 2.0), (0.5, 1.0), (0.25, 0.5)),
        ((9.0, 21.0), (2.0, 4.0), (1.0, 2.0)),
        ((1.5, 2.5), (0.5, 0.5), (0.5, 1.5)),
    ]
    times = iter([[0.0, forward, forward + backward] for one in rounds for forward, backward in one])
    clock = iter([])

    def now(device):
        nonlocal clock
        if (reading := next(clock, None)) is None:
            clock = iter(next(times))
            reading = next(clock)
        return reading

    monkeypatch.setattr(bench, "now", now)
    (result,) = bench_attention(settings(repeats=3))["results"]
    assert [result["full"][part] for part in ("forward_seconds", "backward_seconds", "seconds")] == [1.5, 2.5, 4.0]
    assert [result["s2"][part] for part in ("forward_seconds", "backward_seconds", "seconds")] == [0.5, 1.0, 1.5]
    assert result["bound"]["seconds"] == 2.0
    assert result["ratio"] == 0.25  # of 0.5, 0.2, 0.25; the ratio of the medians is 0.375
    assert result["ratio_to_bound"] == 2.0  # of 2, 2, 0.5
    assert result["bound_ratio"] == 0.25  # of 0.25, 0.1, 0.5


def test_shift_layers_is_the_mean_of_its_two_kinds_of_layer(monkeypatch):
    layers = []

    def record(q, k, v, *arguments, layer, **options):
        layers.append(layer)
        return shifted_attention(q, k, v, *arguments, layer=layer, **options)

    monkeypatch.setattr(correctness, "shifted_attention", record)
    bench_attention(settings(pattern="shift-layers", repeats=2))
    assert layers == [0, 1] * 4  # the check, the warm-up, two rounds
    ticks = iter(range(100))
    monkeypatch.setattr(bench, "now", lambda device: float(next(ticks)) ** 2)
    variant = bench._variants(settings(pattern="shift-layers"), 4, 48, 12, CPU)["s2"]
    assert variant.seconds() == ((1 - 0 + 16 - 9) / 2, (4 - 1 + 25 - 16) / 2)


# ------------------------------------------------------------------------------------------------- several backends


def test_a_backend_asked_for_is_measured_beside_its_own_full_attention(capsys):
    given = settings(backends=("eager",), repeats=3, key_heads=2, dtype="float32", json=False)
    document = bench_attention(given)
    (result,) = document["results"]
    assert document["not_measured"] == {}
    assert result["backend"] == "sdpa"
    (eager,) = result["others"]
    assert eager["backend"] == "eager"
    assert set(eager) == {"backend", "full", "s2", "ratio", "ratio_to_bound", "ratio_to_fastest_full"}
    # eager holds the scores of every head: 4 × 48 × 48 of full attention, in float32
    assert eager["full"]["memory_bytes"] - result["full"]["memory_bytes"] > 4 * 48 * 48 * 4
    fastest = min(("sdpa", result["full"]["seconds"]), ("eager", eager["full"]["seconds"]), key=lambda pair: pair[1])
    assert result["fastest_full"] == fastest[0]
    whose = {"sdpa": result, "eager": eager}[fastest[0]]
    assert whose["ratio_to_fastest_full"] == whose["ratio"]
    rows = [line for line in capsys.readouterr().out.splitlines() if " ms" in line]
    assert [line.split("  ")[0] for line in rows] == [
        "full, sdpa",
        "shift, sdpa",
        "full, eager",
        "shift, eager",
        "bound",
    ]


def test_what_cannot_act_here_is_listed_and_what_was_asked_for_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    document = bench_attention(settings(json=False))
    assert set(document["not_measured"]) == {"varlen", "flex", "flash", "eager"}
    assert document["not_measured"]["varlen"] == "it needs a CUDA GPU, and PyTorch finds none here"
    assert document["results"][0]["others"] == []
    assert "not measured: varlen (it needs a CUDA GPU" in capsys.readouterr().out
    with pytest.raises(UserError, match="attention backend 'varlen' cannot act here: it needs a CUDA GPU"):
        bench_attention(settings(backends=("sdpa", "varlen")))
    with pytest.raises(UserError, match="unknown --backends 'flx'.*Did you mean 'flex'"):
        settings(backends=("flx",))


@pytest.mark.parametrize("pattern", ["shift", "full"])
def test_another_backend_that_is_wrong_gets_no_speed(monkeypatch, pattern):
    def wrong(q, k, v, group, *, backend, **chosen):
        output = shifted_attention(q, k, v, group, backend=backend, **chosen)
        return output * 2 if backend == "eager" and chosen["pattern"] == pattern else output

    monkeypatch.setattr(correctness, "shifted_attention", wrong)
    monkeypatch.setattr(bench.Variant, "seconds", lambda self: pytest.fail("a wrong result was timed"))
    with pytest.raises(UserError, match=f"--pattern {pattern} is computed wrongly by backend 'eager'"):
        bench_attention(settings(backends=("eager",), dtype="float32"))


# ------------------------------------------------------------------------------------------------------------ the bound


def test_the_bound_is_plain_groups_on_the_same_numbers_without_a_copy():
    variants = bench._variants(settings(dtype="float32"), 2, 48, 12, CPU)
    s2, bound = variants["s2"], variants["bound"]
    for whole, grouped in zip(s2.inputs, bound.inputs, strict=True):
        assert grouped.shape == (4, 12, *whole.shape[2:])
        assert grouped.data_ptr() == whole.data_ptr()
    query, key, value = (x.transpose(1, 2) for x in s2.inputs)
    plain = attention_reference(query, key, value, 12, pattern="plain")
    output = bound.forward(bound.layers[0])
    torch.testing.assert_close(output.transpose(1, 2).reshape(1, 48, 4, 8).transpose(1, 2), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("length", "group", "shape"), [(10, 4, (3, 4)), (10, 10, (1, 10)), (10, 99, (1, 10))])
def test_the_bound_has_as_many_groups_as_the_row_needs(length, group, shape):
    bound = bench._variants(settings(), 4, length, group, CPU)["bound"]
    assert bound.inputs[0].shape == (*shape, 4, 8)
    assert [gradient.shape for gradient in bound.backward(bound.forward(bound.layers[0]))] == [
        x.shape for x in bound.inputs
    ]


# --------------------------------------------------------------------------------------------------------------- memory


def known_allocations():
    first = torch.empty(1000)
    second = torch.empty(2000)
    del first
    third = torch.empty(500)
    del second, third


def test_peak_bytes_of_known_allocations():
    assert peak_bytes(known_allocations, CPU) == 12_000
    x = torch.ones(1000)
    assert peak_bytes(lambda: (x + x).mul(x).neg_(), CPU) == 8_000  # made inside operators
    assert peak_bytes(lambda: x.add_(x), CPU) == 0  # what was there before does not count
    assert peak_bytes(lambda: None, CPU) == 0


def test_memory_beside_the_bytes_of_the_tensors():
    (result,) = bench_attention(settings(length=(64,), group=16, key_heads=2, dtype="float32", rows=3))["results"]
    query, key = 3 * 64 * 4 * 8 * 4, 3 * 64 * 2 * 8 * 4
    assert result["input_bytes"] == query + 2 * key
    assert result["output_bytes"] == query
    for name in ("full", "s2", "bound"):  # the output and the three gradients exist at one time
        assert result[name]["memory_bytes"] >= result["input_bytes"] + result["output_bytes"]


@pytest.mark.parametrize(
    ("changes", "key_heads"),
    [({}, 4), ({"pattern": "dilated", "heads": 8}, 1), ({"group": 700, "dtype": "bfloat16"}, 4), ({"rows": 3}, 2)],
)
def test_the_estimate_covers_what_is_held_and_is_not_far_above(changes, key_heads):
    given = settings(**({"length": (4096,), "group": 512, "head_dim": 32, "dtype": "float32"} | changes))

    def everything():
        variants = bench._variants(given, key_heads, 4096, given.group, CPU)
        variants["s2"].refuse_wrong(given.pattern, given.group)
        for variant in variants.values():
            variant.run()

    held, needed = peak_bytes(everything, CPU), bench._bytes_needed(given, key_heads, 4096, given.group)
    assert held <= needed <= 4 * held, (held, needed)


def test_a_length_that_does_not_fit_is_refused_before_anything_is_allocated(monkeypatch):
    monkeypatch.setattr(bench, "free_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"--length 100,000 .* needs about 0\.\d GiB, and 0\.0 GiB are free on cpu"):
        bench_attention(settings(length=(48, 100_000)))


# ---------------------------------------------------------------------------------------- for people and for machines


def test_json_is_one_object_with_the_promised_keys(capsys):
    cli.main(
        "bench attention --length 40,48 --heads 4 --key-heads 2 --head-dim 8 --dtype float32 --repeats 1 "
        "--device cpu --json".split()
    )
    document = json.loads(capsys.readouterr().out)
    assert {name: document[name] for name in ("dtype", "rows", "heads", "key_heads", "head_dim", "repeats")} == {
        "dtype": "float32",
        "rows": 1,
        "heads": 4,
        "key_heads": 2,
        "head_dim": 8,
        "repeats": 1,
    }
    assert document["torch"] == torch.__version__
    assert document["hardware"].endswith(f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1))
    assert [(result["length"], result["group_size"]) for result in document["results"]] == [(40, 10), (48, 12)]
    for result in document["results"]:
        assert result["pattern"] == "shift"
        assert result["correct"] is True
        for name in ("full", "s2", "bound"):
            cost = result[name]
            assert set(cost) == {"forward_seconds", "backward_seconds", "seconds", "memory_bytes"}
            assert all(isinstance(cost[key], float) and cost[key] > 0 for key in cost if key != "memory_bytes")
            assert isinstance(cost["memory_bytes"], int)
            assert cost["seconds"] == pytest.approx(cost["forward_seconds"] + cost["backward_seconds"])
        assert result["ratio"] == pytest.approx(result["s2"]["seconds"] / result["full"]["seconds"])
        assert result["ratio_to_bound"] == pytest.approx(result["s2"]["seconds"] / result["bound"]["seconds"])
        assert result["bound_ratio"] == pytest.approx(result["bound"]["seconds"] / result["full"]["seconds"])


def test_the_table_is_aligned_and_says_what_was_measured(capsys):
    document = bench_attention(settings(length=(48, 1024), group=None, json=False, pattern="dilated"))
    table = capsys.readouterr().out.splitlines()
    assert document["hardware"] in table[0]
    assert "bfloat16" in table[0]
    heading = next(line for line in table if "peak memory" in line)
    body = [line for line in table if " ms" in line]
    assert [line.split("  ")[-1].strip() for line in body if line.startswith("full ")] == ["–", "–"]
    assert {len(line) for line in [heading, *body]} == {len(heading)}
    for row in ("full", "dilated", "bound"):
        assert sum(line.startswith(f"{row} ") for line in body) == 2
    for before, after in pairwise(line.index(" ms") for line in body):
        assert before == after
    assert f"{document['results'][1]['ratio']:.2f}" in body[4]


def test_a_group_as_long_as_the_row_is_full_attention():
    (result,) = bench_attention(settings(group=500, dtype="float32"))["results"]
    assert (result["group_size"], result["correct"]) == (500, True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_pattern_is_measured(pattern):
    (result,) = bench_attention(settings(pattern=pattern, length=(50,), rows=2, heads=8, key_heads=4))["results"]
    assert (result["pattern"], result["correct"]) == (pattern, True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"heads": 6, "key_heads": 4}, "--heads is 6 and --key-heads is 4: the first must be a multiple"),
        ({"key_heads": 0}, "--key-heads is 0"),
        ({"device": "tpu"}, "--device is 'tpu': it must be cpu, cuda, cuda:N, or auto"),
        ({"device": "meta"}, "--device is 'meta': it must be cpu"),
        ({"device": "cuda:9"}, "--device is 'cuda:9', and PyTorch finds 2 CUDA devices here"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_a_sentence(monkeypatch, changes, sentence):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError) as caught:
        bench_attention(settings(**changes))
    assert sentence in str(caught.value)


def test_hardware_names_the_cpu_where_the_system_tells(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\nmodel name\t: Some CPU\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert machine.hardware(CPU) == "Some CPU, 2 threads"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.hardware(CPU).endswith(", 2 threads")
    assert "Some CPU" not in machine.hardware(CPU)
    assert machine.free_bytes(CPU) > 2**20
