"""Rotary position embedding in a model: functions of (q, k, cos, sin) that its methods call by a global name, and that compute `rotary`."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor

from colossal_core.model_ops.proving import drawing, drawn, is_same
from colossal_core.model_ops.remaking import Change, Place, Source, place_of
from colossal_core.ops.rotary import rotary

Angles = Literal["halves", "neighbours", "once"]
Turned = tuple[Tensor, Tensor]

_DIM = "unsqueeze_dim"
"""transformers' keyword for where q and k have their heads."""

_BATCH, _LENGTH, _HEADS, _KEY_HEADS, _WIDTH = 2, 5, 3, 1, 8


@dataclass(frozen=True)
class Rotation:
    """What a function computes. interleaved, angles, to_halves: as of the op. heads: dimension of q and k that holds the heads, unless the
    call says otherwise. partial: some features may pass. keeps_dtype: results have the dtype of q where cos has another;
    keeps_narrow: where q and cos are both narrower than float32.
    """

    interleaved: bool
    angles: Angles
    to_halves: bool
    heads: Literal[1, 2]
    partial: bool
    keeps_dtype: bool
    keeps_narrow: bool


@functools.lru_cache(maxsize=1024)
def calls_in(source: Source) -> tuple[tuple[str, Place], ...]:
    """Global names that a method calls with four arguments or more, as (name, place of the name)."""
    return tuple(_calls(source))


def _calls(source: Source) -> Iterator[tuple[str, Place]]:
    code = source.function.__code__
    local = {*code.co_varnames, *code.co_cellvars, *code.co_freevars}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id not in local:
            place = place_of(node.func)
            if place is not None and len(node.args) + len(node.keywords) >= 4:
                yield node.func.id, place


@functools.lru_cache(maxsize=256)
def find_rotation(function: object) -> Rotation | None:
    """What a function of the signature (q, k, ..., cos, sin, ...) computes, proven in values and gradients for as many and fewer heads of
    keys, for one and several rows of angles, and for partial rotation; None where it is not the op.
    """
    if not isinstance(function, FunctionType) or not is_candidate(function):
        return None
    with drawing():
        guess = next((one for one in _guesses() if _is(function, one, _WIDTH)), None)
        partial = guess is not None and _is(function, guess, _WIDTH // 2)
    if guess is None:
        return None
    wide, narrow = (_keeps(function, guess, dtype) for dtype in (torch.float32, torch.bfloat16))
    return replace(guess, partial=partial, keeps_dtype=wide, keeps_narrow=narrow)


def _guesses() -> Iterator[Rotation]:
    layouts: tuple[Angles, ...] = ("halves", "neighbours", "once")
    orders = ((False, False), (True, False), (True, True))
    places: tuple[Literal[1, 2], ...] = (1, 2)
    for (interleaved, to_halves), angles, heads in itertools.product(orders, layouts, places):
        yield Rotation(interleaved, angles, to_halves, heads, partial=False, keeps_dtype=False, keeps_narrow=False)


def is_candidate(function: object) -> bool:
    """Whether a function takes two tensors, and then cos and sin among others."""
    if not isinstance(function, FunctionType):
        return False
    names = list(inspect.signature(function).parameters)
    return len(names) >= 4 and {"cos", "sin"} <= set(names[2:])


def _is(function: FunctionType, guess: Rotation, width: int) -> bool:
    return all(
        is_same(
            lambda q, k, cos, sin: function(q, k, cos=_laid(cos, guess), sin=_laid(sin, guess)),
            lambda q, k, cos, sin: _by(rotary, guess, guess.heads)(q, k, _laid(cos, guess), _laid(sin, guess)),
            [
                _heads(_HEADS, guess),
                _heads(heads, guess),
                drawn(rows, _LENGTH, width // 2),
                drawn(rows, _LENGTH, width // 2),
            ],
        )
        for heads, rows in ((_KEY_HEADS, _BATCH), (_HEADS, 1))
    )


def _heads(count: int, guess: Rotation) -> Tensor:
    return drawn(*((_BATCH, count, _LENGTH) if guess.heads == 1 else (_BATCH, _LENGTH, count)), _WIDTH)


def _laid(angles: Tensor, guess: Rotation) -> Tensor:
    """Of one number for each pair, what a model makes of it."""
    if guess.angles == "halves":
        return torch.cat((angles, angles), dim=-1)
    return angles.repeat_interleave(2, dim=-1) if guess.angles == "neighbours" else angles


def _keeps(function: FunctionType, guess: Rotation, of_angles: torch.dtype) -> bool:
    """Whether the results of narrow queries and keys are as narrow, under angles of a dtype."""
    q, k = (_heads(count, guess).detach().to(torch.bfloat16) for count in (_HEADS, _KEY_HEADS))
    width = _WIDTH if guess.angles != "once" else _WIDTH // 2
    angle = torch.ones(1, _LENGTH, width, dtype=of_angles)
    try:
        return all(one.dtype == torch.bfloat16 for one in function(q, k, cos=angle, sin=angle))
    except Exception:  # whatever a stranger's function raises where dtypes differ
        return False


def _by(op: Callable[..., Turned], found: Rotation, heads: int) -> Callable[..., Turned]:
    """An implementation of the op for queries and keys that have their heads in dimension 1 or 2."""
    interleaved, angles, to_halves = found.interleaved, found.angles, found.to_halves

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Turned:
        if heads == 1:
            return op(q, k, cos, sin, interleaved=interleaved, angles=angles, to_halves=to_halves)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = op(q, k, cos, sin, interleaved=interleaved, angles=angles, to_halves=to_halves)
        return q.transpose(1, 2), k.transpose(1, 2)

    return turned


def rotated(found: Rotation, op: Callable[..., Turned], original: FunctionType) -> Callable[..., Any]:
    """What takes the place of a function that computes `found`. A call that was not proven (other shapes, another keyword) goes to the
    original.
    """
    signature = inspect.signature(original)
    names = tuple(signature.parameters)
    defaults = {name: one.default for name, one in signature.parameters.items() if one.default is not one.empty}
    known = {*names[:2], "cos", "sin", _DIM}
    by_heads = {heads: _by(op, found, heads) for heads in (1, 2)}
    default = found.heads
    usual = defaults.get(_DIM)
    factor = 2 if found.angles == "once" else 1

    def turned(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False))
        given.update(kwargs)
        q, k, cos, sin = given.get(names[0]), given.get(names[1]), given.get("cos"), given.get("sin")
        heads = default
        if _DIM in given and given[_DIM] != usual:
            heads = given[_DIM]
        others = [name for name in given if name not in known and given[name] is not None]
        if others or heads not in by_heads or q is None or k is None or cos is None or sin is None:
            return original(*args, **kwargs)
        whole = cos.shape[-1] * factor == q.shape[-1]
        usual_shapes = (
            q.dim() == 4 and k.dim() == 4 and cos.dim() == 3 and cos.shape[-2] == q.shape[2 if heads == 1 else 1]
        )
        same = q.dtype == k.dtype and cos.dtype == sin.dtype
        is_narrow = q.dtype in (torch.bfloat16, torch.float16)
        same = same and (found.keeps_dtype if cos.dtype != q.dtype else found.keeps_narrow or not is_narrow)
        if not (usual_shapes and same and (whole or found.partial)):
            return original(*args, **kwargs)
        return by_heads[heads](q, k, cos, sin)

    return turned


def changes_of(place: Place, name: str) -> dict[Place, Change]:
    """The change of a method's source by which it calls `name` instead."""
    return {place: lambda node: ast.Name(name, ast.Load())}
