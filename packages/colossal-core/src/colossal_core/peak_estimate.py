"""Memory of a whole step before it runs: the state by the strategies' closed forms, activations by a trace on fake tensors.

The same estimate is printed by `colossal plan` and used to find the change of plan that would fit where memory ran out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from colossal_core.activations import Activations, ActivationTracer, Treatment
from colossal_core.estimate import EstimateTable, HardwareProfile
from colossal_core.mesh import BASE_AXES
from colossal_core.plan_size import model_size, positions_in
from colossal_core.precision import precision_of
from colossal_core.strategy import Phase

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from colossal_core.block_memory import Kept
    from colossal_core.loss import LossOwner
    from colossal_core.plan import Plan
    from colossal_core.rank_compute import RankCompute
    from colossal_core.strategy import Strategy

LIBRARY_BYTES = {"cuda": 64 * 2**20}
"""Workspaces of libraries, taken through torch's allocator: cuBLAS and cuBLASLt, 32 MiB each on Hopper. By device type; others: none."""

STATE_KINDS = ("parameters", "masters", "gradients", "optimizer")


@dataclass(frozen=True)
class Peak:
    """Bytes on the fullest rank at the highest moment of a step, by kind. moment: its name, as `EstimateTable.moments` has it.

    parameters: the compute copy that is always there; gathered: what is there only while it is used. transients: gradients on their way,
    what is sent and received. activations: kept for the backward pass, of all microbatches that are alive at once. work: head, loss
    and its gradient, or one block's backward pass: what is at the peak beyond the activations. libraries: workspaces. problem: why
    activations and work are not known (then 0), else "".
    """

    parameters: int
    masters: int
    gradients: int
    optimizer: int
    gathered: int
    transients: int
    activations: int
    work: int
    libraries: int
    moment: str = ""
    problem: str = ""

    @property
    def state(self) -> int:
        return self.parameters + self.masters + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.state + self.gathered + self.transients + self.activations + self.work + self.libraries

    def by_kind(self) -> dict[str, int]:
        """Bytes by name, in the order in which they are told."""
        return {
            "parameters": self.parameters,
            "masters": self.masters,
            "gradients": self.gradients,
            "optimizer states": self.optimizer,
            "gathered parameters": self.gathered,
            "gradient buffers": self.transients,
            "activations": self.activations,
            "loss and work": self.work,
            "libraries": self.libraries,
        }


@dataclass(frozen=True)
class Change:
    """A plan that differs in a few settings. settings: dotted field -> value, for the reader. inputs: columns of the estimate table that
    replace the plan's. kept: of `recompute`; None: the plan's. micro_size: None: the plan's.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)
    kept: Kept | None = None
    micro_size: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name}: {value}" for name, value in self.settings.items()) or "as planned"

    def and_also(self, other: Change) -> Change:
        """Both changes; where they touch the same, the other's holds."""
        return Change(
            {**self.settings, **other.settings},
            {**self.inputs, **other.inputs},
            other.kept or self.kept,
            other.micro_size or self.micro_size,
        )


AS_PLANNED = Change()


class PeakEstimator:
    """Estimates one plan and changes of it. No GPU, no process group, no memory.

    model: real, on meta, or in training already (also on an accelerator: nothing is allocated there). strategies: the active ones.
    loss_owner: as in training, on any ops. state_bytes: of optimizer state for each trained element. device_type: where training runs.
    batch: one rank's batch or an example of it, labels included; only shapes beyond the first dimension and dtypes are read. None: the
    activations are left out, and `Peak.problem` says so. computes: what ranks compute of the model (`rank_compute`); None: the model as
    it is.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        strategies: Sequence[Strategy],
        loss_owner: LossOwner,
        batch: Mapping[str, torch.Tensor] | None,
        *,
        state_bytes: float,
        device_type: str,
        computes: RankCompute | None = None,
    ) -> None:
        from colossal_core.ops import OpTable
        from colossal_core.ops.reference import reference_ops

        self.plan = plan
        self._strategies = tuple(strategies)
        self._batch = None if batch is None else dict(batch)
        self._state_bytes = state_bytes
        self._device_type = device_type
        self._precision = precision_of(plan.config)
        on_reference = loss_owner.with_ops(OpTable({found.op: found for found in reference_ops()}))
        self._tracer = ActivationTracer(model, plan.block_names, on_reference, self._precision, computes)
        self._traced: dict[tuple[Treatment, int], Activations] = {}

    def estimate(self, change: Change = AS_PLANNED) -> Peak:
        """The peak of the plan with a change. A second or two the first time that a treatment of blocks or a micro size is asked for."""
        table = self.table(change)
        traced = self._activations(change)
        table = table.setting("activation_bytes_per_microbatch", _row(traced.kept_bytes))
        table = table.setting("loss_bytes", _row(traced.loss_bytes))
        table = table.setting("backward_bytes", _row(traced.backward_bytes))

        def found(name: str) -> int:
            return int(table.column(name)[0])

        moments = {name: float(values[0]) for name, values in table.moments().items()}
        moment = max(moments, key=lambda name: moments[name])
        at_loss, at_end = moment == "loss", moment.startswith("end")
        has_gradients = at_end or table.inputs["num_microbatches"][0] > 1
        return Peak(
            parameters=found("parameter_bytes"),
            masters=found("master_bytes"),
            gradients=found("gradient_bytes") if has_gradients else 0,
            optimizer=found("optimizer_bytes"),
            gathered=found("gathered_bytes"),
            transients=0 if at_loss else found("transient_bytes"),
            activations=0 if at_end else int(traced.kept_bytes * table.column("num_microbatches_in_flight")[0]),
            work=traced.loss_bytes if at_loss else traced.backward_bytes,
            libraries=LIBRARY_BYTES.get(self._device_type, 0),
            moment=moment,
            problem=traced.problem,
        )

    def table(self, change: Change = AS_PLANNED) -> EstimateTable:
        """The strategies' closed forms for the plan with a change: one row, without activations."""
        return state_table(self.plan, self._strategies, self._state_bytes, change, positions_in(self._batch))

    def _activations(self, change: Change) -> Activations:
        if self._batch is None:
            return Activations(problem="no batch is known to trace with")
        size = change.micro_size or self.plan.batch.micro_size
        treatment = treatment_of(self.plan)
        if change.kept is not None:
            treatment = replace(treatment, kept=change.kept)
        key = (treatment, size)
        if key not in self._traced:
            resized = {
                name: torch.empty((size, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")
                for name, tensor in self._batch.items()
            }
            self._traced[key] = self._tracer.trace(resized, treatment)
        return self._traced[key]


def treatment_of(plan: Plan) -> Treatment:
    """How the plan runs blocks: what is recomputed, and which backend compiles them."""
    kept: Kept = "none"
    for mode in plan.decisions.get("recompute", {}).values():
        assert mode in ("full", "selective"), mode
        kept = "full" if mode == "full" else "selective"
    backend = next(iter(plan.decisions.get("compile", {}).values()), "")
    return Treatment(kept, plan.config.recompute.memory_budget, backend)


def state_table(
    plan: Plan,
    strategies: Sequence[Strategy],
    state_bytes: float,
    change: Change = AS_PLANNED,
    positions: int = 0,
) -> EstimateTable:
    """The estimate table of one plan: one row, by the strategies' closed forms. state_bytes: of optimizer state for a trained element.
    positions: of one sequence; 0: not known, and what is sent of activations is left out. One microbatch's activations are alive at once
    where no strategy says otherwise.
    """
    profile = profile_of(plan)
    table = EstimateTable(
        replace(model_size(plan, state_bytes), sequence_length=positions), inputs_of(plan, change), plan=plan
    ).setting("num_microbatches_in_flight", _row(1))
    if all(strategy.phase is not Phase.SHARD_STATE for strategy in strategies):
        table = _whole_state(table, profile)
    for strategy in strategies:
        table = strategy.estimate(table, profile)
    return table


def profile_of(plan: Plan) -> HardwareProfile:
    """Any device, with the element sizes of the plan's precision."""
    formats = precision_of(plan.config)
    return HardwareProfile(
        "any", float("inf"), float("inf"), float("inf"), float("inf"), 0.0,
        compute_element_bytes=formats.compute.itemsize,
        master_element_bytes=formats.master.itemsize,
        gradient_element_bytes=formats.gradient.itemsize,
    )  # fmt: skip


def inputs_of(plan: Plan, change: Change = AS_PLANNED) -> dict[str, np.ndarray]:
    """The columns that describe a plan with a change (`estimate.INPUTS`): its choices, and what the change replaces."""
    inputs = {axis: float(plan.mesh.size(axis)) for axis in BASE_AXES}
    size = change.micro_size or plan.batch.micro_size
    kept = change.kept or treatment_of(plan).kept
    inputs |= {"zero_stage": _stage(plan), "recompute": float(kept == "full")}
    inputs |= {"micro_size": size, "num_microbatches": plan.batch.share / size, **change.inputs}
    return {name: _row(value) for name, value in inputs.items()}


def _stage(plan: Plan) -> float:
    """As the section `parallel.zero` says; without one, 1 where masters are sharded."""
    asked = getattr(getattr(plan.config.section("parallel"), "zero", None), "stage", None)
    sharded = any(layout.state.flat is not None for layout in plan.layouts.values())
    return float(sharded) if asked is None else float(asked)


def _whole_state(table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
    """Bytes of a state that no strategy keeps: all of it is on every rank."""
    compute, master, trained = (
        profile.compute_element_bytes,
        profile.master_element_bytes,
        table.model.num_trainable,
    )
    table = table.adding("parameter_bytes", _row(compute * table.model.num_parameters))
    table = table.adding("gradient_bytes", _row(profile.kept_gradient_bytes * trained))
    table = table.adding("master_bytes", _row((master if master != compute else 0) * trained))
    return table.adding("optimizer_bytes", _row(table.model.state_bytes(master) * trained))


def _row(value: float) -> np.ndarray:
    import numpy as np

    return np.array([float(value)])
