"""A model without storage that still runs: fake tensors on the CPU, in the dtypes of training, whatever device the original is on."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from colossal_core._torch_private import fake_tensor_mode
from colossal_core.dataflow import MAX_ANSWERS
from colossal_core.fused_part import seeds
from colossal_core.keyed_dropout import KeyedDropoutState, KeyedLayer, install_keyed_dropout
from colossal_core.random import RandomKey


@dataclass(frozen=True)
class FakeModel:
    """model: runs inside `mode` only. dropout: what its dropouts read, as in training."""

    model: nn.Module
    mode: AbstractContextManager[object]
    dropout: KeyedDropoutState


def fake_copy(
    model: nn.Module, compute: torch.dtype, blocks: Iterable[str], hooks: frozenset[int] = frozenset()
) -> FakeModel:
    """A copy in which floating parameters have the compute dtype; ties, `requires_grad` and training mode are kept.

    The model may be wrapped already: the copies of its blocks run their class's own forward, neither recomputed nor compiled. hooks: ids
    of those that belong to what the model computes; they are copied with it, and a user's and those that move its state are left out.
    Memory: none.
    """
    mode = fake_tensor_mode()
    with mode:
        memo = _memo(model, compute)
        shadow = copy.deepcopy(model, memo)
        _copy_hooks(model, shadow, hooks, memo)
        for name in blocks:
            attributes = vars(shadow.get_submodule(name))
            if not isinstance(
                attributes.get("forward"), MethodType
            ):  # a method is keyed dropout's; the rest wraps the block
                attributes.pop("forward", None)
        dropout = _rekeyed(shadow)
    return FakeModel(shadow, mode, dropout)


def fake_batch(batch: Mapping[str, Tensor], compute: torch.dtype) -> dict[str, Tensor]:
    """Inside a fake mode: tensors of the batch's shapes; floating ones in the compute dtype."""
    return {
        key: torch.empty(tuple(tensor.shape), dtype=_dtype(tensor, compute), device="cpu")
        for key, tensor in batch.items()
    }


def _memo(model: nn.Module, compute: torch.dtype) -> dict[int, object]:
    """What `copy.deepcopy` is to take for tensors, and empty tables for hooks: those of a model in training hold all of its state."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for name, table in vars(module).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(table, dict):
                memo[id(table)] = type(table)()
        for tensor in _held(module):
            if id(tensor) in memo:
                continue
            parameter = isinstance(tensor, nn.Parameter)
            dtype = _dtype(tensor, compute) if parameter or compute == torch.float64 else tensor.dtype
            empty = torch.empty(tuple(tensor.shape), dtype=dtype, device="cpu")
            memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
    return memo


def _held(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module itself, those among its attributes included (what an entry left for a product when a step was cut off)."""
    for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Tensor):
                yield item


def _copy_hooks(model: nn.Module, shadow: nn.Module, hooks: frozenset[int], memo: dict[int, object]) -> None:
    """Puts copies of some forward hooks on a copy of a model: where one holds a module, its copy holds that module's."""
    for module, copied in zip(model.modules(), shadow.modules(), strict=True) if hooks else ():
        for name, table in vars(module).items():
            if not name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                continue
            kept = [key for key in table if key in hooks and not (callable(table[key]) and seeds(table[key]))]
            for key in kept:
                vars(copied)[name][key] = copy.deepcopy(table[key], memo)


def _dtype(tensor: Tensor, compute: torch.dtype) -> torch.dtype:
    return compute if tensor.is_floating_point() else tensor.dtype


def _rekeyed(shadow: nn.Module) -> KeyedDropoutState:
    """Dropouts that draw keyed numbers from a state of the copy's own."""
    keyed = [(name, module) for name, module in shadow.named_modules() if "keyed_layer" in vars(module)]
    if not keyed:
        return install_keyed_dropout(shadow)
    state = KeyedDropoutState()
    for number, (name, module) in enumerate(keyed):
        before = _layer_of(module)
        module.keyed_layer = layer = state.add(name, number)
        layer.part = before.part if before is not None else None
    return state


class DropoutInputs:
    """What the dropouts of a block read beside its arguments, as inputs of a graph that is traced from it: torch.compile lifts them too."""

    def __init__(self, block: nn.Module) -> None:
        self._layers = [layer for layer in map(_layer_of, block.modules()) if layer is not None]
        self._state = self._layers[0].state if self._layers else None
        current = self._state.capture() if self._state is not None else None
        self._current = current
        shared = [current.key.seed, current.key.step, current.sample_ids] if current is not None else []
        self.tensors: tuple[Tensor, ...] = (*shared, *(layer.number for layer in self._layers)) if shared else ()

    @contextmanager
    def replaced(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the dropouts read these in the place of `tensors`."""
        if self._state is None or self._current is None:
            yield
            return
        seed, step, sample_ids = tensors[:3]
        numbers = [layer.number for layer in self._layers]
        self._state.restore(replace(self._current, key=RandomKey(seed, step), sample_ids=sample_ids))
        for layer, number in zip(self._layers, tensors[3:], strict=True):
            layer.number = number
        try:
            yield
        finally:
            self._state.restore(self._current)
            for layer, number in zip(self._layers, numbers, strict=True):
                layer.number = number


def _layer_of(module: nn.Module) -> KeyedLayer | None:
    found = vars(module).get("keyed_layer")
    return found if isinstance(found, KeyedLayer) else None


@contextmanager
def as_real_tensors() -> Iterator[None]:
    """Inside, transformers takes fake tensors for real ones. It would otherwise make every attention mask that training leaves out (no
    padding, no packing), as it does when it is exported, and with a mask take another kernel.
    """
    module = sys.modules.get("transformers.utils.import_utils")
    known = vars(module).get("is_fake_tensor") if module is not None else None
    if known is None:
        yield
        return
    vars(module)["is_fake_tensor"] = _never
    try:
        yield
    finally:
        vars(module)["is_fake_tensor"] = known


def _never(tensor: object) -> bool:
    del tensor
    return False


class AsOnAccelerator(TorchFunctionMode):
    """Lets a CPU trace be the accelerator's: attention with dropout stays one fused kernel there, which keeps a seed and no mask.

    Questions about values, which fake tensors cannot answer, are answered with `branch`, as `colossal_core.dataflow` does.
    """

    def __init__(self, *, branch: bool) -> None:
        super().__init__()
        self._branch = branch
        self._num_answers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _without_dropout(func, args, kwargs)
        if func is Tensor.__bool__ and self._num_answers < MAX_ANSWERS:
            self._num_answers += 1
            return self._branch
        return func(*args, **kwargs)


def _without_dropout(attention: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    else:
        kwargs["dropout_p"] = 0.0
    return attention(*args, **kwargs)
