"""The specimen of any model: its own blocks in their real sizes, two of each kind, with values drawn anew."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from colossal_core.anatomy import BlockChain
from colossal_core.dataflow import meta_copy, module_lists
from colossal_core.model_ops.remaking import is_remade
from colossal_core.quiet import quiet_transformers
from colossal_core.specimen import SpecimenError
from colossal_core.specimen_batch import example_values, small_batch

KEPT_BLOCKS = 2
"""Blocks of each kind (class, and shapes of parameters) that stay of a list."""

MAX_ELEMENTS = 1 << 29
"""A specimen of more elements than this is refused: several copies of it are trained at once, in float64."""

_SEED = 20_170_612


@contextmanager
def seeded() -> Iterator[None]:
    """Inside, the CPU is the default device and draws from a fixed seed; afterwards the random state is what it was."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(_SEED)
        yield


@dataclass(frozen=True)
class ModuleSpecimen:
    """model: the untouched model, on any device, copied when something is first asked for. chains: its lists of blocks.

    example_batch: keyword arguments of its forward, on any device; None for a transformers model. Blocks are left out where the model runs
    without them. What hooks do is left out.
    """

    model: nn.Module
    chains: tuple[BlockChain, ...]
    example_batch: Mapping[str, Tensor] | None

    @cached_property
    def key(self) -> str:
        skeleton = self._skeleton
        name = f"{type(skeleton.model).__module__}.{type(skeleton.model).__qualname__}"
        found = [
            f"{name} {type(module).__qualname__} {module.extra_repr()}"
            for name, module in skeleton.model.named_modules()
        ]
        parameters = skeleton.model.named_parameters(remove_duplicate=False)
        found += [f"{name} {tuple(parameter.shape)} {parameter.requires_grad}" for name, parameter in parameters]
        found += [f"{key} {tuple(value.shape)} {value.dtype}" for key, value in sorted(self._batch.items())]
        return f"{name}:{hashlib.sha256(chr(10).join(found).encode()).hexdigest()[:16]}"

    @cached_property
    def answers(self) -> dict[object, object]:
        """Of this object alone: attributes of modules, which no key names, may tell two models apart."""
        return {}

    def build(self) -> nn.Module:
        self._batch  # noqa: B018 - decides which blocks stay
        return self._skeleton.with_values()

    def batch(self) -> Mapping[str, Tensor]:
        return dict(self._batch)

    @cached_property
    def _skeleton(self) -> _Skeleton:
        """Truncated where the truncated model runs."""
        refuse_own_forwards(self.model)
        whole = _Skeleton.of(self.model)
        short = _Skeleton.of(self.model)
        if not short.truncate(self.chains):
            return _checked(whole)
        model = _checked(short).with_values()
        try:
            with torch.no_grad(), quiet_transformers(), seeded():
                model(**self._batch_of(model))
        except Exception:  # whatever a stranger's forward raises without its blocks
            return _checked(whole)
        return short

    @cached_property
    def _batch(self) -> Mapping[str, Tensor]:
        return self._batch_of(self._skeleton.with_values())

    def _batch_of(self, model: nn.Module) -> Mapping[str, Tensor]:
        if self.example_batch is not None:
            return example_values(self.example_batch, model)
        with quiet_transformers():
            return small_batch(model)


def refuse_own_forwards(model: nn.Module) -> None:
    """Raises: SpecimenError where a module computes by a function of its own instead of its class's, which may hold on to that module and
    its parameters: no copy could be told to compute the same. Functions that this library puts there are left out, as hooks are.
    """
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if forward is None:
            continue
        function = getattr(forward, "__func__", forward)
        home = getattr(function, "__globals__", {}).get("__name__", type(function).__module__)
        if not home.startswith("colossal_") and not is_remade(function):
            raise SpecimenError(
                f"{name or 'the model'} ({type(module).__name__}) has a forward of its own, put on the module after it was made: write a "
                "class with that forward instead"
            )


@dataclass(frozen=True)
class _Skeleton:
    """A copy of the model on the meta device, and by id() the values of those of its tensors that are no parameters."""

    model: nn.Module
    values: Mapping[int, Tensor]

    @staticmethod
    def of(model: nn.Module) -> _Skeleton:
        try:
            copied = meta_copy(model)
        except Exception as error:  # whatever a stranger's attributes raise when they are copied
            raise SpecimenError(f"the model cannot be copied ({type(error).__name__}: {error})") from None
        values = {}
        for real, empty in zip(model.modules(), copied.modules(), strict=True):
            for mine, its in ((real._buffers, empty._buffers), (vars(real), vars(empty))):
                for name, tensor in mine.items():
                    if isinstance(tensor, Tensor):
                        values[id(its[name])] = _value_of(tensor)
        return _Skeleton(copied, values)

    def truncate(self, chains: tuple[BlockChain, ...]) -> bool:
        """Leaves `KEPT_BLOCKS` blocks of each kind in each list; whether anything was left out."""
        chained = {id(self.model.get_submodule(name)) for chain in chains for name in chain.names}
        found = False
        for list_name in module_lists(self.model):
            try:
                container = self.model.get_submodule(list_name)
            except AttributeError:
                continue  # it was inside a block that is gone
            assert isinstance(container, nn.ModuleList | nn.Sequential)
            kinds: dict[object, list[int]] = {}
            for index in reversed([i for i, kept in enumerate(_kept(list(container), chained, kinds)) if not kept]):
                del container[index]
                found = True
        return found

    def with_values(self) -> nn.Module:
        """A new model with real tensors on the CPU, in training mode."""
        with seeded():
            memo: dict[int, object] = {key: value.clone() for key, value in self.values.items()}
            for parameter in self.model.parameters():
                memo[id(parameter)] = nn.Parameter(_drawn(parameter), requires_grad=parameter.requires_grad)
            return copy.deepcopy(self.model, memo).train()


def _checked(skeleton: _Skeleton) -> _Skeleton:
    numel = sum(parameter.numel() for parameter in skeleton.model.parameters())
    if numel > MAX_ELEMENTS:
        raise SpecimenError(
            f"with two blocks of each kind the model has {numel:,} parameters, too many to try a plan on (at most "
            f"{MAX_ELEMENTS:,}): pass a smaller model of the same kind (model.verify_config)"
        )
    return skeleton


def _kept(elements: list[nn.Module], chained: set[int], kinds: dict[object, list[int]]) -> Iterator[bool]:
    """Whether each element of a list stays: what is no block, and the first blocks of each kind, however often each one stands there."""
    for element in elements:
        shapes = tuple((name, tuple(parameter.shape)) for name, parameter in element.named_parameters())
        seen = kinds.setdefault((type(element), shapes), [])
        if id(element) in chained and id(element) not in seen:
            seen.append(id(element))
        yield id(element) not in chained or id(element) in seen[:KEPT_BLOCKS]


def _value_of(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor without a value something harmless: positive numbers, True, or 0."""
    if not tensor.is_meta:
        return tensor.detach().to("cpu", copy=True)
    if tensor.is_floating_point():
        with seeded():
            return torch.rand(tensor.shape, dtype=tensor.dtype) + 0.5
    return torch.full(tensor.shape, tensor.dtype == torch.bool, dtype=tensor.dtype)


def _drawn(parameter: nn.Parameter) -> Tensor:
    """float32 values for a parameter: weights that keep sizes as they are, vectors around 1; integers stay integers."""
    if not parameter.is_floating_point() and not parameter.is_complex():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    dtype = parameter.dtype if parameter.is_complex() else torch.float32
    if parameter.dim() < 2:
        return torch.rand(parameter.shape, dtype=dtype) + 0.5
    scale: float = parameter.shape[-1] ** -0.5
    return torch.randn(parameter.shape, dtype=dtype) * scale
