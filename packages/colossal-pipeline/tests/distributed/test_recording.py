"""A step of real ranks, recorded: every action once, in order, one after another, on one clock; and nothing is different for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from colossal_core.errors import ConfigError
from colossal_core.examine import examine
from colossal_core.testing import RunSpec
from colossal_core.testing.parity import prepare
from colossal_pipeline.checker import COMPUTED
from colossal_pipeline.planned import show_schedule
from colossal_pipeline.time_line import TimeLine
from colossal_pipeline.trace import Trace

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]
EARLY = 2e-3
"""Seconds by which a message may seem to arrive before it was sent, beside what the clocks are known to."""


def recorded(run_of: Run, folder: Path, pipeline: dict[str, object]) -> RunSpec:
    """The second step of a run is recorded."""
    overrides = {"parallel.pipeline": {"size": 2, **pipeline, "record_step": 2}, "checkpoint.directory": str(folder)}
    return run_of("llama", overrides)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_every_action_is_recorded_once(run_of: Run, exact: Exact, schedule: str, tmp_path: Path) -> None:
    spec = recorded(run_of, tmp_path, {"schedule": schedule})
    exact(spec, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline-step-2.json"]
    trace = Trace.read(tmp_path / "pipeline-step-2.json")
    trace.check(prepare(spec, 2).plan.program)
    assert (trace.schedule, trace.step, trace.num_microbatches) == (schedule, 2, 4)
    assert 0 < trace.clock_error_seconds < 0.5
    line = trace.time_line
    assert min(spans[0].start for spans in line.ranks) == 0
    for spans in line.ranks:
        for span, following in pairwise(spans):
            assert span.start <= span.end <= following.start, f"{span} {following}"
        assert all(span.end > span.start for span in spans if span.action.kind in COMPUTED)
    for idle, parts in zip(line.idle_seconds, line.idle, strict=True):
        assert parts.bubble + parts.messages + parts.other == pytest.approx(idle, rel=1e-9)
        assert min(parts.bubble, parts.messages) >= 0 and parts.other > -1e-9


def test_nothing_is_used_before_it_is_made(run_of: Run, exact: Exact, tmp_path: Path) -> None:
    """What one rank has sent is used by the other later, as far as their clocks are known."""
    exact(recorded(run_of, tmp_path, {"schedule": "1f1b"}), 2)
    trace = Trace.read(tmp_path / "pipeline-step-2.json")
    ends = {span.action: span.end for spans in trace.time_line.ranks for span in spans}
    starts = {span.action: span.start for spans in trace.time_line.ranks for span in spans}
    received = [action for action in ends if action.kind == "receive"]
    assert len(received) == 8
    for action in received:
        sent = replace(action, kind="send", stage=action.peer_stage, peer_stage=action.stage)
        assert ends[action] >= starts[sent] - 2 * trace.clock_error_seconds - EARLY, f"{action}"


def test_a_recorded_step_stands_below_the_estimate(
    run_of: Run, exact: Exact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    spec = recorded(run_of, tmp_path, {"schedule": "zb-h1"})
    prepared = prepare(spec, 2)
    assert callable(spec.batch)
    anatomy = examine(prepared.model, spec.batch(0, 2))
    before = show_schedule(prepared.plan, anatomy, tmp_path / "before.png").splitlines()
    path = tmp_path / "pipeline-step-2.json"
    assert before[-2:] == [
        f"measured    not yet: a run with this config writes {path}",
        f"picture     {tmp_path / 'before.png'}",
    ]
    exact(spec, 2)
    after = show_schedule(prepared.plan, anatomy, tmp_path / "after.png").splitlines()
    assert after[: len(before) - 2] == before[:-2]
    below = after[len(before) - 2 :]
    assert below[1].startswith("measured    step 2; the ranks' clocks are known to ")
    assert [line.split(" ", 2)[:2] for line in below[2:4]] == [["rank", "0"], ["rank", "1"]]
    assert [line.split(":")[0] for line in below[-4:-2]] == ["rank 0", "rank 1"]
    assert all("waiting for messages under way" in line for line in below[-4:-2])
    assert below[-2].startswith("idle        ") and below[-1] == f"picture     {tmp_path / 'after.png'}"
    assert (tmp_path / "after.png").stat().st_size > (tmp_path / "before.png").stat().st_size
    other = prepare(spec.with_overrides({"parallel.pipeline.schedule": "1f1b"}), 2)
    with pytest.raises(ConfigError) as caught:
        show_schedule(other.plan, anatomy, None)
    assert str(caught.value) == (
        "parallel.pipeline.record_step: the recorded step is one of another program than the plan's: zb-h1, 2 stages on 2 ranks, "
        "4 microbatches: give the config of the run that has recorded it"
    )


def test_a_step_that_never_comes_is_refused(run_of: Run) -> None:
    spec = run_of("llama", {"parallel.pipeline": {"size": 2, "record_step": 9}, "train.num_steps": 8})
    with pytest.raises(ConfigError) as caught:
        prepare(spec, 2)
    assert str(caught.value) == (
        "parallel.pipeline.record_step=9: the run ends after step 8: record one of the steps 1 to 8"
    )


def test_stages_are_cut_by_what_was_recorded(run_of: Run, exact: Exact, tmp_path: Path) -> None:
    """Of another schedule and number of stages. A first stage that took long gives blocks away; training is as exact."""
    exact(recorded(run_of, tmp_path, {"schedule": "1f1b"}), 2)
    path = tmp_path / "pipeline-step-2.json"
    trace = Trace.read(path)
    assert trace.blocks == (2, 2)
    slow = [
        [(str(s.action), s.start, s.end + (1000.0 if s.action.stage == 0 else 0.0)) for s in line]
        for line in trace.time_line.ranks
    ]
    replace(trace, time_line=TimeLine.in_order(slow)).write(path)
    spec = run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": "zb-h1", "blocks": str(path)}})
    notes = prepare(spec, 2).plan.notes
    assert any("2 stages of 1 3 blocks" in note for note in notes)
    assert f"pipeline: {path} is step 2 of its run: stages take other times from step 3 on" in notes
    again = recorded(run_of, tmp_path, {"blocks": str(path)})
    with pytest.raises(ConfigError, match=r"would be written over the file that parallel\.pipeline\.blocks is"):
        prepare(again, 2)
    exact(spec, 2)


def test_a_file_that_says_nothing_of_this_model(run_of: Run, tmp_path: Path) -> None:
    def refusal(path: Path, layers: int = 4) -> str:
        overrides = {"parallel.pipeline": {"size": 2, "blocks": str(path)}}
        with pytest.raises(ConfigError) as raised:
            prepare(run_of("llama", overrides, {"num_hidden_layers": layers}), 2)
        return str(raised.value)

    missing, other = tmp_path / "nothing.json", tmp_path / "other.json"
    assert refusal(missing) == (
        f"parallel.pipeline.blocks: {missing} holds no recorded step (FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{missing}'): record it anew, or leave it out"
    )
    line = TimeLine.in_order([[("F0.0", 0.0, 1.0), ("B0.0", 1.0, 2.0)], [("F1.0", 1.0, 2.0), ("B1.0", 2.0, 3.0)]])
    Trace("1f1b", 1, 1, (0, 1), (3, 3), 0.0, line).write(other)
    assert refusal(other) == (
        f"parallel.pipeline.blocks='{other}': was recorded with 6 blocks, and this model runs 4: "
        "record a step of this model, or leave it out"
    )
