"""What a model's forward and backward pass takes beside its state, for any model: one microbatch run on fake tensors.

No formula of a transformer is used: the model's own code runs, block by block, with the loss that training has. The trace follows the
plan: what `recompute` keeps, and which graph `compile` would cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colossal_core.block_memory import BlockCall, Kept, MeasuredBlock, measure_eager, stand_in
from colossal_core.compiled_memory import measure_compiled
from colossal_core.dataflow import tensors_in
from colossal_core.fake_model import AsOnAccelerator, FakeModel, as_real_tensors, fake_batch, fake_copy
from colossal_core.live_bytes import LiveBytes
from colossal_core.rank_compute import AsItIs

if TYPE_CHECKING:
    from colossal_core.loss import LossOwner
    from colossal_core.precision import Precision
    from colossal_core.rank_compute import RankCompute

COMPILED_BACKENDS = ("inductor", "aot_eager")
"""Backends that cut the joint graph of forward and backward pass; with any other a block is taken to keep what it keeps eagerly."""


@dataclass(frozen=True)
class Treatment:
    """How every block is run. kept, budget: as in the section `recompute`; backend: of `compile`; "": blocks run as they are."""

    kept: Kept = "none"
    budget: float = 0.0
    backend: str = ""


@dataclass(frozen=True)
class Activations:
    """Bytes of one microbatch beyond the state. kept_bytes: alive when the last block has run, for the backward pass. loss_bytes: the most
    beyond that until the backward pass reaches the last block: head, loss, its gradient. backward_bytes: the most beyond it from there
    on: the work of one block while few have been freed. problem: why there is no trace, else "".
    """

    kept_bytes: int = 0
    loss_bytes: int = 0
    backward_bytes: int = 0
    problem: str = ""

    @property
    def peak_bytes(self) -> int:
        return self.kept_bytes + max(self.loss_bytes, self.backward_bytes)


class ActivationTracer:
    """Traces one model under several treatments and batches, and measures each block that is alike once.

    model: real, on the meta device, or wrapped already; it is not changed. blocks: full names. loss_owner: what training has, on
    reference ops. computes: what a rank computes of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: tuple[str, ...],
        loss_owner: LossOwner,
        precision: Precision,
        computes: RankCompute | None = None,
    ) -> None:
        self._model = model
        self._blocks = blocks
        self._loss_owner = loss_owner
        self._precision = precision
        self._computes: RankCompute = AsItIs() if computes is None else computes

    def trace(self, batch: Mapping[str, Tensor], treatment: Treatment) -> Activations:
        """One microbatch of the shapes of `batch`, labels included; values are not looked at. Nothing is computed, no memory is taken.

        A model that cannot run on fake tensors (its shapes depend on values) is told of in `problem`.
        """
        errors = []
        for branch in (True, False):
            try:
                return self._run(batch, treatment, branch=branch)
            except Exception as error:  # whatever a stranger's forward raises
                errors.append(f"{type(error).__name__}: {error}".splitlines()[0])
        return Activations(problem=errors[0])

    def _run(self, batch: Mapping[str, Tensor], treatment: Treatment, *, branch: bool) -> Activations:
        compute = self._precision.compute
        fake = fake_copy(self._model, compute, self._blocks, self._computes.hooks)
        fake.model.train(self._model.training)
        counted = LiveBytes()
        moments = _Moments(counted)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(fake.mode)
            stack.enter_context(torch.enable_grad())
            cross_entropy = self._computes.carry_out(fake, self._precision)
            loss_owner = self._loss_owner
            if cross_entropy is not None:
                loss_owner = loss_owner.with_cross_entropy(cross_entropy)
            inputs = loss_owner.with_targets(fake_batch(batch, compute))
            _prepare(fake, inputs, counted)
            measured = _measuring(treatment, counted)
            for name in self._blocks:
                block = fake.model.get_submodule(name)
                stand_in(block, measured)
                block.register_forward_hook(moments.after_block)
            stack.enter_context(_lifted(self._precision))
            stack.enter_context(as_real_tensors())
            stack.enter_context(AsOnAccelerator(branch=branch))
            stack.enter_context(counted)
            self._step(fake.model, loss_owner, inputs)
        return moments.activations()

    def _step(self, model: nn.Module, loss_owner: LossOwner, inputs: Mapping[str, Tensor]) -> None:
        loss = loss_owner(model, inputs).sum.to(self._precision.master)
        scaled = loss / 2.0
        del loss
        scaled.backward()  # type: ignore[no-untyped-call]


class _Moments:
    """Reads the counter when blocks have run, and when the first gradient comes back to one."""

    def __init__(self, counted: LiveBytes) -> None:
        self._counted = counted
        self._kept = 0
        self._loss_peak: int | None = None

    def after_block(self, module: nn.Module, inputs: object, output: object) -> None:
        del module, inputs
        if self._counted.is_paused:  # the block is being measured
            return
        self._kept = self._counted.current
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(self._before_backward)  # type: ignore[no-untyped-call]

    def _before_backward(self, gradient: Tensor) -> None:
        del gradient
        if self._loss_peak is None:
            self._loss_peak = self._counted.restart()

    def activations(self) -> Activations:
        """After the backward pass."""
        peak = self._counted.peak
        if self._loss_peak is None:
            return Activations(self._kept, peak - self._kept, 0)
        return Activations(self._kept, max(self._loss_peak - self._kept, 0), max(peak - self._kept, 0))


def _prepare(fake: FakeModel, inputs: Mapping[str, Tensor], counted: LiveBytes) -> None:
    """Parameters and inputs do not count; a gradient is gone as soon as it has arrived, since the state has a place for it."""
    counted.ignore((*fake.model.parameters(), *fake.model.buffers(), *inputs.values()))
    for parameter in fake.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
    samples = next(iter(inputs.values())).shape[0]
    fake.dropout.set(0, 0, torch.arange(samples, device="cpu"))
    current = fake.dropout.capture()
    assert current is not None
    fake.dropout.restore(replace(current, fused=None))  # nothing is drawn, so no kernel's generator is seeded


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _measuring(treatment: Treatment, counted: LiveBytes) -> Callable[[BlockCall], MeasuredBlock]:
    known: dict[tuple[object, ...], MeasuredBlock] = {}

    def measured(call: BlockCall) -> MeasuredBlock:
        key = call.key
        if key not in known:
            replaced = vars(call.block).pop("forward")
            with counted.paused():
                if treatment.backend in COMPILED_BACKENDS:
                    known[key] = measure_compiled(call, treatment.kept, treatment.budget, treatment.backend)
                else:
                    known[key] = measure_eager(call, treatment.kept, treatment.budget)
            vars(call.block)["forward"] = replaced
        return known[key]

    return measured


def _lifted(precision: Precision) -> Any:
    from contextlib import nullcontext

    if not precision.throughout:
        return nullcontext()
    from colossal_core.float64 import Float64Throughout

    return Float64Throughout()
