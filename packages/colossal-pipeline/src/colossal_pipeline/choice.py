"""From the config to a checked program: a schedule by name, or a file's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from colossal_core.program import Program
    from colossal_pipeline.config import PipelineConfig

SCHEDULE_FIELD = "parallel.pipeline.schedule"
CHUNKS_FIELD = "parallel.pipeline.chunks"
SUFFIXES = (".yaml", ".yml", ".json")


def num_chunks(config: PipelineConfig) -> int:
    """Stages of each rank: as configured, else as few as the schedule takes."""
    from colossal_pipeline.schedules.registry import SCHEDULES

    if config.chunks is not None:
        return config.chunks
    if is_file(config):
        return max(len(_file_program(config).stage_ranks) // config.size, 1)
    found = SCHEDULES.get(config.schedule)
    return found.min_chunks if found is not None else 1


def is_file(config: PipelineConfig) -> bool:
    return config.schedule.endswith(SUFFIXES)


def make_program(config: PipelineConfig, num_microbatches: int) -> Program:
    """The program of a config without problems."""
    from colossal_pipeline.schedules.registry import SCHEDULES

    if is_file(config):
        return _file_program(config)
    return SCHEDULES[config.schedule].generate(config.size, num_chunks(config), num_microbatches)


def schedule_problems(config: PipelineConfig, num_microbatches: int) -> Iterable[Problem]:
    """What is wrong with the schedule that a config asks for. A file's is checked action by action, what is generated in the tests."""
    from colossal_pipeline.checker import problems_of
    from colossal_pipeline.schedules.registry import SCHEDULES

    if not is_file(config):
        spec = SCHEDULES.get(config.schedule)
        if spec is None:
            remedy = f"use one of {', '.join(SCHEDULES)}, or the path of a .yaml or .json file"
            return [Problem(SCHEDULE_FIELD, "is no schedule that is known", remedy, config.schedule)]
        return spec.problems(CHUNKS_FIELD, num_chunks(config))
    try:
        program = _file_program(config)
    except ConfigError as error:
        return error.problems
    found = list(problems_of(program))
    if len(program.actions) != config.size:
        reason = f"is for {len(program.actions)} ranks, and parallel.pipeline.size is {config.size}"
        found.append(Problem(SCHEDULE_FIELD, reason, "write one list of actions for each rank", config.schedule))
    if config.chunks is not None and program.num_stages != config.chunks * config.size:
        reason = f"has {program.num_stages} stages, and {config.size} ranks with {config.chunks} chunks have {config.chunks * config.size}"
        found.append(Problem(SCHEDULE_FIELD, reason, "leave chunks out", config.schedule))
    if program.num_microbatches != num_microbatches:
        reason = f"is for {program.num_microbatches} microbatches, and a step has {num_microbatches}"
        remedy = "change batch.micro_size or batch.global_size, or the file"
        found.append(Problem(SCHEDULE_FIELD, reason, remedy, config.schedule))
    return found


def _file_program(config: PipelineConfig) -> Program:
    from colossal_pipeline.schedule_files import read_schedule

    return read_schedule(Path(config.schedule))
