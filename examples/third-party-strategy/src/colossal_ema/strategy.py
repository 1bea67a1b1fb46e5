"""The strategy `ema`: one tensor beside every trained weight, sharded as that weight is, updated after the optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from colossal_core.errors import Problem
from colossal_core.strategy import Phase

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.shards import ParameterState
    from colossal_core.strategy import ApplyContext, StepView
    from colossal_ema.config import EmaConfig


class EmaStrategy:
    """Only observes: it reads the master weights and never writes them, and sends nothing."""

    name = "ema"
    axes: tuple[str, ...] = ()
    phase = Phase.OPTIMIZER
    after: tuple[str, ...] = ()

    def __init__(self, config: EmaConfig) -> None:
        assert config.decay is not None
        self.config = config
        self._decay = config.decay
        self._averages: dict[str, torch.Tensor] = {}
        self._parameters: ParameterState | None = None

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        del anatomy, mesh
        steps, every = config.train.num_steps, self.config.every_steps
        if every > steps:
            reason = f"is more than the {steps} steps of the run, so that nothing would be averaged"
            return [Problem("ema.every_steps", reason, f"use at most {steps}, or raise train.num_steps", every)]
        return []

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        del anatomy
        return draft.with_note(f"ema: decay {self._decay:g}, every {self.config.every_steps} steps")

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        """One more state in the master dtype: as many bytes as the masters, divided over the ranks as they are."""
        parameters = table.model.num_trainable / (table.inputs["tp"] * table.inputs["pp"])
        shards = np.where(table.inputs["zero_stage"] >= 1, table.inputs["dp_shard"] * table.inputs["cp"], 1)
        return table.adding("optimizer_bytes", profile.master_element_bytes * parameters / shards)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        del model, plan
        self._parameters = context.parameter_state()
        for name, shard in self._parameters.shards.items():
            if shard.layout.trainable:
                average = shard.master.detach().clone()
                self._averages[name] = average
                context.tensors.add("ema", name, average, shard.layout.state)
        context.hooks.add("after_step", self._update)

    def _update(self, view: StepView) -> None:
        if view.step % self.config.every_steps == 0:
            for name, average in self._averages.items():
                average.lerp_(view.parameters.shards[name].master.detach(), 1.0 - self._decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchanges weights and averages, and exchanges them back at the end."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        assert self._parameters is not None, "the strategy was not applied"
        self._parameters.wait_published()
        with torch.no_grad():
            for name, average in self._averages.items():
                master = self._parameters.shards[name].master
                kept = master.detach().clone()
                master.copy_(average)
                average.copy_(kept)
        self._parameters.publish()
        self._parameters.wait_published()

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state
