"""The config tree: what a user may write, and how it is read. Only pydantic and the standard library are imported here."""

from colossal_core.config.sections import (
    BatchConfig,
    CheckpointConfig,
    CompileConfig,
    DataConfig,
    ModelConfig,
    OpsConfig,
    OptimizerConfig,
    RecomputeConfig,
    SchedulerConfig,
    Section,
    TrainSection,
)
from colossal_core.config.tree import ConfigSpec, TrainConfig, build_config_class, json_schema, parse_config

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "CompileConfig",
    "ConfigSpec",
    "DataConfig",
    "ModelConfig",
    "OpsConfig",
    "OptimizerConfig",
    "RecomputeConfig",
    "SchedulerConfig",
    "Section",
    "TrainConfig",
    "TrainSection",
    "build_config_class",
    "json_schema",
    "parse_config",
]
