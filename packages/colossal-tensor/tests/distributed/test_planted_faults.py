"""Mistakes that tensor-parallel code really has, each planted into a run whose plan was found without it: all must be seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_core.layout import ParameterLayout
from colossal_core.testing import RunRecord, RunSpec
from colossal_core.testing.mutants import MUTANTS, PIPELINE_MUTANTS
from colossal_core.testing.parity import prepare
from colossal_core.testing.probes import record
from colossal_tensor import dropout, regions, strategy, vocabulary
from colossal_tensor.layouts import Cutting, Laid, tensor_layouts
from colossal_tensor.regions import EntryHook, ExitHook

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]
Plant = Callable[[pytest.MonkeyPatch], None]


def change_layouts(patch: pytest.MonkeyPatch, name: str, change: Callable[[ParameterLayout], ParameterLayout]) -> None:
    """Every plan from now on has another layout of one parameter."""

    def changed(*arguments: Any) -> Laid:
        laid = tensor_layouts(*arguments)
        return replace(laid, layouts={**laid.layouts, name: change(laid.layouts[name])})

    patch.setattr(strategy, "tensor_layouts", changed)


def forgotten_sum_at_an_exit(patch: pytest.MonkeyPatch) -> None:
    """The first exit that is installed leaves each rank its own summand."""
    original, forgetful = ExitHook._left, list[ExitHook]()

    def left(self: ExitHook, value: torch.Tensor) -> torch.Tensor:
        if not forgetful:
            forgetful.append(self)
        return value if self is forgetful[0] else original(self, value)

    patch.setattr(ExitHook, "_left", left)


def forgotten_sum_at_an_entry(patch: pytest.MonkeyPatch) -> None:
    """What enters the groups has each rank's own summand for a gradient."""
    patch.setattr(EntryHook, "_entered", lambda self, value: value)


def shard_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """Both ranks hold the features after their own, the last rank the first one."""

    def shifted(layout: ParameterLayout) -> ParameterLayout:
        (cut,) = layout.compute.cuts
        size = layout.shape[cut.dim]
        (start, stop), (_, end) = (ranges[0] for ranges in cut.intervals)
        assert (start, end) == (0, size), cut
        moved = replace(cut, intervals=(((1, stop + 1),), ((stop + 1, size), (0, 1))))
        return replace(
            layout, compute=replace(layout.compute, cuts=(moved,)), state=replace(layout.state, cuts=(moved,))
        )

    change_layouts(patch, "model.layers.1.mlp.down_proj.weight", shifted)


def partial_gradient_not_summed(patch: pytest.MonkeyPatch) -> None:
    """Under sequence parallelism a norm's weight has a summand on each rank."""

    def whole(layout: ParameterLayout) -> ParameterLayout:
        assert layout.state.partial == ("tp",), layout
        return replace(layout, compute=replace(layout.compute, partial=()), state=replace(layout.state, partial=()))

    change_layouts(patch, "model.layers.1.input_layernorm.weight", whole)


def bias_on_every_rank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(regions, "leave_out", lambda module, attribute: None)


def words_off_by_one(patch: pytest.MonkeyPatch) -> None:
    """The lookup takes each rank's words to begin one later."""
    install = vocabulary.install_vocabulary

    def shifted(model: Any, plan: Any, cutting: Cutting, collectives: Any) -> None:
        words = tuple((start + 1, stop) for start, stop in cutting.words)
        install(model, plan, replace(cutting, words=words), collectives)

    patch.setattr(regions, "install_vocabulary", shifted)


def numbers_of_the_wrong_part(patch: pytest.MonkeyPatch) -> None:
    """Every rank drops what the first one drops."""
    patch.setattr(dropout, "install_dropout", lambda *arguments: None)


@dataclass(frozen=True)
class Fault:
    """plant: puts it into this process. kind, changes, sequence_parallel: of the run that must show it."""

    plant: Plant
    kind: str = "llama"
    sequence_parallel: bool = False
    changes: tuple[tuple[str, Any], ...] = ()


FAULTS = (
    Fault(forgotten_sum_at_an_exit),
    Fault(forgotten_sum_at_an_entry),
    Fault(shard_off_by_one),
    Fault(shard_off_by_one, sequence_parallel=True),
    Fault(partial_gradient_not_summed, sequence_parallel=True),
    Fault(bias_on_every_rank, "gpt2"),
    Fault(words_off_by_one),
    Fault(numbers_of_the_wrong_part, "gpt2", True, (("resid_pdrop", 0.2),)),
    Fault(numbers_of_the_wrong_part, "bloom", False, (("attention_dropout", 0.2),)),
)


def record_with(collectives: Collectives, spec: RunSpec, plant: Plant) -> RunRecord:
    """The record of a run with a fault, which the search for its plan has not seen."""
    prepare(spec, collectives.mesh.world_size)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        return record(collectives, spec)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.plant.__name__}-{fault.kind}")
def test_planted_faults_are_rejected(run_of: Run, different: Any, fault: Fault) -> None:
    tensor = {"size": 2, "sequence_parallel": fault.sequence_parallel}
    spec = run_of(fault.kind, {"parallel.tensor": tensor}, dict(fault.changes), attention="eager")
    assert different(spec, 2, record_with, fault.plant)


OF_DATA = ("local-divisor", "clip-before-sum", "shard-off-by-one")
"""Faults of data parallelism, which tensor ranks alone do not have."""


def test_planted_faults_of_core_are_rejected(run_of: Run, different: Any) -> None:
    spec = run_of("llama", {"parallel.tensor": {"size": 2}})
    plan = prepare(spec, 2).plan
    of_one_stage = [mutant for mutant in MUTANTS if mutant not in PIPELINE_MUTANTS]
    assert tuple(mutant.name for mutant in of_one_stage if not mutant.applies(plan)) == OF_DATA
    missed = [m.name for m in MUTANTS if m.applies(plan) and not different(replace(spec, mutant=m.name), 2, record)]
    assert not missed
