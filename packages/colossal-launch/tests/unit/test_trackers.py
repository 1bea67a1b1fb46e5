"""Numbers on disk, the picture, and the line that a run shows."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from colossal_core.config.sections import ModelConfig
from colossal_core.errors import ConfigError
from colossal_launch.models import build_model
from colossal_launch.progress import ProgressLine, StepReport, duration
from colossal_launch.speed import WorkPerToken, peak_flops, work_per_token
from colossal_launch.trackers import JsonLinesTracker, TensorBoardTracker, open_trackers, read_metrics


def test_lines_are_on_disk_at_once_and_resuming_drops_what_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    tracker = JsonLinesTracker(path)
    for step in range(1, 6):
        tracker.log(step, {"loss": float("nan") if step == 5 else step / 2})
    assert len(path.read_text().splitlines()) == 5
    assert list(read_metrics(path))[4] == {"step": 5, "loss": None}
    tracker.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    resumed = JsonLinesTracker(path, resumed_step=3)
    resumed.log(4, {"loss": 9.0, "skipped": False})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[3] == {"step": 4, "loss": 9.0, "skipped": False}
    JsonLinesTracker(path).close()
    assert path.read_text() == ""


def test_a_run_has_lines_events_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    trackers, notes = open_trackers(tmp_path)
    assert notes == []
    for step in range(1, 4):
        for tracker in trackers:
            tracker.log(step, {"loss": 3.0 / step})
    for tracker in trackers:
        tracker.log(3, {"val_bits_per_byte": 2.5})
    picture = tmp_path / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    for tracker in trackers:
        tracker.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl", "tensorboard"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == [3.0, 1.5, 1.0]


def test_missing_packages_leave_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trackers, notes = open_trackers(tmp_path)
    assert [type(tracker) for tracker in trackers] == [JsonLinesTracker]
    trackers[0].close()
    assert notes == [
        "TensorBoard events left out: needs the package tensorboard, which is not installed: "
        "pip install 'colossal-launch[track]'",
        "the loss curve left out: needs the package matplotlib, which is not installed: "
        "pip install 'colossal-launch[plot]'",
    ]
    with pytest.raises(ConfigError, match=r"^tensorboard: needs the package tensorboard, which is not installed: pip"):
        TensorBoardTracker(tmp_path)


def test_plain_lines_come_first_last_and_every_ten_seconds() -> None:
    now = 0.0
    out = io.StringIO()
    with ProgressLine(100, stream=out, clock=lambda: now) as line:
        for step in range(1, 101):
            now += 1.0
            line.show(StepReport(step, 4.0 - step / 100, 8192, 1.0, memory_bytes=3 << 30, mfu=0.4123))
        line.note("held-out text: 2.05 bits per byte")
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 1/100  loss 3.9900  8,192 tokens/s  MFU 41.2%  3.0 GiB  1:39 left"
    assert [text.split()[1] for text in lines[:-1]] == [
        f"{step}/100" for step in (1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100)
    ]
    assert lines[-2] == "step 100/100  loss 3.0000  8,192 tokens/s  MFU 41.2%  3.0 GiB  0:00 left"
    assert lines[-1] == "held-out text: 2.05 bits per byte"


def test_a_terminal_gets_one_line_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with ProgressLine(3, stream=out) as line:
        for step in range(1, 4):
            line.show(StepReport(step, 1.0, 10, 0.5))
    assert "step 3/3  loss 1.0000  20 tokens/s  0:00 left" in out.getvalue()
    assert "\x1b[2K" in out.getvalue()


def test_the_first_step_does_not_count_for_the_time_left() -> None:
    out = io.StringIO()
    now = iter(range(0, 1000, 20))
    with ProgressLine(12, stream=out, clock=lambda: float(next(now))) as line:
        line.show(StepReport(1, 1.0, 10, 30.0))
        line.show(StepReport(2, 1.0, 10, 1.0))
    assert out.getvalue().splitlines()[1] == "step 2/12  loss 1.0000  10 tokens/s  0:10 left"
    assert [duration(59.6), duration(3723)] == ["1:00", "1:02:03"]


def test_work_counts_what_a_token_passes_through() -> None:
    pytest.importorskip("transformers")
    keys = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    dense = build_model(ModelConfig(architecture="llama", config=keys), vocab_size=300, seed=0)
    work = work_per_token(dense.module, dense.config, 128)
    assert work == WorkPerToken(dense.num_parameters - 300 * 64, 2, 64, 128)
    assert work.flops == 6 * work.num_active + 12 * 2 * 64 * 128
    assert work.formula.startswith(f"MFU = tokens/s/GPU x (6 x {work.num_active:,} active parameters + 12 x 2 layers")
    experts = {**keys, "num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2}
    sparse = build_model(ModelConfig(architecture="mixtral", config=experts), vocab_size=300, seed=0)
    of_experts = sum(p.numel() for name, p in sparse.module.named_parameters() if ".experts." in name)
    active = work_per_token(sparse.module, sparse.config, 128).num_active
    assert active == sparse.num_parameters - 300 * 64 - of_experts * 6 // 8
    assert work_per_token(torch.nn.Linear(4, 4), None, 8).flops == 6 * 20
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("cpu", "fp32") is None
