"""Bad input in one table: each case is one readable message with field, value, reason and remedy, and the exit status of the contract.

Everything here is found before a worker starts, so the command runs in this process.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from colossal_launch.cli.application import run


@dataclass(frozen=True)
class Case:
    """words: after `train run.yaml`. config: instead of run.yaml's text. needs: a module without which the case is another one.

    message: all of standard error; TAKEN_PORT is a port on which somebody listens, .... what depends on another package's version.
    """

    name: str
    message: str
    words: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    config: str | None = None
    status: int = 2
    needs: str = ""
    file: str = "run.yaml"
    broken_plugin: bool = False

    def __str__(self) -> str:
        return self.name


def setting(*texts: str) -> tuple[str, ...]:
    return tuple(word for text in texts for word in ("--set", text))


CASES = (
    Case(
        "unknown key",
        "error: batch.globl_size: unknown key: did you mean global_size?\n",
        setting("batch.globl_size=8"),
    ),
    Case("unknown section", "error: bach: unknown key: did you mean batch?\n", setting("bach.global_size=8")),
    Case(
        "wrong type",
        ("error: train.num_steps='many': should be a valid integer: correct it (num_steps: optimizer steps)\n"),
        setting("train.num_steps=many"),
    ),
    Case(
        "impossible value",
        "error: optimizer.lr=-1: should be greater than 0: correct it (lr: peak learning rate)\n",
        setting("optimizer.lr=-1"),
    ),
    Case(
        "an op that nobody has",
        "error: ops.rms_nrom='reference': is no op: did you mean rms_norm?\n",
        setting("ops.rms_nrom=reference"),
    ),
    Case(
        "a provider that nobody has",
        "error: ops.swiglu='fast': no installed package has this provider of it: use one of auto, reference\n",
        setting("ops.swiglu=fast"),
    ),
    Case(
        "a provider of another device",
        (
            "error: ops.adamw_step='torch_fused': is for float32 or bfloat16 or float16 on cuda, and this run computes in float32 on cpu: "
            "use one of ....\n"
        ),
        setting("ops.adamw_step=torch_fused"),
    ),
    Case(
        "every op by one that only some have",
        (
            "error: ops.default='triton': should be 'auto' or 'reference': correct it (default: for every op that is not named here. "
            "`reference`: plain PyTorch, and the model's own code as it is)\n"
        ),
        setting("ops.default=triton"),
    ),
    Case(
        "several at once",
        (
            "error: parallel.pipeline: needs the package colossal-pipeline, which is not installed: pip "
            "install colossal-pipeline\n"
            "       batch.globl_size: unknown key: did you mean global_size?\n"
            "       train.num_steps=0: should be greater than or equal to 1: correct it (num_steps: "
            "optimizer steps)\n"
        ),
        setting("batch.globl_size=8", "train.num_steps=0", "parallel.pipeline.size=2"),
        {"COLOSSAL_PLUGINS": "comm"},
    ),
    Case(
        "no source of the model",
        (
            "error: model={'factory': None, 'loss': 'tiny_model:loss'}: exactly one of architecture, "
            "pretrained and factory names the model, found none: correct it (model: the model; null where "
            "one is handed to `Booster.boost`)\n"
        ),
        setting("model.factory=null"),
    ),
    Case(
        "no model",
        "error: model: is required: add `model: {architecture: llama, config: {...}}`\n",
        config="batch: {global_size: 8}\ndata: {}\n",
    ),
    Case(
        "global size does not divide",
        "error: batch.global_size=8: is not divided by the 3 data-parallel ranks: use 6 or 9\n",
        ("--processes", "3"),
        needs="colossal_zero",
    ),
    Case(
        "micro size does not divide",
        (
            "error: batch.micro_size=3: does not divide the 8 sequences of one rank (8 over 1 data-parallel "
            "ranks): use one of 1, 2, 4, 8\n"
        ),
        setting("batch.micro_size=3"),
    ),
    Case(
        "heads do not divide",
        "error: model.config: transformers refuses it (....): change the sizes that are named\n",
        setting("model={architecture: llama, config: {hidden_size: 30, num_attention_heads: 4}}"),
        needs="transformers",
    ),
    Case(
        "unknown architecture",
        (
            "error: model.architecture='lama': the installed transformers has no such architecture (it has "
            "....): did you mean ....?\n"
        ),
        setting("model={architecture: lama}"),
        needs="transformers",
    ),
    Case(
        "masked model on plain text",
        (
            "error: model.architecture='bert': BertForMaskedLM is no causal language model, and plain text gives it nothing to "
            "predict: train it from a script of your own: `booster.boost(model)` with batches that hold its labels\n"
        ),
        setting("model={architecture: bert, config: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}}"),
        needs="transformers",
    ),
    Case(
        "no factory",
        (
            "error: model.factory='tiny_model:bild': tiny_model has no function bild: give "
            "package.module:function, importable where the command runs\n"
        ),
        setting("model.factory=tiny_model:bild"),
    ),
    Case(
        "arguments of the factory",
        (
            "error: model.config={'hidden': 3}: the factory does not take model.config (Tiny.__init__() got "
            "an unexpected keyword argument 'hidden'): give the arguments of tiny_model:build\n"
        ),
        setting("model.config.hidden=3"),
    ),
    Case(
        "no pretrained folder",
        (
            "error: model.pretrained='nowhere': there is no config.json in it: give a folder that "
            "transformers' save_pretrained wrote, with safetensors\n"
        ),
        setting("model={pretrained: nowhere}"),
        needs="transformers",
    ),
    Case(
        "missing package pipeline",
        (
            "error: parallel.pipeline: needs the package colossal-pipeline, which is not installed: pip "
            "install colossal-pipeline\n"
        ),
        setting("parallel.pipeline.size=2"),
        {"COLOSSAL_PLUGINS": "comm"},
    ),
    Case(
        "missing package tensor",
        (
            "error: parallel.tensor: needs the package colossal-tensor, which is not installed: pip install "
            "colossal-tensor\n"
        ),
        setting("parallel.tensor.size=2"),
        {"COLOSSAL_PLUGINS": "comm"},
    ),
    Case(
        "section that its package does not bring",
        "error: parallel.expert: the installed colossal-tensor does not bring this section: remove it\n",
        setting("parallel.expert.size=2"),
        needs="colossal_tensor",
    ),
    Case(
        "missing package zero",
        ("error: parallel.zero: needs the package colossal-zero, which is not installed: pip install colossal-zero\n"),
        setting("parallel.zero.stage=1"),
        {"COLOSSAL_PLUGINS": "comm"},
    ),
    Case(
        "two processes without zero",
        (
            "error: parallel.zero: data parallelism over 2 ranks needs the package colossal-zero, which is "
            "not installed: pip install colossal-zero\n"
        ),
        ("--processes", "2"),
        {"COLOSSAL_PLUGINS": "comm"},
    ),
    Case(
        "parameters kept below stage 3",
        (
            "error: parallel.zero.keep_parameters='step': says how parameters are gathered, and stage 2 keeps them whole: "
            "remove it, or use stage: 3\n"
        ),
        setting("parallel.zero.stage=2", "parallel.zero.keep_parameters=step"),
        needs="colossal_zero",
    ),
    Case(
        "gradients rounded in fp32",
        (
            "error: parallel.zero.reduce_dtype='bf16': would round the gradients of a run in fp32: remove it, or use "
            "precision: bf16\n"
        ),
        ("--processes", "2", *setting("precision=fp32", "parallel.zero.stage=3", "parallel.zero.reduce_dtype=bf16")),
        needs="colossal_zero",
    ),
    Case(
        "replicate does not divide",
        (
            "error: parallel: the sizes asked for need a multiple of 3 ranks (dp_replicate 3), and there are "
            "2: start 3 ranks or change the sizes\n"
        ),
        ("--processes", "2", *setting("parallel.zero.replicate=3")),
        needs="colossal_zero",
    ),
    Case(
        "automatic plan",
        (
            "error: parallel='auto': automatic planning is not part of this release: write the sizes: "
            "`parallel: {zero: {stage: 1}}`\n"
        ),
        setting("parallel=auto"),
    ),
    Case(
        "unknown optimizer",
        (
            "error: optimizer.name='adam': no installed package has this optimizer: use one of adafactor, adamw, "
            "lamb, lars, lion, muon, sgd\n"
        ),
        setting("optimizer.name=adam"),
        needs="colossal_zero",
    ),
    Case(
        "key of another optimizer",
        (
            "error: optimizer.momentum: adamw does not read it: remove it; adamw reads lr, betas, eps, "
            "weight_decay, no_decay, states, masters\n"
        ),
        setting("optimizer.momentum=0.9"),
    ),
    Case(
        "missing text",
        (
            "error: data.source='nowhere.txt': no such file: give `stdlib`, `datasets:NAME`, or the path or "
            "glob of .txt, .jsonl or .parquet files\n"
        ),
        setting("data.source=nowhere.txt"),
    ),
    Case(
        "empty text",
        "error: data.source='empty.txt': there is no text in it: name files that hold text\n",
        setting("data.source=empty.txt"),
    ),
    Case(
        "unknown tokenizer",
        (
            "error: data.tokenizer='nowhere.json': there is no file nowhere.json: give `bpe`, `bytes`, or "
            "the path of a tokenizer.json or of its folder\n"
        ),
        setting("data.tokenizer=nowhere.json"),
        needs="tokenizers",
    ),
    Case(
        "sequence longer than the text",
        (
            "error: data.sequence_length=100000: the text has 18766 tokens, not one sequence: at most 18766, "
            "or more text\n"
            "       data.sequence_length=100000: the held-out text has 1138 tokens, not one sequence: at "
            "most 1138, or more text\n"
        ),
        setting("data.sequence_length=100000"),
    ),
    Case(
        "folder under a file",
        (
            "error: checkpoint.directory='text.txt/run': cannot be written (Not a directory): name a folder "
            "that you may write\n"
        ),
        setting("checkpoint.directory=text.txt/run"),
    ),
    Case(
        "folder that cannot be made",
        (
            "error: checkpoint.directory='/proc/run': cannot be written (No such file or directory): name a "
            "folder that you may write\n"
        ),
        setting("checkpoint.directory=/proc/run"),
    ),
    Case(
        "text and size at once",
        (
            "error: data.source='nowhere.txt': no such file: give `stdlib`, `datasets:NAME`, or the path or "
            "glob of .txt, .jsonl or .parquet files\n"
            "       batch.micro_size=3: does not divide the 8 sequences of one rank (8 over 1 data-parallel "
            "ranks): use one of 1, 2, 4, 8\n"
        ),
        setting("data.source=nowhere.txt", "batch.micro_size=3"),
    ),
    Case(
        "not resumed",
        (
            "error: checkpoint.directory='runs/old': holds checkpoints, and checkpoint.resume is false: name "
            "another folder, or set it to true\n"
        ),
        setting("checkpoint.directory=runs/old", "checkpoint.resume=false"),
    ),
    Case(
        "port taken",
        "error: --port=TAKEN_PORT: the port is taken: choose another one, or leave it out\n",
        ("--processes", "2", "--port", "TAKEN_PORT"),
        needs="colossal_zero",
    ),
    Case(
        "rank without a world",
        (
            "error: WORLD_SIZE: not set, though the other variables of this launcher are: set it, or unset "
            "the others\n"
            "       LOCAL_WORLD_SIZE: not set, though the other variables of this launcher are: set it, or "
            "unset the others\n"
            "       MASTER_ADDR: not set: set it to the host of rank 0, as the other hosts know it\n"
            "       MASTER_PORT: not set: set it to a free port of the host of rank 0\n"
        ),
        environment={"RANK": "0"},
    ),
    Case(
        "processes beside a launcher",
        (
            "error: --processes=2: the environment already describes 2 ranks (torchrun): leave it out, or "
            "start without the launcher\n"
        ),
        ("--processes", "2"),
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ),
    Case(
        "no accelerator",
        "error: train.device='cuda': torch finds only a CPU: use auto or cpu, or install torch for it\n",
        setting("train.device=cuda"),
    ),
    Case(
        "set without a value",
        "error: --set='batch.micro_size': is not section.key=value: write `--set batch.micro_size=4`\n",
        setting("batch.micro_size"),
    ),
    Case(
        "set through a value",
        "error: --set='batch.global_size.a=1': global_size is 8, not a section: set it as a whole\n",
        setting("batch.global_size.a=1"),
    ),
    Case(
        "set what is not YAML",
        "error: --set='batch.micro_size=[1': the value is not YAML: quote it\n",
        setting("batch.micro_size=[1"),
    ),
    Case(
        "unknown plugin",
        ("error: COLOSSAL_PLUGINS='zoro': names a plugin that is not installed; installed: ....: correct it\n"),
        environment={"COLOSSAL_PLUGINS": "comm,zoro"},
    ),
    Case(
        "not YAML",
        (
            "error: CONFIG='run.yaml': is not YAML (line 2, column 1: expected ',' or '}', but got '<stream "
            "end>'): correct the line\n"
        ),
        config="batch: {global_size: 8\n",
    ),
    Case(
        "no sections",
        "error: CONFIG='run.yaml': holds a list, not sections: write `section: {key: value}`\n",
        config="- a\n",
    ),
    Case(
        "unknown precision",
        (
            "error: precision='fp8': should be 'fp64', 'fp32', 'bf16' or 'fp16': correct it (precision: what "
            "the forward and backward pass compute in. Master weights and states are float32 (fp64: "
            "float64))\n"
        ),
        setting("precision=fp8"),
    ),
    Case(
        "no config file",
        "error: CONFIG='nowhere.yaml': there is no such file: give the path of a YAML file\n",
        file="nowhere.yaml",
    ),
    Case(
        "broken plugin",
        (
            "error: plugin stranger: failed to import strangers_plugin.missing (ModuleNotFoundError: No "
            "module named 'strangers_plugin'): repair or uninstall strangers-plugin\n"
        ),
        broken_plugin=True,
    ),
    Case(
        "error in the model",
        ("error: ValueError: three calls are enough (tiny_model.py, line 30)\n       --debug shows the traceback\n"),
        setting("model.config.how=raise"),
        status=1,
    ),
    Case(
        "loss that is not a number",
        (
            "error: step 3: the loss is nan: the update was left out and the run ends here "
            "(train.non_finite: stop); the gradients of embed, layers.0, layers.1, head are not finite; "
            "lower optimizer.lr, or set train.non_finite: skip to go on\n"
        ),
        setting("model.config.how=nan"),
        status=1,
    ),
    Case(
        "rate that is too high",
        (
            "error: step 2: the loss is nan: the update was left out and the run ends here "
            "(train.non_finite: stop); the gradients of embed, layers.0, layers.1, head are not finite; "
            "lower optimizer.lr, or set train.non_finite: skip to go on\n"
        ),
        setting("optimizer.lr=1.0e+30"),
        status=1,
    ),
)


@pytest.fixture
def port() -> Iterator[int]:
    """A port of the loopback interface on which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bad_input(
    case: Case, project: Path, port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    (project / "empty.txt").touch()
    (project / "runs/old/checkpoints/step-00000002").mkdir(parents=True)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    if case.config is not None:
        (project / "run.yaml").write_text(case.config)
    if case.broken_plugin:
        described = project / "strangers_plugin-1.0.dist-info"
        described.mkdir()
        (described / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-plugin\nVersion: 1.0\n")
        (described / "entry_points.txt").write_text("[colossal.plugins]\nstranger = strangers_plugin.missing\n")
    if case.name == "no accelerator" and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    words = (word.replace("TAKEN_PORT", str(port)) for word in case.words)
    with pytest.raises(SystemExit) as left:
        run(["train", case.file, *words])
    errors = capfd.readouterr().err
    pattern = re.escape(case.message.replace("TAKEN_PORT", str(port))).replace(r"\.\.\.\.", ".*")
    assert re.fullmatch(pattern, errors, flags=re.DOTALL), errors
    assert left.value.code == case.status
