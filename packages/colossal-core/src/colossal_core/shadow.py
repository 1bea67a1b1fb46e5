"""Running parts of a model on the meta device, for the shapes of what they return: no values, no memory, next to no time."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from colossal_core.dataflow import Observer, meta_copy, prepare, tensors_in, with_tensors


class Shadow:
    """A structural copy of a model on meta. dtype: of its floating parameters and buffers, None: as they are.

    It computes what a trace does (`dataflow`): no dropping of layers, portable attention, experts that return one row for each token.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self._copy = meta_copy(model)
        prepare(self._copy)
        if dtype is not None:
            self._copy.to(dtype)

    def output(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module `name` returns for arguments whose tensors may lie anywhere; its own tensors lie on meta.

        Questions about values are answered with yes, and where the module fails then, with no. Raises whatever the module raises.
        """
        given = (args, dict(kwargs))
        meta = [torch.empty_like(tensor, device="meta", requires_grad=False) for tensor in tensors_in(given)]
        meta_args, meta_kwargs = with_tensors(given, iter(meta))
        try:
            return self._run(name, meta_args, meta_kwargs, branch=True)
        except Exception:  # whatever a stranger's forward raises
            return self._run(name, meta_args, meta_kwargs, branch=False)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, branch: bool) -> Any:
        module = self._copy.get_submodule(name)
        with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            with torch.device("meta"), Observer(module, set(), branch=branch):
                return module(*args, **kwargs)


def shapes_of(value: object) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of the tensors in a nest, depth first."""
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_in(value))
