"""Every knob, once: its unit, default and source. The command line and YAML recipes are both made from these.

Nothing here imports anything heavy, so that `longlora --help` answers at once.
"""

from longlora.settings.bench import BenchAttentionSettings
from longlora.settings.benchmarks import EvaluateLongPerplexitySettings, EvaluateShortSettings, LongPerplexitySettings
from longlora.settings.chat import AnswerSettings, ChatSettings, PageSettings, SinkSettings
from longlora.settings.evaluation import EvaluatedModelsSettings, EvaluatePerplexitySettings, PerplexitySettings
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
from longlora.settings.fields import DTYPES, CommandSettings, LoadSettings
from longlora.settings.fine_tuning import PROMPT_FORMATS, ExportSettings, SftSettings
from longlora.settings.longqa import BuildLongQASettings, CheckLongQASettings, EndpointSettings
from longlora.settings.memory import MemorySettings
from longlora.settings.model import (
    ATTENTION_BACKENDS,
    METHODS,
    PACKINGS,
    PATTERNS,
    AttentionSettings,
    CacheSettings,
    CorpusSettings,
    PatternOptions,
    PositionSettings,
)
from longlora.settings.planning import PlanSettings
from longlora.settings.reproduction import PAPER_TABLES, STUDIES, ReproduceSettings
from longlora.settings.retrieval import (
    CHOICES,
    LinesSettings,
    LongEvalSettings,
    PasskeySettings,
    RetrievalSettings,
    TopicsSettings,
)
from longlora.settings.ruler import EvaluateTasksSettings, RulerSettings
from longlora.settings.step_bench import STEP_WAYS, BenchStepSettings
