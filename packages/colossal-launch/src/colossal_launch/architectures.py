"""One model of transformers, trained under stages of ZeRO, under tensor parallelism and in a pipeline beside one process in float64: a row
of the table.

`compare_stages`, `compare_tensor` and `compare_pipeline` are what every rank does; `check_stages`, `check_tensor` and `check_pipeline` run
them in a pool and tell the results, or what went wrong, as data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from colossal_core.errors import ColossalError, ConfigError
from colossal_launch.models.small import SmallBatches, SmallModel

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.collectives import Collectives
    from colossal_core.plan import Plan
    from colossal_core.testing import Row, RunRecord, RunSpec, WorkerPool

T = TypeVar("T")

STAGES = (1, 3)
NUM_RANKS = 2
SEQUENCE_LENGTH = 16
NUM_STEPS = 2
ADAM_EPS = 1e-6
"""A gradient that is zero in theory (of the bias of a normalised key, which softmax cancels) is rounding, and AdamW divides it by this: at
1e-8 one process differs from itself by 1e-12 when only the size of its microbatches changes."""

OTHER_HEADS = (
    SmallModel("bert", "masked-lm"),
    SmallModel("t5", "seq2seq-lm"),
    SmallModel("vit", "image-classification"),
    SmallModel("whisper", "speech-to-text"),
)
"""What the table has beside causal language models."""


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
    """What stages of ZeRO made of a model. error: the last line of what went wrong, "" where every stage ran."""

    facts: Facts | None
    stages: tuple[StageResult, ...]
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error and bool(self.stages) and all(stage.passed for stage in self.stages)


@dataclass(frozen=True)
class TensorResult:
    """What tensor parallelism made of a model. worst: as of a stage; None where nothing was cut, and so nothing was trained.

    share: of the elements of matrices, those that are cut (`matrices_of`). whole: patterns of the matrices that are not, the largest first;
    unused: of those that nothing multiplies in this run (their gradient is zero). sequence, vocabulary: whether they are cut. notes: what
    the plan says, or why it was refused. error: the last line of what went wrong, "" where it ran.
    """

    worst: Row | None = None
    passed: bool = False
    share: float = 0.0
    whole: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    sequence: bool = False
    vocabulary: bool = False
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline of two stages made of a model. worst: as of a stage; None where the plan was refused, with `notes`. crossing: the
    number of tensors that cross between the stages. error: the last line of what went wrong, "" where it ran.
    """

    worst: Row | None = None
    passed: bool = False
    crossing: int = 0
    notes: tuple[str, ...] = ()
    error: str = ""


def spec_of(model: SmallModel, micro_size: int = 1) -> RunSpec:
    """The run: four sequences a step, AdamW with clipping, float64. With one sequence a microbatch each of two data ranks has two of them,
    and with two sequences one rank, or several that work on the same ones, has.
    """
    from colossal_core.testing import RunSpec
    from colossal_core.testing.models import TokenBatches
    from colossal_core.testing.verification import ADAMW

    config: dict[str, Any] = {
        "precision": "fp64",
        "batch": {"global_size": 2 * NUM_RANKS, "micro_size": micro_size},
        "optimizer": {**ADAMW, "eps": ADAM_EPS},
    }
    if model.head != "causal-lm":
        return RunSpec(config, model, SmallBatches(model), num_steps=NUM_STEPS)
    batches = TokenBatches(model.config().get_text_config().vocab_size, SEQUENCE_LENGTH)
    return RunSpec(config, model, batches, num_steps=NUM_STEPS, task="causal-lm")


def compare_stages(
    collectives: Collectives, model: SmallModel, stages: Sequence[int] = STAGES
) -> tuple[Facts, tuple[StageResult, ...]]:
    """On every rank: the oracle, alone, then each stage, together, compared where it ran. Communication: that of the steps."""
    from colossal_core.testing import compare, record_run

    spec = spec_of(model)
    oracle = _oracle(spec, collectives)
    results = []
    for stage in stages:
        record = record_run(spec.with_overrides({"parallel.zero": {"stage": stage}}), collectives)
        rows = compare(record, oracle)
        results.append(StageResult(stage, max(rows, key=lambda row: row.difference), all(row.passed for row in rows)))
    return facts_of(model), tuple(results)


def compare_tensor(collectives: Collectives, model: SmallModel) -> TensorResult:
    """On every rank: the oracle, alone, then the ranks together, which share every matrix that can be cut, compared. Communication: that of
    the steps.
    """
    whole = spec_of(model, micro_size=2)
    try:
        plan, record, rows = _beside_oracle(collectives, whole, {"parallel.tensor": {"size": NUM_RANKS}})
    except ConfigError as error:
        return TensorResult(notes=tuple(problem.reason for problem in error.problems))
    matrices = [plan.layouts[name] for name in matrices_of(model())]
    left = sorted((layout for layout in matrices if not layout.compute.cut_axes), key=lambda layout: -layout.numel)
    used = {name for step in record.steps for name, gradient in step.gradients.items() if bool(gradient.any())}
    found: Any = plan.data["tensor"]
    return TensorResult(
        worst=max(rows, key=lambda row: _size(row.difference)),
        passed=all(row.passed for row in rows),
        share=1 - sum(layout.numel for layout in left) / max(sum(layout.numel for layout in matrices), 1),
        whole=_patterns(layout.full_name for layout in left if layout.full_name in used),
        unused=_patterns(layout.full_name for layout in left if layout.full_name not in used),
        sequence=found["plan"]["stream"] is not None,
        vocabulary=bool(found["cutting"]["words"]),
        notes=tuple(note.removeprefix("tensor: ") for note in plan.notes if note.startswith("tensor: "))[1:],
    )


def compare_pipeline(collectives: Collectives, model: SmallModel) -> PipelineResult:
    """On every rank: the oracle, alone, then two stages, one a rank, compared. Communication: that of the steps."""
    whole = spec_of(model)
    try:
        plan, _, rows = _beside_oracle(collectives, whole, {"parallel.pipeline": {"size": NUM_RANKS}})
    except ConfigError as error:
        return PipelineResult(notes=tuple(problem.reason for problem in error.problems))
    found: Any = plan.data["pipeline"]
    return PipelineResult(
        worst=max(rows, key=lambda row: _size(row.difference)),
        passed=all(row.passed for row in rows),
        crossing=max(map(len, found["crossing"])),
    )


def _beside_oracle(
    collectives: Collectives, whole: RunSpec, overrides: Mapping[str, Any]
) -> tuple[Plan, RunRecord, tuple[Row, ...]]:
    """The plan of a run, its record, and that compared with the same run in this process alone. Raises: ConfigError where it is refused."""
    from colossal_core.testing import compare
    from colossal_core.testing.parity import record_end, record_step, share_of_step, start

    spec = whole.with_overrides(overrides)
    trained = start(spec, collectives)
    shares = (share_of_step(spec, trained.plan, collectives.rank, step) for step in range(spec.num_steps))
    record = record_end(trained, [record_step(trained, share) for share in shares])
    return trained.plan, record, compare(record, _oracle(whole, collectives))


def matrices_of(model: nn.Module) -> tuple[str, ...]:
    """The parameters with two dimensions or more, by name. What is looked up and never multiplied is none: a table of embeddings is one
    where it is the head too.
    """
    from torch import nn

    multiplied = {
        id(parameter)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if not isinstance(module, nn.Embedding)
    }
    return tuple(name for name, value in model.named_parameters() if value.dim() > 1 and id(value) in multiplied)


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """With `*` for numbers, each once."""
    from colossal_core.specimen import pattern_of

    return tuple(dict.fromkeys(map(pattern_of, names)))


def facts_of(small: SmallModel) -> Facts:
    """What is known of the model before it is trained."""
    from colossal_core.examine import examine

    model = small()
    anatomy: ModelAnatomy = examine(model)
    return Facts(
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        blocks=tuple(len(chain.names) for chain in anatomy.chains),
        found=anatomy.chains[0].found_by if anatomy.chains else "",
        tied=sum(len(fact.names) > 1 for fact in anatomy.parameters),
    )


def check_stages(model: SmallModel, pool: WorkerPool) -> Checked:
    """All stages on two ranks of the pool, the worse rank's results. Never raises for what a model does."""
    answers, error = _tried(pool, compare_stages, model)
    if not answers:
        return Checked(None, (), error)
    worst = tuple(
        max(found, key=lambda result: _size(result.worst.difference))
        for found in zip(*(results for _, results in answers), strict=True)
    )
    return Checked(answers[0][0], worst)


def check_tensor(model: SmallModel, pool: WorkerPool) -> TensorResult:
    """Tensor parallelism on two ranks of the pool, the worse rank's result. Never raises for what a model does."""
    results, error = _tried(pool, compare_tensor, model)
    return max(results, key=_difference) if results else TensorResult(error=error)


def check_pipeline(model: SmallModel, pool: WorkerPool) -> PipelineResult:
    """Two stages on two ranks of the pool, the worse rank's result. Never raises for what a model does."""
    results, error = _tried(pool, compare_pipeline, model)
    return max(results, key=_difference) if results else PipelineResult(error=error)


def _tried(pool: WorkerPool, function: Callable[..., T], model: SmallModel) -> tuple[list[T], str]:
    """Every rank's answer, or none and the last line of what went wrong."""
    try:
        return pool.run(NUM_RANKS, function, model), ""
    except ColossalError as error:
        return [], _last_line(error)


def _oracle(spec: RunSpec, collectives: Collectives) -> RunRecord:
    """The same run in this process alone."""
    import torch

    from colossal_core.collectives import SingleProcess
    from colossal_core.testing import record_run
    from colossal_core.testing.parity import oracle_of

    torch.set_num_threads(1)
    return record_run(oracle_of(spec), SingleProcess(collectives.device))


def _difference(result: TensorResult | PipelineResult) -> float:
    return _size(result.worst.difference) if result.worst is not None else 0.0


def _size(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _last_line(error: ColossalError) -> str:
    """The line that names the exception in a rank's traceback, or the whole message of an error without one."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith((" ", "rank ", "Traceback"))]
    return (told or lines)[-1][:300]
