"""`Booster`: assembles a model, a plan and the other ranks into `Trained`. It owns no loop of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.config import TrainConfig
from colossal_core.errors import ConfigError, Problem
from colossal_core.mesh import DATA_AXES
from colossal_launch import session
from colossal_launch.assembly import Assembly, assemble, read_setup
from colossal_launch.data.loader import BatchShare, DistributedLoader, MapDataset
from colossal_launch.exporting import HuggingFaceExporter
from colossal_launch.models.buffers import restore_meta_buffers

if TYPE_CHECKING:
    import torch
    from torch import nn

    from colossal_core.loss import LossFunction
    from colossal_core.optimizers import OptimizerFactory
    from colossal_core.trained import Trained
    from colossal_launch.models.weights import WeightSource


class Booster:
    """Reads a config (a path, a mapping, or a `TrainConfig`) and carries it out on a model.

    tokenizer_file: a tokenizer.json that `export_hf` puts beside the weights.

    Raises: ConfigError with every problem of the config, PluginError with every problem of the installed plugins.
    """

    def __init__(
        self, config: str | Path | Mapping[str, Any] | TrainConfig, tokenizer_file: Path | None = None
    ) -> None:
        self._setup = read_setup(config)
        self._loaders: list[DistributedLoader] = []
        self._trained: Trained | None = None
        self._tokenizer_file = tokenizer_file

    @property
    def config(self) -> TrainConfig:
        return self._setup.config

    def boost(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
        loss_fn: LossFunction | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        weights: WeightSource | None = None,
    ) -> Trained:
        """The model in training, spread as the config says. The module is wrapped in place; no name changes.

        model: any nn.Module, also with its parameters on the meta device. optimizer: an instance with empty state on the
        model's parameters (re-pointed in place), a factory `params -> optimizer`, or None (the config's). loss_fn: (outputs, batch) ->
        (sum of losses, number of items); None: cross-entropy for language models, else the model's own `.loss`. weights: values of
        parameters on the meta device; None: the modules' own initialisation, keyed by `train.seed`.

        Communication: fingerprints of the plan are compared over all ranks, then whatever the strategies need.
        """
        from colossal_core.memory_report import memory_told
        from colossal_core.wrap import Parts, wrap

        if self._trained is not None:
            raise ConfigError([Problem("booster", "has boosted a model already", "make a Booster for each model")])
        device = self._device()
        restore_meta_buffers(model)
        assembly = self._assemble(model, device, own_optimizer=optimizer is not None, own_loss=loss_fn is not None)
        values = _meta_values(model, assembly, weights, self.config.train.seed)
        parts = Parts(optimizer, lr_scheduler, loss_fn, values, HuggingFaceExporter(model, self._tokenizer_file))
        collectives = session.collectives_for(assembly.plan.mesh, device)
        specs = self._setup.plugins.optimizers()
        with memory_told(lambda: self._state_report(model, assembly, device)):
            self._trained = wrap(
                model, assembly.plan, assembly.anatomy, assembly.strategies, collectives, assembly.ops, specs, parts
            )
        for number, loader in enumerate(self._loaders):
            self._trained.attach(_loader_name(number), loader)
        return self._trained

    def _state_report(self, model: nn.Module, assembly: Assembly, device: torch.device) -> str:
        """What takes the memory where it runs out before the first step."""
        from colossal_core.loss import LossOwner
        from colossal_core.memory_report import state_report
        from colossal_core.peak_estimate import PeakEstimator

        loss_owner = LossOwner(assembly.anatomy, assembly.ops, None)
        estimator = PeakEstimator(
            model,
            assembly.plan,
            assembly.strategies,
            loss_owner,
            None,
            state_bytes=assembly.optimizer_state_bytes,
            device_type=device.type,
        )
        return state_report(estimator, session.rank(), device)

    def _device(self) -> torch.device:
        joined = session.joined_device()
        asked = self.config.train.device
        if joined is None:
            return session.choose_device(asked, 0)
        if asked not in ("auto", joined.type):
            reason = f"the group was joined on {joined.type}"
            raise ConfigError(
                [Problem("train.device", reason, f"call launch(device={asked!r}), or leave it out", asked)]
            )
        return joined

    def _assemble(self, model: nn.Module, device: torch.device, *, own_optimizer: bool, own_loss: bool) -> Assembly:
        return assemble(
            self._setup,
            model,
            world_size=session.world_size(),
            device_type=device.type,
            own_optimizer=own_optimizer,
            own_loss=own_loss,
        )

    def dataloader(
        self, dataset: MapDataset, shuffle: bool = True, collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> DistributedLoader:
        """This rank's batches: step k holds global samples [kG, (k+1)G) of a shuffle that depends on `data.seed` alone.

        Saved and restored with the checkpoints of the boosted model; its position survives another mesh. Ends after `train.num_steps`.
        """
        data_seed = self.config.data.seed if self.config.data is not None else self.config.train.seed
        loader = DistributedLoader(
            dataset,
            self._share(),
            seed=data_seed,
            shuffle=shuffle,
            num_steps=self.config.train.num_steps,
            collate_fn=collate_fn,
        )
        self._loaders.append(loader)
        if self._trained is not None:
            self._trained.attach(_loader_name(len(self._loaders) - 1), loader)
        return loader

    def _share(self) -> BatchShare:
        """This rank's place along the data axes, known from the config alone."""
        from colossal_core.plan import mesh_of

        mesh = mesh_of(self._setup.plugins.axis_sizes(self.config), session.world_size())
        coordinate = mesh.coordinate(session.rank())
        return BatchShare(self.config.batch.global_size, mesh.flat_index(coordinate, DATA_AXES), mesh.size(DATA_AXES))


def _loader_name(number: int) -> str:
    return f"dataloader.{number}"


def _meta_values(model: nn.Module, assembly: Assembly, weights: WeightSource | None, seed: int) -> Any:
    """Values for a model whose parameters are on the meta device; the structure is copied before the model is taken apart. Blocks of other
    pipeline stages are neither drawn nor read.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return None
    from colossal_launch.models.initialise import InitialWeights
    from colossal_launch.models.weights import all_values

    source = weights if weights is not None else InitialWeights(model, seed)
    coordinate = assembly.plan.mesh.coordinate(session.rank())
    layouts = assembly.plan.layouts.values()
    held = {layout.block for layout in layouts if layout.compute.is_present(coordinate)}
    return all_values(source, assembly.anatomy.blocks, held)
