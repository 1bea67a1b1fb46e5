"""Everything about a training run that can be known before the first worker starts. Nothing that is wrong gets past here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from colossal_core.errors import ConfigError, Problem
from colossal_launch.assembly import Assembly, Setup, assemble

if TYPE_CHECKING:
    from colossal_core.config import DataConfig, ModelConfig, TrainConfig
    from colossal_launch.data.preparation import PreparedText
    from colossal_launch.models.building import BuiltModel

TEXT_FOLDER = "text"
CHECKPOINT_FOLDER = "checkpoints"


@dataclass(frozen=True)
class Job:
    """A checked run. folder: the run's. text: its tokens. assembly: its plan, for the reader; workers make their own and compare."""

    setup: Setup
    folder: Path
    text: PreparedText
    assembly: Assembly


def sections_of(config: TrainConfig) -> tuple[ModelConfig, DataConfig]:
    """The sections that a run from the command line needs. Raises ConfigError naming what is missing."""
    problems = []
    if config.model is None:
        problems.append(Problem("model", "is required", "add `model: {architecture: llama, config: {...}}`"))
    if config.data is None:
        problems.append(Problem("data", "is required", "add `data: {source: stdlib, sequence_length: 256}`"))
    if config.model is None or config.data is None:
        raise ConfigError(problems)
    return config.model, config.data


def prepare_job(setup: Setup, *, world_size: int, device_type: str) -> Job:
    """Reads the text, builds the model without storage, and plans. Raises ConfigError with every problem found."""
    from colossal_launch.data.preparation import prepare_text

    _, data = sections_of(setup.config)
    folder = Path(setup.config.checkpoint.directory)
    problems = list(_folder_problems(setup.config, folder))
    text: PreparedText | None = None
    if not problems:
        try:
            text = prepare_text(data, folder / TEXT_FOLDER)
        except ConfigError as error:
            problems += error.problems
    try:
        built = build(setup, text, device="cpu")
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    problems += _task_problems(setup.config, built)
    assembly = assemble(
        setup,
        built.module,
        world_size=world_size,
        device_type=device_type,
        known_problems=problems,
        own_loss=sections_of(setup.config)[0].loss is not None,
    )
    assert text is not None, "its absence is a problem, and problems are raised"
    write_config(setup, folder)
    return Job(setup, folder, text, assembly)


def build(setup: Setup, text: PreparedText | None, device: str) -> BuiltModel:
    """The model of the config, its vocabulary the tokenizer's where the config names none.

    text: None where it is not there (yet): the configured size of the vocabulary stands in for the trained one.
    """
    from colossal_launch.data.tokenizer import ByteTokenizer
    from colossal_launch.models.building import build_model

    model, data = sections_of(setup.config)
    if text is not None:
        vocab_size, eos_id = text.vocab_size, text.eos_id
    elif data.tokenizer == "bytes":
        vocab_size, eos_id = ByteTokenizer().vocab_size, ByteTokenizer().eos_id
    else:
        vocab_size, eos_id = data.vocab_size, None
    return build_model(model, vocab_size=vocab_size, seed=setup.config.train.seed, eos_id=eos_id, device=device)


def _task_problems(config: TrainConfig, built: BuiltModel) -> Iterable[Problem]:
    """Text gives a causal model its targets; it gives a masked, a sequence-to-sequence or an image model none."""
    from colossal_core.task import find_task

    model, _ = sections_of(config)
    task = find_task(built.module)
    if built.config is None or model.loss is not None or task == "causal-lm":
        return
    field = "model.architecture" if model.architecture is not None else "model.pretrained"
    name = type(built.module).__name__
    reason = f"{name} is no causal language model, and plain text gives it nothing to predict"
    remedy = "train it from a script of your own: `booster.boost(model)` with batches that hold its labels"
    yield Problem(field, reason, remedy, model.architecture or model.pretrained)


def config_path(folder: Path) -> Path:
    """Where a run's folder keeps its config."""
    return folder / "config.json"


def write_config(setup: Setup, folder: Path) -> None:
    """The config as JSON in the run's folder: what workers read, and what a reader finds later. Only keys that were written."""
    path = config_path(folder)
    text = json.dumps(setup.config.model_dump(mode="json", exclude_unset=True), indent=2)
    aside = path.with_name(f"{path.name}.tmp{os.getpid()}")
    aside.write_text(f"{text}\n", encoding="utf-8")
    aside.replace(path)


def _folder_problems(config: TrainConfig, folder: Path) -> Iterable[Problem]:
    field = "checkpoint.directory"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        yield Problem(field, reason, "name a folder that you may write", str(folder))
        return
    saved = folder / CHECKPOINT_FOLDER
    if not config.checkpoint.resume and saved.is_dir() and any(saved.glob("step-*")):
        reason = "holds checkpoints, and checkpoint.resume is false"
        yield Problem(field, reason, "name another folder, or set it to true", str(folder))
