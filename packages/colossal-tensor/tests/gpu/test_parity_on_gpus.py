"""GPUs through NCCL and symmetric memory give what one CPU process gives, in float64: Llama and GPT-2, with microbatches and clipping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from colossal_comm import RankCollectives
from colossal_core.collectives import Collectives
from colossal_core.mesh import MeshLayout
from colossal_core.testing import Oracles, RunRecord, RunSpec, WorkerPool, compare, table
from colossal_core.testing.each import of_each
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.probes import record

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="these are models of transformers")
pytest.importorskip("colossal_zero")

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


def record_with_symmetric_memory(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """The record of a whole run. On GPUs its products go through symmetric memory."""
    if collectives.device.type == "cuda":
        seen = collectives.with_mesh(MeshLayout((1, 1, 1, 1, collectives.mesh.world_size)))
        assert isinstance(seen, RankCollectives)
        assert seen.symmetric_group("tp"), "these GPUs do not reach each other's memory"
    return record(collectives, spec)


def check(pool: WorkerPool, num_ranks: int, cases: Sequence[Case]) -> None:
    """Compares every case with one process on the CPU, and fails with the table of the first that differs."""
    oracles, specs = Oracles(), {str(case): case.spec() for case in cases}
    found = pool.run(num_ranks, of_each, record_with_symmetric_memory, specs)
    for name, spec in specs.items():
        rows = compare([records[name] for records in found], oracles.of(spec))
        assert all(row.passed for row in rows), f"{name}\n{table(rows)}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gpus_are_one_process(gpus: WorkerPool, num_ranks: int) -> None:
    if torch.accelerator.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    check(gpus, num_ranks, cases_of(num_ranks))
