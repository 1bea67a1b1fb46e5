"""Stages on GPUs through NCCL give what one CPU process gives, in float64: every schedule, alone and beside ZeRO and tensor parallelism. In
bfloat16 compiled stages are no further from the truth than twice what one process is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.difference import relative_difference
from colossal_core.stage_links import FIRST_STEPS
from colossal_core.testing import Oracles, RunRecord, RunSpec, WorkerPool, compare, table
from colossal_core.testing.each import of_each
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.probes import record

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="these are models of transformers")
pytest.importorskip("colossal_zero")
pytest.importorskip("colossal_tensor")

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


def spread(pool: WorkerPool, num_ranks: int, cases: Sequence[Case]) -> Iterator[tuple[Case, list[RunRecord]]]:
    """Every case with its records, by rank."""
    found = pool.run(num_ranks, of_each, record, {str(case): case.spec() for case in cases})
    for case in cases:
        yield case, [records[str(case)] for records in found]


def check(pool: WorkerPool, num_ranks: int, cases: Sequence[Case]) -> None:
    """Compares every case with one process on the CPU, and fails with the table of the first that differs."""
    oracles = Oracles()
    for case, records in spread(pool, num_ranks, cases):
        rows = compare(records, oracles.of(case.spec()))
        assert all(row.passed for row in rows), f"{case}\n{table(rows)}"


def vectors(run: RunRecord) -> list[torch.Tensor]:
    """The losses, the gradients of each step, and the parameters at the end, as one vector each."""
    losses = torch.tensor([step.loss for step in run.steps], dtype=torch.float64)
    kinds = [list(step.gradients.values()) for step in run.steps] + [list(run.parameters.values())]
    return [losses, *(torch.cat([tensor.double().reshape(-1) for tensor in kind]) for kind in kinds)]


def check_rounded(pool: WorkerPool, cases: Sequence[Case]) -> None:
    """Compares every case with the truth, and its distance from it with that of one process on one device, where nothing is compiled."""
    truth = vectors(Oracles().of(cases[0].spec()))
    alone = vectors(pool.run(1, record, replace(cases[0].spec(), is_oracle=True))[0])
    for case, records in spread(pool, 2, cases):
        for found in map(vectors, records):
            ratios = [
                relative_difference(ours, wanted) / relative_difference(near, wanted)
                for wanted, near, ours in zip(truth, alone, found, strict=True)
            ]
            assert max(ratios[1:]) <= 2.0, f"{case}: {ratios}"
            assert relative_difference(found[0], truth[0]) <= 2**-8, f"{case}: losses {found[0]}"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gpus_are_one_process(gpus: WorkerPool, num_ranks: int) -> None:
    if torch.accelerator.device_count() < num_ranks:
        pytest.skip(f"needs {num_ranks} GPUs")
    check(gpus, num_ranks, cases_of(num_ranks))


@pytest.mark.timeout(300)
def test_compiled_stages_in_bfloat16_stay_near_the_truth(gpus: WorkerPool) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    check_rounded(gpus, ROUNDED)
