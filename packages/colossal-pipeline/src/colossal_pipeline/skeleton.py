"""The stages of a model on one rank: the whole module tree stays, and a forward pass computes the running stage's part of it.

The model's own forward runs for every stage. A unit (a block, or an outermost module with parameters outside the blocks) that belongs to
an earlier stage is not computed: its call returns zeros of the right structure, and the tensors of it that cross into this stage in
their places. What stands between the units (masks, rotary tables) is computed on every stage from the batch. When the last block of the
stage has run, the pass ends. So no architecture is known by name, and a custom forward runs as it was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colossal_core.dataflow import tensors_in, with_tensors
from colossal_core.errors import ColossalError
from colossal_core.shadow import Shadow, shapes_of
from colossal_core.stages import StageEnd
from colossal_pipeline._torch_private import original_call, replace_call
from colossal_pipeline.split_units import SplitCalls, UnitRunners

if TYPE_CHECKING:
    from colossal_pipeline.cutting import Crossing, Cutting

Place = tuple[str, int, int]
"""A tensor by what makes it: unit, call, which tensor of its output."""


@dataclass
class _Run:
    """One forward pass of a stage. positions: that it computes; last: at which it ends, None on the last stage. split: its units, where its
    backward pass will be cut.
    """

    positions: range
    last: int | None
    received: dict[Place, Tensor]
    wanted: dict[tuple[str, int], tuple[int, ...]]
    sent: Sequence[Crossing]
    split: SplitCalls | None
    calls: Counter[str] = field(default_factory=Counter)
    made: dict[Place, Tensor] = field(default_factory=dict)

    @property
    def anchors(self) -> Sequence[Tensor]:
        return self.split.anchors if self.split is not None else ()

    def parameter_gradients(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        assert self.split is not None, "the pass was not to be cut"
        return self.split.parameter_gradients()

    def abandon(self) -> None:
        if self.split is not None:
            self.split.abandon()

    def outputs(self) -> list[Tensor]:
        known = {**self.received, **self.made}
        return [known[one.unit, one.call, one.output] for one in self.sent]


class Skeleton:
    """`colossal_core.stages.Stages` of a model. shadow: of the whole model, in the dtype in which it computes."""

    def __init__(self, model: nn.Module, cutting: Cutting, shadow: Shadow, device: torch.device) -> None:
        self._cutting = cutting
        self._shadow = shadow
        self._device = device
        self._run: _Run | None = None
        self._templates: dict[tuple[object, ...], Any] = {}
        self._modules = {unit: model.get_submodule(unit) for unit, _ in cutting.units}
        self._runners: UnitRunners | None = None
        self._num_passes = 0
        for unit, positions in cutting.units:
            module = self._modules[unit]
            replace_call(module, self._call_of(unit, positions, original_call(module)))

    @contextmanager
    def running(self, stage: int, received: Sequence[Tensor], *, split: bool = False) -> Iterator[_Run]:
        """As `colossal_core.stages.Stages` says."""
        cutting = self._cutting
        is_last = stage + 1 == cutting.num_stages
        sent = () if is_last else cutting.crossing[stage + 1]
        wanted: dict[tuple[str, int], tuple[int, ...]] = {}
        for one in sent:
            wanted[one.unit, one.call] = (*wanted.get((one.unit, one.call), ()), one.output)
        came = zip(cutting.crossing[stage], received, strict=True)
        run = self._run = _Run(
            positions=cutting.positions(stage),
            last=None if is_last else 2 * cutting.starts[stage + 1] - 1,
            received={(one.unit, one.call, one.output): tensor for one, tensor in came},
            wanted=wanted,
            sent=sent,
            split=self._split_calls() if split else None,
        )
        try:
            yield run
            self._check_way(run)
        finally:
            self._run = None
            run.received, run.made = {}, {}  # a pass lives until its last backward part, and needs no values for it

    def _check_way(self, run: _Run) -> None:
        """Raises: ColossalError where a pass has come to its end without some call that the plan counts on."""
        for unit, positions in self._cutting.units:
            planned = sum(position < run.positions.stop for position in positions)
            if run.calls[unit] < planned:
                raise ColossalError(_other_way(unit, run.calls[unit], len(positions)))

    def _split_calls(self) -> SplitCalls:
        """Runners are made when the first is needed: by then blocks are as they run, recomputed or not."""
        if self._runners is None:
            self._runners = UnitRunners()
            for unit, module in self._modules.items():
                self._runners.add(unit, module, original_call(module))
        self._num_passes += 1
        return SplitCalls(self._runners, self._num_passes)

    def _call_of(self, unit: str, positions: Sequence[int], compute: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None:
                raise ColossalError(_CALLED_WHOLE)
            number = run.calls[unit]
            run.calls[unit] += 1
            if number >= len(positions):
                raise ColossalError(_other_way(unit, number + 1, len(positions)))
            position = positions[number]
            if position < run.positions.start:
                return self._stand_in(run, unit, number, args, kwargs)
            output = compute(*args, **kwargs) if run.split is None else run.split.run(unit, args, kwargs)
            wanted = run.wanted.get((unit, number))
            if wanted:
                tensors = list(tensors_in(output))
                run.made.update({(unit, number, index): tensors[index] for index in wanted})
            if position == run.last:
                raise StageEnd(run.outputs())
            return output

        return call

    def _stand_in(self, run: _Run, unit: str, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a unit of an earlier stage returns here: what was received of it, and zeros for what nobody will read."""
        key = (unit, shapes_of((args, kwargs)))
        if key not in self._templates:
            self._templates[key] = self._shadow.output(unit, args, kwargs)
        template = self._templates[key]
        tensors = []
        for index, form in enumerate(tensors_in(template)):
            came = run.received.get((unit, number, index))
            tensors.append(torch.zeros(form.shape, dtype=form.dtype, device=self._device) if came is None else came)
        return with_tensors(template, iter(tensors))


_CALLED_WHOLE = (
    "the model is cut into pipeline stages, and this rank holds some of them: call trained.train_step or trained.eval_step, "
    "which run them all, in the place of the model"
)


def _other_way(unit: str, found: int, planned: int) -> str:
    return (
        f"{unit} ran {_times(found)} in one forward pass, and {_times(planned)} when the plan was made: in a pipeline every forward pass "
        "takes the same way through the model"
    )


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")
