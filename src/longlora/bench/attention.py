"""`longlora bench attention`: S2-Attn beside full causal attention and beside the bound, on the same input.

Each attention backend that can act here is measured, against its own full attention and the fastest of all. One
process, everything in turn round by round, so that a busy machine slows all of it alike; medians of each round's ratio.
The bound is dense causal attention of the groups and nothing else: what S2-Attn would cost if cutting heads into
groups and joining them again were free. No speed is given for a result that is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from longlora.attention.backends import check_backend, choose_backend, why_not
from longlora.attention.kernels import Scoring
from longlora.attention.layout import Documents, plan, query_key_pairs
from longlora.bench.correctness import MOST_POSITIONS, Attention, attentions, refuse_wrong
from longlora.bench.machine import choose_device, free_bytes, hardware, now, peak_bytes
from longlora.bench.tables import attention_table
from longlora.errors import UserError
from longlora.progress import Progress
from longlora.settings import ATTENTION_BACKENDS, AttentionSettings, BenchAttentionSettings

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

    def refuse_wrong(self, pattern: str, group_size: int, backend: str = "") -> None:
        """Raises UserError unless this is the pattern's attention."""
        refuse_wrong(self.layers, self.inputs, self.gradient, pattern, group_size, backend)

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
        `{"hardware", "torch", "dtype", "rows", "heads", "key_heads", "head_dim", "repeats", "not_measured": {backend:
        reason}, "results": [{"length", "group_size", "pattern", "backend", "full", "s2", "bound", "ratio",
        "ratio_to_bound", "bound_ratio", "fastest_full", "ratio_to_fastest_full", "others": [{"backend", "full", "s2",
        "ratio", "ratio_to_bound", "ratio_to_fastest_full"}], "input_bytes", "output_bytes", "correct"}]}`. `backend` is
        the one that `auto` takes, and `full` PyTorch's SDPA; `others` are the other backends, each with the pattern and
        with full attention. `full`, `s2` and `bound` are `{"forward_seconds", "backward_seconds", "seconds",
        "memory_bytes"}`: medians over the rounds, and the peak of what forward + backward allocate besides q, k, v and
        the output's gradient. The bound of `scatter` is full attention's time for as many query-key pairs, and has no
        memory of its own (None). `ratio` is s2 / full, `ratio_to_bound` s2 / bound, `bound_ratio` bound / full: medians
        over the rounds of forward + backward. `fastest_full` is the backend with the least time for full attention.

    Raises:
        UserError: heads that do not fit each other, a device this machine lacks, a length that does not fit in memory,
            a backend that cannot act here, or a wrong result, for which no speed is given.
    """
    device = choose_device(settings.device)
    key_heads = settings.heads if settings.key_heads is None else settings.key_heads
    if key_heads < 1 or settings.heads % key_heads:
        raise UserError(
            f"--heads is {settings.heads} and --key-heads is {key_heads}: the first must be a multiple of the second."
        )
    groups = AttentionSettings(group_size=settings.group)
    lengths = {length: groups.tokens_per_group(length) for length in settings.length}
    not_measured = _not_measured(settings, key_heads, device)
    backends = settings.backends or tuple(name for name in ATTENTION_BACKENDS[1:] if name not in not_measured)
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
        "not_measured": not_measured,
        "results": [_measure(settings, key_heads, *case, device, backends) for case in lengths.items()],
    }
    if not settings.json:
        print(attention_table(document))
    return document


def _not_measured(settings: BenchAttentionSettings, key_heads: int, device: torch.device) -> dict[str, str]:
    """Backends that are not measured though none was named, and why.

    Raises:
        UserError: one of them was asked for.
    """
    like = torch.empty(1, settings.heads, 1, settings.head_dim, dtype=getattr(torch, settings.dtype), device=device)
    if settings.backends:
        for name in settings.backends:
            check_backend(name)
            choose_backend(name, like, like, (), Scoring())
        return {}
    reasons = {name: why_not(name, like, like, (), Scoring()) for name in ATTENTION_BACKENDS[1:]}
    reasons["eager"] = "it holds every score; ask for it with --backends"
    return {name: reason for name, reason in reasons.items() if reason}


def _measure(
    settings: BenchAttentionSettings,
    key_heads: int,
    length: int,
    group_size: int,
    device: torch.device,
    backends: Sequence[str],
) -> dict[str, Any]:
    """The entry of `results` for one length, with every one of `backends`."""
    variants = _variants(settings, key_heads, length, group_size, device)
    query, _, value = (x.transpose(1, 2) for x in variants["s2"].inputs)
    automatic = choose_backend("auto", query, value, (), Scoring())
    others = [name for name in backends if name != automatic]
    for name in others:
        variants |= {
            f"{way} {name}": replace(variants["s2"], layers=attentions(pattern, group_size, name))
            for way, pattern in (("full", "full"), ("s2", settings.pattern))
        }
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
            for name in ("", *others):
                variants[f"s2 {name}".rstrip()].refuse_wrong(settings.pattern, group_size, name)
            for name in others:
                variants[f"full {name}"].refuse_wrong("full", group_size, name)
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

    costs: dict[str, dict[str, Any]] = {
        name: {
            "forward_seconds": median(times[name][0] for times in rounds),
            "backward_seconds": median(times[name][1] for times in rounds),
            "seconds": median(sum(times[name]) for times in rounds),
            "memory_bytes": memory.get(name),
        }
        for name in rounds[0]
    }
    fastest = min((name for name in costs if name.split()[0] == "full"), key=lambda name: costs[name]["seconds"])

    def ratios(s2: str, full: str) -> dict[str, float]:
        return {
            "ratio": ratio(s2, full),
            "ratio_to_bound": ratio(s2, "bound"),
            "ratio_to_fastest_full": ratio(s2, fastest),
        }

    return {
        "length": length,
        "group_size": group_size,
        "pattern": settings.pattern,
        "backend": automatic,
        "full": costs["full"],
        "s2": costs["s2"],
        "bound": costs["bound"],
        **ratios("s2", "full"),
        "bound_ratio": ratio("bound", "full"),
        "fastest_full": fastest.partition(" ")[2] or "sdpa",
        "others": [
            {
                "backend": name,
                "full": costs[f"full {name}"],
                "s2": costs[f"s2 {name}"],
                **ratios(f"s2 {name}", f"full {name}"),
            }
            for name in others
        ],
        "input_bytes": sum(x.nbytes for x in variants["s2"].inputs),
        "output_bytes": variants["s2"].gradient.nbytes,
        "correct": True,
    }


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
    groups = leaves(*(grouped(x) for x in (query, key, value)))
    return {
        "full": Variant(inputs, gradient.transpose(1, 2), [dense]),
        "s2": Variant(inputs, gradient.transpose(1, 2), attentions(settings.pattern, group_size)),
        "bound": Variant(groups, grouped(gradient).transpose(1, 2), [dense]),
    }


def _refuse_too_large(
    settings: BenchAttentionSettings, key_heads: int, length: int, group_size: int, device: torch.device
) -> None:
    """Raises UserError, before anything is allocated, for a length that will not fit."""
    needed, free = _bytes_needed(settings, key_heads, length, group_size), free_bytes(device)
    if needed > free:
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
    # Eager full attention: scores, weights, their dropped copy and their gradients in float32.
    scores = 20 * settings.rows * settings.heads * length**2 if "eager" in settings.backends else 0
    return tensors + padded + PEAK * tensors + check + scores
