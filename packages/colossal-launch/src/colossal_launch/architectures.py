"""One causal language model of transformers, trained under stages of ZeRO beside one process in float64: a row of the table.

`compare_stages` is what every rank does; `check` runs it in a pool and tells the result, or what went wrong, as data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ColossalError
from colossal_launch.models.causal import SmallCausalModel

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.collectives import Collectives
    from colossal_core.testing import Row, RunSpec, WorkerPool

STAGES = (1, 3)
NUM_RANKS = 2
SEQUENCE_LENGTH = 16
NUM_STEPS = 2
ADAM_EPS = 1e-6
"""A gradient that is zero in theory (of the bias of a normalised key, which softmax cancels) is rounding, and AdamW divides it by this: at
1e-8 one process differs from itself by 1e-12 when only the size of its microbatches changes."""


@dataclass(frozen=True)
class Facts:
    """What the anatomy says. blocks: their number, by list; found: how the first list was found, "" without one."""

    class_name: str
    parameters: int
    blocks: tuple[int, ...]
    found: str
    tied: int


@dataclass(frozen=True)
class StageResult:
    """worst: the row with the largest difference of all kinds, steps and tensors, on this rank."""

    stage: int
    worst: Row
    passed: bool


@dataclass(frozen=True)
class Checked:
    """A model's row. error: the last line of what went wrong, "" where every stage ran."""

    architecture: str
    facts: Facts | None
    stages: tuple[StageResult, ...]
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and bool(self.stages) and all(stage.passed for stage in self.stages)


def spec_of(architecture: str) -> RunSpec:
    """The run: two microbatches of one sequence for each of two ranks, AdamW with clipping, float64."""
    from colossal_core.testing import RunSpec
    from colossal_core.testing.models import TokenBatches
    from colossal_core.testing.verification import ADAMW

    model = SmallCausalModel(architecture)
    vocab_size = model.config().get_text_config().vocab_size
    config: dict[str, Any] = {
        "precision": "fp64",
        "batch": {"global_size": 2 * NUM_RANKS, "micro_size": 1},
        "optimizer": {**ADAMW, "eps": ADAM_EPS},
    }
    return RunSpec(config, model, TokenBatches(vocab_size, SEQUENCE_LENGTH), num_steps=NUM_STEPS, task="causal-lm")


def compare_stages(
    collectives: Collectives, architecture: str, stages: Sequence[int] = STAGES
) -> tuple[Facts, tuple[StageResult, ...]]:
    """On every rank: the oracle, alone, then each stage, together, compared where it ran. Communication: that of the steps."""
    import torch

    from colossal_core.collectives import SingleProcess
    from colossal_core.testing import compare, record_run
    from colossal_core.testing.parity import oracle_of

    torch.set_num_threads(1)
    spec = spec_of(architecture)
    oracle = record_run(oracle_of(spec), SingleProcess(collectives.device))
    results = []
    for stage in stages:
        record = record_run(spec.with_overrides({"parallel.zero": {"stage": stage}}), collectives)
        rows = compare(record, oracle)
        results.append(StageResult(stage, max(rows, key=lambda row: row.difference), all(row.passed for row in rows)))
    return facts_of(architecture), tuple(results)


def facts_of(architecture: str) -> Facts:
    """What is known of the model before it is trained."""
    from colossal_core.examine import examine

    model = SmallCausalModel(architecture)()
    anatomy: ModelAnatomy = examine(model)
    return Facts(
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=tuple(len(chain.names) for chain in anatomy.chains),
        found=anatomy.chains[0].found_by if anatomy.chains else "",
        tied=sum(len(fact.names) > 1 for fact in anatomy.parameters),
    )


def check(architecture: str, pool: WorkerPool) -> Checked:
    """Both stages on two ranks of the pool, the worse rank's result. Never raises for what a model does."""
    try:
        answers = pool.run(NUM_RANKS, compare_stages, architecture)
    except ColossalError as error:
        return Checked(architecture, None, (), _last_line(error))
    worst = tuple(
        max(found, key=lambda result: _size(result.worst.difference))
        for found in zip(*(a[1] for a in answers), strict=True)
    )
    return Checked(architecture, answers[0][0], worst)


def _size(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _last_line(error: ColossalError) -> str:
    """The line that names the exception in a rank's traceback, or the whole message of an error without one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith((" ", "rank ", "Traceback"))]
    return (told or lines)[-1][:300]
