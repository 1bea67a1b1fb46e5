"""Residual additions with a norm behind them: in the code of a block `x = residual + x`, and then `self.norm(x)`, or `self.norm(x + y)`.

Only inside of one method: where the sum is made in one block and normed in the next, the two do not meet.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from colossal_core.model_ops.norms import NORMED, Norm
from colossal_core.model_ops.remaking import PREFIX, Change, Place, Source, place_of

OPS = {"rms_norm": "add_rms_norm", "layer_norm": "add_layer_norm"}
"""Which op adds and norms, by the op that norms."""


@dataclass(frozen=True)
class Addition:
    """A sum in a method's source and the call of a norm on it. attribute: of the method's own module, which holds the norm. total: the
    statement that assigns the sum, None where it is made in the call of the norm.
    """

    attribute: str
    normed: Place
    total: Place | None = None


@functools.lru_cache(maxsize=1024)
def additions_in(source: Source) -> tuple[Addition, ...]:
    """Every addition that is normed before anything else happens to the sum."""
    return tuple(_additions(source))


def _additions(source: Source) -> Iterator[Addition]:
    own = source.function.__code__.co_varnames[:1]
    for node in ast.walk(source.tree):
        attribute = _norm_call(node, own)
        if attribute and isinstance(node, ast.Call) and _is_sum(node.args[0]):
            place = place_of(node)
            assert place is not None
            yield Addition(attribute, place)
        for name in ("body", "orelse"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                yield from _in_statements(statements, own)


def _in_statements(statements: list[ast.stmt], own: tuple[str, ...]) -> Iterator[Addition]:
    for index, statement in enumerate(statements):
        if not (_assigns_name(statement) and _is_sum(statement.value)):  # type: ignore[attr-defined]
            continue
        names = {statement.targets[0].id}  # type: ignore[attr-defined]
        for following in statements[index + 1 :]:
            if not _assigns_name(following):
                break
            target, value = following.targets[0].id, following.value  # type: ignore[attr-defined]
            if isinstance(value, ast.Name) and value.id in names:
                names.add(target)  # another name for the sum
                continue
            attribute = _norm_call(value, own)
            if attribute and isinstance(value.args[0], ast.Name) and value.args[0].id in names:
                total, normed = place_of(statement), place_of(value)
                assert total is not None and normed is not None
                yield Addition(attribute, normed, total)
            break


def _assigns_name(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name)
    )


def _is_sum(node: ast.expr) -> bool:
    return isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add)


def _norm_call(node: ast.AST, own: tuple[str, ...]) -> str:
    """`name` of a call `self.name(x)`, else ""."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords):
        return ""
    is_own = isinstance(node.func.value, ast.Name) and (node.func.value.id,) == own
    return node.func.attr if is_own and len(node.args) == 1 else ""


def changes_of(addition: Addition, own: str, name: str, number: int) -> dict[Place, Change]:
    """The changes of a method's source by which the function `name` adds and norms. own: what the method calls its module (`self`). number:
    sets its variable apart from others.
    """
    variable = f"{PREFIX}normed_{number}"

    def both(norm: ast.expr, total: Any) -> ast.Call:
        return ast.Call(ast.Name(name, ast.Load()), [norm, total.left, total.right], [])

    def at_once(call: ast.Call) -> ast.AST:
        return ast.Subscript(both(call.func, call.args[0]), ast.Constant(0), ast.Load())

    def first(statement: ast.Assign) -> ast.AST:
        norm = ast.Attribute(ast.Name(own, ast.Load()), addition.attribute, ast.Load())
        targets = ast.Tuple([ast.Name(variable, ast.Store()), statement.targets[0]], ast.Store())
        return ast.Assign([targets], both(norm, statement.value))

    if addition.total is None:
        return {addition.normed: at_once}
    return {addition.total: first, addition.normed: lambda call: ast.Name(variable, ast.Load())}


def added_and_normed(
    norm: Norm, function: Callable[..., tuple[Tensor, Tensor]]
) -> Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(norm of the sum, sum) by an implementation of the op. As it stood where somebody has put a hook on the norm or another forward in
    the place of the op's, and where the summands differ in shape or dtype.
    """

    def added(module: nn.Module, x: Any, residual: Any) -> tuple[Tensor, Tensor]:
        tensors = isinstance(x, Tensor) and isinstance(residual, Tensor)
        alike = tensors and x.shape == residual.shape and x.dtype == residual.dtype and norm.fits(module, x)
        if not alike or not is_untouched(module):
            total = x + residual
            return module(total), total
        return function(x, residual, *norm.arguments(module), offset=norm.offset)

    return added


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a norm does what its formula says and nothing else."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks and vars(module).get("forward") is vars(module).get(NORMED)
