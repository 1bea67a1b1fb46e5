"""Differentiable collectives against one process that does the same with plain tensor operations, forward and backward, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colossal_comm import RankCollectives
from colossal_core.mesh import MeshLayout

PAIR = MeshLayout((1, 1, 1, 1, 2))
SQUARE = MeshLayout((1, 1, 2, 1, 2))
ROWS_SENT = {2: [[3, 1], [2, 2]], 4: [[1, 0, 2, 1], [0, 3, 1, 0], [2, 1, 1, 0], [1, 1, 1, 1]]}
"""What each rank sends to each, by the number of ranks; every rank sends four rows."""


def values(rank: int, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def apply(operation: str, collectives: RankCollectives, x: torch.Tensor, axes: Any) -> torch.Tensor:
    if operation == "all_reduce replicated":
        return collectives.all_reduce(x, axes, tag=operation)
    if operation == "all_reduce partial":
        return collectives.all_reduce(x, axes, cotangent="partial", tag=operation)
    if operation == "replicate":
        return collectives.replicate(x, axes, tag=operation)
    if operation == "all_gather partial":
        return collectives.all_gather(x, axes, dim=1, tag=operation)
    if operation == "all_gather replicated":
        return collectives.all_gather(x, axes, dim=-1, cotangent="replicated", tag=operation)
    if operation == "reduce_scatter":
        return collectives.reduce_scatter(x, axes, dim=1, tag=operation)
    if operation == "own_range":
        return collectives.own_range(x, axes, dim=-2, tag=operation)
    if operation == "all_to_all even":
        return collectives.all_to_all(x, axes, tag=operation)
    if operation == "all_to_all uneven":
        rows, own = ROWS_SENT[collectives.size(axes)], collectives.index(axes)
        received = [row[own] for row in rows]
        return collectives.all_to_all(x, axes, output_sizes=received, input_sizes=rows[own], tag=operation)
    assert operation == "broadcast"
    return collectives.broadcast(x, axes, source=1, tag=operation)


def reference(operation: str, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every rank's output, from every rank's input."""
    size = len(inputs)
    if operation.startswith("all_reduce"):
        total = torch.stack(inputs).sum(0)
        return [total] * size
    if operation == "replicate":
        return inputs
    if operation.startswith("all_gather"):
        joined = torch.cat(inputs, dim=1 if operation.endswith("partial") else -1)
        return [joined] * size
    if operation == "reduce_scatter":
        return list(torch.stack(inputs).sum(0).chunk(size, dim=1))
    if operation == "own_range":
        return [x.chunk(size, dim=1)[place] for place, x in enumerate(inputs)]
    if operation.startswith("all_to_all"):
        rows = ROWS_SENT[size] if operation.endswith("uneven") else [[4 // size] * size] * size
        parts = [list(torch.split(x, sent)) for x, sent in zip(inputs, rows, strict=True)]
        return [torch.cat([parts[source][target] for source in range(size)]) for target in range(size)]
    return [inputs[1]] * size


OPERATIONS = (
    "all_reduce replicated",
    "all_reduce partial",
    "replicate",
    "all_gather partial",
    "all_gather replicated",
    "reduce_scatter",
    "own_range",
    "all_to_all even",
    "all_to_all uneven",
    "broadcast",
)
ONE_LOSS = ("all_reduce replicated", "all_gather replicated")
"""Operations whose output every rank puts through the same function: there is one loss, not one a rank."""


def outputs_and_gradients(collectives: RankCollectives, axes: Any, compiled: str) -> dict[str, tuple[Any, Any]]:
    def every(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            torch.sin(apply(operation, collectives, x * 2, axes)) * 3
            for operation, x in zip(OPERATIONS, inputs, strict=True)
        ]

    call = torch.compile(every, fullgraph=True, backend=compiled) if compiled else every
    inputs = [values(collectives.rank, (4, 4, 3), salt).requires_grad_() for salt in range(len(OPERATIONS))]
    outputs = call(inputs)
    loss = torch.zeros((), dtype=torch.float64)
    for salt, (operation, output) in enumerate(zip(OPERATIONS, outputs, strict=True)):
        weight = values(0 if operation in ONE_LOSS else collectives.rank, tuple(output.shape), 100 + salt)
        loss = loss + (output * weight).sum()
    gradients = torch.autograd.grad(loss, inputs)
    results = [(output.tolist(), gradient.tolist()) for output, gradient in zip(outputs, gradients, strict=True)]
    return dict(zip(OPERATIONS, results, strict=True))


def check(found: list[dict[str, tuple[Any, Any]]], groups: tuple[tuple[int, ...], ...]) -> None:
    for salt, operation in enumerate(OPERATIONS):
        for ranks in groups:
            inputs = [values(rank, (4, 4, 3), salt).requires_grad_() for rank in ranks]
            outputs = [torch.sin(y) * 3 for y in reference(operation, [x * 2 for x in inputs])]
            losses = [
                (y * values(0 if operation in ONE_LOSS else rank, tuple(y.shape), 100 + salt)).sum()
                for rank, y in zip(ranks, outputs, strict=True)
            ]
            loss = losses[0] if operation in ONE_LOSS else torch.stack(losses).sum()
            # The copies of a replicated tensor are one: its gradient is the sum over them, each at the values that it holds here.
            gradients = list(torch.autograd.grad(loss, inputs, materialize_grads=True))
            if operation in ("replicate", "own_range"):
                gradients = [torch.stack(gradients).sum(0)] * len(ranks)
            for rank, output, gradient in zip(ranks, outputs, gradients, strict=True):
                difference = (
                    torch.tensor(found[rank][operation][0], dtype=torch.float64) - output
                ).norm() / output.norm()
                assert difference <= 1e-12, (operation, rank, "output", difference)
                difference = (torch.tensor(found[rank][operation][1], dtype=torch.float64) - gradient).norm() / max(
                    gradient.norm(), 1e-3
                )
                assert difference <= 1e-12, (operation, rank, "gradient", difference)


@pytest.mark.parametrize("axes", ["tp", ("dp_shard", "tp"), ("tp", "dp_shard")])
def test_exact_forward_and_backward(on_mesh: Any, axes: Any) -> None:
    check(on_mesh(SQUARE, outputs_and_gradients, axes, ""), SQUARE.groups(axes))


def test_exact_in_compiled_blocks(on_gloo: Any) -> None:
    check(on_gloo(PAIR, outputs_and_gradients, "tp", "aot_eager"), PAIR.groups("tp"))


def counts(collectives: RankCollectives, compiled: bool) -> dict[str, tuple[int, int]]:
    def block(x: torch.Tensor) -> torch.Tensor:
        y = collectives.replicate(x, "tp", tag="in")
        y = collectives.all_gather(torch.relu(y), "tp", tag="middle")
        y = collectives.all_reduce(collectives.reduce_scatter(y, "tp", tag="middle"), "tp", tag="out")
        return collectives.own_range(y, "tp", tag="own")

    call = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    x = torch.ones(2, 8, requires_grad=True)
    for _ in range(3):
        torch.autograd.backward(call(x).sum())
    rows = collectives.ledger.rows()
    return {f"{row.operation} {row.tag}": (row.num_calls, row.sent_bytes) for row in rows}


@pytest.mark.parametrize("compiled", [False, True])
def test_the_ledger_counts_forward_and_backward_when_they_run(on_gloo: Any, compiled: bool) -> None:
    expected = {
        "all_gather middle": (6, 6 * 64),
        "reduce_scatter middle": (6, 6 * 64),
        "all_reduce out": (3, 3 * 64),
        "all_reduce in": (3, 3 * 64),
        "all_gather own": (3, 3 * 32),
    }
    assert on_gloo(PAIR, counts, compiled) == [expected, expected]


def through_bfloat16_and_strides(collectives: RankCollectives) -> tuple[str, list[float], list[float]]:
    x = torch.ones(2, 3, dtype=torch.bfloat16).t().requires_grad_()
    y = collectives.all_reduce(x, "tp", cotangent="partial")
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    return str(y.dtype), y.detach().reshape(-1).float().tolist(), x.grad.reshape(-1).float().tolist()


def test_bfloat16_and_strided_inputs_and_gradients(on_mesh: Any) -> None:
    expected = ("torch.bfloat16", [2.0] * 6, [2.0] * 6)
    assert on_mesh(PAIR, through_bfloat16_and_strides) == [expected, expected]
