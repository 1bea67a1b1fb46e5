"""Stages on GPUs through NCCL give what one CPU process gives, in float64: every schedule, alone and beside ZeRO and tensor parallelism. In
bfloat16 compiled stages are no further from the truth than twice what one process is.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_comm import join, leave
from colossal_core.collectives import SingleProcess
from colossal_core.difference import relative_difference
from colossal_core.mesh import MeshLayout
from colossal_core.stage_links import FIRST_STEPS
from colossal_core.testing import RunRecord, RunSpec, compare, record_run, table
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import oracle_of

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="these are models of transformers")
pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_tensor")

SECONDS = 300.0
VOCABULARY, SEQUENCE_LENGTH = 96, 16
SCHEDULES = ("1f1b", "interleaved", "zb-h1", "zbv")
COMPILED = {"compile": {"enabled": True}}


@dataclass(frozen=True)
class SmallModel:
    """Builds a causal language model of four heads. kind: `llama`, with two key/value heads, or `gpt2`, tied."""

    kind: str
    num_blocks: int

    def __call__(self) -> nn.Module:
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": self.num_blocks,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
        if self.kind == "gpt2":
            sizes = {"n_embd": 64, "n_inner": 96, "n_layer": self.num_blocks, "n_head": 4, "n_positions": 32}
            sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        built: nn.Module = auto.from_config(transformers.AutoConfig.for_model(self.kind, **words, **sizes))
        return built.train()


@dataclass(frozen=True)
class Case:
    """A model and how it is spread. stage: of ZeRO over the ranks that are left; None: none. tensor: ranks that share matrices."""

    schedule: str
    kind: str = "llama"
    size: int = 2
    stage: int | None = None
    tensor: int = 1
    num_blocks: int = 4
    precision: str = "fp64"
    more: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> RunSpec:
        """The first steps and one more, of eight sequences, one a microbatch, clipped: four microbatches and more on each pipeline."""
        parallel: dict[str, Any] = {"pipeline": {"size": self.size, "schedule": self.schedule}}
        if self.stage is not None:
            parallel["zero"] = {"stage": self.stage, "bucket_bytes": 9000}
        if self.tensor > 1:
            parallel["tensor"] = {"size": self.tensor}
        config = {
            "batch": {"global_size": 8, "micro_size": 1},
            "precision": self.precision,
            "optimizer": {"lr": 1.0e-3, "eps": 1e-6, "max_grad_norm": 0.1},
            "parallel": parallel,
            **self.more,
        }
        batches, plugins = TokenBatches(VOCABULARY, SEQUENCE_LENGTH), "comm,pipeline,tensor,zero"
        model = SmallModel(self.kind, self.num_blocks)
        return RunSpec(config, model, batches, num_steps=FIRST_STEPS + 1, task="causal-lm", plugins=plugins)


ALONE = (
    *(Case(schedule, kind) for kind in ("llama", "gpt2") for schedule in SCHEDULES),
    *(Case(schedule, more=COMPILED) for schedule in ("1f1b", "zbv")),
    Case("zb-h1", more={"recompute": {"mode": "full"}}),
)
WITH_ZERO = tuple(Case(schedule, stage=stage) for stage in (1, 3) for schedule in ("1f1b", "zbv"))
WITH_TENSOR = tuple(Case(schedule, tensor=2) for schedule in ("1f1b", "interleaved", "zbv"))
FOUR_STAGES = tuple(Case(schedule, size=4, num_blocks=8) for schedule in SCHEDULES)
ROUNDED = tuple(Case(schedule, precision="bf16", more=COMPILED) for schedule in ("1f1b", "zbv"))


def cases_of(num_ranks: int) -> tuple[Case, ...]:
    """Two ranks: stages alone. With ZeRO beside them where there are four; where there are not, its stages have one rank."""
    if num_ranks == 4:
        return (*WITH_ZERO, *WITH_TENSOR, *FOUR_STAGES)
    return ALONE if torch.accelerator.device_count() >= 4 else (*ALONE, *WITH_ZERO)


def rank_of(rank: int, cases: Sequence[Case], num_ranks: int, device_type: str, folder: str) -> None:
    """One rank: its records go into files."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    mesh = MeshLayout((num_ranks, 1, 1, 1, 1))
    collectives = join(mesh, rank, device, f"file://{folder}/store", timedelta(seconds=120))
    for place, case in enumerate(cases):
        print(rank, case, flush=True)
        torch.compiler.reset()
        torch.save(record_run(case.spec(), collectives), f"{folder}/record-{place}-{rank}.pt")
    leave(collectives)


def spread(cases: Sequence[Case], num_ranks: int, device_type: str, folder: Path) -> list[list[RunRecord]]:
    """The records of every case, by rank."""
    context = multiprocessing.get_context("spawn")
    arguments = (cases, num_ranks, device_type, str(folder))
    ranks = [context.Process(target=rank_of, args=(rank, *arguments)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
    found = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert found == [0] * num_ranks
    return [
        [torch.load(folder / f"record-{place}-{rank}.pt", weights_only=False) for rank in range(num_ranks)]
        for place in range(len(cases))
    ]


def check(cases: Sequence[Case], num_ranks: int, device_type: str, folder: Path) -> None:
    """Compares every case with one process on the CPU, and fails with the table of the first that differs."""
    wanted: dict[tuple[str, int], RunRecord] = {}
    for case, records in zip(cases, spread(cases, num_ranks, device_type, folder), strict=True):
        key = case.kind, case.num_blocks
        if key not in wanted:
            wanted[key] = record_run(oracle_of(case.spec()), SingleProcess(torch.device("cpu")))
        rows = compare(records, wanted[key])
        assert all(row.passed for row in rows), f"{case}\n{table(rows)}"


def vectors(run: RunRecord) -> list[torch.Tensor]:
    """The losses, the gradients of each step, and the parameters at the end, as one vector each."""
    losses = torch.tensor([step.loss for step in run.steps], dtype=torch.float64)
    kinds = [list(step.gradients.values()) for step in run.steps] + [list(run.parameters.values())]
    return [losses, *(torch.cat([tensor.double().reshape(-1) for tensor in kind]) for kind in kinds)]


def check_rounded(cases: Sequence[Case], device_type: str, folder: Path) -> None:
    """Compares every case with the truth, and its distance from it with that of one process on one device, where nothing is compiled."""
    truth = vectors(record_run(oracle_of(cases[0].spec()), SingleProcess(torch.device("cpu"))))
    one = SingleProcess(torch.device("cpu") if device_type == "cpu" else torch.device(device_type, 0))
    alone = vectors(record_run(replace(cases[0].spec(), is_oracle=True), one))
    for case, records in zip(cases, spread(cases, 2, device_type, folder), strict=True):
        for record in records:
            ratios = [
                relative_difference(ours, wanted) / relative_difference(near, wanted)
                for wanted, near, ours in zip(truth, alone, vectors(record), strict=True)
            ]
            assert max(ratios[1:]) <= 2.0, f"{case}: {ratios}"
            assert relative_difference(vectors(record)[0], truth[0]) <= 2**-8, f"{case}: losses {vectors(record)[0]}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gpus_are_one_process(num_ranks: int, tmp_path: Path) -> None:
    if torch.accelerator.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    check(cases_of(num_ranks), num_ranks, "cuda", tmp_path)


@pytest.mark.timeout(300)
def test_compiled_stages_in_bfloat16_stay_near_the_truth(tmp_path: Path) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    check_rounded(ROUNDED, "cuda", tmp_path)
