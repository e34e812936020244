"""The sections of a recipe: frozen pydantic models, one docstring per field (they are the reference)."""

from slimtune.sections.bounds import Names
from slimtune.sections.data import DataConfig, Source, Sources
from slimtune.sections.guard import AlarmConfig, Guard, SpeedConfig
from slimtune.sections.moe import MoeConfig, unsearched
from slimtune.sections.run import (
    BudgetConfig,
    CompensateConfig,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    GeneratorConfig,
    LoraConfig,
    ModelConfig,
    RecoverConfig,
    SearchConfig,
    TrainConfig,
)
from slimtune.sections.twostage import TwoStageConfig

__all__ = [
    "AlarmConfig",
    "BudgetConfig",
    "CompensateConfig",
    "DataConfig",
    "DistillConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GeneratorConfig",
    "Guard",
    "LoraConfig",
    "ModelConfig",
    "MoeConfig",
    "Names",
    "RecoverConfig",
    "SearchConfig",
    "Source",
    "Sources",
    "SpeedConfig",
    "TrainConfig",
    "TwoStageConfig",
    "unsearched",
]
