"""The handle that `Booster.boost` returns: one line trains, whatever the strategies behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from colossal_core.assemble import gather_full
from colossal_core.errors import CheckpointError, ColossalError
from colossal_core.foreign_optimizer import ForeignOptimizer
from colossal_core.memory_report import memory_told, step_report
from colossal_core.mesh import WORLD
from colossal_core.registered import buffers_of, full_tensors, registered_tensors

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.checkpoint import FoundCheckpoint
    from colossal_core.collectives import Collectives
    from colossal_core.gradient_statistics import GradientStatistics
    from colossal_core.optimizer_state import StateTensor
    from colossal_core.plan import Plan
    from colossal_core.step import EvalResult, StepEngine, StepResult
    from colossal_core.strategy import RegisteredTensor, Strategy


class Stateful(Protocol):
    """What is saved beside tensors: a data loader's position, a learning-rate scheduler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


Exporter = Callable[["Trained", Path, "torch.dtype | None"], None]


class Trained:
    """A model in training. All methods but `step` and `on_step` are collective: every rank calls them together."""

    def __init__(self, engine: StepEngine, strategies: Sequence[Strategy], exporter: Exporter | None = None) -> None:
        self._engine = engine
        self._exporter = exporter
        self._strategies = tuple(strategies)
        self._callbacks: list[Callable[[StepResult], None]] = []
        self._stateful: dict[str, Stateful] = {}
        self._loaded_stateful: dict[str, dict[str, Any]] = {}

    @property
    def module(self) -> nn.Module:
        """The user's module, wrapped in place. Its parameters are this rank's compute copies."""
        self._engine.state.wait_published()
        return self._engine.model

    @property
    def plan(self) -> Plan:
        return self._engine.plan

    @property
    def collectives(self) -> Collectives:
        """The other ranks, on the plan's mesh; with colossal-comm, its `ledger` counts what was sent."""
        return self._engine.context.collectives

    @property
    def step(self) -> int:
        """Finished optimizer steps, skipped ones included."""
        return self._engine.step

    @property
    def skipped_steps(self) -> torch.Tensor:
        """How many of them left out the update: 0-d int64, the same on every rank; reading it waits for the device. Saved and restored."""
        return self._engine.skipped_steps.clone()

    def strategy(self, name: str) -> Strategy:
        """An active strategy by its name: the way to what a plugin offers beside training."""
        found = next((strategy for strategy in self._strategies if strategy.name == name), None)
        if found is None:
            message = f"no strategy {name!r} is active; there are {', '.join(strategy.name for strategy in self._strategies) or 'none'}"
            raise KeyError(message)
        return found

    def train_step(self, batch: Mapping[str, torch.Tensor]) -> StepResult:
        """One optimizer step on this rank's share of a global batch: see `colossal_core.step`.

        A model in evaluation mode is put into training mode first; parts of one in training mode stay as the user has set them.
        """
        if not self._engine.model.training:
            self._engine.model.train()
        with memory_told(lambda: step_report(self._engine, self._strategies, batch, training=True)):
            result = self._engine.train_step(batch)
        for callback in self._callbacks:
            callback(result)
        return result

    def eval_step(self, batch: Mapping[str, torch.Tensor]) -> EvalResult:
        """The loss of a batch, without gradients, in evaluation mode."""
        with memory_told(lambda: step_report(self._engine, self._strategies, batch, training=False)):
            return self._engine.eval_step(batch)

    def on_step(self, callback: Callable[[StepResult], None]) -> None:
        """Calls `callback(result)` after every `train_step`, in the order of registration."""
        self._callbacks.append(callback)

    def attach(self, name: str, stateful: Stateful) -> None:
        """Saves and restores an object's `state_dict` (JSON values, the same on every rank) with the checkpoints.

        After a `load` it takes the state that the checkpoint held under this name, if any.
        """
        self._stateful[name] = stateful
        if name in self._loaded_stateful:
            stateful.load_state_dict(self._loaded_stateful.pop(name))

    def gradients(self) -> dict[str, torch.Tensor]:
        """The full gradient of the last step by full name: summed over all ranks, unscaled, unclipped. Trainable parameters only."""
        found = {}
        context = self._engine.context
        for name, layout in self.plan.layouts.items():
            if layout.trainable:
                shard = self._engine.state.shards.get(name)
                local = None if shard is None else shard.gradient
                if local is None:
                    shape = (0,) if shard is None else tuple(shard.master.shape)
                    local = torch.zeros(shape, dtype=context.precision.gradient, device=context.device)
                found[name] = gather_full(local, layout.state, context.collectives)
        return found

    def gradient_statistics(self) -> Mapping[str, GradientStatistics]:
        """Norm, largest magnitude, share of zeros and elements that are not finite, of the gradients of the last step (as `gradients` reads
        them): by unit (block, or module outside every block), and of all together under `"*"`. Frozen parameters are in none.

        Communication: two all-reduces over all ranks, of 24 and 8 bytes a unit.
        """
        from colossal_core.gradient_statistics import gradient_statistics

        engine = self._engine
        return gradient_statistics(
            engine.state, engine.plan, engine.context.collectives, engine.context.precision.gradient
        )

    def full_parameter(self, name: str) -> torch.Tensor:
        """One whole parameter, in the master dtype. Aliases of a tied parameter are known too."""
        layouts, context = self.plan.layouts, self._engine.context
        layout = next((one for full, one in layouts.items() if name == full or name in one.aliases), None)
        if layout is None:
            message = f"no parameter {name!r}; the model has {', '.join(list(layouts)[:4])}, ..."
            raise KeyError(message)
        shard = self._engine.state.shards.get(layout.full_name)
        if shard is not None:
            return gather_full(shard.master.detach(), layout.state, context.collectives)
        dtype = context.precision.master if layout.trainable else context.slots.dtype(layout.full_name)
        if not layout.trainable and dtype.is_floating_point:
            dtype = context.precision.compute
        return gather_full(torch.empty(0, dtype=dtype, device=context.device), layout.state, context.collectives)

    def full_states(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, full name, whole tensor) of everything registered beside the parameters: optimizer states, what plugins keep."""
        kept = (tensor for tensor in self._tensors() if tensor.kind not in ("parameter", "buffer"))
        return full_tensors(kept, self.collectives)

    def full_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(full name, tensor) of every persistent buffer, as it is where its module runs."""
        for _, name, tensor in full_tensors(buffers_of(self._engine), self.collectives):
            yield name, tensor

    def save(self, directory: str | Path) -> Path:
        """Writes a checkpoint of this step under `directory`; each rank writes what it owns. Returns its folder."""
        from colossal_core.checkpoint import capture_random_state, save

        context = self._engine.context
        self._engine.state.wait_published()
        return save(
            Path(directory),
            self.step,
            self._tensors(),
            self._metadata(),
            context.collectives,
            keep=self.plan.config.checkpoint.keep,
            rank_metadata=capture_random_state(context.device),
        )

    def load(self, directory: str | Path) -> FoundCheckpoint | None:
        """Takes back the newest good checkpoint under `directory`, on whatever mesh it was written. None when there is none.

        What is returned names its folder, its step, and the newer ones that are damaged. Raises: CheckpointError when it does not fit
        the model, or when there are checkpoints and none is good.
        """
        from colossal_core.checkpoint import find_latest, load

        context = self._engine.context
        found = find_latest(Path(directory), context.collectives)
        if found is not None:
            self._engine.state.wait_published()  # a gather on its way would overwrite what is read
            if isinstance(self._engine.optimizer, ForeignOptimizer):
                self._engine.optimizer.prepare_load(found.manifest.by_name)
            states = list(self._engine.optimizer.state_tensors())
            metadata = load(found.path, self._tensors(states), context.collectives)
            for state in states:
                if state.store is not None:
                    state.store()
            self._restore(metadata, found)
        return found

    def export_hf(self, directory: str | Path, dtype: torch.dtype | None = None) -> None:
        """Writes what transformers' `from_pretrained` loads, in the dtype of the masters unless told otherwise. Rank 0 writes.

        Communication: each parameter is gathered by itself; no rank holds the whole model on its device.
        """
        if self._exporter is None:
            raise ColossalError(
                "export_hf: needs a model boosted by colossal_launch.Booster: pip install 'colossal-launch[hf]'"
            )
        self._exporter(self, Path(directory), dtype)

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says yes. Communication: one all-reduce of 8 bytes over all ranks; waits for it."""
        context = self._engine.context
        seen = torch.tensor(float(flag), dtype=torch.float64, device=context.device)
        context.collectives.start_all_reduce(seen, WORLD, op="max", tag="flag").wait()
        return bool(seen.item())

    def verify(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Compares the loss that this mesh gives for a batch share with the one that this rank alone computes for the gathered batch.

        Returns the relative difference. Nothing is trained. For the whole comparison (gradients, states) use `colossal verify`.
        """
        from colossal_core.self_check import loss_difference

        return loss_difference(self._engine, batch)

    def _tensors(self, optimizer_states: Sequence[StateTensor] | None = None) -> list[RegisteredTensor]:
        """Everything that a checkpoint holds. optimizer_states: as they are now where none are given."""
        states = self._engine.optimizer.state_tensors() if optimizer_states is None else optimizer_states
        return registered_tensors(self._engine, states)

    def _metadata(self) -> dict[str, Any]:
        """What is saved beside tensors, the same on every rank."""
        return {
            "step": self.step,
            "plan": self.plan.fingerprint,
            "config": self.plan.config.model_dump(mode="json"),
            "strategies": {strategy.name: dict(strategy.state()) for strategy in self._strategies},
            "stateful": {name: stateful.state_dict() for name, stateful in self._stateful.items()},
        }

    def _restore(self, metadata: Mapping[str, Any], found: FoundCheckpoint) -> None:
        """Takes back everything that is not a tensor. Random state returns on the same mesh only; training itself draws by key."""
        from colossal_core.checkpoint import restore_random_state

        context = self._engine.context
        for strategy in self._strategies:
            if strategy.name in metadata["strategies"]:
                strategy.load(metadata["strategies"][strategy.name])
        for name, stateful in self._stateful.items():
            if name not in metadata["stateful"]:
                message = f"checkpoint: holds no state of {name}: it was saved by a run without it"
                raise CheckpointError(message)
            stateful.load_state_dict(metadata["stateful"][name])
        self._loaded_stateful = {
            name: dict(state) for name, state in metadata["stateful"].items() if name not in self._stateful
        }
        random = found.manifest.rank_metadata_for(context.collectives.mesh.sizes, context.collectives.rank)
        if random is not None:
            restore_random_state(random, context.device)
        self._engine.step = int(metadata["step"])
        self._engine.state.publish()
        self._engine.state.wait_published()
