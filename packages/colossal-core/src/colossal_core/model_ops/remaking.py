"""A method of a model made anew from its own source with a few expressions changed, for one module and never for its class.

What it is made of: the function's syntax tree, changed at some places; compiled where it stood (file, lines and flags, so that a traceback
shows the model's own source). It keeps the globals of the original, the very mapping, and the cells of its closure; what the changed
expressions call is in cells of its own. So two models live side by side, and torch.compile sees an ordinary function.
"""

from __future__ import annotations
import __future__

import ast
import dis
import functools
import inspect
import itertools
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any, TypeAlias

from torch import nn

Place: TypeAlias = tuple[str, int, int, int, int]
"""Where a node of a tree stands: its kind, and where it begins and ends in the source."""

Change: TypeAlias = Callable[[Any], ast.AST]
"""From a node, whose children are changed already, to what takes its place."""

PREFIX = "_colossal_"
"""Of the names that changed expressions use."""

_MARK = "colossal_remade"
_FEATURES = functools.reduce(
    lambda found, name: found | getattr(__future__, name).compiler_flag, __future__.all_feature_names, 0
)


@dataclass(frozen=True)
class Source:
    """A function and the tree that it is made of, which is never changed: `changed` makes another. wrappers: the decorators' functions
    that stand around it, innermost first; what is called is the last one.
    """

    function: FunctionType
    tree: ast.FunctionDef
    wrappers: tuple[FunctionType, ...] = ()

    def changed(self, changes: Mapping[Place, Change], bound: Mapping[str, object]) -> FunctionType:
        """The function with what stands at some places changed, its wrappers around it. bound: what the names are that the changes bring
        in.
        """
        tree = _Changing(changes).visit(_parsed(self.function))
        made = _compiled(ast.fix_missing_locations(tree), self.function, bound)
        inner = self.function
        for wrapper in self.wrappers:
            inner, made = wrapper, _around(wrapper, inner, made)
        return made


@functools.lru_cache(maxsize=1024)
def source_of(function: FunctionType) -> Source | None:
    """The source of a function; None where it cannot be made anew: there is none, it is not what the function was compiled from (names are
    mangled by its class, the file has changed), or a decorator's function stands around it that holds it in no cell of its own.
    """
    wrappers: list[FunctionType] = []
    while "__wrapped__" in vars(function):
        inner = vars(function)["__wrapped__"]
        if not isinstance(inner, FunctionType) or not any(held is inner for held in _held(function)):
            return None
        wrappers.insert(0, function)
        function = inner
    try:
        tree = _parsed(function)
        again = _compiled(tree, function, {})
    except (OSError, TypeError, SyntaxError, ValueError, LookupError, tokenize.TokenError):
        return None
    return Source(function, tree, tuple(wrappers)) if _alike(again.__code__, function.__code__) else None


def _held(function: FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        yield from _held_in(cell)


def _around(wrapper: FunctionType, inner: FunctionType, made: FunctionType) -> FunctionType:
    """A decorator's function around `made` instead of `inner`. Its other cells are the old ones."""
    cells = [
        CellType(made) if any(held is inner for held in _held_in(cell)) else cell for cell in wrapper.__closure__ or ()
    ]
    twin = FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells))
    twin.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(twin, wrapper)
    vars(twin).update({"__wrapped__": made, _MARK: True})
    return twin


def _held_in(cell: CellType) -> Iterator[object]:
    try:
        yield cell.cell_contents
    except ValueError:  # it is empty
        return


def _parsed(function: FunctionType) -> ast.FunctionDef:
    lines, first = inspect.getsourcelines(function)
    module = ast.parse(textwrap.dedent("".join(lines)))
    tree = module.body[0]
    if not isinstance(tree, ast.FunctionDef) or tree.name != function.__code__.co_name:
        raise LookupError(f"no definition of {function.__qualname__}")
    return ast.increment_lineno(tree, max(first, 1) - 1)


def _compiled(tree: ast.FunctionDef, original: FunctionType, bound: Mapping[str, object]) -> FunctionType:
    """The function of a tree, with the surroundings of the original. Nothing is executed: its code is taken out of that of a function
    around it, whose parameters are the names of its cells.
    """
    names = [*original.__code__.co_freevars, *bound]
    bare = ast.FunctionDef(
        **{**_fields(tree), "decorator_list": [], "returns": None, "args": _without_defaults(tree.args)}
    )
    parameters = [ast.arg(name) for name in names]
    outer = ast.FunctionDef(
        **{
            **_fields(tree),
            "name": f"{PREFIX}cells",
            "args": ast.arguments([], parameters, None, [], [], None, []),
            "body": [bare],
            "decorator_list": [],
            "returns": None,
        }
    )
    module = ast.fix_missing_locations(ast.Module([ast.copy_location(outer, tree)], []))
    flags = original.__code__.co_flags & _FEATURES
    code = compile(module, original.__code__.co_filename, "exec", flags, dont_inherit=True)
    code = _code_in(_code_in(code, f"{PREFIX}cells"), tree.name)
    cells = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
    cells.update({name: CellType(value) for name, value in bound.items()})
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__, closure)
    made.__kwdefaults__ = original.__kwdefaults__
    made.__annotations__ = original.__annotations__
    made.__qualname__, made.__module__, made.__doc__ = original.__qualname__, original.__module__, original.__doc__
    vars(made)[_MARK] = True
    return made


def is_remade(function: object) -> bool:
    """Whether a function is one that this file made."""
    return isinstance(function, FunctionType) and _MARK in vars(function)


def _fields(tree: ast.FunctionDef) -> dict[str, Any]:
    return {name: getattr(tree, name) for name in tree._fields if hasattr(tree, name)}


def _without_defaults(given: ast.arguments) -> ast.arguments:
    """The same parameters; which of them have defaults says the function, not its code."""

    def bare(parameter: ast.arg) -> ast.arg:
        return ast.copy_location(ast.arg(parameter.arg), parameter)

    return ast.arguments(
        posonlyargs=[bare(one) for one in given.posonlyargs],
        args=[bare(one) for one in given.args],
        vararg=None if given.vararg is None else bare(given.vararg),
        kwonlyargs=[bare(one) for one in given.kwonlyargs],
        kw_defaults=[None for _ in given.kwonlyargs],
        kwarg=None if given.kwarg is None else bare(given.kwarg),
        defaults=[],
    )


def _code_in(code: CodeType, name: str) -> CodeType:
    return next(one for one in code.co_consts if isinstance(one, CodeType) and one.co_name == name)


def _alike(a: CodeType, b: CodeType) -> bool:
    """Whether two pieces of code do the same: instructions in order, with their names and constants.

    Compiled by itself, a function does not know which globals its file imports: methods of those are then looked up by another
    instruction, which is no difference. Doc strings differ by their indentation.
    """
    if (a.co_varnames, a.co_freevars, a.co_cellvars) != (b.co_varnames, b.co_freevars, b.co_cellvars):
        return False
    pairs = itertools.zip_longest(_instructions(a), _instructions(b))
    return all(one is not None and other is not None and _same(one, other) for one, other in pairs)


_FILLING = ("CACHE", "PUSH_NULL", "EXTENDED_ARG")


def _instructions(code: CodeType) -> Iterator[dis.Instruction]:
    return (one for one in dis.get_instructions(code) if one.opname not in _FILLING)


def _same(a: dis.Instruction, b: dis.Instruction) -> bool:
    lookups = ("LOAD_METHOD", "LOAD_ATTR")
    if a.opname != b.opname and not (a.opname in lookups and b.opname in lookups):
        return False
    if a.opcode in dis.hasjrel or a.opcode in dis.hasjabs:
        return True  # the lookups are of different lengths, so that jumps are
    return _same_constant(a.argval, b.argval)


def _same_constant(a: object, b: object) -> bool:
    if isinstance(a, CodeType) and isinstance(b, CodeType):
        return _alike(a, b)
    if isinstance(a, str) and isinstance(b, str):
        return a.split() == b.split()
    return type(a) is type(b) and repr(a) == repr(b)


class _Changing(ast.NodeTransformer):
    def __init__(self, changes: Mapping[Place, Change]) -> None:
        self._changes = changes

    def visit(self, node: ast.AST) -> Any:
        place = place_of(node)  # before children change: a changed node may have no place of its own
        node = self.generic_visit(node)
        change = self._changes.get(place) if place is not None else None
        return node if change is None else ast.copy_location(change(node), node)


def place_of(node: ast.AST) -> Place | None:
    """Where a node stands; None for what has no place (an operator)."""
    if not isinstance(node, ast.expr | ast.stmt):
        return None
    end_line, end_column = node.end_lineno or 0, node.end_col_offset or 0
    return (type(node).__name__, node.lineno, node.col_offset, end_line, end_column)


def methods_of(module: nn.Module) -> Iterator[tuple[str, FunctionType]]:
    """The plain methods of a module by name, `forward` among them: its class's, and those of its parents down to `nn.Module` and
    transformers' own model class. A module whose `forward` was put on it after it was made has none; another
    method that was put on it is no longer its class's.
    """
    if "forward" in vars(module):
        return
    seen = {*vars(module)}
    for parent in type(module).__mro__:
        if parent is nn.Module or parent.__name__ == "PreTrainedModel":
            return
        for name, value in vars(parent).items():
            if (
                name not in seen
                and isinstance(value, FunctionType)
                and (name == "forward" or not name.startswith("__"))
            ):
                yield name, value
            seen.add(name)


def put(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Makes a function the module's method of that name; copies of the module get it as a method of their own."""
    vars(module)[name] = MethodType(function, module)
