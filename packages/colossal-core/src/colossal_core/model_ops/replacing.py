"""Putting the ops of the table into a model: as methods of single modules, whose classes and whose parameters' names stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from colossal_core.model_ops.experts import by_experts
from colossal_core.model_ops.head import HeadLoss
from colossal_core.model_ops.norms import NORMED, normed
from colossal_core.model_ops.remaking import PREFIX, put

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.model_ops.edits import Edit
    from colossal_core.model_ops.uses import MethodUse, Uses
    from colossal_core.plan import Plan
    from colossal_core.strategy import ApplyContext

DATA = "ops"
"""The plan's data of this name says what is replaced: op -> names of modules."""

HEAD_LOSS = "linear_cross_entropy"

Function = Callable[..., Any]
Chosen = Mapping[str, Sequence[str]]
"""Names of modules by op."""


def replace_ops(model: nn.Module, plan: Plan, anatomy: ModelAnatomy, context: ApplyContext) -> None:
    """Carries out what the plan says, before any strategy: they work on the model as if its code had been written so. Sets the context's
    `cross_entropy` where head and loss become one. No communication.
    """
    chosen = chosen_in(plan.data)
    if not chosen:
        return
    assert anatomy.op_uses is not None, "the plan has been made with it"
    functions = {op: context.ops.resolved(op) for op in chosen}
    install(model, anatomy.op_uses.found, chosen, functions)
    for name in chosen.get(HEAD_LOSS, ()):
        loss = HeadLoss(functions[HEAD_LOSS], context)
        loss.install(model.get_submodule(name))
        context.cross_entropy = loss


def chosen_in(data: Mapping[str, Mapping[str, object]]) -> dict[str, tuple[str, ...]]:
    """What a plan's data says of ops."""
    found: Mapping[str, Any] = data.get(DATA, {})
    return {op: tuple(names) for op, names in found.items()}


def install(model: nn.Module, uses: Uses, chosen: Chosen, functions: Mapping[str, Function]) -> None:
    """Gives every chosen module of a model its methods. Modules of one kind get the same function, so that torch.compile's work for one
    serves the next. The head is not among them.
    """
    made: dict[object, Function] = {}
    for name, norm in uses.norms.items():
        if name in chosen.get(norm.op, ()):
            module = model.get_submodule(name)
            key: object = (norm, type(module))
            if key not in made:
                made[key] = normed(norm, functions[norm.op], type(module).forward)
            put(module, "forward", made[key])
            vars(module)[NORMED] = vars(module)["forward"]
    for name in chosen.get("experts", ()):
        module = model.get_submodule(name)
        key = (uses.experts[name], type(module))
        if key not in made:
            made[key] = by_experts(uses.experts[name], functions["experts"], type(module).forward)
        put(module, "forward", made[key])
    for use in uses.methods:
        picked = picked_in(use, uses, chosen)
        if picked:
            method = (use.source.function, use.source.wrappers, tuple(picked))
            if method not in made:
                made[method] = _remade(use, picked, functions)
            put(model.get_submodule(use.module), use.method, made[method])


def picked_in(use: MethodUse, uses: Uses, chosen: Chosen) -> list[tuple[Edit, str]]:
    """The edits of a method that are made, each with its op. None of them in a module that an op replaces as a whole."""
    norm = uses.norms.get(use.module)
    if use.module in chosen.get("experts", ()) or (norm is not None and use.module in chosen.get(norm.op, ())):
        return []
    pairs = ((edit, next((op for op in edit.ops if use.module in chosen.get(op, ())), "")) for edit in use.edits)
    return [(edit, op) for edit, op in pairs if op]


def _remade(use: MethodUse, picked: Sequence[tuple[Edit, str]], functions: Mapping[str, Function]) -> Function:
    own = use.source.function.__code__.co_varnames[0]
    changes, bound = {}, {}
    for number, (edit, op) in enumerate(picked):
        name = f"{PREFIX}{op}_{number}"
        changes.update(edit.changes(op, own, name))
        bound[name] = edit.bound(op, functions[op])
    return use.source.changed(changes, bound)
