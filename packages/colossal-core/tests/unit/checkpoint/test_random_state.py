"""Random generators go on where they were."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from colossal_core.checkpoint import capture_random_state, restore_random_state
from colossal_core.errors import CheckpointError

CPU = torch.device("cpu")


def draw() -> tuple[object, ...]:
    return torch.randn(3).tolist(), torch.randn(1).item(), random.gauss(0, 1), random.random(), np.random.randn()


def test_every_generator_draws_the_same_again() -> None:
    draw()  # an odd number of Gaussian draws: half of a pair is kept for later
    state = json.loads(json.dumps(capture_random_state(CPU)))
    expected = [draw() for _ in range(3)]
    restore_random_state(state, CPU)
    assert [draw() for _ in range(3)] == expected


def test_the_state_of_another_kind_of_device_is_left_alone() -> None:
    state = {**capture_random_state(CPU), "device": {"type": "cuda", "state": "AAAA"}}
    restore_random_state(state, CPU)


@pytest.mark.parametrize("key", ["torch", "python", "numpy"])
def test_what_is_not_a_state_is_refused(key: str) -> None:
    state = capture_random_state(CPU)
    bad = {"torch": "AAAA", "python": {"version": 3, "words": [1], "gauss": None}, "numpy": {"state": {}}}
    with pytest.raises(CheckpointError, match=r"^the random state cannot be restored: "):
        restore_random_state({**state, key: bad[key]}, CPU)
    restore_random_state(state, CPU)
