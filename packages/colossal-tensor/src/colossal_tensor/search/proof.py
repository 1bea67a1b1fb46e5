"""The proof of a plan: a small model on simulated ranks beside one process, in float64, every output and every gradient.

Each rank is a thread with its own copy of the model and its part of the parameters, and runs the code that training runs
(`layouts.tensor_layouts`, `regions.install`). Every parameter is drawn anew around its value, so that nothing is zero or one by chance: a
bias that is added twice is seen. What is whole on every rank is told apart here: its gradient is either the true one on each, or a summand.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colossal_core.difference import floor_for_gradients, relative_difference
from colossal_core.errors import ColossalError
from colossal_core.float64 import Float64Throughout
from colossal_core.keyed_dropout import install_keyed_dropout
from colossal_core.layout import take_local
from colossal_core.mesh import MeshLayout
from colossal_core.plan import initial_layouts
from colossal_tensor.group import TensorPlan
from colossal_tensor.layouts import AXIS, Laid, tensor_layouts
from colossal_tensor.search.draws import SameDraws

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.collectives import Collectives
    from colossal_tensor.search.sites import Names

TOLERANCE = 1e-10
"""The largest relative difference, of each output and each gradient, at which a plan counts as exact."""
_PARSING = threading.Lock()
"""Simulated ranks are threads, and Python 3.11 does not parse and compile in two of them at once."""


@dataclass(frozen=True)
class Outcome:
    """forward: whether every output was the same. problem: why the plan is not exact, "" where it is. partial: patterns of parameters of
    which each rank's gradient is a summand; unseen: of those whose gradient is zero here, so that nothing is known of it. possible: whether
    the small model's sizes allow so many ranks.
    """

    forward: bool
    problem: str
    partial: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    possible: bool = True

    @property
    def passed(self) -> bool:
        return not self.problem


class DifferentError(ColossalError):
    """A rank computed something else than one process."""


class Proof:
    """One small model, computed once by one process, beside which plans are tried. anatomy: of the small model; names: its patterns.
    dropping: its dropouts draw keyed numbers; else it has none.
    """

    def __init__(
        self, model: nn.Module, anatomy: ModelAnatomy, batch: Mapping[str, Any], names: Names, *, dropping: bool = False
    ) -> None:
        self._model, self._anatomy, self._batch, self._names = model, anatomy, dict(batch), names
        self.dropping = dropping
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        alone = copy.deepcopy(model)  # a model may keep what it computed, and the ranks' copies are to start afresh
        if dropping:
            key_dropouts(alone, self._batch)
        with torch.enable_grad(), Float64Throughout(), SameDraws():
            outputs = tensors_in(alone(**self._batch))
            self._outputs = [value.detach() for value in outputs]
            self._weights = weights_for(self._outputs)
            weighted(outputs, self._weights).backward()  # type: ignore[no-untyped-call]
        own = dict(alone.named_parameters(remove_duplicate=False))
        self._gradients = {
            fact.full_name: _gradient(own[fact.full_name]) for fact in anatomy.parameters if fact.trainable
        }
        self._floor = floor_for_gradients(self._gradients.values())

    def run(self, plan: TensorPlan, num_ranks: int = 2, *, whole_outputs: bool = False) -> Outcome:
        """Tries a plan on `num_ranks` simulated ranks. Never raises for what a candidate does to the model. whole_outputs: something other
        than core's loss reads the outputs, so that each rank must give out all of them whole.
        """
        mesh = MeshLayout((1, 1, 1, 1, num_ranks))
        try:
            laid = tensor_layouts(plan, self._anatomy, initial_layouts(self._anatomy, mesh), mesh)
        except (AssertionError, KeyError, ValueError) as error:
            return Outcome(False, f"no layout: {_said(error)}")
        if laid.problems:
            return Outcome(False, laid.problems[0].reason, possible=False)
        from colossal_comm.simulated import run_simulated

        try:
            with torch.enable_grad():
                found = run_simulated(laid.mesh, _Rank(self, plan, laid, whole_outputs))
        except DifferentError as error:
            return Outcome(str(error) == "", str(error) or "another output")
        except Exception as error:  # whatever a wrong guess makes a model's code raise
            return Outcome(False, _said(error))
        return self._compared(found, laid)

    def _compared(self, found: Sequence[Mapping[str, Tensor]], laid: Laid) -> Outcome:
        partial: set[str] = set()
        whole_ones: set[str] = set()
        unseen: set[str] = set()
        for name, true in self._gradients.items():
            given = [gradients[name] for gradients in found]
            layout = laid.layouts[name]
            if layout.compute.cut_axes:
                difference = self._difference(_assembled(given, layout.compute, laid.mesh), true)
                if difference > TOLERANCE:
                    return Outcome(True, f"the gradient of {name} differs by {difference:.1e}")
                continue
            whole = max(self._difference(gradient, true) for gradient in given)
            summed = self._difference(torch.stack(given).sum(0), true)
            pattern = self._names.pattern(name)
            if min(whole, summed) > TOLERANCE:
                return Outcome(True, f"the gradient of {name} differs by {min(whole, summed):.1e}, whole or summed")
            (unseen if max(whole, summed) <= TOLERANCE else partial if summed <= TOLERANCE else whole_ones).add(pattern)
        if partial & whole_ones:
            return Outcome(True, f"the gradient of {min(partial & whole_ones)} is a summand in some places alone")
        return Outcome(True, "", tuple(sorted(partial)), tuple(sorted(unseen - partial - whole_ones)))

    def _difference(self, found: Tensor, true: Tensor) -> float:
        return relative_difference(found, true, floor=self._floor)


@dataclass(frozen=True)
class _Rank:
    """What one simulated rank does: its copy of the model, cut, forwards and backwards. Returns its gradients by full name."""

    proof: Proof
    plan: TensorPlan
    laid: Laid
    whole_outputs: bool

    def __call__(self, collectives: Collectives) -> dict[str, Tensor]:
        from colossal_tensor.dropout import install_dropout
        from colossal_tensor.regions import install

        collectives = collectives.with_mesh(self.laid.mesh)
        coordinate = self.laid.mesh.coordinate(collectives.rank)
        held, local = {}, {}
        for name, layout in self.laid.layouts.items():
            full = self.proof._parameters[name]
            part = full.detach()
            if layout.compute.cut_axes:
                part = torch.zeros(layout.compute.local_shape(coordinate, self.laid.mesh), dtype=full.dtype)
                take_local(part, full.detach(), layout.compute.pieces(coordinate, self.laid.mesh))
            local[name] = held[id(full)] = nn.Parameter(part, requires_grad=full.requires_grad)
        model = copy.deepcopy(self.proof._model, held)
        if self.proof.dropping:
            key_dropouts(model, self.proof._batch)
        install(model, self.plan, self.laid.cutting, collectives)
        if self.proof.dropping:
            install_dropout(model, self.plan, self.laid.cutting, collectives, self.proof._anatomy.blocks)
        with Float64Throughout(), SameDraws():
            outputs = [
                self._whole(value, true, collectives)
                for value, true in zip(tensors_in(model(**self.proof._batch)), self.proof._outputs, strict=True)
            ]
            self._check(outputs, collectives)
            weighted(outputs, self.proof._weights).backward()  # type: ignore[no-untyped-call]
        return {name: _gradient(local[name]) for name in self.proof._gradients}

    def _whole(self, value: Tensor, true: Tensor, collectives: Collectives) -> Tensor:
        """Logits of this rank's words, gathered: what core's loss reads without gathering. And activations of this rank's part of the
        sequence, which a model may give out beside its logits, and core's loss does not read. Any other reader gets what the rank has.
        """
        if self.whole_outputs:
            return value
        cut = (value.shape[0], value.shape[1] * collectives.size(AXIS), *value.shape[2:]) if value.ndim == 3 else ()
        if self.plan.stream is not None and cut == true.shape:
            return collectives.all_gather(value, AXIS, dim=1, cotangent="replicated", tag="proof")
        words = self.laid.cutting.words
        vocabulary = self.plan.vocabulary
        if not words or not vocabulary.head or vocabulary.gathered or value.shape[-1] != self.laid.cutting.padded_words:
            return value
        whole = collectives.all_gather(value, AXIS, dim=-1, cotangent="replicated", tag="proof")
        return whole.narrow(-1, 0, words[-1][1])

    def _check(self, outputs: Sequence[Tensor], collectives: Collectives) -> None:
        """Every rank's outputs beside the true ones: all ranks say the same, whichever comes first."""
        true = self.proof._outputs
        if [value.shape for value in outputs] != [value.shape for value in true]:
            raise DifferentError("outputs of other shapes")
        own = [relative_difference(found, expected) for found, expected in zip(outputs, true, strict=True)]
        worst = torch.tensor(max(own, default=0.0), dtype=torch.float64)
        collectives.start_all_reduce(worst, AXIS, op="max", tag="proof").wait()
        if not float(worst) <= TOLERANCE:
            raise DifferentError(f"an output differs by {float(worst):.1e}")


def _assembled(given: Sequence[Tensor], placement: Any, mesh: MeshLayout) -> Tensor:
    """The full gradient from every rank's part; where ranks hold copies, their summands add up."""
    full = torch.zeros(placement.shape, dtype=torch.float64)
    for rank, local in enumerate(given):
        for piece in placement.pieces(mesh.coordinate(rank), mesh):
            full[piece.box] += piece.view(local.contiguous())
    return full


def key_dropouts(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Gives every dropout of a whole model the numbers of one microbatch, as training does before it cuts the model."""
    num_samples = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
    with _PARSING:
        state = install_keyed_dropout(model)
    state.set(seed=0, step=0, sample_ids=torch.arange(num_samples))


def tensors_in(output: Any) -> list[Tensor]:
    """Every floating tensor of a model's output that has a gradient, in order; caches and other objects are left out."""
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, Mapping):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, (tuple, list)):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def weights_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(20_230_502)
    return [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in outputs]


def weighted(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """One number that depends on every element of every output."""
    return torch.stack([(value * weight).sum() for value, weight in zip(outputs, weights, strict=True)]).sum()


def _gradient(parameter: nn.Parameter | Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
