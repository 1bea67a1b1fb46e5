"""What a microbatch costs in a stage: what the simulator and the closed forms start from."""

from __future__ import annotations

from dataclasses import dataclass

from colossal_core.program import Action


@dataclass(frozen=True)
class StageCosts:
    """What one microbatch costs in one stage.

    forward, backward_input, backward_weight: seconds of `F`, `I` and `W`. backward: seconds of `B`; None: those of `I` and `W` together.
    activation_bytes: kept from `F` until `B`, or until `I`. weight_part_bytes: what of them is kept from `I` until `W`; None: all.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    backward: float | None = None
    activation_bytes: int = 0
    weight_part_bytes: int | None = None

    @property
    def whole_backward(self) -> float:
        """Seconds of `B`."""
        return self.backward_input + self.backward_weight if self.backward is None else self.backward

    def seconds(self, action: Action) -> float:
        """Of a compute action; every other takes none."""
        if action.kind == "forward":
            return self.forward
        if action.kind == "backward":
            return self.whole_backward
        if action.kind == "backward_input":
            return self.backward_input
        return self.backward_weight if action.kind == "backward_weight" else 0.0


@dataclass(frozen=True)
class Costs:
    """stages: costs of each stage. link_seconds: from the end of an action until its tensors are on the other rank."""

    stages: tuple[StageCosts, ...]
    link_seconds: float = 0.0

    @classmethod
    def alike(cls, num_stages: int, stage: StageCosts | None = None, link_seconds: float = 0.0) -> Costs:
        """Every stage costs the same; without `stage` one second for each of `F`, `I` and `W`."""
        return cls((StageCosts() if stage is None else stage,) * num_stages, link_seconds)
