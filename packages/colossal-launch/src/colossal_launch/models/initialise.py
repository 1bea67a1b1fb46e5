"""The first values of a model on the meta device, one unit at a time, the same on any mesh.

A copy of the unit's modules gets real memory; each module's own recipe fills it (transformers' `_init_weights`, called from the leaves up
as transformers does; `reset_parameters` for plain torch modules), with random numbers keyed by (seed, module name): values depend
on neither the mesh nor the order of units. Nothing is guessed: a dry run on the meta device first sees which recipe writes what.
What no recipe writes keeps what its constructor wrote; where that is not known either, or a module writes into a block from
outside, the whole model is built on the CPU once.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from colossal_core.errors import ConfigError, Problem
from colossal_launch._torch_private import storage_key, written_storages
from colossal_launch.models.weights import WholeModel, alias_table, unit_of


@dataclass(frozen=True)
class Recipe:
    """What a dry run showed. writers: for each tensor, the modules that write it, in order. resets: modules whose own parameters nothing
    else writes, so that their `reset_parameters` does. failed: why there is no recipe by units; empty where there is one.
    """

    writers: Mapping[str, tuple[str, ...]]
    resets: tuple[str, ...] = ()
    failed: str = ""


class InitialWeights:
    """First values of `model`, whose parameters are on the meta device. A `WeightSource`.

    The structure is copied here, so the model may be taken apart afterwards. constructed: values that constructors wrote, by full name.
    build_whole: builds the model on the CPU, or None where the caller has no way to.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int,
        *,
        constructed: Mapping[str, torch.Tensor] | None = None,
        build_whole: Callable[[], nn.Module] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._aliases = alias_table(model)
        self._skeleton = _skeleton(model)
        self._seed = seed
        self._constructed = dict(constructed or {})
        self._build_whole = build_whole
        self._device = torch.device(device)
        self._recipe: Recipe | None = None
        self._whole: WholeModel | None = None

    @property
    def recipe(self) -> Recipe:
        if self._recipe is None:
            self._recipe = self._dry_run()
        return self._recipe

    def values(self, unit: str, blocks: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """See `WeightSource`. Raises ConfigError where some value cannot be known."""
        blocks = frozenset(blocks)
        problem = self.recipe.failed or self._crossing(blocks)
        if problem:
            yield from self._whole_model(problem).values(unit, blocks)
            return
        names = self._names(unit, blocks)
        module = _materialise(self._skeleton, names, self._device)
        tensors = _named_tensors(module)
        with torch.no_grad():
            for name in names:
                if name in self._constructed:
                    tensors[name].copy_(self._constructed[name])
            for name in _post_order(module):
                if unit_of(name, blocks) == unit:
                    self._initialise_module(module, name)
            for name in self.recipe.resets:
                if unit_of(name, blocks) == unit:
                    self._reset_unwritten(module, name)
        filled = _named_tensors(module)
        del module, tensors
        for name in names:
            yield name, filled.pop(name).detach()

    def _names(self, unit: str, blocks: Collection[str]) -> list[str]:
        found = _named_tensors(self._skeleton)
        missing = (name for name, tensor in found.items() if tensor.is_meta and name not in self._aliases)
        return [name for name in missing if unit_of(name, blocks) == unit]

    def _initialise_module(self, root: nn.Module, name: str) -> None:
        apply = _hugging_face_recipe(root, name)
        if apply is not None:
            with keyed_random(self._seed, name, self._device):
                apply(root.get_submodule(name))

    def _reset_unwritten(self, root: nn.Module, name: str) -> None:
        module = root.get_submodule(name)
        reset = _reset_function(module)
        assert reset is not None, name
        prefix = f"{name}." if name else ""
        own = _own_tensors(module, recurse=False)
        kept = {
            key: tensor.clone()
            for key, tensor in own.items()
            if self.recipe.writers.get(prefix + key, ()) not in ((), (name,))
        }
        with keyed_random(self._seed, name, self._device):
            reset()
        for key, value in kept.items():
            _own_tensors(module, recurse=False)[key].copy_(value)

    def _crossing(self, blocks: Collection[str]) -> str:
        """Which module writes into a unit that is not its own; empty where none does."""
        for name, writers in self.recipe.writers.items():
            for writer in writers:
                if unit_of(writer, blocks) != unit_of(name, blocks):
                    return f"{writer or 'the model'} initialises {name}"
        return ""

    def _whole_model(self, reason: str) -> WholeModel:
        if self._whole is None:
            if self._build_whole is None:
                remedy = "build the model with real parameters, or give its modules `reset_parameters`"
                raise ConfigError([Problem("model", f"first values cannot be made unit by unit: {reason}", remedy)])
            buffers = tuple(
                name for name, tensor in _named_tensors(self._skeleton).items()
                if tensor.is_meta and not isinstance(tensor, nn.Parameter)
            )  # fmt: skip
            self._whole = WholeModel(self._build_whole, buffers, [])
        return self._whole

    def _dry_run(self) -> Recipe:
        """Runs every module's recipe on the meta device, where it costs nothing, and sees what it writes."""
        module = _materialise(self._skeleton, _named_tensors(self._skeleton), torch.device("meta"))
        missing = {name for name, tensor in _named_tensors(self._skeleton).items() if tensor.is_meta}
        missing -= self._aliases.keys()
        tensors = {name: tensor for name, tensor in _named_tensors(module).items() if name in missing}
        writers: dict[str, list[str]] = {}
        try:
            with torch.no_grad(), keyed_random(self._seed, "dry run", self._device):
                for name in _post_order(module):
                    apply = _hugging_face_recipe(module, name)
                    if apply is not None:
                        for written in _written_by(functools.partial(apply, module.get_submodule(name)), tensors):
                            writers.setdefault(written, []).append(name)
                resets = self._find_resets(module, tensors, writers)
        except Exception as error:  # a recipe that reads values cannot run here
            return Recipe({}, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        unknown = [name for name in tensors if name not in writers and name not in self._constructed]
        failed = f"nothing initialises {', '.join(unknown[:3])}" if unknown else ""
        return Recipe({name: tuple(found) for name, found in writers.items()}, resets, failed)

    def _find_resets(
        self, root: nn.Module, tensors: Mapping[str, torch.Tensor], writers: dict[str, list[str]]
    ) -> tuple[str, ...]:
        resets = []
        for name in _post_order(root):
            module = root.get_submodule(name)
            prefix = f"{name}." if name else ""
            own = [prefix + key for key in _own_tensors(module, recurse=False)]
            reset = _reset_function(module)
            if reset is None or all(key in writers or key not in tensors for key in own):
                continue
            written = _written_by(reset, tensors)
            resets.append(name)
            for key in written:
                if key not in writers:
                    writers[key] = [name]
        return tuple(resets)


@contextlib.contextmanager
def keyed_random(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Random numbers of torch keyed by (seed, name), on the CPU and on `device`; the generators' states come back afterwards."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "big") >> 1
    accelerated = device.type not in ("cpu", "meta")
    with torch.random.fork_rng([device] if accelerated else [], device_type=device.type if accelerated else "cuda"):
        torch.default_generator.manual_seed(key)  # torch.manual_seed would also change devices that are not forked here
        if accelerated:
            torch.get_device_module(device).manual_seed(key)
        yield


def _hugging_face_recipe(root: nn.Module, name: str) -> Callable[[nn.Module], None] | None:
    """`_init_weights` of the innermost transformers model around a module: sub-models bring their own. None for plain torch modules."""
    path = [root]
    for part in name.split(".") if name else []:
        path.append(path[-1].get_submodule(part))
    for module in reversed(path):
        recipe = getattr(module, "_init_weights", None)
        if callable(recipe) and callable(getattr(module, "initialize_weights", None)):
            return recipe  # type: ignore[no-any-return]
    return None


def _reset_function(module: nn.Module) -> Callable[[], None] | None:
    """How a plain torch module fills its own parameters, by torch's convention."""
    for name in ("reset_parameters", "_reset_parameters"):
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]
    return None


def _post_order(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of a module and all inside it, children first: the order in which transformers initialises."""
    for name, child in module.named_children():
        yield from _post_order(child, f"{prefix}{name}.")
    yield prefix.removesuffix(".")


def _written_by(action: Callable[[], object], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    written = written_storages(action)
    return [name for name, tensor in tensors.items() if storage_key(tensor) in written]


def _own_tensors(module: nn.Module, *, recurse: bool) -> dict[str, torch.Tensor]:
    parameters = dict(module.named_parameters(recurse=recurse, remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(recurse=recurse, remove_duplicate=False))}


def _named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by every name that it has."""
    return _own_tensors(module, recurse=True)


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of the structure that shares parameters with the model as it is now (replacing them there changes nothing here)."""
    return _copied(model, lambda name, tensor: tensor, "", {})


def _materialise(skeleton: nn.Module, names: Collection[str], device: torch.device) -> nn.Module:
    """A copy whose tensors in `names` are memory on `device`; other parameters are on the meta device, real buffers are copied.

    An alias of a tied parameter stays a meta tensor of its own: what its module writes is lost, as it is when transformers ties
    weights after they were initialised.
    """
    wanted = frozenset(names)

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:  # it has its value: recipes must not write into the user's model
            return _like(tensor, torch.device("meta")) if isinstance(tensor, nn.Parameter) else tensor.clone()
        return _like(tensor, device if name in wanted else torch.device("meta"))

    return _copied(skeleton, place, "", {})


def _like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    memory = torch.empty(tensor.shape, dtype=dtype, device=device)
    return nn.Parameter(memory, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory


def _copied(
    module: nn.Module, place: Callable[[str, torch.Tensor], torch.Tensor], prefix: str, seen: dict[int, nn.Module]
) -> nn.Module:
    """A copy of the module tree, its tensors as `place(full name, tensor)` says. A module met twice is one module in the copy."""
    if id(module) in seen:
        return seen[id(module)]
    duplicate = copy.copy(module)
    seen[id(module)] = duplicate
    attributes = vars(duplicate)
    for kind in ("_parameters", "_buffers"):
        tensors = attributes[kind].items()
        attributes[kind] = {key: None if held is None else place(prefix + key, held) for key, held in tensors}
    children = module._modules.items()
    attributes["_modules"] = {
        key: None if child is None else _copied(child, place, f"{prefix}{key}.", seen) for key, child in children
    }
    return duplicate
