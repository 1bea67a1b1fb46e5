"""The pool of ranks with one rank, which needs no package for communication."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
import torch

from colossal_core.errors import ConfigError, Problem
from colossal_core.testing import RankError, WorkerPool
from colossal_core.testing.mutants import MUTANTS, plant
from colossal_core.testing.suites import session_pool
from colossal_core.testing.worker import connect

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> WorkerPool:
    return session_pool(request.config)


def world_size_and_process(collectives: Collectives, number: int) -> tuple[int, int]:
    return collectives.mesh.world_size + number, os.getpid()


def raise_value_error(collectives: Collectives) -> None:
    del collectives
    raise ValueError("wrong on purpose")


def raise_config_error(collectives: Collectives) -> None:
    del collectives
    raise ConfigError(
        [Problem("batch.global_size", "is odd", "use an even one", 3), Problem("model", "is missing", "name one")]
    )


def end_process(collectives: Collectives) -> None:
    del collectives
    os._exit(7)


def sleep(collectives: Collectives) -> None:
    del collectives
    time.sleep(60)


def test_workers_are_kept(pool: WorkerPool) -> None:
    ((first, process),) = pool.run(1, world_size_and_process, 4)
    ((second, again),) = pool.run(1, world_size_and_process, 5)
    assert (first, second) == (5, 6)
    assert process == again != os.getpid()


def test_exception_comes_with_the_rank_s_traceback(pool: WorkerPool) -> None:
    with pytest.raises(RankError) as raised:
        pool.run(1, raise_value_error)
    lines = str(raised.value).splitlines()
    assert lines[:2] == ["rank 0 failed:", "Traceback (most recent call last):"]
    assert lines[-1] == "ValueError: wrong on purpose"
    assert raised.value.exit_status == 1
    assert str(raised.value.__cause__) == "wrong on purpose"


def test_config_error_stays_one(pool: WorkerPool) -> None:
    with pytest.raises(ConfigError) as raised:
        pool.run(1, raise_config_error)
    assert str(raised.value) == "batch.global_size=3: is odd: use an even one\nmodel: is missing: name one"


def test_process_that_ends_is_an_error(pool: WorkerPool) -> None:
    with pytest.raises(RankError) as raised:
        pool.run(1, end_process)
    assert str(raised.value) == "rank 0 failed:\nthe worker process ended with exit code 7"
    assert pool.run(1, world_size_and_process, 0)[0][0] == 1


def test_hang_is_ended_and_no_process_is_left() -> None:
    with WorkerPool(timeout_seconds=3.0) as own:
        process = own.run(1, world_size_and_process, 0)[0][1]
        own.timeout_seconds = 0.5
        with pytest.raises(RankError) as raised:
            own.run(1, sleep)
    assert str(raised.value) == "ranks [0] did not answer within 0.5 s; all workers were killed"
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_call_that_is_interrupted_leaves_no_answer_behind() -> None:
    """As pytest's time limit does: an exception in the middle of a call, while the rank goes on."""

    def interrupt(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with WorkerPool() as own:
            first = own.run(1, world_size_and_process, 0)[0][1]
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(TimeoutError):
                own.run(1, sleep)
            ((number, second),) = own.run(1, world_size_and_process, 4)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert number == 5
    assert first != second


def test_several_ranks_need_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOSSAL_PLUGINS", "")
    with pytest.raises(ConfigError) as raised:
        connect(2, 0, "/nowhere", timedelta(seconds=1))
    assert str(raised.value) == (
        "world_size=2: more than one rank needs the package colossal-comm, which is not installed: pip install colossal-comm"
    )


def device_of(collectives: Collectives) -> str:
    return str(collectives.device)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="here the rank would have its device")
def test_the_device_reaches_the_ranks(pool: WorkerPool) -> None:
    assert pool.run(1, device_of) == ["cpu"]
    with WorkerPool(device_type="cuda") as own, pytest.raises(RankError) as raised:
        own.run(1, device_of)
    assert "torch.accelerator.set_device_index(rank)" in str(raised.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_the_accelerator_with_its_number_before_it_joins(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.accelerator.set_device_index", chosen.append)
    monkeypatch.setenv("COLOSSAL_PLUGINS", "")
    if rank == 0:
        assert str(connect(1, rank, "/nowhere", timedelta(seconds=1), "cuda").device) == "cuda:0"
    else:
        with pytest.raises(ConfigError):
            connect(2, rank, "/nowhere", timedelta(seconds=1), "cuda")
    assert chosen == [rank]


def test_unknown_mutant_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as raised:
        plant("gremlin")
    known = ", ".join(mutant.name for mutant in MUTANTS)
    assert str(raised.value) == f"--mutant='gremlin': there is no such planted fault: use one of {known}"
