"""The longest context that fits under each combination of switches, and the cheapest combination for a context."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

from longlora.errors import UserError
from longlora.model.memory_saving.offloaded_activations import refuse_checkpointing
from longlora.planner.anatomy import Anatomy
from longlora.planner.layer_memory import Step
from longlora.planner.memory import Memory, peak, step_memory
from longlora.settings import PlanSettings
from longlora.settings.memory import LAYER_TILE

SWITCHES = (
    "chunked_loss",
    "shard",
    "tiled_mlp",
    "gradient_checkpointing",
    "layer_tiles",
    "offload_activations",
    "offload_optimizer",
    "base_bits",
)
"""What makes room, the cheapest in time (or, for a 4-bit base, in precision) first."""

LADDER = (
    "chunked_loss",
    "gradient_checkpointing",
    "layer_tiles",
    "tiled_mlp",
    "offload_activations",
    "offload_optimizer",
    "base_bits",
    "shard",
)
"""The order in which a table adds one after the other, tiles of the MLP only where layers cannot be in tiles."""

STEP_TOKENS = 256
"""The longest context is found to this many tokens."""

LONGEST = 2**28
"""Tokens beyond which no longest context is looked for."""


class Fit:
    """What fits on the GPUs that `settings` name."""

    def __init__(self, anatomy: Anatomy, settings: PlanSettings, device_bytes: int | None = None):
        """`device_bytes` is what a GPU has; default as `settings` say."""
        self.anatomy, self.settings = anatomy, settings
        self.budget = round((device_bytes or settings.gpu_bytes) * (1 - settings.memory.reserve))
        """Bytes of a GPU that training may use."""

    def step(self, context: int, switches: tuple[str, ...]) -> Step:
        """A training step of `settings` at `context` tokens with `switches` on and the others off."""
        settings, training = self.settings, self.settings.training
        rows = training.device_batch * (settings.gpus // training.sequence_parallel)
        return Step(
            context=context,
            rows=training.device_batch,
            group_size=self._group(context),
            low_precision=training.dtype != "float32",
            loss_chunk=training.loss_chunk if "chunked_loss" in switches else None,
            accumulates=training.batch > rows,
            gradient_checkpointing="gradient_checkpointing" in switches,
            offload_activations="offload_activations" in switches,
            layer_tile=(settings.memory.layer_tile or LAYER_TILE) if "layer_tiles" in switches else None,
            tiled_mlp="tiled_mlp" in switches,
            mlp_tile=settings.memory.mlp_tile,
            offload_optimizer="offload_optimizer" in switches,
            base_bits=4 if "base_bits" in switches else None,
            gpus=settings.gpus,
            shard="shard" in switches,
            sequence_parallel=training.sequence_parallel,
        )

    def _group(self, context: int) -> int | None:
        """The widest group that the run will meet, None when full attention is among it."""
        attention = self.settings.attention
        if (
            attention.pattern == "full"
            or attention.full_attention_steps
            or attention.full_attention_layers
            or attention.full_layers_share
        ):
            return None
        return min(attention.final_group_size or attention.tokens_per_group(context), context)

    def given(self) -> tuple[str, ...]:
        """The switches as `settings` have them."""
        settings = self.settings
        on = {
            "chunked_loss": True,
            "gradient_checkpointing": settings.training.gradient_checkpointing,
            "layer_tiles": bool(settings.memory.layer_tile),
            "tiled_mlp": settings.memory.tiled_mlp,
            "offload_activations": settings.memory.offload_activations,
            "offload_optimizer": settings.memory.offload_optimizer,
            "base_bits": settings.memory.base_bits == 4,
            "shard": settings.shard,
        }
        return tuple(name for name in LADDER if on[name])

    def possible(self) -> tuple[str, ...]:
        """The switches that can act on this model and these GPUs."""
        without = {"base_bits"} if self.anatomy.trainees.whole or not self.anatomy.trainees.frozen_linear else set()
        without |= set() if self.anatomy.tiles else {"tiled_mlp"}
        without |= set() if self.anatomy.layer_tiles else {"layer_tiles"}
        without |= set() if self.anatomy.checkpoints else {"gradient_checkpointing"}
        without |= {"shard"} if self.settings.gpus == 1 else set()
        return tuple(name for name in SWITCHES if name not in without)

    def all_combinations(self) -> Iterator[tuple[str, ...]]:
        """Every combination that makes sense, the cheapest first."""
        possible = self.possible()
        cost = {name: 2**place for place, name in enumerate(SWITCHES)}
        subsets = [chosen for count in range(len(possible) + 1) for chosen in combinations(possible, count)]
        for chosen in sorted(subsets, key=lambda names: sum(cost[name] for name in names)):
            finer = {"offload_activations", "layer_tiles"} & set(chosen)
            if (not finer or "gradient_checkpointing" in chosen) and not {"layer_tiles", "tiled_mlp"} <= set(chosen):
                yield tuple(name for name in LADDER if name in chosen)

    def ladder(self) -> Iterator[tuple[str, ...]]:
        """No switch, then one more at a time."""
        possible = [name for name in LADDER if name in self.possible()]
        if {"layer_tiles", "tiled_mlp"} <= set(possible):
            possible.remove("tiled_mlp")
        for count in range(len(possible) + 1):
            yield tuple(possible[:count])

    def moments(self, context: int, switches: tuple[str, ...]) -> dict[str, Memory]:
        """Bytes by part of one GPU at each moment where memory may peak."""
        return step_memory(self.anatomy, self.step(context, switches))

    def peak_bytes(self, context: int, switches: tuple[str, ...]) -> int:
        moments = self.moments(context, switches)
        return moments[peak(moments)].total

    def fits(self, context: int, switches: tuple[str, ...]) -> bool:
        return self.peak_bytes(context, switches) <= self.budget

    def longest(self, switches: tuple[str, ...]) -> int:
        """The longest context that fits, in tokens, to `STEP_TOKENS`; 0 when nothing does."""
        fits, fails = 0, 1
        while self.fits(fails * STEP_TOKENS, switches):
            fits, fails = fails, 2 * fails
            if fails * STEP_TOKENS > LONGEST:
                return LONGEST
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.fits(middle * STEP_TOKENS, switches) else (fits, middle)
        return fits * STEP_TOKENS

    def asked(self) -> set[str]:
        """The switches that are on whatever fits: the loss is always in chunks, and what was asked for stays."""
        return {"chunked_loss"} | (set(self.given()) - {"gradient_checkpointing"})

    def cheapest(self, available: set[str]) -> tuple[str, ...] | None:
        """The cheapest combination of `available` switches, with those asked for, under which the context fits."""
        must = self.asked()
        for switches in self.all_combinations():
            if must <= set(switches) <= available | must and self.fits(self.settings.positions.context, switches):
                return switches
        return None


def refuse_what_cannot_be(anatomy: Anatomy, settings: PlanSettings) -> None:
    """Raises UserError for a context, group or switch that training would refuse."""
    memory = settings.memory
    asked = settings.training.gradient_checkpointing and not memory.layer_tile and memory.memory == "manual"
    refuse_checkpointing(anatomy.architecture, anatomy.checkpoints, asked)
    context = settings.positions.context
    group = settings.attention.tokens_per_group(context)
    if group > context:
        raise UserError(f"--group-size is {group:,}: it must be at most the context, {context:,} tokens.")
    reach = max(layer.window or context for layer in anatomy.layers)
    if reach < context:
        raise UserError(
            f"every layer of {settings.model} attends to the last {reach:,} tokens only (sliding_window), and the "
            f"context is {context:,}: there is no full attention for S2-Attn to replace. Set sliding_window to null in "
            "the model's config.json to train it with a longer reach."
        )


def with_switches(settings: PlanSettings, switches: tuple[str, ...]) -> PlanSettings:
    """`settings` with exactly these switches on."""
    return replace(
        settings,
        training=replace(settings.training, gradient_checkpointing="gradient_checkpointing" in switches),
        memory=replace(
            settings.memory,
            layer_tile=(settings.memory.layer_tile or LAYER_TILE) if "layer_tiles" in switches else None,
            tiled_mlp="tiled_mlp" in switches,
            offload_activations="offload_activations" in switches,
            offload_optimizer="offload_optimizer" in switches,
            base_bits=4 if "base_bits" in switches else None,
        ),
        shard="shard" in switches,
    )
