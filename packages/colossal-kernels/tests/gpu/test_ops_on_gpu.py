"""Every announced op on a GPU: the suite in float32, float16 and bfloat16, the same bits over and over, under torch.compile and recompute,
torch's own check of every operator, and on a device that is not the current one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from colossal_core._torch_private import TorchDispatchMode
from colossal_core.ops import OpImplementation
from colossal_core.testing import OpSuite
from colossal_core.testing.op_cases import OpCase, op_cases
from colossal_core.testing.op_cases.case import placed
from colossal_kernels.bench.case import Call, Draw
from colossal_kernels.bench.command import known_benches
from colossal_kernels.bench.measure import resolved
from colossal_kernels.bench.outcome import copied, distance, mapped, outcome
from colossal_kernels.interpreting import interpreted
from colossal_kernels.table import implementations

DEVICE = "cpu" if interpreted() else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() and not interpreted(), reason="needs a CUDA device"),
    # torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
]
NARROW = torch.float16 if interpreted() else torch.bfloat16
"""What is tried beside the suite. The interpreter computes nothing in bfloat16."""
KINDS = ("float32", "float16") if interpreted() else ("float32", "float16", "bfloat16")
FOUND = [found for found in implementations() if DEVICE in found.device_types]
IN_PLACE = ("adamw_step", "lion_step", "sgd_step")
DIFFERENTIATED_OPS = [
    op
    for op, bench in known_benches().items()
    if any({"backward", "both"} & set(shape.least) for shape in bench.shapes)
]
DIFFERENTIATED = [found for found in FOUND if found.op in DIFFERENTIATED_OPS]


def title(implementation: OpImplementation) -> str:
    return f"{implementation.op}-{implementation.provider}"


def suites() -> Iterator[tuple[str, type[OpSuite]]]:
    """One subclass of the suite for each implementation, as a test file would write it."""
    for found in FOUND:
        name = f"Test_{found.op}_{found.provider}"
        fitting = tuple(kind for kind in KINDS if found.fits(DEVICE, kind))
        yield name, type(name, (OpSuite,), {"implementation": found, "dtypes": fitting, "device": DEVICE})


globals().update(suites())
every_op = pytest.mark.parametrize("implementation", FOUND, ids=title)


def calls(op: str, most: int, dtype: torch.dtype = NARROW, device: str = DEVICE) -> list[Call]:
    """The suite's first cases that have elements."""
    cases = [case for case in op_cases(op, dtype) if not case.in_place or case.arguments[0]]
    full = [case for case in cases if all(tensor.numel() for tensor in _tensors(case))][:most]
    grad = op in DIFFERENTIATED_OPS
    return [
        mapped(
            _call(case, grad=grad), lambda tensor: placed(tensor.detach(), device).requires_grad_(tensor.requires_grad)
        )
        for case in full
    ]


def _call(case: OpCase, *, grad: bool) -> Call:
    for tensor in _tensors(case):
        tensor.requires_grad_(grad and tensor.is_floating_point() and tensor.itemsize > 1)
    return Call(case.arguments, case.keywords)


def _tensors(case: OpCase) -> list[torch.Tensor]:
    flat = [item for value in case.arguments for item in (value if isinstance(value, list | tuple) else [value])]
    return [item for item in flat if isinstance(item, torch.Tensor)]


def directions(op: str) -> tuple[Any, ...]:
    if op in IN_PLACE:
        return ("step",)
    return ("both",) if op in DIFFERENTIATED_OPS else ("forward",)


def realistic(op: str) -> Call:
    """The third shape of the benchmark, the small one."""
    if interpreted():
        return calls(op, 1)[0]
    return known_benches()[op].shapes[2].call(Draw(torch.device(DEVICE)))


def same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Bit by bit, NaN too."""
    return all(torch.equal(bits(one), bits(other)) for one, other in zip(ours, others, strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@every_op
def test_it_runs_once(implementation: OpImplementation) -> None:
    """The test that compute-sanitizer watches."""
    for call in calls(implementation.op, 4):
        outcome(implementation.function, call, directions(implementation.op))
    if not interpreted():
        torch.cuda.synchronize()


@every_op
def test_it_gives_the_same_bits_a_hundred_times(implementation: OpImplementation) -> None:
    call, where = realistic(implementation.op), directions(implementation.op)
    first = outcome(implementation.function, copied(call), where)
    for _ in range(2 if interpreted() else 99):
        assert same(outcome(implementation.function, copied(call), where), first)


@every_op
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.skipif(interpreted(), reason="a compiled graph does not reach the interpreter")
def test_it_is_compiled_without_a_break_at_any_size(implementation: OpImplementation, backend: str) -> None:
    if implementation.op in IN_PLACE:
        return  # a step is never inside what is compiled
    torch.compiler.reset()
    function = resolved(implementation)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)
    where = directions(implementation.op)
    for call in calls(implementation.op, 4 if backend == "aot_eager" else 2):
        expected = outcome(function, copied(call), where)
        assert distance(outcome(compiled, copied(call), where), expected) <= torch.finfo(NARROW).eps


@pytest.mark.parametrize("implementation", DIFFERENTIATED, ids=title)
def test_recomputation_gives_the_same_gradients(implementation: OpImplementation) -> None:
    def recomputed(*arguments: Any, **keywords: Any) -> Any:
        return checkpoint(implementation.function, *arguments, use_reentrant=False, **keywords)

    for call in calls(implementation.op, 2):
        expected = outcome(implementation.function, copied(call), ("both",))
        assert same(outcome(recomputed, copied(call), ("both",)), expected)


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The first call of every operator of this package."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[str, tuple[Any, Call]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func.namespace == "colossal_kernels":
            self.calls.setdefault(str(func), (func, copied(Call(tuple(args), kwargs or {}))))
        return func(*args, **(kwargs or {}))


@every_op
def test_torch_finds_no_fault_in_its_operators(implementation: OpImplementation) -> None:
    recorded = Recorded()
    for call in calls(implementation.op, 4):
        with recorded:
            outcome(implementation.function, call, directions(implementation.op))
    if not recorded.calls:  # a kernel that takes nothing as small as this
        with recorded:
            outcome(implementation.function, realistic(implementation.op), directions(implementation.op))
    reachable = implementation.provider == "triton" and not interpreted()
    assert recorded.calls or not reachable, "nothing of this package was called"
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if not interpreted():
        checks.append("test_aot_dispatch_dynamic")
    for func, seen in recorded.calls.values():
        given = seen if has_gradient(func) else mapped(seen, torch.Tensor.detach)
        # What it returns beside the loss are gradients to be: torch's check sums all outputs, and its partitioner refuses these.
        fitting = [check for check in checks if implementation.op != "linear_cross_entropy" or "aot" not in check]
        torch.library.opcheck(func, given.arguments, dict(given.keywords), test_utils=fitting)


def has_gradient(operator: Any) -> bool:
    """Whether an operator was given one. Those that others' gradients are made of were not, and are asked for none."""
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "Autograd")
    return found


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_it_runs_on_a_device_that_is_not_the_current_one(implementation: OpImplementation) -> None:
    assert torch.cuda.current_device() == 0
    where = directions(implementation.op)
    for here, there in zip(
        calls(implementation.op, 2, device="cuda:0"), calls(implementation.op, 2, device="cuda:1"), strict=True
    ):
        found = outcome(implementation.function, there, where)
        assert all(tensor.device in (torch.device("cuda:1"), torch.device("cpu")) for tensor in found)
        expected = outcome(implementation.function, here, where)
        assert same([tensor.cpu() for tensor in found], [tensor.cpu() for tensor in expected])
