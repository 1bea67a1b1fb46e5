"""Models of transformers that are awkward to gather: an encoder with a decoder, and checkpoints by transformers' own means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="these are models of transformers")

from colossal_core.anatomy import Task
from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import BatchBuilder, ModelBuilder, oracle_of
from colossal_core.testing.probes import record

POLICIES: tuple[dict[str, Any], ...] = (
    {"stage": 2},
    {"stage": 3},
    {"stage": 3, "keep_parameters": "microbatch"},
    {"stage": 3, "keep_parameters": "step"},
)


def check(pool: WorkerPool, zero: Mapping[str, Any], model: ModelBuilder, batch: BatchBuilder, task: Task) -> None:
    """Two ranks beside one process, two microbatches each, clipped."""
    config: dict[str, Any] = {
        "batch": {"global_size": 4, "micro_size": 1},
        "precision": "fp64",
        "optimizer": {"lr": 0.001, "max_grad_norm": 0.1},
        "parallel": {"zero": {"bucket_bytes": 9000, **zero}},
    }
    spec = RunSpec(config, model, batch, task=task, num_steps=2)
    oracle = pool.run(1, record, oracle_of(spec))[0]
    rows = compare(pool.run(2, record, spec), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


@dataclass(frozen=True)
class Encoders:
    """A tiny T5 whose position bias is made in the first block of each stack and passed on by all the others."""

    def __call__(self) -> nn.Module:
        import transformers

        config: Any = transformers.T5Config(
            vocab_size=31,
            d_model=8,
            d_kv=4,
            d_ff=12,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
        )
        config.decoder_start_token_id = 0
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return model.train()


@dataclass(frozen=True)
class Llama:
    """A tiny Llama that recomputes its blocks by transformers' own means."""

    def __call__(self) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=53,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
        model: Any = transformers.LlamaForCausalLM(config)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        made: nn.Module = model.train()
        return made


def sequences(step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 31, (num_sequences, 6), generator=generator)
    return {"input_ids": ids, "labels": ids.flip(1)}


@pytest.mark.parametrize("zero", POLICIES, ids=lambda zero: "-".join(map(str, zero.values())))
def test_an_encoder_and_a_decoder_are_exact(pool: WorkerPool, zero: dict[str, Any]) -> None:
    check(pool, zero, Encoders(), sequences, "seq2seq-lm")


@pytest.mark.parametrize("zero", POLICIES, ids=lambda zero: "-".join(map(str, zero.values())))
def test_checkpointing_of_transformers_is_exact(pool: WorkerPool, zero: dict[str, Any]) -> None:
    """The user's own: each block's whole call, hooks included, runs again in the backward pass."""
    check(pool, zero, Llama(), TokenBatches(), "causal-lm")
