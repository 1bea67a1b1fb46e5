"""Products with the sequence cut before or after them, against the whole product in one process, in float64: outputs, gradients, bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from colossal_comm import RankCollectives, run_simulated
from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.mesh import MeshLayout
from colossal_core.testing import WorkerPool
from colossal_tensor import _torch_private
from colossal_tensor.matmul import SequenceMatmul, sequence_matmul
from colossal_tensor.operators import Route

FEATURES, HIDDEN = 5, 3
"""Features of the stream, and of one rank between the two products."""


@dataclass(frozen=True)
class Case:
    """shape: of the whole input without its features; dim: the one that is cut; without: what needs no gradient."""

    shape: tuple[int, ...] = (2, 12)
    dim: int = 1
    transposed: bool = False
    without: tuple[str, ...] = ()


CASES = [
    Case(),
    Case(transposed=True),
    Case(shape=(1, 12)),
    Case(shape=(12,), dim=0),
    Case(shape=(9, 12)),  # more samples than messages
    Case(shape=(2, 12, 3), dim=-3, transposed=True),
    Case(without=("first", "row")),
    Case(without=("input",)),
    Case(without=("first", "second", "bias")),
]
Tensors = dict[str, torch.Tensor]


def mesh_of(size: int) -> MeshLayout:
    return MeshLayout((1, 1, 1, 1, size))


def whole_tensors(case: Case, size: int) -> Tensors:
    generator = torch.Generator().manual_seed(7)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "input": drawn(*case.shape, FEATURES),
        "first": drawn(size * HIDDEN, FEATURES),
        "second": drawn(size * HIDDEN, FEATURES),
        "bias": drawn(size * HIDDEN),
        "row": drawn(FEATURES, size * HIDDEN),
        "of result": drawn(*case.shape, FEATURES),
        "of whole": drawn(size, *case.shape, FEATURES),
    }


LEARNED = ("input", "first", "second", "bias", "row")


def reference(case: Case, size: int) -> Tensors:
    """The result and the gradients of one process."""
    tensors = whole_tensors(case, size)
    for name in LEARNED:
        tensors[name].requires_grad_(name not in case.without)
    x = tensors["input"]
    h = torch.tanh(x @ tensors["first"].t()) * (x @ tensors["second"].t() + tensors["bias"])
    result = h @ tensors["row"].t()
    torch.autograd.backward((result * tensors["of result"]).sum() + (x * tensors["of whole"].sum(0)).sum())
    return {"result": result.detach(), **{name: grad for name in LEARNED if (grad := tensors[name].grad) is not None}}


CUT_ALONG = {"first": 0, "second": 0, "bias": 0, "row": 1}
"""Which dimension of a weight, as nn.Linear keeps it, is cut."""


def own_part(tensors: Tensors, name: str, case: Case, size: int, rank: int) -> torch.Tensor:
    dim = CUT_ALONG.get(name, case.dim % len(case.shape) if case.dim >= 0 else case.dim % (len(case.shape) + 1))
    part = tensors[name].chunk(size, dim=dim)[rank]
    flipped = case.transposed and name in ("first", "second", "row")
    return (part.t() if flipped else part).contiguous()


def run_case(collectives: Collectives, case: Case, matmul: SequenceMatmul, compiled: str = "") -> Tensors:
    size, rank = collectives.size("tp"), collectives.index("tp")
    tensors = whole_tensors(case, size)
    own = {name: own_part(tensors, name, case, size, rank) for name in (*LEARNED, "of result")}
    for name in LEARNED:
        own[name].requires_grad_(name not in case.without)

    def block(own: Tensors, of_whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = [own["first"], own["second"]]
        whole, (first, second) = matmul.gather_columns(
            own["input"], weights, [None, own["bias"]], dim=case.dim, transposed=case.transposed
        )
        h = torch.tanh(first) * second
        result = matmul.row_scatter(h, own["row"], dim=case.dim, transposed=case.transposed)
        return result, (whole * of_whole).sum()

    call = torch.compile(block, backend=compiled, fullgraph=True) if compiled else block
    result, other = call(own, tensors["of whole"][rank])
    torch.autograd.backward((result * own["of result"]).sum() + other)
    return {"result": result.detach(), **{name: grad for name in LEARNED if (grad := own[name].grad) is not None}}


def check(case: Case, found: list[Tensors]) -> None:
    expected = reference(case, len(found))
    for rank, parts in enumerate(found):
        assert parts.keys() == expected.keys()
        for name, part in parts.items():
            wanted = own_part(expected, name, case, len(found), rank)
            assert part.shape == wanted.shape
            assert (part - wanted).norm() <= 1e-12 * wanted.norm(), (rank, name)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_exact_on_simulated_ranks(size: int, case: Case) -> None:
    check(case, run_simulated(mesh_of(size), lambda ranks: run_case(ranks, case, sequence_matmul(ranks, "tp"))))


def eager_and_compiled(collectives: Collectives, which: int) -> list[Tensors]:
    ranks = collectives.with_mesh(mesh_of(2))
    matmul = sequence_matmul(ranks, "tp")
    torch.compiler.reset()  # each case is compiled from the start, or they would count as recompilations of one block
    return [run_case(ranks, CASES[which], matmul, compiled) for compiled in ("", "aot_eager")]


@pytest.mark.parametrize("which", range(len(CASES)), ids=lambda which: str(CASES[which]))
def test_exact_on_gloo_eager_and_compiled(pool: WorkerPool, which: int) -> None:
    ranks = pool.run(2, eager_and_compiled, which)
    for found in zip(*ranks, strict=True):
        check(CASES[which], list(found))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_process(case: Case) -> None:
    alone = SingleProcess(torch.device("cpu"))
    check(case, [run_case(alone, case, sequence_matmul(alone, "tp"))])


Pipelines = tuple[Callable[..., None], Callable[..., None]]


def pipelines(ranks: dict[str, RankCollectives]) -> Pipelines:
    """What torch does through symmetric memory, through the ranks' collectives instead, by the group's name. In torch's order: a rank's own
    part is consumed before it stands in the whole.
    """

    def gather_and_consume(parts: Any, wholes: Any, consume: Callable[[int], None], group: str) -> None:
        own = ranks[group].index("tp")
        consume(own)
        for part, whole in zip(parts, wholes, strict=True):
            assert part.is_contiguous() and whole.is_contiguous()
            ranks[group].start_all_gather(whole, part, "tp").wait()
        for rank in range(ranks[group].size("tp")):
            if rank != own:
                consume(rank)

    def produce_and_exchange(produce: Callable[[int, torch.Tensor], None], output: torch.Tensor, group: str) -> None:
        made = torch.empty_like(output)
        for rank, part in enumerate(made.chunk(ranks[group].size("tp"))):
            produce(rank, part)
        ranks[group].start_all_to_all(output, made, "tp").wait()

    return gather_and_consume, produce_and_exchange


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_rows_that_are_multiplied_as_they_arrive(monkeypatch: pytest.MonkeyPatch, size: int, case: Case) -> None:
    ranks: dict[str, RankCollectives] = {}
    gather_and_consume, produce_and_exchange = pipelines(ranks)
    monkeypatch.setattr(_torch_private, "gather_and_consume", gather_and_consume)
    monkeypatch.setattr(_torch_private, "produce_and_exchange", produce_and_exchange)

    def on_rank(collectives: Collectives) -> Tensors:
        assert isinstance(collectives, RankCollectives)
        name = f"group of rank {collectives.rank}"
        ranks[name] = collectives
        return run_case(collectives, case, SequenceMatmul(Route(collectives, "tp", "sequence", name)))

    check(case, run_simulated(mesh_of(size), on_rank))
    # Besides what this test's own exchange counts: gathers of the input, of the gradient and again of the input; two reduce-scatters.
    part = 8 * FEATURES * torch.Size(case.shape).numel() // size
    again = any(name not in case.without for name in ("first", "second"))
    for collectives in ranks.values():
        sent = collectives.ledger.sent_bytes(tag="sequence")
        of_input = 0 if "input" in case.without else 1
        assert sent == (size - 1) * part * (3 + again + of_input)


def counted(collectives: Collectives, case: Case) -> list[tuple[str, int, int]]:
    assert isinstance(collectives, RankCollectives)
    run_case(collectives, case, sequence_matmul(collectives, "tp", symmetric=False))
    return [(row.operation, row.num_calls, row.sent_bytes) for row in collectives.ledger.rows(axes="tp")]


@pytest.mark.parametrize(
    ("case", "gathers", "scatters", "messages"),
    [
        (Case(shape=(1, 12)), 3, 2, 1),
        (Case(shape=(3, 12)), 3, 2, 3),
        (Case(shape=(9, 12)), 3, 2, 1),
        (Case(without=("first", "second")), 2, 2, 2),
        (Case(without=("input",)), 3, 1, 2),
    ],
    ids=str,
)
def test_bytes_are_the_formula(case: Case, gathers: int, scatters: int, messages: int) -> None:
    size = 3
    sent = (size - 1) * 8 * FEATURES * torch.Size(case.shape).numel() // size
    expected = [
        ("all_gather", gathers * messages, gathers * sent),
        ("reduce_scatter", scatters * messages, scatters * sent),
    ]
    assert run_simulated(mesh_of(size), lambda ranks: counted(ranks, case)) == [expected] * size


def outputs_that_nobody_reads(collectives: Collectives) -> list[bool]:
    """Which of the input, two weights and two biases get a gradient when the second output is not read, nor the whole input."""
    generator = torch.Generator().manual_seed(3)
    x, *rest = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(2, 3, 4), (5, 4), (5, 4), (5,), (5,)]
    )
    _, outputs = sequence_matmul(collectives, "tp").gather_columns(x, rest[:2], rest[2:])
    torch.autograd.backward(outputs[0].sum())
    return [tensor.grad is not None for tensor in (x, *rest)]


def test_outputs_that_nobody_reads_have_no_gradients() -> None:
    expected = [True, True, False, True, False]
    assert run_simulated(mesh_of(2), outputs_that_nobody_reads) == [expected, expected]


def kept(collectives: Collectives) -> list[tuple[int, ...]]:
    """Shapes of what is kept for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    x, weight = torch.ones(2, 3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sequence_matmul(collectives, "tp").gather_columns(x, [weight], [None])
    return shapes


def test_the_whole_input_is_not_kept() -> None:
    expected = [(2, 3, 4), (5, 4)]
    assert run_simulated(mesh_of(2), kept) == [expected, expected]


def order(collectives: Collectives) -> list[str]:
    """What starts and what is waited for in the backward pass of one sample, between the products."""
    assert isinstance(collectives, RankCollectives)
    seen: list[str] = []
    watched = Watched(collectives, seen)
    x, weight = torch.ones(1, 3, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    _, outputs = SequenceMatmul(Route(watched, "tp", "")).gather_columns(x, [weight], [None])  # type: ignore[arg-type]
    seen.clear()
    torch.autograd.backward(outputs[0].sum())
    return seen


class Watched:
    """Collectives that write down when they start and when they are waited for."""

    def __init__(self, ranks: RankCollectives, seen: list[str]) -> None:
        self.ranks, self.seen = ranks, seen
        self.size, self.index = ranks.size, ranks.index

    def start_all_gather(self, *arguments: Any, **options: Any) -> Any:
        return self._started("gather", self.ranks.start_all_gather(*arguments, **options))

    def start_reduce_scatter(self, *arguments: Any, **options: Any) -> Any:
        return self._started("reduce-scatter", self.ranks.start_reduce_scatter(*arguments, **options))

    def _started(self, name: str, handle: Any) -> Any:
        self.seen.append(f"{name} starts")
        seen = self.seen

        class Waited:
            def wait(self) -> None:
                seen.append(f"{name} is waited for")
                handle.wait()

        return Waited()


def test_both_messages_of_the_backward_pass_have_a_product_to_hide_behind() -> None:
    expected = ["gather starts", "reduce-scatter starts", "gather is waited for", "reduce-scatter is waited for"]
    assert run_simulated(mesh_of(2), order) == [expected, expected]


def test_a_copy_keeps_its_ranks() -> None:
    matmul = sequence_matmul(SingleProcess(torch.device("cpu")), "tp")
    assert copy.deepcopy(matmul) is matmul
    assert copy.deepcopy(matmul.route) is matmul.route
    assert replace(matmul.route, tag="other").key != matmul.route.key
