"""torch.compile of every block by itself, outside whatever recomputation has already put into `block.forward`, and of core's own loss.

Never `Module.compile()`: that would trace the hooks with which later phases gather parameters. Hooks stay outside, and eager.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colossal_core._torch_private import raise_recompile_limit
from colossal_core.errors import Problem
from colossal_core.ops.compiled_cross_entropy import compiled_cross_entropy
from colossal_core.ops.table import OpImplementation
from colossal_core.program import WHOLE, missing_parts
from colossal_core.recompute import no_blocks
from colossal_core.split_compiled import IN_TWO
from colossal_core.strategy import Phase, StrategySpec

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import CompileConfig, TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.strategy import ApplyContext

LOSS = "cross_entropy"
"""The op that is core's own loss of a language model."""


@dataclass(frozen=True)
class Compile:
    """The built-in strategy `compile`. Decisions: `compile` -> block -> backend. No communication.

    Under a program that cuts backward passes in two, blocks get two backward graphs (`split_compiled.py`).

    Core's own cross-entropy is compiled too, in place of the reference: eager, it is about 3 % of a GPT-2 1.5B step. A faster
    implementation of a plugin, a model's own loss and a user's `loss_fn` are left as they are.
    """

    config: CompileConfig
    name: str = field(default="compile", init=False)
    axes: tuple[str, ...] = field(default=(), init=False)
    phase: Phase = field(default=Phase.COMPILE, init=False)
    after: tuple[str, ...] = field(default=(), init=False)

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        del mesh
        problems = []
        if not anatomy.blocks:
            problems.append(Problem("compile.enabled", *no_blocks(anatomy, "compile.enabled: false"), True))
        known = torch.compiler.list_backends(exclude_tags=())
        if self.config.backend not in known:
            reason = f"torch {torch.__version__} has no such backend"
            problems.append(Problem("compile.backend", reason, f"use one of {', '.join(known)}", self.config.backend))
        if self.config.backend == "eager" and config.recompute.mode != "none":
            reason = "does not bring random numbers back when it recomputes a block: dropout would get wrong gradients"
            remedy = "use aot_eager or inductor, or recompute.mode: none"
            problems.append(Problem("compile.backend", reason, remedy, self.config.backend))
        return problems

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        draft = draft.with_decisions("compile", dict.fromkeys(anatomy.blocks, self.config.backend))
        if anatomy.task == "own-loss" or anatomy.own_loss or draft.ops.get(LOSS) != "reference":
            return draft
        return draft.with_op(LOSS, self._provider).with_note(f"loss: compiled ({self.config.backend})")

    @property
    def _provider(self) -> str:
        """What the plan says of an op that this strategy compiles."""
        return f"compiled ({self.config.backend})"

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        """Unchanged: what fusion saves is in the measured rates of the profile, not in a formula."""
        del profile
        return table

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        decisions = plan.decisions.get("compile", {})
        raise_recompile_limit(len(decisions))
        in_two = bool(missing_parts(plan.program, WHOLE))
        for name, chosen in decisions.items():
            block = model.get_submodule(name)
            backend: Any = IN_TWO[chosen] if in_two else chosen
            compiled = torch.compile(block.forward, backend=backend, dynamic=self.config.dynamic, fullgraph=False)
            vars(block)["forward"] = compiled
        if plan.ops.get(LOSS) == self._provider:
            function = compiled_cross_entropy(self.config.backend, dynamic=self.config.dynamic)
            context.ops = context.ops.with_implementation(OpImplementation(LOSS, self._provider, function))

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def compile_spec() -> StrategySpec:
    """The section `compile`: off by default."""
    from colossal_core.config.sections import CompileConfig

    return StrategySpec(
        name="compile",
        section="compile",
        config_class=CompileConfig,
        factory=lambda config: Compile(config) if config.enabled else None,
    )
