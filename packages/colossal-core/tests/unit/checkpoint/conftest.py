"""Simulated ranks as threads, and a small training state laid out in every way that a placement knows."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from colossal_core.collectives import Axes, Collectives, SingleProcess
from colossal_core.layout import DimCut, FlatCut, Placement, even_ranges, take_local
from colossal_core.mesh import BASE_AXES, MeshLayout
from colossal_core.strategy import RegisteredTensor

TIMEOUT_SECONDS = 20.0


class Meeting:
    """Where the threads of one run exchange bytes. A rank that is late breaks the barrier for all."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size, timeout=TIMEOUT_SECONDS)
        self.data: list[bytes] = [b""] * world_size


class ThreadRank(SingleProcess):
    """The collectives of one thread: only the gather of bytes over all ranks is real."""

    def __init__(self, mesh: MeshLayout, rank: int, meeting: Meeting) -> None:
        super().__init__(torch.device("cpu"))
        self.mesh, self.rank, self._meeting = mesh, rank, meeting

    def index(self, axes: Axes) -> int:
        raise AssertionError("the checkpoint asks only for its rank")

    def gather_bytes(self, data: bytes, axes: Axes, *, tag: str = "") -> list[bytes]:
        assert axes == BASE_AXES
        assert tag == "checkpoint"
        self._meeting.data[self.rank] = data
        self._meeting.barrier.wait()
        found = list(self._meeting.data)
        self._meeting.barrier.wait()
        return found


RunRanks = Callable[[MeshLayout, Callable[[Collectives], Any]], list[Any]]


@pytest.fixture
def run_ranks() -> RunRanks:
    """Runs a function once for each rank of a mesh, in threads; returns the results, or raises the first rank's error."""

    def run(mesh: MeshLayout, function: Callable[[Collectives], Any]) -> list[Any]:
        meeting = Meeting(mesh.world_size)
        with ThreadPoolExecutor(mesh.world_size) as pool:
            ranks = [ThreadRank(mesh, rank, meeting) for rank in range(mesh.world_size)]
            futures = [pool.submit(function, rank) for rank in ranks]
            return [future.result() for future in futures]

    return run


@dataclass(frozen=True)
class Item:
    """A full tensor and the way in which it is to be cut."""

    kind: str
    full_name: str
    full: torch.Tensor
    cut: str


def _placement(shape: tuple[int, ...], cut: str, mesh: MeshLayout) -> Placement:
    """whole; flat over shard; dim 0 (`row`) or the last (`column`) over tp, uneven and padded; `packed`: two halves of dim 0 over tp;
    `stage`: on the last pipeline stage only, flat over shard; `shared`: on the first and the last one.
    """
    if cut in ("stage", "shared"):
        last = mesh.size("pp") - 1
        held = (last,) if cut == "stage" else tuple(sorted({0, last}))
        everywhere = _placement(shape, "flat" if cut == "stage" else "whole", mesh)
        left = tuple(axis for axis in everywhere.replicated if axis != "pp")
        return replace(everywhere, replicated=left, present=(("pp", held),))
    others = {
        "whole": BASE_AXES,
        "flat": ("pp", "dp_replicate", "tp"),
        "column": ("pp", "dp_replicate", "dp_shard", "cp"),
    }
    replicated = others.get(cut, ("pp", "dp_replicate"))
    if cut == "whole":
        return Placement(shape, replicated=replicated)
    tensor, shard = mesh.size("tp"), mesh.size("shard")
    if cut == "flat":
        numel = torch.Size(shape).numel()
        return Placement(shape, flat=FlatCut(("shard",), (even_ranges(numel, shard),)), replicated=replicated)
    dim = len(shape) - 1 if cut == "column" else 0
    halves = 2 if cut == "packed" else 1
    assert shape[dim] % halves == 0
    part = shape[dim] // halves
    ranges = even_ranges(part, tensor)
    intervals = tuple(
        tuple((half * part + start, half * part + stop) for half in range(halves)) for start, stop in ranges
    )
    longest = max(stop - start for start, stop in ranges)
    padding = tuple(1 + longest - (stop - start) for start, stop in ranges) if cut == "column" else ()
    dim_cut = DimCut(dim, ("tp",), intervals, padding)
    if cut == "column":
        return Placement(shape, (dim_cut,), replicated=replicated)
    row = torch.Size(shape).numel() // shape[0]
    sizes = (sum(stop - start for start, stop in held) * row for held in intervals)
    flat = FlatCut(("shard",), tuple(even_ranges(numel, shard) for numel in sizes))
    return Placement(shape, (dim_cut,), flat, replicated)


PADDING = 77

Lay = Callable[[list[Item], Collectives], list[RegisteredTensor]]


@pytest.fixture
def lay() -> Lay:
    """This rank's part of full tensors; with `blank`, filled with a value that marks padding instead of the elements."""

    def lay_items(items: list[Item], collectives: Collectives, *, blank: bool = False) -> list[RegisteredTensor]:
        mesh = collectives.mesh
        coordinate = mesh.coordinate(collectives.rank)
        found = []
        for item in items:
            placement = _placement(tuple(item.full.shape), item.cut, mesh)
            local = torch.full(placement.local_shape(coordinate, mesh), PADDING).to(item.full.dtype)
            if not blank:
                take_local(local, item.full, placement.pieces(coordinate, mesh))
            found.append(RegisteredTensor(item.kind, item.full_name, local, placement))
        return found

    return lay_items


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def items() -> list[Item]:
    """Every way of cutting in every dtype, and tensors without dimensions or without elements."""
    torch.manual_seed(0)
    found: list[Item] = []
    for cut, dtype in itertools.product(("whole", "flat", "row", "column", "packed", "stage", "shared"), DTYPES):
        full = (torch.rand(6, 3, 5) * 200).to(dtype)
        found.append(Item(f"test.{cut}", f"layers.{len(found)}.weight", full, cut))
    found += [
        Item("parameter", "scalar", torch.tensor(3.5), "flat"),
        Item("adamw.step", "scalar", torch.tensor(7), "whole"),
        Item("parameter", "empty", torch.empty(0, 4), "flat"),
        Item("parameter", "vector", torch.arange(5.0), "flat"),
    ]
    return found


@pytest.fixture
def state_of() -> Callable[[int], list[Item]]:
    """A small state whose values tell its step."""

    def build(step: int) -> list[Item]:
        weight = torch.arange(24.0).reshape(4, 6) + 1000 * step
        return [Item("parameter", "weight", weight, "flat"), Item("adamw.exp_avg", "weight", -weight, "flat")]

    return build


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
