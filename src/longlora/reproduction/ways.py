"""Ways to make a model longer, as the paper's tables and the studies vary them, and the cell that each of them is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from longlora.reproduction.cells import Cell
from longlora.settings import AttentionSettings, ExtendSettings

SAID = {
    "full": "full attention",
    "shift": "S², across heads",
    "shift-layers": "S², across layers",
    "plain": "only P1 (short attention)",
    "shifted": "only P2 (shifted)",
    "dilated": "dilated",
    "strided": "strided",
}


@dataclass(frozen=True, kw_only=True)
class Way:
    """How one model is made longer; what is not said here is the base settings'. Two tables that ask for the same way
    share its cell."""

    name: str = ""
    """What the cell is, as a file's name; default made from the rest."""

    label: str = ""
    """What the cell is, for people; default made from the rest."""

    context: int | None = None
    """Tokens trained for."""

    pattern: str = "shift"
    groups: int = 4
    """Groups a row, of context / groups tokens."""

    attention: Mapping[str, Any] = field(default_factory=dict)
    """Further settings of the attention while training."""

    train: tuple[str, ...] = ("lora", "norm", "embed")
    rank: int = 8
    alpha: float = 16.0

    rate: float = 1.0
    """Learning rates, as a multiple of the base settings'."""

    one_rate: bool = False
    """Norms and embeddings train at LoRA's rate instead of their own."""

    trained: bool = True
    """False: positions are stretched and nothing is trained."""

    method: str | None = None
    """How positions are stretched."""

    stretch: int = 1
    """Positions are stretched for this many times the context."""

    steps: float = 1.0
    """Share of the base settings' steps."""

    mix: tuple[str, ...] = ()
    """Shares of kinds of documents."""

    watched: int | None = None
    """Steps between measurements on the way; default none."""

    def cell(self, base: ExtendSettings, seed: int) -> Cell:
        """The cell of this way with `seed`.

        Args:
            base: model, data, steps, rates and rows a step at `base.positions.context`, the longest context; shorter
                ones get more rows, so that every step of every cell has the same number of tokens.
        """
        own = base.training
        context, method = self.context or base.positions.context, self.method or base.positions.method
        norm = "norm" in self.train and not self.one_rate
        embed = "embed" in self.train and not self.one_rate
        training = replace(
            own,
            seed=seed,
            steps=max(1, round(own.steps * self.steps)),
            batch=max(1, own.batch * base.positions.context // context),
            lr=_times(own.lr, self.rate),
            norm_lr=_times(own.norm_lr, self.rate) if norm and own.norm_lr is not None else None,
            embed_lr=_times(own.embed_lr, self.rate) if embed and own.embed_lr is not None else None,
            evaluate_every=self.watched,
        )
        group = max(2, context // self.groups)
        settings = replace(
            base,
            positions=replace(base.positions, context=context, method=method),
            attention=AttentionSettings(pattern=self.pattern, group_size=group, **self.attention),
            corpus=replace(base.corpus, packing="isolate" if self.mix else base.corpus.packing, mix=self.mix),
            trainable=replace(base.trainable, train=self.train, rank=self.rank, alpha=self.alpha),
            training=training,
        )
        name, label = self.name or self._name(context, method), self.label or self._label(context, method)
        return Cell(name, label, settings, self.trained)

    def _name(self, context: int, method: str) -> str:
        if not self.trained:
            return f"untrained-{method}-{context}"
        parts = [method, str(context), self.pattern]
        parts += [f"{self.groups}-groups"] if self.pattern != "full" and self.groups != 4 else []
        parts += self.train
        if "lora" in self.train and (self.rank != 8 or self.alpha != 16):
            parts += [f"r{self.rank}"] + ([f"a{self.alpha:g}"] if self.alpha != 16 else [])
        parts += [f"rate{self.rate:g}".replace(".", "_")] if self.rate != 1 else []
        parts += ["one-rate"] if self.one_rate else []
        return "-".join([*parts, *(["watched"] if self.watched else [])])

    def _label(self, context: int, method: str) -> str:
        if not self.trained:
            return f"{method} at {context:,}, not trained"
        return f"{SAID[self.pattern]} at {context:,}, {' + '.join(self.train)}"


def _times(rate: float, factor: float) -> float:
    """The product without the last digits of its rounding, which would stand in every settings.yaml."""
    return float(f"{rate * factor:.6g}")
