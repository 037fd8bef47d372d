"""`longlora bench attention`: S2-Attn beside full causal attention and beside the bound, on the same input.

One process, the three in turn round by round, so that a busy machine slows all of them alike; medians of each round's
ratio. The bound is dense causal attention of the groups and nothing else: what S2-Attn would cost if cutting heads into
groups and joining them again were free. No speed is given for a result that is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from longlora.attention.layout import Documents, plan, query_key_pairs
from longlora.attention.shifted import shifted_attention
from longlora.bench.correctness import MOST_POSITIONS, Attention, find_wrong
from longlora.bench.machine import choose_device, free_bytes, hardware, now, peak_bytes
from longlora.bench.table import table
from longlora.errors import UserError
from longlora.progress import Progress
from longlora.settings import AttentionSettings, BenchAttentionSettings

PEAK = 3
"""Forward + backward hold at most this many times the bytes of q, k, v and output (measured: 1.0 for full attention,
1.5 for `shift`, 2.4 for `dilated` with a quarter of the KV heads), on fused kernels."""


@dataclass(frozen=True)
class Variant:
    """One way to compute attention, on inputs laid out as models hand them over.

    Attributes:
        inputs: query (B, N, H, D), key and value (B, N, Hkv, D), leaves; attention sees them with N and H exchanged.
        gradient: (B, H, N, D) of the output, likewise a view of (B, N, H, D).
        layers: attention of each kind of layer; times are their mean. Only `shift-layers` has more than one.
    """

    inputs: tuple[Tensor, ...]
    gradient: Tensor
    layers: Sequence[Attention]

    def forward(self, attention: Attention) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in self.inputs)
        return attention(query, key, value)

    def backward(self, output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.inputs, self.gradient)

    def run(self) -> None:
        for attention in self.layers:
            self.backward(self.forward(attention))

    def seconds(self) -> tuple[float, float]:
        """Wall-clock seconds of the forward and of the backward pass."""
        forward = backward = 0.0
        for attention in self.layers:
            began = now(self.gradient.device)
            output = self.forward(attention)
            middle = now(self.gradient.device)
            gradients = self.backward(output)
            forward, backward = forward + middle - began, backward + now(self.gradient.device) - middle
            del output, gradients  # freed here, outside what is timed
        return forward / len(self.layers), backward / len(self.layers)


def bench_attention(settings: BenchAttentionSettings) -> dict[str, Any]:
    """Run `longlora bench attention`.

    Returns:
        `{"hardware", "torch", "dtype", "rows", "heads", "key_heads", "head_dim", "repeats", "results": [{"length",
        "group_size", "pattern", "full", "s2", "bound", "ratio", "ratio_to_bound", "bound_ratio", "input_bytes",
        "output_bytes", "correct"}]}`. `full`, `s2` and `bound` are `{"forward_seconds", "backward_seconds", "seconds",
        "memory_bytes"}`: medians over the rounds, and the peak of what forward + backward allocate besides q, k, v and
        the output's gradient. The bound of `scatter` is full attention's time for as many query-key pairs, and has no
        memory of its own (None). `ratio` is s2 / full, `ratio_to_bound` s2 / bound, `bound_ratio` bound / full: medians
        over the rounds of forward + backward.

    Raises:
        UserError: heads that do not fit each other, a device this machine lacks, a length that does not fit in memory,
            or a wrong result, for which no speed is given.
    """
    device = choose_device(settings.device)
    key_heads = settings.heads if settings.key_heads is None else settings.key_heads
    if key_heads < 1 or settings.heads % key_heads:
        raise UserError(
            f"--heads is {settings.heads} and --key-heads is {key_heads}: the first must be a multiple of the second."
        )
    groups = AttentionSettings(group_size=settings.group)
    lengths = {length: groups.tokens_per_group(length) for length in settings.length}
    for length, group_size in lengths.items():
        _refuse_too_large(settings, key_heads, length, group_size, device)
    document = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "dtype": settings.dtype,
        "rows": settings.rows,
        "heads": settings.heads,
        "key_heads": key_heads,
        "head_dim": settings.head_dim,
        "repeats": settings.repeats,
        "results": [_measure(settings, key_heads, *case, device) for case in lengths.items()],
    }
    if not settings.json:
        print(table(document))
    return document


def attention_costs(
    *,
    heads: int,
    key_heads: int,
    head_dim: int,
    lengths: Sequence[int],
    group_sizes: Sequence[int],
    dtype: str,
    repeats: int,
) -> dict[str, Any]:
    """Time and peak memory of S2-Attn and of full attention for a model's shape, for a run's `evaluation/costs.json`.

    Args:
        lengths: N in tokens; group_sizes: G in tokens, one for each length.
        dtype: float32, bfloat16 or float16.
        repeats: timed rounds, whose medians are returned.

    Returns:
        `{"hardware", "dtype", "what", "rows": [{"length", "group_size", "full": {"seconds", "memory_bytes"}, "s2":
        {"seconds", "memory_bytes"}, "ratio"}]}`, of forward + backward; `ratio` is of the seconds, s2 / full.

    Raises:
        UserError: as `bench_attention`.
    """
    rows = []
    for length, group_size in zip(lengths, group_sizes, strict=True):
        settings = BenchAttentionSettings(
            length=(length,),
            group=group_size,
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            dtype=dtype,
            repeats=repeats,
            json=True,
        )
        document = bench_attention(settings)
        (result,) = document["results"]
        costs = {name: {key: result[name][key] for key in ("seconds", "memory_bytes")} for name in ("full", "s2")}
        rows.append({"length": length, "group_size": group_size, **costs, "ratio": result["ratio"]})
    return {
        "hardware": hardware(choose_device("auto")),
        "dtype": dtype,
        "what": f"causal attention alone, forward + backward, {heads} query and {key_heads} KV heads of {head_dim}, "
        f"medians of {repeats} rounds in turn",
        "rows": rows,
    }


def _measure(
    settings: BenchAttentionSettings, key_heads: int, length: int, group_size: int, device: torch.device
) -> dict[str, Any]:
    """The entry of `results` for one length."""
    variants = _variants(settings, key_heads, length, group_size, device)
    share = None
    if settings.pattern == "scatter":
        # blocks that read other blocks have no dense twin: their bound is full attention's time for as many pairs
        row: Documents = (((0, length),),)
        pairs, whole = (
            query_key_pairs(plan(row, length, settings.heads, key_heads, group_size, pattern))
            for pattern in (settings.pattern, "full")
        )
        share = pairs / whole
        del variants["bound"]
    memory: dict[str, int] = {}
    rounds: list[dict[str, tuple[float, float]]] = []
    with Progress(f"attention at {length:,} tokens", "rounds", settings.repeats + 2) as progress:
        try:
            _refuse_wrong(variants["s2"], settings, length, group_size)
            progress.show(1, "output and gradients are right")
            for name, variant in variants.items():
                memory[name] = peak_bytes(variant.run, device)
            progress.show(2, "warm and memory measured")
            for number in range(settings.repeats):
                times = {name: variant.seconds() for name, variant in variants.items()}
                if share is not None:
                    times["bound"] = (share * times["full"][0], share * times["full"][1])
                rounds.append(times)
                progress.show(number + 3, f"round {number + 1} of {settings.repeats}")
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"--length {length:,} does not fit in the memory of {device}: shorten it, or take fewer --heads or "
                "--rows."
            ) from error

    def ratio(one: str, other: str) -> float:
        return median(sum(times[one]) / sum(times[other]) for times in rounds)

    costs = {
        name: {
            "forward_seconds": median(times[name][0] for times in rounds),
            "backward_seconds": median(times[name][1] for times in rounds),
            "seconds": median(sum(times[name]) for times in rounds),
            "memory_bytes": memory.get(name),
        }
        for name in rounds[0]
    }
    return {
        "length": length,
        "group_size": group_size,
        "pattern": settings.pattern,
        **costs,
        "ratio": ratio("s2", "full"),
        "ratio_to_bound": ratio("s2", "bound"),
        "bound_ratio": ratio("bound", "full"),
        "input_bytes": sum(x.nbytes for x in variants["s2"].inputs),
        "output_bytes": variants["s2"].gradient.nbytes,
        "correct": True,
    }


def _refuse_wrong(variant: Variant, settings: BenchAttentionSettings, length: int, group_size: int) -> None:
    for layer, attention in enumerate(variant.layers):
        wrong = find_wrong(attention, variant.inputs, variant.gradient, settings.pattern, group_size, layer)
        if wrong:
            raise UserError(
                f"--pattern {settings.pattern} is computed wrongly at {length:,} tokens in groups of {group_size:,} "
                f"and {settings.dtype}: {wrong}. No speed is given for a wrong result; please report it."
            )


def _variants(
    settings: BenchAttentionSettings, key_heads: int, length: int, group_size: int, device: torch.device
) -> dict[str, Variant]:
    """`full`, `s2` and `bound` on the same numbers, in the order in which a round runs them."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value, gradient = (
        torch.randn(
            settings.rows,
            length,
            count,
            settings.head_dim,
            dtype=getattr(torch, settings.dtype),
            device=device,
            generator=generator,
        )
        for count in (settings.heads, key_heads, key_heads, settings.heads)
    )
    block = min(group_size, length)

    def grouped(x: Tensor) -> Tensor:
        """(B, N, H, D) -> (B * ceil(N / G), G, H, D), without a copy where G divides N."""
        x = pad(x, (0, 0, 0, 0, 0, -length % block)) if length % block else x
        return x.unflatten(1, (-1, block)).flatten(0, 1)

    def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach().requires_grad_() for x in tensors)

    dense = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=settings.heads != key_heads)
    inputs = leaves(query, key, value)
    pattern = [
        lambda q, k, v, layer=layer: shifted_attention(q, k, v, group_size, pattern=settings.pattern, layer=layer)
        for layer in ((0, 1) if settings.pattern == "shift-layers" else (0,))
    ]
    groups = leaves(*(grouped(x) for x in (query, key, value)))
    return {
        "full": Variant(inputs, gradient.transpose(1, 2), [dense]),
        "s2": Variant(inputs, gradient.transpose(1, 2), pattern),
        "bound": Variant(groups, grouped(gradient).transpose(1, 2), [dense]),
    }


def _refuse_too_large(
    settings: BenchAttentionSettings, key_heads: int, length: int, group_size: int, device: torch.device
) -> None:
    """Raises UserError, before anything is allocated, for a length that will not fit."""
    needed, free = _bytes_needed(settings, key_heads, length, group_size), free_bytes(device)
    if free is not None and needed > free:
        raise UserError(
            f"--length {length:,} with {settings.rows} × {settings.heads} heads of {settings.head_dim} in "
            f"{settings.dtype} needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}: "
            "shorten it, or take fewer --heads or --rows."
        )


def _bytes_needed(settings: BenchAttentionSettings, key_heads: int, length: int, group_size: int) -> int:
    itemsize = getattr(torch, settings.dtype).itemsize
    tensors = settings.rows * length * 2 * (settings.heads + key_heads) * settings.head_dim * itemsize
    missing = -length % min(group_size, length)
    padded = tensors * (length + missing) // length if missing else 0
    # The check holds some twenty (N, D) and six (positions, N) float64 tensors, and its own gradient of the output.
    check = length * (20 * settings.head_dim + 6 * MOST_POSITIONS) * 8 + tensors // 2
    return tensors + padded + PEAK * tensors + check
