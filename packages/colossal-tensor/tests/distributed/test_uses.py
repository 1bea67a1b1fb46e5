"""What else is done with a model that is cut: evaluation, statistics, optimizers and losses of the user's, frozen parameters, no values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from colossal_core.errors import ConfigError
from colossal_core.examine import examine
from colossal_core.ops import build_op_table
from colossal_core.plan import make_plan
from colossal_core.testing import RunSpec, WorkerPool, relative_difference
from colossal_core.testing.models import next_token_loss
from colossal_core.testing.parity import ModelBuilder, prepare, share_of_step, start
from colossal_core.wrap import Parts, wrap

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]
AWKWARD: Mapping[str, Any] = {"vocab_size": 97}


def evaluated(collectives: Collectives, spec: RunSpec) -> dict[str, torch.Tensor]:
    """The loss of an evaluation before and after a step, that of a forward pass of the user's own, and every whole parameter."""
    trained = start(spec, collectives)
    share = share_of_step(spec, trained.plan, collectives.rank, 0)
    found = {"before": trained.eval_step(share).loss}
    trained.train_step(share)
    found["after"] = trained.eval_step(share).loss
    return {**found, **{name: trained.full_parameter(name) for name in trained.plan.layouts}}


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_evaluation_is_that_of_one_process(pool: WorkerPool, run_of: Run, kind: str, sequence_parallel: bool) -> None:
    wanted = pool.run(1, evaluated, run_of(kind, {}, AWKWARD))[0]
    tensor = {"size": 2, "sequence_parallel": sequence_parallel}
    for found in pool.run(2, evaluated, run_of(kind, {"parallel.tensor": tensor}, AWKWARD)):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].shape == value.shape
            assert relative_difference(found[name], value) <= 1e-12, name


def called(collectives: Collectives, spec: RunSpec) -> list[torch.Tensor]:
    """Logits of the user's own calls: before a step, after one, and with a gradient."""
    trained = start(spec, collectives)
    share = share_of_step(spec, trained.plan, 0, 0)
    with torch.no_grad():
        found = [trained.module(**share).logits]
    trained.train_step(share)
    trained.eval_step(share)
    with torch.no_grad():
        found.append(trained.module(input_ids=share["input_ids"]).logits)
    found.append(trained.module(input_ids=share["input_ids"]).logits.detach())
    return found


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_call_of_the_model_gives_whole_logits(
    pool: WorkerPool, run_of: Run, kind: str, sequence_parallel: bool, recompute: str
) -> None:
    wanted = pool.run(1, called, run_of(kind, {}, AWKWARD))[0]
    parallel = {"parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel}}
    for found in pool.run(2, called, run_of(kind, {**parallel, "recompute": {"mode": recompute}}, AWKWARD)):
        for logits, true in zip(found, wanted, strict=True):
            assert logits.shape == true.shape
            assert relative_difference(logits, true) <= 1e-12


def measured(collectives: Collectives, spec: RunSpec) -> tuple[dict[str, tuple[float, ...]], float]:
    """The statistics of a step's gradients, by unit; and how far the mesh's loss is from that of each rank alone."""
    trained = start(spec, collectives)
    share = share_of_step(spec, trained.plan, collectives.rank, 0)
    trained.train_step(share)
    found = {
        unit: tuple(float(number) for number in (of.norm, of.max_abs, of.zero_fraction, of.non_finite))
        for unit, of in trained.gradient_statistics().items()
    }
    return found, trained.verify(share)


def test_statistics_count_neither_padding_nor_copies(pool: WorkerPool, run_of: Run) -> None:
    wanted, _ = pool.run(1, measured, run_of("llama", {}, AWKWARD))[0]
    for found, apart in pool.run(4, measured, run_of("llama", {"parallel.tensor": {"size": 4}}, AWKWARD)):
        assert apart <= 1e-12
        assert found.keys() == wanted.keys()
        for unit, numbers in wanted.items():
            assert found[unit] == pytest.approx(numbers, rel=1e-12, abs=1e-12), unit


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-6, foreach=False)


def test_optimizer_of_the_user(run_of: Run, exact: Exact) -> None:
    spec = run_of("llama", {"parallel.tensor": {"size": 2}, "optimizer": {"max_grad_norm": 0.1}}, AWKWARD)
    exact(replace(spec, optimizer=adam), 2)


class Normalised(torch.optim.Optimizer):
    """Steps along the direction of each whole gradient."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-3})


def normalised(model: nn.Module) -> torch.optim.Optimizer:
    return Normalised(model.parameters())


def refused(collectives: Collectives, spec: RunSpec) -> str:
    try:
        start(spec, collectives)
    except ConfigError as error:
        return str(error)
    return ""


def test_optimizer_that_needs_whole_parameters_is_refused(pool: WorkerPool, run_of: Run) -> None:
    spec = run_of("llama", {"parallel.tensor": {"size": 2}, "optimizer": {"max_grad_norm": 0.1}})
    expected = (
        "optimizer: Normalised is not known to update every element by itself, and the masters are sharded: set "
        "optimizer.elementwise: true if it does, or use parallel.zero.stage: 0 and no tensor parallelism"
    )
    assert pool.run(2, refused, replace(spec, optimizer=normalised)) == [expected, expected]


def whole_logits_loss(outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """A user's loss, which reads the whole vocabulary's logits."""
    assert outputs.logits.shape[-1] == AWKWARD["vocab_size"], tuple(outputs.logits.shape)
    return next_token_loss(outputs, batch)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_of_the_user_gets_whole_logits(run_of: Run, exact: Exact, kind: str, sequence_parallel: bool) -> None:
    spec = run_of(kind, {"parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel}}, AWKWARD)
    exact(replace(spec, loss_fn=whole_logits_loss, task=None), 2)


@dataclass(frozen=True)
class Frozen:
    """A model of which some parameters are not trained. names: parts of these parameters' names."""

    model: ModelBuilder
    names: tuple[str, ...]

    def __call__(self) -> nn.Module:
        model = self.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in self.names))
        return model


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("names", [("embed", "q_proj", "norm"), ("layers", "embed")], ids=["some", "all blocks"])
def test_frozen_parameters(run_of: Run, exact: Exact, names: tuple[str, ...], sequence_parallel: bool) -> None:
    spec = run_of("llama", {"parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel}})
    assert not isinstance(spec.model, str)
    exact(replace(spec, model=Frozen(spec.model, names)), 2)


def on_meta(model: nn.Module) -> nn.Module:
    """The model with parameters that have no values, tied as they were; its buffers stay."""
    empty = {parameter: nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in model.parameters()}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            module.register_parameter(name, empty[parameter])
    return model


def without_values(collectives: Collectives, spec: RunSpec) -> list[torch.Tensor]:
    """Losses and norms of two steps of a model on the meta device, whose values are handed over."""
    world_size = collectives.mesh.world_size
    prepared = prepare(spec, world_size)
    values = {name: parameter.detach() for name, parameter in prepared.model.named_parameters()}
    model = on_meta(prepared.model)
    anatomy, ops = examine(model), build_op_table(prepared.plugins.ops(), "cpu", "float64")
    axis_sizes = prepared.plugins.axis_sizes(prepared.config)
    plan = make_plan(prepared.config, anatomy, prepared.strategies, axis_sizes, ops, world_size=world_size)
    seen, parts = collectives.with_mesh(plan.mesh), Parts(values=values.items())
    specs = prepared.plugins.optimizers()
    trained = wrap(model, plan, anatomy, prepared.strategies, seen, ops, specs, parts)
    results = [trained.train_step(share_of_step(spec, plan, collectives.rank, step)) for step in range(2)]
    return [torch.stack([result.loss, result.grad_norm]) for result in results]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_model_without_values_of_its_own(pool: WorkerPool, run_of: Run, kind: str) -> None:
    wanted = pool.run(1, without_values, run_of(kind, {}))[0]
    for found in pool.run(2, without_values, run_of(kind, {"parallel.tensor": {"size": 2}})):
        for ours, true in zip(found, wanted, strict=True):
            assert relative_difference(ours, true) <= 1e-12
