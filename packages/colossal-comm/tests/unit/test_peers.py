"""Ranks that reach each other's memory: decided from what all of them say."""

from __future__ import annotations

import json

from colossal_comm.peers import reach_each_other


def fact(machine: str, gpu: str, *reached: str) -> bytes:
    return json.dumps({"machine": machine, "gpu": gpu, "reached": [gpu, *reached]}).encode()


def test_gpus_of_one_machine_that_reach_each_other() -> None:
    assert reach_each_other([fact("m", "a", "b"), fact("m", "b", "a")])


def test_two_machines() -> None:
    assert not reach_each_other([fact("m", "a", "b"), fact("n", "b", "a")])


def test_one_gpu_does_not_reach_the_other() -> None:
    assert not reach_each_other([fact("m", "a", "b"), fact("m", "b")])


def test_two_ranks_on_one_gpu() -> None:
    assert not reach_each_other([fact("m", "a"), fact("m", "a")])
