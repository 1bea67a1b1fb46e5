"""Many cases in one group of ranks, and the watch over a step."""

from __future__ import annotations

import pytest
import torch

from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.each import failures_of_each, of_each
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import start
from colossal_core.testing.waiting import losses_without_waiting, never_waits

ALONE = SingleProcess(torch.device("cpu"))


def reciprocal(collectives: Collectives, number: int) -> float:
    del collectives
    if number == 0:
        raise RuntimeError("no reciprocal")
    return 1 / number


def test_each_case_is_named_as_it_begins(capsys: pytest.CaptureFixture[str]) -> None:
    assert of_each(ALONE, reciprocal, {"two": 2, "four": 4}) == {"two": 0.5, "four": 0.25}
    assert capsys.readouterr().out == "rank 0: two\nrank 0: four\n"


def test_what_a_case_raises_says_which_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as raised:
        of_each(ALONE, reciprocal, {"two": 2, "none": 0, "four": 4})
    assert raised.value.__notes__ == ["in the case none"]
    assert capsys.readouterr().out == "rank 0: two\nrank 0: none\n"


def test_cases_after_a_failure_run_too(capsys: pytest.CaptureFixture[str]) -> None:
    found = failures_of_each(ALONE, reciprocal, {"two": 2, "none": 0, "four": 4})
    assert {name: text.splitlines()[-1] for name, text in found.items()} == {"none": "RuntimeError: no reciprocal"}
    assert capsys.readouterr().out == "rank 0: two\nrank 0: none\nrank 0: four\n"


def test_waiting_is_an_error_only_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", modes.append)
    with never_waits(torch.device("cpu")):
        assert modes == []
    with never_waits(torch.device("cuda", 0)):
        assert modes == ["error"]
    assert modes == ["error", "default"]
    with pytest.raises(RuntimeError), never_waits(torch.device("cuda", 0)):
        raise RuntimeError
    assert modes == ["error", "default"] * 2


def test_losses_are_those_of_all_steps() -> None:
    """Those that are not watched, and then those that are."""
    config = {"batch": {"global_size": 2, "micro_size": 1}}
    spec = RunSpec(config, TinyModel(), TokenBatches(), num_steps=2, task="causal-lm", plugins="")
    assert len(losses_without_waiting(start(spec, ALONE), spec, 2)) == 4
    losses = losses_without_waiting(start(spec, ALONE), spec)
    assert losses == losses_without_waiting(start(spec, ALONE), spec, 2)[:3]
