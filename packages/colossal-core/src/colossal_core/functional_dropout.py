"""The methods of a module class that call `torch.nn.functional.dropout`, made again so that each call asks the module's own key.

A call `nn.functional.dropout(x, ...)` in a method becomes `self.keyed_layer.dropout(call, x, ...)`: the method's source is parsed, the call
replaced, and the result compiled with the method's own globals, closure, defaults and line numbers. Nothing of torch or of the class is
changed; the copies are attributes of instances, so two models live side by side, and a compiler sees plain Python. Without its source, or
where the source does not compile to the very code that is loaded, a method is left alone and reported.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CALLS_PER_SITE = 1 << 16
"""A call's number is its site's number in the class times this, plus the iteration where the site stands in a loop."""

_OTHER_DRAWS = (F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout)
_NESTED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef, ast.GeneratorExp)
_LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp)
_COMPILER_FLAGS = 0x1FF0000  # the bits of co_flags that stand for `from __future__` imports


@dataclass
class KeyedMethods:
    """What was found in one class. copies: by name of method. left: what still draws from torch's generator, as sentences."""

    copies: dict[str, FunctionType] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class CannotRewriteError(Exception):
    """Why one function's calls are left as they are: the rest of a sentence that begins with its name."""


def keyed_methods(kind: type[nn.Module]) -> KeyedMethods:
    """Looks at every method of the class and its parents, but not at torch's own modules."""
    found = KeyedMethods()
    numbers = itertools.count(1)
    above: dict[str, list[FunctionType]] = {}
    for parent in kind.__mro__:
        if parent.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for name, value in vars(parent).items():
            function = getattr(value, "__func__", value)
            if not isinstance(function, FunctionType):
                continue
            label = f"{parent.__name__}.{name}"
            overriding = above.setdefault(name, [])
            try:
                if overriding:
                    _check_overridden(function, parent.__name__, overriding)
                elif (copy := _copy(function, parent.__name__, numbers, is_method=function is value)) is not None:
                    copy.__name__ = name  # by which a pickle finds the class's own
                    found.copies[name] = copy
            except CannotRewriteError as reason:
                found.left.append(f"{label} {reason}")
            found.left.extend(f"{label} calls {other}" for other in sorted(_other_draws(function)))
            overriding.append(function)
    return found


def _check_overridden(function: FunctionType, class_name: str, overriding: list[FunctionType]) -> None:
    """What a subclass overrides is only reached by `super()` or by the parent's name, and there an instance's copy would not be found.

    Raises: CannotRewriteError.
    """
    reaching = {"super", class_name}
    if _calls_dropout(function) and any(reaching & set(code.co_names) for over in overriding for code in _codes(over)):
        raise CannotRewriteError("is called by a subclass that overrides it")


def _copy(function: FunctionType, class_name: str, numbers: Iterator[int], *, is_method: bool) -> FunctionType | None:
    """The function with its calls replaced, or around a copy of a function in its closure whose calls are: decoration keeps its layers.

    is_method: whether its first argument is the module. None: there is nothing to replace. Raises: CannotRewriteError.
    """
    code = function.__code__
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    inner: dict[int, FunctionType] = {}
    for name, cell in cells.items():
        wrapped = _contents(cell)
        if isinstance(wrapped, FunctionType) and wrapped is not function:
            copy = _copy(wrapped, class_name, numbers, is_method=wrapped.__code__.co_varnames[:1] == ("self",))
            if copy is not None:
                inner[id(wrapped)], cells[name] = copy, CellType(copy)
    if _calls_dropout(function):
        if not is_method or code.co_argcount == 0:
            raise CannotRewriteError("calls dropout without the module as its first argument")
        code = _keyed_code(function, class_name, numbers)
    elif not inner:
        return None
    new = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, tuple(cells[n] for n in code.co_freevars)
    )
    new.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(new, function)
    below = vars(function).get("__wrapped__")
    if below is None:
        vars(new).pop("__wrapped__")
    else:
        vars(new)["__wrapped__"] = inner.get(id(below), below)
    return new


def _keyed_code(function: FunctionType, class_name: str, numbers: Iterator[int]) -> CodeType:
    """The function's code with its calls replaced."""
    code = function.__code__
    definition, tree = _parsed(function, class_name)
    if not _same_code(_compiled(tree, code), code):
        raise CannotRewriteError("has a source that is not its code's")
    module = code.co_varnames[0]
    replacing = _Replacing(_Resolver(function), module, numbers)
    for statement in definition.body:
        replacing.visit(statement)
    if any(_binds(node, module) for statement in definition.body for node in ast.walk(statement)):
        raise CannotRewriteError(f"gives `{module}` another meaning")
    first = 1 if ast.get_docstring(definition, clean=False) is not None else 0
    starts = [ast.parse(f"{name} = {number}").body[0] for name, number in replacing.counters.items()]
    for start in starts:
        for node in ast.walk(start):
            ast.copy_location(node, definition.body[0])
    definition.body[first:first] = starts
    try:
        new = _compiled(ast.fix_missing_locations(tree), code)
    except SyntaxError as error:  # in a comprehension's iterable there can be no counter
        raise CannotRewriteError("calls dropout where it cannot be counted") from error
    return new.replace(co_qualname=code.co_qualname, co_firstlineno=code.co_firstlineno)


def _parsed(function: FunctionType, class_name: str) -> tuple[ast.FunctionDef, ast.Module]:
    """The definition, and around it what gives its code the same meaning: the class, and a function with its free variables.

    Decorators, defaults and annotations stay the loaded function's: they belong to the code around it.
    """
    code = function.__code__
    try:
        source = inspect.getsource(code)
        is_indented = source[:1] in (" ", "\t")
        tree = ast.parse(f"class {class_name}:\n{source}" if is_indented else f"if True:\n  pass\n{source}")
    except (OSError, TypeError, SyntaxError) as error:
        raise CannotRewriteError("has no source") from error
    definition = tree.body[0].body[0] if isinstance(tree.body[0], ast.ClassDef) else tree.body[-1]
    if not isinstance(definition, ast.FunctionDef):
        raise CannotRewriteError("is no plain function")
    ast.increment_lineno(tree, code.co_firstlineno - (2 if is_indented else 3))
    definition.decorator_list = []
    free = ", ".join(name for name in code.co_freevars if name != "__class__")
    outer = ast.parse(f"def outer({free}):\n  class {class_name}:\n    pass")
    scope = outer.body[0]
    assert isinstance(scope, ast.FunctionDef)
    inner_class = scope.body[0]
    assert isinstance(inner_class, ast.ClassDef)
    inner_class.body = [definition]
    return definition, ast.fix_missing_locations(outer)


def _compiled(tree: ast.Module, original: CodeType) -> CodeType:
    """The code of the innermost definition, compiled as the original was."""
    whole = compile(tree, original.co_filename, "exec", flags=original.co_flags & _COMPILER_FLAGS, dont_inherit=True)
    outer = next(constant for constant in whole.co_consts if inspect.iscode(constant))
    of_class = next(constant for constant in outer.co_consts if inspect.iscode(constant))
    return next(c for c in of_class.co_consts if inspect.iscode(c) and c.co_name == original.co_name)


def _same_code(one: CodeType, other: CodeType) -> bool:
    """Whether two codes do the same, nested ones included; their positions may differ."""
    pairs = itertools.zip_longest(_instructions(one), _instructions(other))
    return all(
        _same_code(mine, its) if inspect.iscode(mine) and inspect.iscode(its) else mine == its for mine, its in pairs
    ) and (one.co_freevars, one.co_cellvars) == (other.co_freevars, other.co_cellvars)


def _instructions(code: CodeType) -> Iterator[object]:
    """What the code does, step by step. Not where it jumps to, nor the two ways of calling an attribute: a name that the module imports
    is called in the other way, and of the module only one function is compiled again.
    """
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("CACHE", "PRECALL", "PUSH_NULL", "NOP", "EXTENDED_ARG"):
            continue
        if inspect.iscode(instruction.argval):
            yield instruction.argval
        elif instruction.opcode in dis.hasjrel:
            yield instruction.opname
        else:
            name = "LOAD_ATTR" if instruction.opname == "LOAD_METHOD" else instruction.opname
            yield f"{name} {instruction.argval!r}"


class _Resolver:
    """What a dotted name in a function stands for: globals and closure, and attributes of modules. Local names are not known."""

    def __init__(self, function: FunctionType) -> None:
        self._local = {name for code in _codes(function) for name in (*code.co_varnames, *code.co_cellvars)}
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        self._free = {name: _contents(cell) for name, cell in cells}
        self._globals = function.__globals__

    def __call__(self, node: ast.expr) -> object:
        if isinstance(node, ast.Name):
            return None if node.id in self._local else self._free.get(node.id, self._globals.get(node.id))
        if isinstance(node, ast.Attribute):
            owner = self(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None


class _Replacing(ast.NodeTransformer):
    """Replaces the calls of one definition. counters: local variables that number the iterations of sites in loops, with their start."""

    def __init__(self, resolve: _Resolver, module: str, numbers: Iterator[int]) -> None:
        self._resolve, self._module, self._numbers = resolve, module, numbers
        self._is_nested = self._in_loop = False
        self.counters: dict[str, int] = {}

    def visit(self, node: ast.AST) -> Any:
        before = self._is_nested, self._in_loop
        self._is_nested = self._is_nested or isinstance(
            node, _NESTED
        )  # its local variables begin anew at each call: nothing to count with
        self._in_loop = self._in_loop or isinstance(node, _LOOPS)
        try:
            return super().visit(node)
        finally:
            self._is_nested, self._in_loop = before

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self._resolve(node.func) is not F.dropout:
            return self.generic_visit(node)
        site = next(self._numbers)
        number = str(site * CALLS_PER_SITE)
        if self._in_loop and not self._is_nested:
            counter = f"keyed_dropout_calls_{site}"
            self.counters[counter] = site * CALLS_PER_SITE
            number = f"({counter} := {counter} + 1)"
        replaced = ast.parse(f"{self._module}.keyed_layer.dropout({number})", mode="eval").body
        assert isinstance(replaced, ast.Call)
        for new in ast.walk(replaced):
            ast.copy_location(new, node)
        replaced.args += [self.visit(argument) for argument in node.args]
        replaced.keywords = [self.visit(keyword) for keyword in node.keywords]
        return replaced

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self._refuse(node)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        self._refuse(node)
        return node

    def _refuse(self, node: ast.expr) -> None:
        if self._resolve(node) is F.dropout:
            raise CannotRewriteError("hands dropout on instead of calling it")


def _binds(node: ast.AST, name: str) -> bool:
    """Whether a part of a function gives a name another meaning there or in a nested function."""
    if isinstance(node, ast.Name):
        return node.id == name and not isinstance(node.ctx, ast.Load)
    return isinstance(node, ast.arg) and node.arg == name


def _calls_dropout(function: FunctionType) -> bool:
    return any(loaded is F.dropout for loaded, _ in _loaded(function))


def _other_draws(function: FunctionType) -> set[str]:
    """Functions that draw, or that call dropout without a module to ask, and which `function` calls."""
    found = set()
    for loaded, is_called in _loaded(function):
        if loaded in _OTHER_DRAWS or (is_called and isinstance(loaded, FunctionType) and _calls_dropout(loaded)):
            found.add(loaded.__name__)
    return found - {F.dropout.__name__}


def _loaded(function: FunctionType) -> Iterator[tuple[Any, bool]]:
    """What the function's code and that of functions nested in it load by dotted names, and whether a plain global is loaded for a call."""
    resolve = _Resolver(function)
    for code in _codes(function):
        if not any(_may_draw(name, function.__globals__.get(name)) for name in code.co_names):
            continue
        node: ast.expr | None = None
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF", "LOAD_CLASSDEREF"):
                node = ast.Name(instruction.argval, ast.Load())
                yield resolve(node), instruction.opname == "LOAD_GLOBAL" and bool((instruction.arg or 0) & 1)
            elif node is not None and instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                node = ast.Attribute(node, instruction.argval, ast.Load())
                yield resolve(node), False
            else:
                node = None


def _may_draw(name: str, found: object) -> bool:
    """Whether a name in a code is worth looking at: to disassemble every method of a large class takes long."""
    if isinstance(found, FunctionType):
        return any("dropout" in inner for inner in found.__code__.co_names)
    return "dropout" in name


def _codes(function: FunctionType) -> Iterator[CodeType]:
    """The function's code and the code of functions defined in it."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield code
        waiting.extend(constant for constant in code.co_consts if inspect.iscode(constant))


def _contents(cell: CellType) -> Any:
    """What a closure's variable holds; None while it is unset."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
