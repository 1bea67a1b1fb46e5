"""Whether stages compute what the whole model does, tried on a small model of its kind: on the CPU, in float64, before anything is cut.

Every block becomes a stage of its own, on a copy in which all that other stages hold is zero. Outputs and every gradient are compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from colossal_core.dataflow import first_line, tensors_in
from colossal_core.errors import ColossalError
from colossal_core.examine import examine
from colossal_core.float64 import Float64Throughout
from colossal_core.shadow import Shadow
from colossal_core.specimen import SpecimenError
from colossal_core.specimen_trial import batch_for, prepared
from colossal_core.stages import StageEnd
from colossal_pipeline.cutting import Cutting, cut
from colossal_pipeline.skeleton import Skeleton

if TYPE_CHECKING:
    from colossal_core.flow import Flow
    from colossal_core.specimen import Specimen

TOLERANCE = 1e-11
"""Largest difference, relative to the largest element of what is compared: sums in another order make 1e-15."""
SEED = 20_260_101


def prove(specimen: Specimen) -> str:
    """What differs between the stages and the whole, in a line; "" where nothing does. Worked out once for a specimen.

    Raises: SpecimenError where the small model cannot be built or does not run, or has one block only.
    """
    question = "pipeline: stages are the whole"
    if question not in specimen.answers:
        with Float64Throughout(), torch.random.fork_rng(devices=[]):
            specimen.answers[question] = _difference(specimen)
    return str(specimen.answers[question])


def _difference(specimen: Specimen) -> str:
    model = prepared(specimen.build())
    anatomy = examine(model)
    if anatomy.flow is None:  # not a model of transformers, whose batches are known
        anatomy = examine(model, specimen.batch())
    if anatomy.flow is None:
        raise SpecimenError(f"what flows between its blocks is not known: {anatomy.unfollowed}")
    if len(anatomy.flow.blocks) < 2:
        raise SpecimenError("it has one block only")
    batch = batch_for(model, specimen.batch(), anatomy)
    cutting = cut(anatomy.flow, range(len(anatomy.flow.blocks)))
    # Copies are made of what has not run yet, as in training: a forward pass may change the model for good.
    shadow = Shadow(model)
    parts = [_part(model, anatomy.flow, cutting, stage) for stage in range(cutting.num_stages)]
    torch.manual_seed(SEED)
    random = torch.get_rng_state()
    try:
        wanted, wanted_gradients = _whole(model, batch)
    except Exception as error:  # whatever a stranger's forward raises
        raise SpecimenError(f"it does not run ({first_line(error)})") from error
    if not torch.equal(random, torch.get_rng_state()):
        return "it draws random numbers outside of dropout, and a stage would draw others than the whole"
    try:
        found, gradients = _staged(parts, shadow, cutting, batch)
    except (ColossalError, RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        return f"it stops with {first_line(error)}"
    return next(_differences(wanted, wanted_gradients, found, gradients), "")


def _differences(
    wanted: Sequence[Tensor],
    wanted_gradients: Mapping[str, Tensor | None],
    found: Sequence[Tensor],
    gradients: Mapping[str, Tensor | None],
) -> Iterator[str]:
    if len(wanted) != len(found):
        yield f"{len(found)} outputs instead of {len(wanted)}"
    for index, (one, other) in enumerate(zip(wanted, found, strict=False)):
        if not _same(one, other):
            yield f"output {index} differs"
    for name, gradient in wanted_gradients.items():
        if not _same(gradient, gradients[name]):
            yield f"the gradient of {name} differs"


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return all(each is None or not each.count_nonzero() for each in (one, other))
    largest = float(one.abs().max()) if one.numel() else 0.0
    return one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * max(largest, 1e-3)).all())


def _whole(model: nn.Module, batch: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    model.zero_grad()
    torch.manual_seed(SEED)
    outputs = _with_gradient(model(**batch))
    _weighted(outputs).backward()  # type: ignore[no-untyped-call]
    return [output.detach() for output in outputs], {name: one.grad for name, one in model.named_parameters()}


def _staged(
    parts: Sequence[nn.Module], shadow: Shadow, cutting: Cutting, batch: Mapping[str, Any]
) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    passages: list[tuple[nn.Module, tuple[Tensor, ...], Sequence[Tensor]]] = []
    received: tuple[Tensor, ...] = ()
    outputs: list[Tensor] = []
    for stage, part in enumerate(parts):
        skeleton = Skeleton(part, cutting, shadow, torch.device("cpu"))
        torch.manual_seed(SEED)
        with skeleton.running(stage, received):
            try:
                outputs = _with_gradient(part(**batch))
                passages.append((part, received, [_weighted(outputs)]))
            except StageEnd as end:
                passages.append((part, received, end.outputs))
                received = tuple(one.detach().requires_grad_(one.requires_grad) for one in end.outputs)
    if len(passages) != cutting.num_stages or not outputs:
        raise ColossalError("the last stage gives no output")
    gradients: dict[str, Tensor | None] = dict.fromkeys(name for name, _ in parts[0].named_parameters())
    arriving: list[Tensor | None] = [None]
    for part, came, sent in reversed(passages):
        pairs = [(one, grad) for one, grad in zip(sent, arriving, strict=True) if one.requires_grad]
        reached = [(one, grad) for one, grad in pairs if grad is not None or one.dim() == 0]
        if reached:
            torch.autograd.backward([one for one, _ in reached], [grad for _, grad in reached])
        arriving = [one.grad for one in came]
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                before = gradients[name]
                gradients[name] = parameter.grad if before is None else before + parameter.grad
    return [output.detach() for output in outputs], gradients


def _part(model: nn.Module, flow: Flow, cutting: Cutting, stage: int) -> nn.Module:
    """A copy of the model in which all parameters that the stage does not read are zero and untrained."""
    part = copy.deepcopy(model)
    part.zero_grad()
    held = {name for name, positions in flow.read if any(cutting.stage_of(position) == stage for position in positions)}
    for name, parameter in part.named_parameters():
        if name not in held:
            parameter.requires_grad_(False)
            parameter.data.zero_()
    return part


def _with_gradient(output: object) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.requires_grad and tensor.is_floating_point()]


def _weighted(outputs: Sequence[Tensor]) -> Tensor:
    """One number of all outputs, in which every element counts differently."""
    generator = torch.Generator().manual_seed(SEED)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        total = total + (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
    return total
