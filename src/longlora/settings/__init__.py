"""Every knob, once: its unit, default and source. The command line and YAML recipes are both made from these.

Nothing here imports anything heavy, so that `longlora --help` answers at once.
"""

from longlora.settings.bench import BenchAttentionSettings
from longlora.settings.evaluation import SCORES, EvaluatePerplexitySettings, PerplexitySettings
from longlora.settings.extension import (
    TRAINABLE,
    DemoSettings,
    ExtendSettings,
    MergeSettings,
    ReportSettings,
    TrainableSettings,
    TrainingSettings,
)
from longlora.settings.fields import DTYPES, CommandSettings, LoadSettings, Names, Tokens
from longlora.settings.model import METHODS, PACKINGS, PATTERNS, AttentionSettings, CorpusSettings, PositionSettings

__all__ = [
    "DTYPES",
    "METHODS",
    "PACKINGS",
    "PATTERNS",
    "SCORES",
    "TRAINABLE",
    "AttentionSettings",
    "BenchAttentionSettings",
    "CommandSettings",
    "CorpusSettings",
    "DemoSettings",
    "EvaluatePerplexitySettings",
    "ExtendSettings",
    "LoadSettings",
    "MergeSettings",
    "Names",
    "PerplexitySettings",
    "PositionSettings",
    "ReportSettings",
    "Tokens",
    "TrainableSettings",
    "TrainingSettings",
]
