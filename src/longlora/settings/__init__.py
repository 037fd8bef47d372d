"""Every knob, once: its unit, default and source. The command line and YAML recipes are both made from these.

Nothing here imports anything heavy, so that `longlora --help` answers at once.
"""

from longlora.settings.bench import BenchAttentionSettings, BenchPerplexitySettings
from longlora.settings.benchmarks import (
    EvaluatedModelsSettings,
    EvaluateLongPerplexitySettings,
    EvaluateShortSettings,
    LongPerplexitySettings,
)
from longlora.settings.evaluation import SCORES, EvaluatePerplexitySettings, PerplexitySettings
from longlora.settings.extension import (
    RECIPES,
    TRAINABLE,
    DemoSettings,
    ExtendSettings,
    MergeSettings,
    OptimisationSettings,
    ReportSettings,
    TrainableSettings,
    TrainingSettings,
)
from longlora.settings.fields import DTYPES, CommandSettings, LoadSettings, Names, Tokens
from longlora.settings.fine_tuning import (
    EXPORT_TYPES,
    PROMPT_FORMATS,
    ExportSettings,
    FineTuningSettings,
    SftSettings,
)
from longlora.settings.longqa import BuildLongQASettings, CheckLongQASettings, EndpointSettings
from longlora.settings.model import (
    METHODS,
    PACKINGS,
    PATTERNS,
    AttentionSettings,
    CorpusSettings,
    PatternOptions,
    PositionSettings,
)
from longlora.settings.planning import DEVICES, MEASURES, MemorySettings, PlanSettings
from longlora.settings.reproduction import STUDIES, ReproduceSettings
from longlora.settings.retrieval import (
    CHOICES,
    LinesSettings,
    LongEvalSettings,
    PasskeySettings,
    RetrievalSettings,
    TopicsSettings,
)
from longlora.settings.ruler import RULER_BAR, RulerSettings

__all__ = [
    "CHOICES",
    "DEVICES",
    "DTYPES",
    "EXPORT_TYPES",
    "MEASURES",
    "METHODS",
    "PACKINGS",
    "PATTERNS",
    "PROMPT_FORMATS",
    "RECIPES",
    "RULER_BAR",
    "SCORES",
    "STUDIES",
    "TRAINABLE",
    "AttentionSettings",
    "BenchAttentionSettings",
    "BenchPerplexitySettings",
    "BuildLongQASettings",
    "CheckLongQASettings",
    "CommandSettings",
    "CorpusSettings",
    "DemoSettings",
    "EndpointSettings",
    "EvaluateLongPerplexitySettings",
    "EvaluatePerplexitySettings",
    "EvaluateShortSettings",
    "EvaluatedModelsSettings",
    "ExportSettings",
    "ExtendSettings",
    "FineTuningSettings",
    "LinesSettings",
    "LoadSettings",
    "LongEvalSettings",
    "LongPerplexitySettings",
    "MemorySettings",
    "MergeSettings",
    "Names",
    "OptimisationSettings",
    "PasskeySettings",
    "PatternOptions",
    "PerplexitySettings",
    "PlanSettings",
    "PositionSettings",
    "ReportSettings",
    "ReproduceSettings",
    "RetrievalSettings",
    "RulerSettings",
    "SftSettings",
    "Tokens",
    "TopicsSettings",
    "TrainableSettings",
    "TrainingSettings",
]
