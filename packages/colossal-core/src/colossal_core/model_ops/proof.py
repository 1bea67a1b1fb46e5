"""The proof that a model computes the same with ops in it: outputs and gradients of its specimen, with the references of the ops and
without them, to 1e-12 in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colossal_core.dataflow import tensors_in
from colossal_core.difference import EXACT, floor_for_gradients, relative_difference
from colossal_core.model_ops.proving import drawing
from colossal_core.model_ops.replacing import HEAD_LOSS, install
from colossal_core.model_ops.uses import Uses, find_uses
from colossal_core.quiet import quiet_transformers
from colossal_core.specimen import Specimen, SpecimenError, pattern_of
from colossal_core.specimen_trial import batch_for, prepared

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy


@dataclass(frozen=True)
class Proof:
    """same: pairs of an op and the pattern of a module's name where it may be used. left: what may not, in words."""

    same: frozenset[tuple[str, str]]
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Run:
    """What one pass of the specimen gave. head_is_last: the logits that the model returns are what its head returned, called once."""

    outputs: Sequence[Tensor]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    head_is_last: bool = False


def prove_ops(anatomy: ModelAnatomy, specimen: Specimen, wanted: Sequence[str]) -> Proof:
    """All of the wanted ops at once; where that is not the same, each by itself. Raises: SpecimenError."""
    names = [op for op in wanted if op != HEAD_LOSS]
    heads = anatomy.heads
    try:
        truth = _run(anatomy, specimen, heads, {})
    except SpecimenError:
        raise
    except Exception as error:  # whatever a model's forward raises
        raise SpecimenError(f"a small model of this kind cannot be run: {_in_a_line(error)}") from error
    uses = _uses(specimen, heads)

    def different_with(ops: Sequence[str]) -> str:
        try:
            found = _run(anatomy, specimen, heads, _chosen(uses, ops))
        except Exception as error:  # without the ops it ran
            return f"raises {_in_a_line(error)}"
        return _difference(found, truth)

    different = different_with(names)
    left = []
    if different:
        apart = {op: different_with([op]) for op in names}
        left = [f"{op}: not used, a small model of this kind {why} with it" for op, why in apart.items() if why]
        names = [op for op, why in apart.items() if not why]
        if not left:
            left, names = [f"no op is used: a small model of this kind {different} with all of them"], []
    same = {(op, pattern_of(name)) for op in names for name in uses.modules.get(op, ())}
    if HEAD_LOSS in wanted and uses.heads:
        if truth.head_is_last and len(heads) == 1 and _hands_on(anatomy, specimen, heads[0]):
            same.add((HEAD_LOSS, pattern_of(heads[0])))
        else:
            left.append(f"{HEAD_LOSS}: not used, the logits are not what the head makes alone")
    return Proof(frozenset(same), tuple(left))


def _uses(specimen: Specimen, heads: tuple[str, ...]) -> Uses:
    with quiet_transformers():
        return find_uses(specimen.build(), heads)


def _chosen(uses: Uses, ops: Sequence[str]) -> dict[str, tuple[str, ...]]:
    return {op: uses.modules[op] for op in ops if op in uses.modules}


def _run(
    anatomy: ModelAnatomy, specimen: Specimen, heads: tuple[str, ...], chosen: Mapping[str, Sequence[str]]
) -> _Run:
    """One pass of the specimen with some ops in it, forward and backward."""
    from colossal_core.ops.reference import reference_ops

    with quiet_transformers():
        model = prepared(specimen.build())
        batch = batch_for(model, specimen.batch(), anatomy)
    functions = {found.op: found.function for found in reference_ops()}
    install(model, find_uses(model, heads), chosen, functions)
    made: list[Any] = []
    for name in heads:
        model.get_submodule(name).register_forward_hook(lambda module, args, output: made.append(output))
    with drawing(), quiet_transformers():
        output = model(**batch)
        logits = _logits_in(output)
        outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad and tensor.is_floating_point()]
        total = sum((torch.randn(one.shape, dtype=one.dtype) * one).sum() for one in outputs)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        gradients: Sequence[Tensor | None] = [None] * len(trained)
        if isinstance(total, Tensor):
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    found = {name: one for name, one in zip(trained, gradients, strict=True) if one is not None}
    return _Run([one.detach() for one in outputs], found, len(made) == 1 and made[0] is logits)


def _hands_on(anatomy: ModelAnatomy, specimen: Specimen, head: str) -> bool:
    """Whether the logits that the model returns are the very tensor that its head made where the model is narrow: a cast of them to float32
    (Mamba) is none in float64.
    """
    with quiet_transformers():
        model = prepared(specimen.build()).to(torch.bfloat16)
        given = batch_for(model, specimen.batch(), anatomy)
    narrow = {
        key: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in given.items()
    }
    made: list[Any] = []
    model.get_submodule(head).register_forward_hook(lambda module, args, output: made.append(output))
    try:
        with torch.no_grad(), torch.device("cpu"), quiet_transformers():
            logits = _logits_in(model(**narrow))
    except Exception:  # whatever a model raises that was not made for narrow numbers
        return False
    return len(made) == 1 and made[0] is logits


def _logits_in(output: Any) -> object:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _difference(found: _Run, wanted: _Run) -> str:
    """What is different, in a few words; "" where nothing is."""
    if [one.shape for one in found.outputs] != [one.shape for one in wanted.outputs]:
        return "returns something else"
    for one, other in zip(found.outputs, wanted.outputs, strict=True):
        distance = relative_difference(one, other)
        if not distance <= EXACT:
            return f"differs by {distance:.1e}"
    if set(found.gradients) != set(wanted.gradients):
        return "has gradients of other parameters"
    floor = floor_for_gradients(wanted.gradients.values())
    for name, gradient in wanted.gradients.items():
        distance = relative_difference(found.gradients[name], gradient, floor=floor)
        if not distance <= EXACT:
            return f"differs in the gradient of {name} by {distance:.1e}"
    return ""
