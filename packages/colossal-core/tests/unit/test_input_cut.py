"""Inputs split over a mesh axis by equal chunks: two chunks a rank, one from each end, is the balanced cut of a causal sequence."""

from __future__ import annotations

import pytest
import torch

from colossal_core.batch import InputCut, take_part
from colossal_core.errors import ColossalError
from colossal_core.mesh import MeshLayout

MESH = MeshLayout((1, 1, 1, 2, 1))
CUT = InputCut((("input_ids", 1), ("labels", 1)), ("cp",), 4, ((0, 3), (1, 2)))


def part_of(rank: int, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return take_part(batch, [CUT], MESH.coordinate(rank), MESH)


def test_each_rank_holds_its_chunks_in_order() -> None:
    batch = {"input_ids": torch.arange(8).view(1, 8), "weights": torch.ones(1)}
    assert part_of(0, batch)["input_ids"].tolist() == [[0, 1, 6, 7]]
    assert part_of(1, batch)["input_ids"].tolist() == [[2, 3, 4, 5]]
    assert part_of(1, batch)["weights"] is batch["weights"]


def test_a_length_that_does_not_divide_says_what_to_pad_to() -> None:
    with pytest.raises(ColossalError) as caught:
        part_of(0, {"input_ids": torch.zeros(1, 10)})
    assert str(caught.value) == (
        "batch.input_ids: dimension 1 has 10 elements, which 4 chunks over cp do not divide: pad it to 12"
    )
