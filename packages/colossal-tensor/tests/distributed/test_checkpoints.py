"""What one cut has saved goes on under any other, and holds nothing but the model: no padding, every copied head once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from colossal_core.checkpoint import find_latest
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.probes import save_and_go_on

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
GoesOn = Callable[..., None]

AWKWARD: Mapping[str, Any] = {"vocab_size": 97}
"""Words that no number of ranks divides."""


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_cut_goes_on_where_another_stopped(run_of: Run, goes_on: GoesOn, kind: str, tmp_path: Path) -> None:
    """Four ranks, which hold copies of Llama's key/value heads and padded words, then two and one; and two, then four."""
    four, two, one = (run_of(kind, {"parallel.tensor": {"size": size}}, AWKWARD) for size in (4, 2, 1))
    goes_on(str(tmp_path / "4"), (4, four), (2, two), (1, one))
    goes_on(str(tmp_path / "2"), (2, two), (4, four))


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
