"""A user's own torch optimizer behind the interface of core's own: its steps, its state, and what of it is saved beside tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch

from colossal_core.errors import CheckpointError
from colossal_core.optimizer_state import StateTensor
from colossal_core.tensor_lists import clipped

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.shards import Shard


class ForeignOptimizer:
    """A torch optimizer over this rank's masters, of which a pipeline stage may have none. shards: by id() of each master.

    It reads gradients as torch's optimizers do, from the masters' `.grad`, and finds clipped copies there, so that `trained.gradients()`
    still reads the raw ones. A step that must be skipped is skipped on the host, which waits for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, shards: Mapping[int, Shard], collectives: Collectives) -> None:
        self.optimizer = optimizer
        self._collectives = collectives
        self._shards = shards
        self._names = {key: shard.layout.full_name for key, shard in shards.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        if skip is not None and bool(skip):
            return
        masters = [master for master in self._masters() if self._shards[id(master)].gradient is not None]
        raw = [cast("torch.Tensor", self._shards[id(master)].gradient) for master in masters]
        for master, gradient in zip(masters, clipped(raw, clip), strict=True):
            master.grad = gradient
        self.optimizer.step()
        for master, gradient in zip(masters, raw, strict=True):
            master.grad = gradient

    def state_tensors(self) -> Iterable[StateTensor]:
        """What there is: none before the first step, which begins with values that only the optimizer knows."""
        for master in self._masters():
            for key, value in self._state_of(master).items():
                if isinstance(value, torch.Tensor):
                    yield StateTensor(f"{self._kind}.{key}", master, value)

    def prepare_load(self, saved: Iterable[tuple[str, str]]) -> None:
        """Has state for exactly the parameters that a checkpoint has state of. saved: (kind, full name) of its tensors.

        State is made by one step with gradients of zero, after which every parameter gets its value back. The tensors are
        then overwritten by the checkpoint's, and the numbers by `load_state_dict`.
        """
        wanted = {name for kind, name in saved if kind.startswith(f"{self._kind}.")}
        if any(self._names[id(master)] in wanted and not self._state_of(master) for master in self._masters()):
            self._make_state()
        for master in self._masters():
            if self._names[id(master)] not in wanted:
                self.optimizer.state.pop(master, None)

    def _make_state(self) -> None:
        kept = [(master, master.detach().clone(), master.grad) for master in self._masters()]
        for master, value, _ in kept:
            master.grad = torch.zeros_like(value)
        self.optimizer.step()
        with torch.no_grad():
            for master, value, gradient in kept:
                master.copy_(value)
                master.grad = gradient

    def state_dict(self) -> dict[str, Any]:
        """What is saved beside tensors, as JSON. groups: numbers, texts and lists of them of each group; whatever else a group holds is
        the user's to set again. numbers: by full name, what the state holds beside tensors (a step counter).

        In a pipeline every rank calls it and gets the numbers of all parameters, and, under `stage_groups`, the groups of each stage's rank
        where they are not the same. Communication: one gather of bytes over all ranks, of this JSON.

        Raises: CheckpointError for a state that is neither.
        """
        if self._collectives.mesh.size("pp") == 1:
            return self._own_state()
        from colossal_core.checkpoint.agreement import all_or_none

        def own() -> tuple[None, dict[str, Any]]:
            return None, self._own_state()

        _, found = all_or_none(self._collectives, "the optimizer's state was not saved", own)
        numbers = {name: kept for state in found for name, kept in state["numbers"].items()}
        saved: dict[str, Any] = {"groups": found[0]["groups"], "numbers": numbers}
        if any(state["groups"] != saved["groups"] for state in found):
            every = len(found) // self._collectives.mesh.size("pp")
            saved["stage_groups"] = [state["groups"] for state in found[::every]]
        return saved

    def _own_state(self) -> dict[str, Any]:
        groups = [
            {key: kept for key, value in group.items() if (kept := _plain(value)) is not None}
            for group in self.param_groups
        ]
        return {
            "groups": groups,
            "numbers": {self._names[id(master)]: self._numbers(master) for master in self._masters()},
        }

    def _numbers(self, master: torch.nn.Parameter) -> dict[str, Any]:
        found = {key: value for key, value in self._state_of(master).items() if not isinstance(value, torch.Tensor)}
        for key, value in found.items():
            if value is not None and _plain(value) is None:
                message = (
                    f"checkpoint: the optimizer keeps {key} of {self._names[id(master)]} as {type(value).__name__}, "
                    "and only tensors, numbers, texts and lists of them can be saved"
                )
                raise CheckpointError(message)
        return {key: _plain(value) for key, value in found.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises CheckpointError for another number of groups, or of stages where each had groups of its own."""
        saved = self._saved_groups(state_dict)
        if len(saved) != len(self.param_groups):
            message = (
                f"checkpoint: the optimizer has {len(self.param_groups)} groups, the saved one had {len(saved)}: "
                "hand over the same groups"
            )
            raise CheckpointError(message)
        for group, settings in zip(self.param_groups, saved, strict=True):
            for key, value in settings.items():
                if isinstance(group.get(key), torch.Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = tuple(value) if isinstance(value, list) else value
        for master in self._masters():
            numbers = state_dict["numbers"].get(self._names[id(master)], {})
            if numbers:
                self.optimizer.state[master].update(numbers)

    def _saved_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        mesh = self._collectives.mesh
        by_stage = state_dict.get("stage_groups")
        if by_stage is None:
            groups: list[dict[str, Any]] = state_dict["groups"]
            return groups
        if len(by_stage) != mesh.size("pp"):
            message = (
                f"checkpoint: the optimizer's groups were not the same on the {len(by_stage)} ranks of the pipeline that saved "
                "it: load it with as many, or make groups that do not depend on which parameters there are"
            )
            raise CheckpointError(message)
        of_stage: list[dict[str, Any]] = by_stage[mesh.coordinate(self._collectives.rank)["pp"]]
        return of_stage

    def _masters(self) -> list[torch.nn.Parameter]:
        return [master for group in self.param_groups for master in group["params"]]

    def _state_of(self, master: torch.nn.Parameter) -> Mapping[str, Any]:
        """Its state as it is: reading it makes no entry in the optimizer's table."""
        found: Mapping[str, Any] = self.optimizer.state.get(master, {})
        return found

    @property
    def _kind(self) -> str:
        return type(self.optimizer).__name__.lower()


def _plain(value: Any) -> Any:
    """The value as JSON holds it, or None where it does not."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    if isinstance(value, tuple | list):
        return list(value) if all(isinstance(item, bool | int | float | str) for item in value) else None
    return value if isinstance(value, bool | int | float | str) else None
