"""What ranks send along tp, and what they keep, where they share the data too."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytest.importorskip("colossal_zero")

from colossal_core.testing import RunSpec

Sized = Callable[..., RunSpec]
Check = Callable[[RunSpec, int], None]


@pytest.mark.parametrize("stage", [0, 3])
def test_shards_of_partial_gradients(sized_run: Sized, sends_as_estimated: Check, stage: int) -> None:
    """What is summed once a step is what a data-parallel rank keeps."""
    sends_as_estimated(sized_run("llama", 2, True, shards=2, config={"parallel.zero": {"stage": stage}}), 4)


def test_copies_of_hybrid_sharding_sum_in_the_same_message(sized_run: Sized, sends_as_estimated: Check) -> None:
    zero = {"stage": 1, "replicate": 2}
    sends_as_estimated(sized_run("gpt2", 2, True, shards=2, config={"parallel.zero": zero}), 4)


@pytest.mark.parametrize(("name", "stage"), [*(("llama", stage) for stage in range(4)), ("gpt2", 3)])
def test_state_of_every_stage(sized_run: Sized, keeps_as_estimated: Check, name: str, stage: int) -> None:
    config = {"parallel.zero": {"stage": stage}, "precision": "bf16"}
    keeps_as_estimated(sized_run(name, 2, True, width=128, shards=2, config=config), 4)
