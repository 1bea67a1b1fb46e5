"""The verbs of `colossal`, each run as far as one process goes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from colossal_launch.cli.application import run

VERBS = {
    "train": "torchrun --nproc-per-node 4 -m colossal_launch train run.yaml",
    "run": "colossal run my_training.py --lr 1e-3",
    "plan": "colossal plan run.yaml --schema > colossal.schema.json",
    "verify": "colossal verify run.yaml --world-size 4",
    "doctor": "colossal doctor",
    "plugins": "COLOSSAL_PLUGINS=zero,comm colossal plugins",
    "bench": "colossal bench comm --processes 2",
    "bench comm": "colossal bench comm --processes 2",
    "bench kernels": "colossal bench kernels --device cpu",
    "convert": "colossal convert runs/demo runs/demo-hf --dtype bfloat16",
}


def printed(words: list[str], capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    with pytest.raises(SystemExit) as left:
        run(words)
    output, errors = capsys.readouterr()
    assert (left.value.code, errors) == (status, "")
    return output


@pytest.mark.parametrize("verb", VERBS)
def test_help_ends_with_examples_on_lines_of_their_own(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    output = printed([*verb.split(), "--help"], capsys)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip(" │") for line in output.splitlines()]
    assert any(line.startswith("Usage: colossal") for line in lines), output
    assert "Examples:" in lines, output
    assert VERBS[verb] in lines, output


def test_help_is_quick() -> None:
    """It imports neither torch nor anything as heavy."""
    code = (
        "import sys\nfrom colossal_launch.cli.application import run\n"
        "try:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'numpy', 'matplotlib', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_an_unknown_verb_or_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["trian"], ["train", "run.yaml", "--proceses", "2"], ["train"], []):
        with pytest.raises(SystemExit) as left:
            run(words)
        assert left.value.code == (2 if words else 0) or not words
    assert "Traceback" not in capsys.readouterr().err


def test_plugins_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["plugins"], capsys).splitlines()
    assert lines[0] == "plugins of contract 0.1"
    assert lines[1].split() == ["plugin", "distribution", "version", "contract", "hooks"]
    assert "comm colossal-comm" in re.sub(" +", " ", lines[3])
    assert "strategy recompute: section recompute" in lines
    zeros = ["adafactor", "lamb", "lars", "lion", "muon"] if find_spec("colossal_zero") else []
    assert lines[-1] == f"optimizers: {', '.join(sorted(['adamw', 'sgd', *zeros]))}"


def test_bench_of_kernels_says_where_there_is_nothing_to_measure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOSSAL_PLUGINS", "comm")
    with pytest.raises(SystemExit) as left:
        run(["bench", "kernels"])
    message = "error: bench kernels: no installed plugin has kernels to measure: pip install colossal-kernels\n"
    assert (left.value.code, capsys.readouterr()) == (2, ("", message))


def test_plan_prints_mesh_batch_and_bytes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del project
    lines = printed(["plan", "run.yaml", "--layouts", "--set", "batch.micro_size=2"], capsys).splitlines()
    facts = dict(line.split(maxsplit=1) for line in lines if not line.startswith(" "))
    assert facts["model"] == "Tiny: 18,817 parameters, 18,817 trained, 0 tied, 2 blocks"
    assert facts["mesh"] == "one process (1 ranks)"
    assert facts["batch"] == "8 sequences a step: 8 a rank in 4 microbatches of 2"
    assert facts["memory"] == "of one rank, 2 sequences at once, by estimate:"
    first = lines.index(f"memory      {facts['memory']}") + 1
    sizes = {line[2:22].strip(): line[22:].strip() for line in lines[first : first + 10]}
    assert list(sizes) == [
        "parameters",
        "masters",
        "gradients",
        "optimizer states",
        "gathered parameters",
        "gradient buffers",
        "activations",
        "loss and work",
        "libraries",
        "peak of a step",
    ]
    assert [sizes[kind] for kind in ("parameters", "masters", "gradients", "optimizer states", "activations")] == [
        "73.5 KiB",
        "0 B",
        "73.5 KiB",
        "147.0 KiB",
        "44.0 KiB",
    ]
    assert "  embed.weight [257, 32] compute () state ()" in lines


def test_plan_of_many_ranks_needs_none(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("colossal_zero")
    del project
    words = [
        "plan",
        "run.yaml",
        "--world-size",
        "512",
        "--set",
        "batch.global_size=1024",
        "--set",
        "parallel.zero.stage=1",
    ]
    output = printed(words, capsys)
    assert "mesh        dp_shard 512 (512 ranks)\n" in output
    assert "state flat over dp_shard" in output


NO_PIPELINE = "the plan has no pipeline: every rank runs its microbatches one after another, each forward and backward"


def test_plan_shows_the_schedule_of_a_pipeline(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("colossal_pipeline")
    pytest.importorskip("transformers")
    monkeypatch.setenv("COLUMNS", "100")
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, tie_word_embeddings: true"
    words = [
        "plan",
        "run.yaml",
        "-w",
        "2",
        "--show-schedule",
        "--set",
        "batch.micro_size=2",
        "--set",
        "parallel.pipeline.size=2",
    ]
    lines = printed([*words, "--set", f"model={{architecture: llama, config: {{{sizes}}}}}"], capsys).splitlines()
    sent = next(line for line in lines if line.startswith("sent "))
    assert re.fullmatch(r"sent        shard 0 B, dp_replicate 0 B, pp [\d.]+ KiB, tp 0 B a rank and step", sent)
    first = lines.index("schedule    1f1b, 2 stages on 2 ranks, 4 microbatches")
    assert [line.split(":")[0] for line in lines[-2:]] == ["rank 0", "rank 1"]
    assert lines[first + 2].startswith("rank 0 F0")


def test_plan_without_a_pipeline_has_no_schedule_to_show(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(["plan", "run.yaml", "--show-schedule"], capsys).splitlines()[-1] == f"schedule    {NO_PIPELINE}"
    with pytest.raises(SystemExit) as left:
        run(["plan", "run.yaml", "--picture", "schedule.png"])
    assert left.value.code == 2
    told = f"error: --picture='schedule.png': {NO_PIPELINE}: give parallel.pipeline.size, or leave it out\n"
    assert capsys.readouterr().err == told
    assert not (project / "schedule.png").exists()


def test_plan_prints_the_schema_of_the_config(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    del project
    schema = json.loads(printed(["plan", "run.yaml", "--schema"], capsys))
    assert {"model", "batch", "recompute", "parallel"} <= set(schema["properties"])


def test_doctor_names_machine_packages_and_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(["doctor"], capsys).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["machine", "packages", "environment", "two ranks"]
    assert f"  torch {torch.__version__}".split("+")[0] in "\n".join(lines)
    assert "  launcher: single, rank 0 of 1" in lines
    assert lines[-1] == "  gloo on the loopback interface works"


def test_a_trained_run_becomes_a_hugging_face_folder(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are those of the trained model; the text that it was trained on is no longer needed."""
    transformers = pytest.importorskip("transformers")
    sizes = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, tie_word_embeddings: true"
    words = ["--set", f"model={{architecture: llama, config: {{{sizes}}}}}", "--set", "train.num_steps=2"]
    with pytest.raises(SystemExit) as left:
        run(["train", "run.yaml", *words])
    assert left.value.code == 0
    capsys.readouterr()
    (project / "text.txt").unlink()
    monkeypatch.chdir(project / "runs")
    assert printed(["convert", "a", "a-hf"], capsys) == "step 2 of a written to a-hf\n"
    loaded = transformers.AutoModelForCausalLM.from_pretrained("a-hf")

    from colossal_core.checkpoint import read_full

    other = transformers.LlamaForCausalLM(loaded.config)
    names = [name for name, _ in other.named_parameters()]
    folder = project / "runs/a/checkpoints/step-00000002"
    other.load_state_dict({name: read_full(folder, "parameter", name) for name in names}, strict=False)
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, other.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere", "x"],
            "RUN='nowhere': holds no config.json with its text beside it: give the folder that checkpoint.directory named",
        ),
        (
            ["nowhere", "x", "--dtype", "int8"],
            "--dtype='int8': is not a dtype to write: use master, float32, bfloat16, float16",
        ),
    ],
)
def test_convert_says_what_it_needs(
    words: list[str], message: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del project
    with pytest.raises(SystemExit) as left:
        run(["convert", *words])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
