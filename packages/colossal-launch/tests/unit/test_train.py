"""`colossal train` on one process: what it prints and writes, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colossal_core.errors import ConfigError
from colossal_launch import Booster, session
from colossal_launch.cli.application import run


def train(*settings: str) -> int:
    with pytest.raises(SystemExit) as left:
        run(["train", "run.yaml", *(word for text in settings for word in ("--set", text))])
    assert isinstance(left.value.code, int)
    return left.value.code


def steps(folder: Path) -> list[int]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_one_process_needs_no_other_package(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLOSSAL_PLUGINS", "comm")
    assert train() == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    lines = [line for line in output.splitlines() if "left out" not in line]
    assert lines[-5].startswith("text        1 .txt file of text.txt: 18,766 tokens to train on, 1,138 held out")
    assert lines[-4].startswith("step 1/5  loss 5.7")
    assert lines[-3].startswith("step 5/5  loss ")
    assert lines[-2].startswith("step 5: held-out loss ")
    assert lines[-1] == "step 5: saved runs/a/checkpoints/step-00000005"
    assert steps(project / "runs/a") == [1, 2, 3, 4, 5]
    assert json.loads((project / "runs/a/config.json").read_text())["batch"] == {"global_size": 8}


def test_a_finished_run_has_nothing_left_and_goes_on_when_it_is_given_more(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    assert train() == 0
    before = (project / "runs/a/metrics.jsonl").read_text()
    capsys.readouterr()
    assert train() == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "going on from step 5 (runs/a/checkpoints/step-00000005)",
        "nothing left to do: step 5 of 5 is saved",
    ]
    assert (project / "runs/a/metrics.jsonl").read_text() == before
    assert train("train.num_steps=7") == 0
    assert "going on from step 5 (runs/a/checkpoints/step-00000005)\n" in capsys.readouterr().out
    assert steps(project / "runs/a") == [1, 2, 3, 4, 5, 6, 7]


def test_a_loss_that_is_not_a_number_is_found_between_the_steps_that_are_logged(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("model.config.how=nan", "train.num_steps=12", "train.log_every_steps=6")
    assert train(*settings) == 1
    assert capsys.readouterr().err.startswith("error: step 3: the loss is nan: ")
    assert train(*settings, "train.non_finite=skip", "checkpoint.directory=runs/b") == 0
    assert steps(project / "runs/b") == [6, 12]


def test_out_of_memory_is_told_with_the_change_that_fits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del project
    assert train("model.config.how=memory", "batch.micro_size=8") == 1
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0].startswith("error: out of memory in step 2 on rank 0: cpu has ")
    assert lines[1].startswith("parameters ")
    assert lines[-3].startswith("the smallest change that fits by the estimate: recompute.mode: selective (")
    assert lines[-1] == "CUDA out of memory. Tried to allocate 1.54 GiB."


def test_gradients_are_reported_at_their_interval(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of all and of each unit; a step that was left out is in the total, and its gradients are no numbers."""
    assert train("train.gradient_statistics_every_steps=3", "train.non_finite=skip", "model.config.how=nan") == 0
    lines = [json.loads(line) for line in (project / "runs/a/metrics.jsonl").read_text().splitlines()]
    (found,) = [line for line in lines if "gradient_norm" in line]
    names = ("norm", "max_abs", "zero_fraction", "non_finite")
    units = ("embed", "layers.0", "layers.1", "head")
    assert list(found) == [
        "step",
        *(f"gradient_{name}{of}" for of in (*(f"/{u}" for u in units), "") for name in names),
    ]
    assert (found["step"], found["gradient_norm"], found["gradient_norm/head"]) == (3, None, None)
    assert found["gradient_non_finite/layers.0"] == 32 * 33
    assert [line["skipped_steps"] for line in lines if "loss" in line] == [0, 0, 1, 1, 1]
    assert "step 5/5" in (output := capsys.readouterr().out)
    assert "1 skipped" in output
    assert train("train.gradient_statistics_every_steps=2", "checkpoint.directory=runs/b") == 0
    lines = [json.loads(line) for line in (project / "runs/b/metrics.jsonl").read_text().splitlines()]
    norms = {line["step"]: line["grad_norm"] for line in lines if "loss" in line}
    found_norms = {line["step"]: line["gradient_norm"] for line in lines if "gradient_norm" in line}
    assert list(found_norms) == [2, 4]
    assert all(norm == pytest.approx(norms[step], rel=1e-6) for step, norm in found_norms.items())


def test_a_model_of_other_sizes_does_not_fit_the_checkpoint(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    text = (project / "tiny_model.py").read_text()
    (project / "tiny_other.py").write_text(text.replace("nn.Linear(32, 257)", "nn.Linear(32, 257, bias=False)"))
    capsys.readouterr()
    assert train("model.factory=tiny_other:build", "train.num_steps=7") == 1
    errors = capsys.readouterr().err
    assert "head.bias" in errors, errors
    assert "Traceback" not in errors


def test_ranks_that_never_joined_are_not_trained_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    session.finish()
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    from torch import nn

    with pytest.raises(ConfigError) as raised:
        Booster({"batch": {"global_size": 2}, "train": {"device": "cpu"}}).boost(nn.Linear(2, 2))
    assert str(raised.value) == (
        "launch: the environment describes 2 ranks (torchrun), and none has joined: "
        "call colossal_launch.launch() before Booster, in every process"
    )
