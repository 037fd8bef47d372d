"""`longlora bench step`: whole training steps with S2-Attn, with full attention, and as anybody's script takes them.

One process, the three in turn round by round, each an optimiser step in a Trainer's own loop: forward, backward,
clipping, AdamW. Its learning rate is 0, so that every step begins from the same weights and can be compared. Before
anything is timed, our step with full attention must give the loss and the gradient norm of the plain Trainer's step,
and the pattern's attention must be right at the length that is timed. No speed is given for a result that is wrong.
"""

import tempfile
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version

from longlora.bench.correctness import attentions, refuse_wrong
from longlora.bench.machine import choose_device, free_bytes, hardware, peak_bytes
from longlora.bench.tables import step_table
from longlora.bench.trainers import Rows, Taken, Way, make_ways, random_rows
from longlora.errors import UserError
from longlora.model.positions import extend_positions, present_context
from longlora.planner.anatomy import Anatomy
from longlora.planner.layer_memory import Step
from longlora.planner.measure import with_layers
from longlora.planner.memory import peak, step_memory
from longlora.planner.reading import read_anatomy
from longlora.planner.shapes import find_config
from longlora.progress import Progress
from longlora.settings import BenchStepSettings, MemorySettings

CHECK_TOKENS = 1024
"""Tokens of the rows on which our step is compared with plain's, at most; their logits fit anywhere."""

APART = {"float32": {"loss": 1e-5, "gradient_norm": 1e-4}, "bfloat16": {"loss": 2e-3, "gradient_norm": 3e-2}}
"""By how much, as a share, the two steps may differ. Measured on SmolLM2's shape, 2 layers, 512 tokens: 1e-7 and 1e-7
in float32; 0 and 1.4e-3 in bfloat16, where stock PEFT keeps retrained norms and embeddings in bfloat16, we in float32.
"""


def bench_step(settings: BenchStepSettings) -> dict[str, Any]:
    """Run `longlora bench step`.

    Returns:
        `{"hardware", "torch", "transformers", "model", "parameters", "trainable", "layers", "of_layers", "dtype",
        "rows", "gradient_checkpointing", "loss_chunk", "memory", "pattern", "attention_backend", "repeats", "results":
        [{"context", "group_size", "ways", "s2_over_full", "s2_over_plain", "full_over_plain", "checked", "correct"}]}`.

        `ways` has `s2`, `full` and `plain`, as many as were asked for: `{"seconds", "rounds",
        "processor_seconds", "tokens_per_second", "memory_bytes", "standing_bytes", "predicted_bytes", "loss"}`: seconds
        are the median of `rounds`, those of the processor what the process's threads took, memory is what stands
        between steps (the weights that all ways share among it) and the most that a step adds, counted by PyTorch's
        allocator, predicted what `longlora plan` makes of it; or None where it ran out of memory. `s2_over_full` is how
        many times faster S2 is, `{"median", "least", "most"}` over the rounds, or None.
        `checked` says on how many tokens, and what the losses and gradient norms of full and plain were.

    Raises:
        UserError: a model or device that is not there, what does not fit in memory, or a wrong result.
    """
    device = one_device(settings.device)
    config, of_layers = read_config(settings)
    anatomy = read_anatomy(config, settings.trainable, settings.loading.trust_remote_code)
    for context in settings.context:
        _refuse_too_large(anatomy, settings, context, device)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(config, settings, device, folder)
        results = [_measure(ways, anatomy, config, settings, context, device) for context in settings.context]
    document = {
        "hardware": hardware(device),
        "torch": torch.__version__,
        "transformers": transformers_version,
        "model": settings.model,
        "parameters": anatomy.parameters,
        "trainable": anatomy.trainees.groups,
        "layers": len(anatomy.layers),
        "of_layers": of_layers,
        "dtype": settings.dtype,
        "rows": settings.rows,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "loss_chunk": settings.loss_chunk,
        "memory": asdict(settings.memory),
        "pattern": settings.attention.pattern,
        "attention_backend": settings.attention.attention_backend,
        "repeats": settings.repeats,
        "results": results,
    }
    if not settings.json:
        print(step_table(document))
    return document


def one_device(name: str) -> torch.device:
    """The device that `--device` names; the Trainers of one process take the first GPU.

    Raises:
        UserError: a device that is not there, or a GPU other than the first.
    """
    device = choose_device(name)
    if device.index:
        raise UserError(f"--device is '{name}': choose a GPU with CUDA_VISIBLE_DEVICES={device.index} and give cuda.")
    if torch.cuda.device_count() > 1 and device.type == "cuda":
        raise UserError(
            f"PyTorch finds {torch.cuda.device_count()} GPUs, and one is measured: set CUDA_VISIBLE_DEVICES to its "
            "number."
        )
    return device


def read_config(settings: BenchStepSettings) -> tuple[PreTrainedConfig, int]:
    """The config of the model that is measured, its window at least the longest context, and how many layers all are.

    Raises:
        UserError: MODEL is not there, or has fewer layers.
    """
    config = find_config(settings.model, settings.loading)
    of_layers = config.get_text_config().num_hidden_layers
    layers = of_layers if settings.layers is None else settings.layers
    if layers > of_layers:
        raise UserError(f"--layers is {layers}: {settings.model} has {of_layers}, give at most as many.")
    config = with_layers(config, layers)
    if present_context(config) < max(settings.context):
        extend_positions(config, max(settings.context))
    return config, of_layers


@dataclass
class Cost:
    """What one way to take the step costs at one context."""

    first: Taken
    standing_bytes: int
    added_bytes: int
    rounds: list[Taken] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [taken.seconds for taken in self.rounds]

    def document(self, tokens: int) -> dict[str, Any]:
        return {
            "seconds": median(self.seconds),
            "rounds": self.seconds,
            "processor_seconds": median(taken.processor_seconds for taken in self.rounds),
            "tokens_per_second": tokens / median(self.seconds),
            "memory_bytes": self.standing_bytes + self.added_bytes,
            "standing_bytes": self.standing_bytes,
            "loss": self.first.loss,
        }


def _measure(
    ways: dict[str, Way],
    anatomy: Anatomy,
    config: PreTrainedConfig,
    settings: BenchStepSettings,
    context: int,
    device: torch.device,
) -> dict[str, Any]:
    """The entry of `results` for one context."""
    group_size, tokens = settings.attention.tokens_per_group(context), settings.rows * context
    costs: dict[str, Cost] = {}
    steps = (settings.repeats + 1) * len(settings.ways)
    with Progress(f"steps at {context:,} tokens", "steps", steps) as progress:
        _refuse_wrong_attention(anatomy, settings, context, group_size, device)
        checked = _refuse_unlike(ways, config, settings, min(context, CHECK_TOKENS))
        rows = random_rows(config, settings.rows, context, settings.seed)
        for name in settings.ways:
            cost = _warm_up(ways[name], rows, device)
            if cost is not None:
                costs[name] = cost
        progress.show(len(settings.ways), "warm, memory measured")
        if {"full", "plain"} <= costs.keys():
            _refuse_apart(costs["full"].first, costs["plain"].first, settings.dtype, context)
        for number in range(settings.repeats):
            for place, (name, cost) in enumerate(costs.items()):
                cost.rounds.append(ways[name].step(rows))
                progress.show((number + 1) * len(settings.ways) + place + 1, f"round {number + 1}, {name}")
    return {
        "context": context,
        "group_size": group_size,
        "ways": {
            name: costs[name].document(tokens)
            | {"predicted_bytes": planned_bytes(anatomy, settings, context, name, foreach=device.type == "cuda")}
            if name in costs
            else None
            for name in settings.ways
        },
        "s2_over_full": _faster(costs, "s2", "full"),
        "s2_over_plain": _faster(costs, "s2", "plain"),
        "full_over_plain": _faster(costs, "full", "plain"),
        "checked": checked,
        "correct": True,
    }


def _warm_up(way: Way, rows: Rows, device: torch.device) -> Cost | None:
    """A first step at this context and the memory it takes; None where it does not fit."""
    taken: list[Taken] = []
    standing = way.standing_bytes()
    try:
        added = peak_bytes(lambda: taken.append(way.step(rows)), device)
    except torch.OutOfMemoryError:
        way.forget()
        return None
    return Cost(taken[0], standing, added)


def _faster(costs: dict[str, Cost], one: str, other: str) -> dict[str, float] | None:
    """How many times less time `one` takes than `other`: the median over the rounds, the least and the most."""
    if one not in costs or other not in costs:
        return None
    shares = [long / short for short, long in zip(costs[one].seconds, costs[other].seconds, strict=True)]
    return {"median": median(shares), "least": min(shares), "most": max(shares)}


def _refuse_wrong_attention(
    anatomy: Anatomy, settings: BenchStepSettings, context: int, group_size: int, device: torch.device
) -> None:
    """Raises UserError unless the pattern is right on a row of the model's heads, output and gradients."""
    pattern = settings.attention.pattern
    generator = torch.Generator(device).manual_seed(settings.seed)
    sizes = (
        (anatomy.heads, anatomy.head_width),
        (anatomy.key_heads, anatomy.head_width),
        (anatomy.key_heads, anatomy.value_width),
        (anatomy.heads, anatomy.value_width),
    )
    dtype = getattr(torch, settings.dtype)
    *inputs, gradient = (
        torch.randn(1, context, heads, width, dtype=dtype, device=device, generator=generator) for heads, width in sizes
    )
    layers = attentions(pattern, group_size, settings.attention.attention_backend)
    refuse_wrong(layers, [x.requires_grad_() for x in inputs], gradient.transpose(1, 2), pattern, group_size)


def _refuse_unlike(
    ways: dict[str, Way], config: PreTrainedConfig, settings: BenchStepSettings, tokens: int
) -> dict[str, Any]:
    """A step of each way on short rows, which also makes the optimiser's moments; ours must be plain's.

    Returns:
        `{"tokens", "loss": {"full", "plain"}, "gradient_norm": {"full", "plain"}}`.

    Raises:
        UserError: it is not.
    """
    rows = random_rows(config, settings.rows, tokens, settings.seed)
    taken = {name: way.step(rows) for name, way in ways.items()}
    _refuse_apart(taken["full"], taken["plain"], settings.dtype, tokens)
    return {
        "tokens": tokens,
        "loss": {name: taken[name].loss for name in ("full", "plain")},
        "gradient_norm": {name: taken[name].gradient_norm for name in ("full", "plain")},
    }


def _refuse_apart(full: Taken, plain: Taken, dtype: str, tokens: int) -> None:
    for what, allowed in APART[dtype].items():
        ours, theirs = getattr(full, what), getattr(plain, what)
        if not abs(ours - theirs) <= allowed * abs(theirs):  # so that NaN is wrong
            raise UserError(
                f"our step with full attention and the plain Trainer's disagree at {tokens:,} tokens in {dtype}: "
                f"{what.replace('_', ' ')} {ours:.7g} and {theirs:.7g}. No speed is given for a wrong result; please "
                "report it."
            )


def planned_step(settings: BenchStepSettings, context: int, way: str, foreach: bool) -> Step:
    """The step as the plan knows it.

    Args:
        way: of `settings.STEP_WAYS`; `plain` has none of our switches.
        foreach: AdamW steps all tensors of a group at once, PyTorch's way on GPUs.
    """
    memory = MemorySettings() if way == "plain" else settings.memory
    return Step(
        context=context,
        rows=settings.rows,
        group_size=settings.attention.tokens_per_group(context) if way == "s2" else None,
        low_precision=settings.dtype != "float32",
        loss_chunk=None if way == "plain" else settings.loss_chunk,
        accumulates=False,
        gradient_checkpointing=settings.gradient_checkpointing,
        offload_activations=memory.offload_activations,
        layer_tile=memory.layer_tile,
        tiled_mlp=memory.tiled_mlp,
        mlp_tile=memory.mlp_tile,
        offload_optimizer=memory.offload_optimizer,
        base_bits=memory.base_bits,
        foreach=foreach,
    )


def planned_bytes(anatomy: Anatomy, settings: BenchStepSettings, context: int, way: str, foreach: bool) -> int:
    """Bytes at the step's peak, as the plan has them; for `foreach` see `planned_step`."""
    moments = step_memory(anatomy, planned_step(settings, context, way, foreach))
    return moments[peak(moments)].total


def _refuse_too_large(anatomy: Anatomy, settings: BenchStepSettings, context: int, device: torch.device) -> None:
    """Raises UserError, before anything is allocated, for a context that will not fit in the memory of a CPU.

    A GPU says so itself, and the ways that fit are timed.
    """
    if device.type != "cpu":
        return
    free = free_bytes(device)
    most = max(planned_bytes(anatomy, settings, context, name, foreach=False) for name in settings.ways)
    moments = 16 * anatomy.trainees.numbers * 2  # of the two ways that wait
    if most + moments > free:
        raise UserError(
            f"--context {context:,} with {settings.rows} row{'s' if settings.rows > 1 else ''} of "
            f"{len(anatomy.layers)} layers needs about {(most + moments) / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
            "are free: shorten it, take fewer --layers, or leave plain, which holds all logits, out of --ways."
        )
