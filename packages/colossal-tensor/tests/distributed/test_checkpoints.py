"""What one cut has saved goes on under any other, and holds nothing but the model: no padding, every copied head once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("transformers", reason="these are models of transformers")

from colossal_core.checkpoint import find_latest
from colossal_core.testing import RunRecord, RunSpec, WorkerPool, compare, table
from colossal_core.testing.probes import load_and_go_on, save_and_go_on

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]

AWKWARD: Mapping[str, Any] = {"vocab_size": 97}
"""Words that no number of ranks divides."""


def goes_on(
    pool: WorkerPool, directory: str, saving: tuple[int, RunSpec], loading: tuple[tuple[int, RunSpec], ...]
) -> None:
    """Every element comes back bit for bit, and the next step is the one that the run that saved has made."""
    saved, after = pool.run(saving[0], save_and_go_on, saving[1], directory)[0]
    for num_ranks, spec in loading:
        for loaded, step in pool.run(num_ranks, load_and_go_on, spec, directory):
            rows = compare(loaded, saved, limit=0.0)
            assert all(row.passed for row in rows), f"{num_ranks} ranks\n{table(rows)}"
            rows = compare(RunRecord((step,), {}, {}, ""), RunRecord((after,), {}, {}, ""))
            assert all(row.passed for row in rows), f"{num_ranks} ranks\n{table(rows)}"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_cut_goes_on_where_another_stopped(pool: WorkerPool, run_of: Run, kind: str, tmp_path: Path) -> None:
    """Four ranks, which hold copies of Llama's key/value heads and padded words, then two, one and three."""
    four, two, one = (run_of(kind, {"parallel.tensor": {"size": size}}, AWKWARD) for size in (4, 2, 1))
    goes_on(pool, str(tmp_path / "4"), (4, four), ((2, two), (1, one)))
    goes_on(pool, str(tmp_path / "2"), (2, two), ((4, four),))


def saved_shapes(collectives: Collectives, directory: str) -> dict[str, tuple[int, ...]]:
    """The shape and the elements of the chunks of every parameter of the newest checkpoint."""
    found = find_latest(Path(directory), collectives)
    assert found is not None
    sizes = {}
    for tensor in found.manifest.tensors:
        if tensor.kind == "parameter":
            sizes[tensor.full_name] = (*tensor.shape, sum(chunk.numel for chunk in tensor.chunks))
    return sizes


def test_padding_and_copies_are_not_saved(pool: WorkerPool, run_of: Run, tmp_path: Path) -> None:
    four = run_of("llama", {"parallel.tensor": {"size": 4}}, AWKWARD)
    saved, _ = pool.run(4, save_and_go_on, four, str(tmp_path))[0]
    sizes = pool.run(1, saved_shapes, str(tmp_path))[0]
    assert not isinstance(four.model, str)
    for name, value in four.model().named_parameters():
        assert sizes.pop(name) == (*value.shape, value.numel()), name
        assert saved.parameters[name].shape == value.shape
    assert not sizes


@pytest.mark.parametrize("stage", [1, 3])
def test_goes_on_from_tensor_ranks_with_shards(pool: WorkerPool, run_of: Run, stage: int, tmp_path: Path) -> None:
    """Saved by two tensor ranks beside two data-parallel ones."""
    pytest.importorskip("colossal_zero")

    def spec(size: int, zero_stage: int) -> RunSpec:
        zero = {"stage": zero_stage, "bucket_bytes": 9000}
        return run_of("llama", {"batch.micro_size": 1, "parallel.tensor.size": size, "parallel.zero": zero}, AWKWARD)

    goes_on(pool, str(tmp_path), (4, spec(2, stage)), ((2, spec(1, stage)), (4, spec(4, 1)), (1, spec(1, 0))))
