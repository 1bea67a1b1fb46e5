"""The whole config: core's sections, and those that installed plugins contribute at the dotted paths that they declare."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic_core import ErrorDetails

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
from colossal_core.errors import ConfigError, Problem

PACKAGE_OF_SECTION: Mapping[str, str] = {
    "parallel.zero": "colossal-zero",
    "parallel.tensor": "colossal-tensor",
    "parallel.context": "colossal-tensor",
    "parallel.expert": "colossal-tensor",
    "parallel.pipeline": "colossal-pipeline",
}
"""Sections that our own packages contribute: asking for one whose package is not installed names the package."""


class TrainConfig(Section):
    """Everything that a run is made of. Plugins' sections are added by `build_config_class`."""

    model: ModelConfig | None = None
    """The model; null where one is handed to `Booster.boost`."""
    data: DataConfig | None = None
    """The text; null where a dataset is handed to `Booster.dataloader`."""
    batch: BatchConfig
    """Sizes of the batch."""
    precision: Literal["fp64", "fp32", "bf16", "fp16"] = "fp32"
    """What the forward and backward pass compute in. Master weights and states are float32 (fp64: float64)."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """The optimizer."""
    scheduler: SchedulerConfig = Field(default_factory=SchedulerConfig)
    """The learning-rate schedule."""
    train: TrainSection = Field(default_factory=TrainSection)
    """Length, seed and reports."""
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    """Saving and resuming."""
    recompute: RecomputeConfig = Field(default_factory=RecomputeConfig)
    """Activation recomputation."""
    compile: CompileConfig = Field(default_factory=CompileConfig)
    """Compilation of blocks."""
    ops: OpsConfig = Field(default_factory=OpsConfig)
    """Implementations of ops."""

    def section(self, path: str) -> BaseModel:
        """The section at a dotted path (`parallel.zero`)."""
        found: BaseModel = self
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def was_set(self, path: str) -> bool:
        """Whether the user wrote the section or key at a dotted path."""
        found: Any = self
        for name in path.split("."):
            if name not in found.model_fields_set:
                return False
            found = getattr(found, name)
        return True


@dataclass(frozen=True)
class ConfigSpec:
    """A section that a plugin contributes: where it stands and its class."""

    section: str
    config_class: type[BaseModel]


def build_config_class(specs: Iterable[ConfigSpec]) -> type[TrainConfig]:
    """`TrainConfig` with the sections of all plugins, each with its defaults where the user writes none.

    Core's own strategies (`recompute`, `compile`) already have their section here. A path has at most two parts, and two
    plugins may not claim one path.
    """
    top: dict[str, type[BaseModel]] = {}
    parallel: dict[str, type[BaseModel]] = {}
    for spec in specs:
        head, _, rest = spec.section.partition(".")
        if not rest and head in TrainConfig.model_fields:
            continue
        where = parallel if head == "parallel" and rest else top
        name = rest or head
        assert "." not in name, f"section {spec.section} is too deep"
        if name in where:
            raise ConfigError(
                [Problem(spec.section, "two installed plugins claim this section", "uninstall one of them")]
            )
        where[name] = spec.config_class
    parallel_class = create_model(
        "ParallelConfig", __base__=Section, __doc__="How the model is spread.", **_fields(parallel)
    )
    fields: dict[str, Any] = {"parallel": (parallel_class, Field(default_factory=parallel_class)), **_fields(top)}
    return create_model("TrainConfig", __base__=TrainConfig, __doc__=TrainConfig.__doc__, **fields)


def _fields(classes: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    return {
        name: (section, Field(default_factory=section, description=section.__doc__))
        for name, section in classes.items()
    }


def json_schema(config_class: type[TrainConfig]) -> dict[str, Any]:
    """The JSON schema of a config, for editors."""
    return config_class.model_json_schema()


def parse_config(data: Mapping[str, Any], config_class: type[TrainConfig]) -> TrainConfig:
    """The validated config.

    Raises: ConfigError with every problem at once: unknown keys (with the nearest known one), wrong types, impossible values, and sections
    whose package is not installed or does not bring them.
    """
    problems = list(_missing_packages(data, config_class))
    hidden = {problem.field for problem in problems}
    try:
        text = json.dumps(data)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            [Problem("config", f"holds a value that is not text, number, list or mapping ({error})", "quote it")]
        ) from None
    try:
        config = config_class.model_validate_json(text)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            problem = _problem(details, config_class)
            if problem.field not in hidden:
                problems.append(problem)
    if problems:
        raise ConfigError(dict.fromkeys(problems) if _hashable(problems) else problems)
    return config


def _hashable(problems: Sequence[Problem]) -> bool:
    return all(isinstance(problem.value, str | int | float | bool | None) for problem in problems)


def _missing_packages(data: Mapping[str, Any], config_class: type[TrainConfig]) -> Iterable[Problem]:
    parallel = data.get("parallel")
    if parallel == "auto":
        remedy = "write the sizes: `parallel: {zero: {stage: 1}}`"
        yield Problem("parallel", "automatic planning is not part of this release", remedy, "auto")
        return
    if not isinstance(parallel, Mapping):
        return
    section = _model_at(["parallel"], config_class)
    installed = section.model_fields if section is not None else {}
    present = {PACKAGE_OF_SECTION.get(f"parallel.{name}") for name in installed}
    for name in parallel:
        package = PACKAGE_OF_SECTION.get(f"parallel.{name}")
        if package is None or name in installed:
            continue
        if package in present:
            yield Problem(f"parallel.{name}", f"the installed {package} does not bring this section", "remove it")
        else:
            reason = f"needs the package {package}, which is not installed"
            yield Problem(f"parallel.{name}", reason, f"pip install {package}")


def _problem(details: ErrorDetails, config_class: type[TrainConfig]) -> Problem:
    path = [str(part) for part in details["loc"]]
    field = ".".join(path) or "config"
    value = details["input"]
    if details["type"] == "extra_forbidden":
        known = _keys_at(path[:-1], config_class)
        close = difflib.get_close_matches(path[-1], known, n=1)
        where = ".".join(path[:-1]) or "the config"
        remedy = f"did you mean {close[0]}?" if close else f"{where} has: {', '.join(sorted(known))}"
        return Problem(field, "unknown key", remedy)
    if details["type"] == "missing":
        return Problem(field, "is required", "add it")
    reason = details["msg"][:1].lower() + details["msg"][1:]
    reason = reason.removeprefix("value error, ").removeprefix("input ")
    described = _description_at(path, config_class)
    meaning = f" ({path[-1]}: {described[:1].lower()}{described[1:].removesuffix('.')})" if described else ""
    return Problem(field, reason, f"correct it{meaning}", value)


def _model_at(path: Sequence[str], config_class: type[BaseModel]) -> type[BaseModel] | None:
    found: type[BaseModel] = config_class
    for part in path:
        if part not in found.model_fields:
            return None
        inner = _model_of(found.model_fields[part].annotation)
        if inner is None:
            return None
        found = inner
    return found


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `ModelConfig | None`."""
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _keys_at(path: Sequence[str], config_class: type[BaseModel]) -> list[str]:
    section = _model_at(path, config_class)
    return list(section.model_fields) if section is not None else []


def _description_at(path: Sequence[str], config_class: type[BaseModel]) -> str:
    section = _model_at(path[:-1], config_class)
    if section is None or not path or path[-1] not in section.model_fields:
        return ""
    return (section.model_fields[path[-1]].description or "").strip()
