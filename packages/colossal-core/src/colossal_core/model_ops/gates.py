"""Gated activations in a model: products `act(gate) * up` in the code of its methods, of which `act` is one that an op has.

Found in the source, so that what makes gate and up (linear layers under whatever names, cut by tensor parallelism, with adapters)
stays as it is. `act` is whatever the expression calls, a module or a function of torch; its values prove that it is silu or gelu.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from colossal_core.model_ops.proving import drawing, drawn, is_same
from colossal_core.model_ops.remaking import Change, Place, Source, place_of


@dataclass(frozen=True)
class Activation:
    """A kind of gate. op: which computes `act(gate) * up`; packed: which does so of both in one tensor. keywords: of the ops, as pairs.
    function: the activation alone.
    """

    name: str
    op: str
    packed: str
    keywords: tuple[tuple[str, str], ...]
    function: Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = (
    Activation("silu", "swiglu", "packed_swiglu", (), F.silu),
    Activation("gelu", "geglu", "packed_geglu", (), F.gelu),
    Activation("gelu tanh", "geglu", "packed_geglu", (("approximate", "tanh"),), _gelu_tanh),
)


@dataclass(frozen=True)
class Product:
    """A product in a method's source. node: the multiplication; act: the call of the activation. gate_first: the activation is the left
    factor. name: of the variable that holds the activated gate where the product reads one, else "". halves: the statement before it, where
    that cuts one tensor into gate and up, which nothing else reads.
    """

    node: Place
    act: Place
    gate_first: bool
    name: str = ""
    halves: Place | None = None


@functools.lru_cache(maxsize=1024)
def products_in(source: Source) -> tuple[tuple[Product, ast.Call], ...]:
    """The products of which one factor is a call of something with one argument, and that call."""
    return tuple(_products(source))


def _products(source: Source) -> Iterator[tuple[Product, ast.Call]]:
    assigned = _single_uses(source.tree)
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
            continue
        for factor in (node.left, node.right):
            name = factor.id if isinstance(factor, ast.Name) else ""
            call = assigned.get(name) if name else factor
            if (
                not isinstance(call, ast.Call)
                or len(call.args) != 1
                or not all(_constant(one) for one in call.keywords)
            ):
                continue
            if not name or isinstance(call.args[0], ast.Call):  # a variable might be written over before the product
                product, act = place_of(node), place_of(call)
                assert product is not None and act is not None
                other = node.right if factor is node.left else node.left
                halves = None if name else _halves(source.tree, node, call.args[0], other)
                yield Product(product, act, factor is node.left, name, halves), call


def _constant(keyword: ast.keyword) -> bool:
    return keyword.arg is not None and isinstance(keyword.value, ast.Constant)


def _single_uses(tree: ast.FunctionDef) -> Mapping[str, ast.expr]:
    """Variables that are assigned once and read once, further on in the same list of statements, with what they are assigned."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    count = {name: sum(node.id == name for node in names) for name in {node.id for node in names}}
    found = {}
    for statements in _lists(tree):
        for index, statement in enumerate(statements):
            if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
                continue
            target = statement.targets[0]
            if isinstance(target, ast.Name) and count[target.id] == 2 and _read_in(statements[index + 1 :], target.id):
                found[target.id] = statement.value
    return found


def _lists(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for name in ("body", "orelse"):
            value = getattr(node, name, None)
            if isinstance(value, list):
                yield value


def _read_in(statements: list[ast.stmt], name: str) -> bool:
    """Whether a variable is read by one of these statements itself, not by one inside a loop or a branch."""
    simple = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)
    within = (node for one in statements if isinstance(one, simple) for node in ast.walk(one))
    return any(isinstance(node, ast.Name) and node.id == name for node in within)


def called_by(call: ast.Call, function: FunctionType, module: nn.Module) -> Callable[..., Any] | None:
    """What an expression calls: `self.act`, `F.silu`, `silu`; None where that is not known before it runs."""
    parts: list[str] = []
    node: ast.expr = call.func
    while isinstance(node, ast.Attribute):
        parts.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    code = function.__code__
    value: object
    if code.co_varnames[:1] == (node.id,) and code.co_argcount > 0:
        value = module
    elif node.id in code.co_varnames or node.id in code.co_cellvars or node.id in code.co_freevars:
        return None
    else:
        value = function.__globals__.get(node.id)
    for part in parts:
        try:
            value = getattr(value, part)
        except AttributeError:
            return None
    return value if callable(value) else None


def keywords_of(call: ast.Call) -> dict[str, Any]:
    """The keywords of a call, which are constants."""
    return {str(one.arg): one.value.value for one in call.keywords if isinstance(one.value, ast.Constant)}


def is_changed(called: nn.Module) -> bool:
    """Whether a call of a module may do something beside what its class does."""
    return bool(called._forward_hooks or called._forward_pre_hooks or "forward" in vars(called))


def find_activation(called: Callable[..., Any], keywords: Mapping[str, Any]) -> Activation | None:
    """Which activation something is, proven on random numbers; None for one that no op has. Modules that hold no numbers and functions of
    torch alone are called to see what they do: a stranger's might do something else beside.
    """
    if isinstance(called, nn.Module):
        if (
            is_changed(called)
            or next(called.parameters(), None) is not None
            or next(called.buffers(), None) is not None
        ):
            return None
    elif isinstance(called, type) or not _is_of_torch(called):
        return None
    with drawing():
        inputs = [
            drawn(4, 64, scale=scale) for scale in (3.0, 300.0)
        ]  # a limit (transformers' gelu_10) shows on large ones alone
        return next(
            (
                one
                for one in ACTIVATIONS
                if all(is_same(lambda x: called(x, **keywords), one.function, [x]) for x in inputs)
            ),
            None,
        )


def _is_of_torch(called: Callable[..., Any]) -> bool:
    home = getattr(called, "__module__", None) or ""
    return home.split(".")[0] == "torch" or called in (F.gelu, F.silu)


def _halves(tree: ast.FunctionDef, product: ast.BinOp, gate: ast.expr, up: ast.expr) -> Place | None:
    """The statement `gate, up = both.chunk(2, dim=-1)` right before that of a product, where nothing else reads the two."""
    if not (isinstance(gate, ast.Name) and isinstance(up, ast.Name)):
        return None
    for statements in _lists(tree):
        for before, statement in itertools.pairwise(statements):
            if not any(node is product for node in ast.walk(statement)):
                continue
            if _targets(before) == (gate.id, up.id) and _both(before) is not None:
                rest = _loads(tree, (gate.id, up.id), statement, in_order=statements is tree.body)
                return place_of(before) if rest == 2 else None
    return None


def _targets(statement: ast.stmt) -> tuple[str, ...]:
    """The variables that an assignment of several sets."""
    if not (isinstance(statement, ast.Assign) and len(statement.targets) == 1):
        return ()
    target = statement.targets[0]
    names = target.elts if isinstance(target, ast.Tuple) else []
    return tuple(one.id for one in names if isinstance(one, ast.Name))


def _both(statement: Any) -> ast.expr | None:
    """What `x.chunk(2, dim=-1)` or `torch.chunk(x, 2, dim=-1)` cuts, of the statement that assigns it."""
    call = statement.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "chunk"):
        return None
    of_torch = isinstance(call.func.value, ast.Name) and call.func.value.id == "torch"
    args = call.args[1:] if of_torch else call.args
    given = [ast.unparse(one) for one in (*args, *call.keywords)]
    if given not in (["2", "dim=-1"], ["2", "-1"]) or (of_torch and not call.args):
        return None
    return call.args[0] if of_torch else call.func.value


def _loads(tree: ast.FunctionDef, names: tuple[str, ...], statement: ast.stmt, *, in_order: bool) -> int:
    """How often variables are read as `statement` finds them. in_order: it runs once, so that what stands before it is past, and what it
    assigns to one of them ends that one.
    """
    target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
    ended = {target.id} if isinstance(target, ast.Name) and in_order else set()
    here = {id(node) for node in ast.walk(statement)}
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load):
            after = node.lineno > statement.lineno
            count += id(node) in here or (not in_order) or (after and node.id not in ended)
    return count


def packed_changes_of(product: Product, name: str) -> dict[Place, Change]:
    """As `changes_of`, by a function of the tensor that holds both halves."""
    assert product.halves is not None, "gate and up are no halves of one tensor"

    def whole(statement: Any) -> ast.AST:
        both = _both(statement)
        assert both is not None, "it has been looked at"
        return ast.Assign([statement.targets[0].elts[0]], both)

    def multiplied(node: ast.BinOp) -> ast.AST:
        act: Any = node.left if product.gate_first else node.right
        return ast.Call(ast.Name(name, ast.Load()), [act.args[0]], [])

    return {product.halves: whole, product.node: multiplied}


def changes_of(product: Product, name: str) -> dict[Place, Change]:
    """The changes of a method's source by which the function `name` makes the product. Factors are evaluated in the order of before."""

    def multiplied(node: ast.BinOp) -> ast.AST:
        act, other = (node.left, node.right) if product.gate_first else (node.right, node.left)
        gate = act if product.name else _argument(act)
        keywords = [ast.keyword("gate", gate), ast.keyword("up", other)]
        return ast.Call(ast.Name(name, ast.Load()), [], keywords if product.gate_first else list(reversed(keywords)))

    changes: dict[Place, Change] = {product.node: multiplied}
    if product.name:
        changes[product.act] = _argument
    return changes


def _argument(call: Any) -> ast.expr:
    argument: ast.expr = call.args[0]
    return argument


def gated(activation: Activation, function: Callable[..., Tensor]) -> Callable[..., Any]:
    """`act(gate) * up` by an implementation of the op; as it stood where the factors differ in shape or dtype."""
    keywords = dict(activation.keywords)
    alone = activation.function

    def gated_product(gate: Tensor, up: Any) -> Any:
        if isinstance(up, Tensor) and gate.shape == up.shape and gate.dtype == up.dtype:
            return function(gate, up, **keywords)
        return alone(gate) * up

    return gated_product


def packed(activation: Activation, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The gated product of the two halves of a tensor by an implementation of the packed op."""
    keywords = dict(activation.keywords)

    def gated_halves(both: Tensor) -> Tensor:
        return function(both, **keywords)

    return gated_halves
