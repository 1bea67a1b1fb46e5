"""What the suites run on each rank: functions for `WorkerPool.run`, and what they bring back. No pytest here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast
from unittest import mock

from colossal_core import runner
from colossal_core.stage_links import StageLinks
from colossal_core.strategy import Phase
from colossal_core.testing.parity import RunRecord, RunSpec, StepRecord, record_end, record_step, share_of_step, start

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from colossal_core.collectives import Collectives
    from colossal_core.program import Action, Program
    from colossal_core.trained import Trained

CORE_TAGS = (
    "plan",
    "initial values",
    "items",
    "batch",
    "loss and norm",
    "full tensor",
    "random state",
    "checkpoint",
    "gradient shards",
    "gradient statistics",
    "flag",
    "verify",
)
"""Tags of what core itself sends, whatever the strategies are."""


@dataclass(frozen=True)
class Traffic:
    """One line of a rank's ledger: what it sent with one tag in one operation over one set of axes."""

    axes: tuple[str, ...]
    operation: str
    tag: str
    num_calls: int
    sent_bytes: int

    @property
    def kind(self) -> tuple[tuple[str, ...], str, str]:
        return self.axes, self.operation, self.tag


@dataclass(frozen=True)
class Observation:
    """What a run gave, sent and kept on one rank. state_bytes: by column of the estimate (`parameter_bytes`, ...)."""

    record: RunRecord
    traffic: tuple[Traffic, ...]
    state_bytes: Mapping[str, int]


class _LedgerRow(Protocol):
    @property
    def axes(self) -> tuple[str, ...]: ...

    @property
    def operation(self) -> str: ...

    @property
    def tag(self) -> str: ...

    @property
    def num_calls(self) -> int: ...

    @property
    def sent_bytes(self) -> int: ...


class _Ledger(Protocol):
    def rows(self) -> Sequence[_LedgerRow]: ...

    def reset(self) -> None: ...


class _Counting(Protocol):
    """Collectives of more than one rank keep a ledger (colossal-comm's do)."""

    @property
    def ledger(self) -> _Ledger: ...


def traffic(collectives: Collectives) -> tuple[Traffic, ...]:
    """Everything that this rank has sent since the last `forget_traffic`; one rank sends nothing."""
    if collectives.mesh.world_size == 1:
        return ()
    rows = cast("_Counting", collectives).ledger.rows()
    return tuple(Traffic(row.axes, row.operation, row.tag, row.num_calls, row.sent_bytes) for row in rows)


def forget_traffic(collectives: Collectives) -> None:
    """Starts counting anew."""
    if collectives.mesh.world_size > 1:
        cast("_Counting", collectives).ledger.reset()


def observe(collectives: Collectives, spec: RunSpec) -> Observation:
    """A whole run, with what it sent from wrapping to the last step and the bytes of the state that it keeps."""
    trained = start(spec, collectives)
    shares = [share_of_step(spec, trained.plan, collectives.rank, step) for step in range(spec.num_steps)]
    steps = [record_step(trained, share) for share in shares]
    sent = traffic(collectives)
    return Observation(record_end(trained, steps), sent, _state_bytes(trained))


def record(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """The record of a whole run."""
    return observe(collectives, spec).record


def record_with_first_steps(
    collectives: Collectives, spec: RunSpec, first_steps: int
) -> tuple[RunRecord, Sequence[str]]:
    """A run whose stages send through host memory in that many steps, and the uses of the communicators on which messages went."""
    uses: list[str] = []

    class Listening(StageLinks):
        def __init__(self, program: Program, ranks: Collectives) -> None:
            super().__init__(program, ranks, first_steps)
            uses.clear()

        def _use(self, action: Action) -> str:
            uses.append(super()._use(action))
            return uses[-1]

    with mock.patch.object(runner, "StageLinks", Listening):
        return record(collectives, spec), uses


def save_and_go_on(collectives: Collectives, spec: RunSpec, directory: str) -> tuple[RunRecord, StepRecord]:
    """Trains, saves under `directory`, and makes one more step: what was saved, and that step."""
    trained = start(spec, collectives)
    for step in range(spec.num_steps):
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, step))
    trained.save(directory)
    saved = record_end(trained, ())
    return saved, record_step(trained, share_of_step(spec, trained.plan, collectives.rank, spec.num_steps))


def load_and_go_on(collectives: Collectives, spec: RunSpec, directory: str) -> tuple[RunRecord, StepRecord]:
    """Loads what is under `directory` into an untrained model and makes one step: what was loaded, and that step."""
    trained = start(spec, collectives)
    found = trained.load(directory)
    assert found, f"no checkpoint under {directory}"
    assert trained.step == spec.num_steps, f"loaded step {trained.step} instead of {spec.num_steps}"
    loaded = record_end(trained, ())
    return loaded, record_step(trained, share_of_step(spec, trained.plan, collectives.rank, spec.num_steps))


def _state_bytes(trained: Trained) -> dict[str, int]:
    engine = trained._engine
    shards = [shard for shard in engine.state.shards.values() if shard.layout.trainable]
    separate = engine.context.precision.master != engine.context.precision.compute
    optimizer = sum(state.num_bytes for state in engine.optimizer.state_tensors() if state.tensor.dim())
    registered = sum(tensor.local.nbytes for tensor in engine.context.tensors)
    return {
        "parameter_bytes": sum(shard.parameter.nbytes for shard in shards if _is_there(shard.parameter)),
        "master_bytes": sum(shard.master.nbytes for shard in shards) if separate else 0,
        "optimizer_bytes": optimizer + registered,
    }


def _is_there(parameter: torch.Tensor) -> bool:
    """Whether a compute copy holds memory: one that has been released is a view of a single element."""
    return parameter.untyped_storage().nbytes() >= parameter.nbytes


def owns_state(phase: Phase) -> bool:
    """Whether a strategy of this phase answers for the whole parameter state."""
    return phase is Phase.SHARD_STATE
