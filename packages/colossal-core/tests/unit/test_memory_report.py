"""What is told when memory runs out: what took it, and the smallest change of plan that would fit. Here an allocation is made to fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core import memory_report
from colossal_core.collectives import SingleProcess
from colossal_core.errors import OutOfMemoryError
from colossal_core.estimate import INPUTS
from colossal_core.memory_report import DeviceMemory, changes, in_units, is_out_of_memory, live_bytes
from colossal_core.peak_estimate import PeakEstimator, inputs_of
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyLM, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start
from colossal_core.trained import Trained

OPTIONS = TinyOptions(vocab_size=96, hidden_size=64, num_heads=4, num_blocks=3, max_length=32, dropout=0.0)
BATCHES = TokenBatches(vocab_size=96, length=32)
MESSAGE = "CUDA out of memory. Tried to allocate 1.54 GiB. GPU 0 has a total capacity of 139.80 GiB"


class Failing(nn.Module):
    """A block whose forward pass runs out of memory once it is told to."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.error: Exception | None = None

    def forward(self, *args: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.block(*args)


@dataclass(frozen=True)
class FailingModel:
    def __call__(self) -> nn.Module:
        model = TinyLM(OPTIONS)
        for index, block in enumerate(model.blocks):
            model.blocks[index] = Failing(block)
        return model


def trained_with(config: Mapping[str, Any] | None = None) -> tuple[Trained, Mapping[str, torch.Tensor]]:
    settings = {"batch": {"global_size": 8, "micro_size": 8}, "precision": "fp32", **(config or {})}
    spec = RunSpec(settings, FailingModel(), BATCHES, task="causal-lm", plugins="")
    trained = start(spec, SingleProcess(torch.device("cpu")))
    batch = share_of_step(spec, trained.plan, 0, 0)
    trained.train_step(batch)
    return trained, batch


def estimator(trained: Trained, batch: Mapping[str, torch.Tensor]) -> PeakEstimator:
    engine = trained._engine
    return PeakEstimator(engine.model, engine.plan, (), engine.loss_owner, batch, state_bytes=8.0, device_type="cpu")


def fail(trained: Trained, error: Exception) -> None:
    block = trained.module.get_submodule("blocks.1")
    assert isinstance(block, Failing)
    block.error = error


def with_memory(monkeypatch: pytest.MonkeyPatch, capacity: int, peak: int) -> None:
    found = DeviceMemory("cuda:0", capacity, peak)
    monkeypatch.setattr(memory_report, "device_memory", lambda device: found)


def test_live_bytes_are_those_of_the_state() -> None:
    trained, _ = trained_with()
    elements = sum(parameter.numel() for parameter in trained.module.parameters())
    step_count = 4
    assert live_bytes(trained) == {
        "parameters": 4 * elements,
        "masters": 0,
        "gradients": 4 * elements,
        "optimizer": 8 * elements + step_count,
        "registered": 0,
    }


def test_the_smallest_change_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, batch = trained_with()
    planned = estimator(trained, batch).estimate()
    options = {str(change): change for change in changes(trained.plan, training=True)}
    full = estimator(trained, batch).estimate(options["recompute.mode: full"])
    capacity = int(full.total / 0.95) + 1024
    with_memory(monkeypatch, capacity=capacity, peak=planned.total)
    fail(trained, torch.OutOfMemoryError(MESSAGE))
    with pytest.raises(OutOfMemoryError) as caught:
        trained.train_step(batch)
    state = live_bytes(trained)
    assert state["gradients"] == 0  # in the forward pass of the first microbatch there are none
    activations = planned.total - sum(state.values()) - planned.transients
    lines = [
        f"out of memory in step 1 on rank 0: cuda:0 has {in_units(capacity)}, "
        f"of which at most {in_units(planned.total)} was in use:",
        f"  {'parameters':<38}{in_units(state['parameters']):>12}",
        f"  {'optimizer states':<38}{in_units(state['optimizer']):>12}",
        f"  {'activations and the work of the step':<38}{in_units(activations):>12}",
        f"the smallest change that fits by the estimate: recompute.mode: full ({in_units(full.total)})",
        f"the plan as it is needs {in_units(planned.total)} by the estimate",
        f"  {MESSAGE}",
    ]
    assert str(caught.value) == "\n".join(lines)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert caught.value.exit_status == 1


def test_changes_from_small_to_large() -> None:
    trained, _ = trained_with()
    assert [str(change) for change in changes(trained.plan, training=True)] == [
        "recompute.mode: selective",
        "recompute.mode: full",
        "batch.micro_size: 4",
        "batch.micro_size: 2",
        "batch.micro_size: 1",
        "recompute.mode: full, batch.micro_size: 4",
        "recompute.mode: full, batch.micro_size: 2",
        "recompute.mode: full, batch.micro_size: 1",
    ]
    assert [str(change) for change in changes(trained.plan, training=False)] == [
        "batch.micro_size: 4",
        "batch.micro_size: 2",
        "batch.micro_size: 1",
    ]


def test_a_plan_fills_every_column_that_strategies_may_read() -> None:
    trained, _ = trained_with({"recompute": {"mode": "full"}})
    inputs = inputs_of(trained.plan)
    assert set(inputs) == set(INPUTS)
    assert {name: float(inputs[name][0]) for name in ("zero_stage", "recompute")} == {
        "zero_stage": 0.0,
        "recompute": 1.0,
    }


def test_each_change_takes_less_than_the_plan() -> None:
    trained, batch = trained_with()
    found = estimator(trained, batch)
    planned = found.estimate().total
    for change in changes(trained.plan, training=True):
        assert found.estimate(change).total < planned, str(change)


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, batch = trained_with()
    with_memory(monkeypatch, capacity=2**20, peak=2**20)
    fail(trained, torch.OutOfMemoryError(MESSAGE))
    with pytest.raises(OutOfMemoryError) as caught:
        trained.eval_step(batch)
    told = next(line for line in str(caught.value).splitlines() if line.startswith("no change"))
    assert told.startswith("no change of the plan fits by the estimate; the least is ")
    assert told.endswith(" with batch.micro_size: 1: use more ranks, or a device with more memory")


def test_the_model_trains_on_after_it_was_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace leaves no mark on the model: hooks, dropout and random numbers are as they were."""
    trained, batch = trained_with({"recompute": {"mode": "full"}})
    with_memory(monkeypatch, capacity=2**40, peak=2**20)
    before = torch.get_rng_state()
    assert estimator(trained, batch).estimate().problem == ""
    assert torch.equal(torch.get_rng_state(), before)
    fail(
        trained,
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    )
    with pytest.raises(OutOfMemoryError, match=r"the smallest change that fits by the estimate: batch\.micro_size: 4"):
        trained.train_step(batch)
    block = trained.module.get_submodule("blocks.1")
    assert isinstance(block, Failing)
    block.error = None
    assert torch.isfinite(trained.train_step(batch).loss)


def test_what_is_an_allocation_that_failed() -> None:
    caused = ValueError("in the block")
    caused.__cause__ = torch.OutOfMemoryError(MESSAGE)
    assert is_out_of_memory(caused)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_another_error_goes_through_unchanged() -> None:
    trained, batch = trained_with()
    fail(trained, ValueError("of the block's own"))
    with pytest.raises(ValueError, match=r"^of the block's own$"):
        trained.train_step(batch)
