"""Pipeline parallelism. Found by core through the entry point `pipeline`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_pipeline.checker import peak_activations, problems_of
    from colossal_pipeline.config import PipelineConfig
    from colossal_pipeline.picture import draw_png, draw_text
    from colossal_pipeline.schedule_files import document_of, parse_action, read_schedule
    from colossal_pipeline.schedules.messages import program_of
    from colossal_pipeline.schedules.registry import SCHEDULES, ScheduleSpec
    from colossal_pipeline.simulator import peak_bytes, simulate
    from colossal_pipeline.stage_costs import Costs, StageCosts
    from colossal_pipeline.strategy import PipelineStrategy
    from colossal_pipeline.time_line import Idle, Span, TimeLine
    from colossal_pipeline.trace import Trace

__all__ = [
    "SCHEDULES",
    "Costs",
    "Idle",
    "PipelineConfig",
    "PipelineStrategy",
    "ScheduleSpec",
    "Span",
    "StageCosts",
    "TimeLine",
    "Trace",
    "document_of",
    "draw_png",
    "draw_text",
    "parse_action",
    "peak_activations",
    "peak_bytes",
    "problems_of",
    "program_of",
    "read_schedule",
    "simulate",
]

_MODULES = {
    "SCHEDULES": "schedules.registry",
    "Costs": "stage_costs",
    "Idle": "time_line",
    "PipelineConfig": "config",
    "PipelineStrategy": "strategy",
    "ScheduleSpec": "schedules.registry",
    "Span": "time_line",
    "StageCosts": "stage_costs",
    "TimeLine": "time_line",
    "Trace": "trace",
    "document_of": "schedule_files",
    "draw_png": "picture",
    "draw_text": "picture",
    "parse_action": "schedule_files",
    "peak_activations": "checker",
    "peak_bytes": "simulator",
    "problems_of": "checker",
    "program_of": "schedules.messages",
    "read_schedule": "schedule_files",
    "simulate": "simulator",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
