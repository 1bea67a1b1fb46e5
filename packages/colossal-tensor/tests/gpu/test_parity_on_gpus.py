"""GPUs through NCCL and symmetric memory give what one CPU process gives, in float64: Llama and GPT-2, with microbatches and clipping."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_comm import RankCollectives, join, leave
from colossal_core.collectives import SingleProcess
from colossal_core.mesh import MeshLayout
from colossal_core.testing import RunRecord, RunSpec, compare, record_run, table
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import oracle_of

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="these are models of transformers")
pytest.importorskip("colossal_zero")

SECONDS = 300.0
VOCABULARY, SEQUENCE_LENGTH = 96, 16
PLAIN, WHOLE = {"overlap": "plain"}, {"sequence_parallel": False}
COMPILED = {"compile": {"enabled": True}}


@dataclass(frozen=True)
class SmallModel:
    """Builds a causal language model of two blocks and four heads. kind: `llama`, with two key/value heads, or `gpt2`, tied."""

    kind: str

    def __call__(self) -> nn.Module:
        import transformers

        auto: Any = transformers.AutoModelForCausalLM
        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
        }
        if self.kind == "gpt2":
            sizes = {"n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "n_positions": 32}
            sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        words = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
        built: nn.Module = auto.from_config(transformers.AutoConfig.for_model(self.kind, **words, **sizes))
        return built.train()


@dataclass(frozen=True)
class Case:
    """A model and how it is spread. tensor: keys of `parallel.tensor` beside size. stage: of ZeRO over the other ranks; None: none."""

    kind: str
    size: int = 2
    tensor: Mapping[str, Any] = field(default_factory=dict)
    stage: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def spec(self) -> RunSpec:
        """Two steps of four sequences, one a microbatch, clipped."""
        parallel: dict[str, Any] = {"tensor": {"size": self.size, **self.tensor}}
        if self.stage is not None:
            parallel["zero"] = {"stage": self.stage, "bucket_bytes": 9000}
        config = {
            "batch": {"global_size": 4, "micro_size": 1},
            "precision": "fp64",
            "optimizer": {"lr": 1.0e-3, "eps": 1e-6, "max_grad_norm": 0.1},
            "parallel": parallel,
            **self.more,
        }
        batches = TokenBatches(VOCABULARY, SEQUENCE_LENGTH)
        return RunSpec(config, SmallModel(self.kind), batches, num_steps=2, task="causal-lm")


ALONE = (
    *(Case(kind, tensor=tensor) for kind in ("llama", "gpt2") for tensor in ({}, PLAIN, WHOLE)),
    *(Case("llama", tensor=tensor, more=COMPILED) for tensor in ({}, PLAIN)),
    Case("llama", more={"recompute": {"mode": "full"}}),
)
WITH_ZERO = tuple(Case("llama", tensor=tensor, stage=stage) for stage in (1, 3) for tensor in ({}, PLAIN, WHOLE))
FOUR = (Case("llama", 4), Case("gpt2", 4), Case("llama", 4, WHOLE))


def cases_of(num_ranks: int) -> tuple[Case, ...]:
    """Two ranks: tensor parallelism alone. With ZeRO beside it where there are four; where there are not, its stages have one rank."""
    if num_ranks == 4:
        return (*WITH_ZERO, *FOUR)
    return ALONE if torch.accelerator.device_count() >= 4 else (*ALONE, *WITH_ZERO)


def rank_of(rank: int, cases: Sequence[Case], num_ranks: int, device_type: str, folder: str) -> None:
    """One rank: its records go into files."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device(device_type, rank)
    mesh = MeshLayout((1, 1, 1, 1, num_ranks))
    collectives = join(mesh, rank, device, f"file://{folder}/store", timedelta(seconds=120))
    if device_type == "cuda":
        torch.cuda.set_device(device)
        assert isinstance(collectives, RankCollectives)
        assert collectives.symmetric_group("tp"), "these GPUs do not reach each other's memory"
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
    wanted: dict[str, RunRecord] = {}
    for case, records in zip(cases, spread(cases, num_ranks, device_type, folder), strict=True):
        if case.kind not in wanted:
            wanted[case.kind] = record_run(oracle_of(case.spec()), SingleProcess(torch.device("cpu")))
        rows = compare(records, wanted[case.kind])
        assert all(row.passed for row in rows), f"{case}\n{table(rows)}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gpus_are_one_process(num_ranks: int, tmp_path: Path) -> None:
    if torch.accelerator.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    check(cases_of(num_ranks), num_ranks, "cuda", tmp_path)
