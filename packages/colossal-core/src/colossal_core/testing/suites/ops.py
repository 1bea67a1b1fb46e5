"""`OpSuite`: an implementation of an op beside core's reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch

from colossal_core.difference import EXACT, floor_for_gradients, relative_difference
from colossal_core.ops import OpImplementation
from colossal_core.ops.reference import reference_ops
from colossal_core.testing.op_cases import OpCase, op_cases
from colossal_core.testing.op_cases.case import placed
from colossal_core.testing.suites.sealed import SealedSuite


class OpSuite(SealedSuite, suite=True):
    """Facts about an implementation, and the tests that follow from them.

    implementation: as the plugin announces it. dtypes: those to try, by name; the implementation must say that it fits them. device: where
    to run. In float64 values and gradients are the reference's to 1e-12; in a narrower dtype their distance to the float64 truth is at most
    twice the reference's own in that dtype, and one unit in the last place of what is computed in and of what is returned.
    """

    implementation: ClassVar[OpImplementation]
    dtypes: ClassVar[tuple[str, ...]] = ("float64", "float32")
    device: ClassVar[str] = "cpu"

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        if "case_name" in metafunc.fixturenames:
            names = [case.name for case in op_cases(cls.implementation.op, torch.float64)]
            metafunc.parametrize("case_name", names)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", cls.dtypes)

    def test_implementation_fits_where_it_is_tried(self) -> None:
        device_type = torch.device(self.device).type
        assert self.implementation.provider != "" and self.dtypes
        assert all(self.implementation.fits(device_type, dtype) for dtype in self.dtypes)

    def test_values_and_gradients_are_the_reference_s(self, case_name: str, dtype: str) -> None:
        op, kind = self.implementation.op, getattr(torch, dtype)
        reference = next(found.function for found in reference_ops() if found.op == op)
        ours = _results(self.implementation.function, _case(op, case_name, kind, self.device))
        same = _results(reference, _case(op, case_name, kind, self.device))
        narrow = _case(op, case_name, kind, self.device)
        truth = _results(reference, _widened(narrow))
        assert [(tensor.shape, tensor.dtype) for tensor in ours] == [(tensor.shape, tensor.dtype) for tensor in same]
        floor = floor_for_gradients(truth)
        for found, near, wanted in zip(ours, same, truth, strict=True):
            rounded = found.dtype.is_floating_point and found.dtype.itemsize > 1  # codes of eight bits are exact
            unit = max(torch.finfo(kind).eps, torch.finfo(found.dtype).eps if rounded else 0.0)
            yardstick = 2.0 * relative_difference(near, wanted, floor=floor) + unit
            limit = EXACT if kind == torch.float64 else yardstick
            assert relative_difference(found, wanted, floor=floor) <= limit, case_name

    def test_arguments_are_left_alone(self, case_name: str, dtype: str) -> None:
        """But for those that the op is there to change."""
        case = _case(self.implementation.op, case_name, getattr(torch, dtype), self.device)
        given = _tensors(case.arguments[1:2] if case.in_place else case.arguments)
        before = [tensor.detach().clone() for tensor in given]
        _results(self.implementation.function, case)
        assert all(torch.equal(tensor.detach(), kept) for tensor, kept in zip(given, before, strict=True))


def _case(op: str, name: str, dtype: torch.dtype, device: str) -> OpCase:
    case = next(case for case in op_cases(op, dtype) if case.name == name)
    return _mapped(case, lambda tensor: placed(tensor, device))


def _widened(case: OpCase) -> OpCase:
    return _mapped(case, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def _mapped(case: OpCase, change: Callable[[torch.Tensor], torch.Tensor]) -> OpCase:
    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        return [walk(item) for item in value] if isinstance(value, list) else value

    keywords = {key: walk(value) for key, value in case.keywords.items()}
    return OpCase(case.name, tuple(walk(value) for value in case.arguments), keywords, case.in_place)


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _results(function: Callable[..., Any], case: OpCase) -> list[torch.Tensor]:
    """What the op returns (or has changed), then the gradient of each floating argument under a fixed weight of every output."""
    if case.in_place:
        function(*case.arguments, **copy.deepcopy(dict(case.keywords)))
        return _tensors([case.arguments[0], *case.arguments[2:]])
    inputs = [tensor.requires_grad_() for tensor in _tensors(case.arguments) if tensor.is_floating_point()]
    returned = function(*case.arguments, **case.keywords)
    outputs = _tensors(returned if isinstance(returned, tuple) else [returned])
    ends = [output for output in outputs if output.requires_grad]
    weights = [_weight(output) for output in ends]
    gradients = torch.autograd.grad(ends, inputs, weights, materialize_grads=True) if inputs else ()
    return [*(output.detach() for output in outputs), *gradients]


def _weight(output: torch.Tensor) -> torch.Tensor:
    """Different for every element, and the same number in every dtype; of a single number one that no narrow dtype holds, since it is a
    factor that kernels must not round.
    """
    if output.dim() == 0:
        return torch.tensor(0.7, dtype=torch.float32, device=output.device).to(output.dtype)
    steps = torch.arange(output.numel(), device=output.device) % 7 - 3
    return (steps / 4).to(output.dtype).reshape(output.shape)
