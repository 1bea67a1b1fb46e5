"""Dropout where tensors are cut: keyed numbers are those of one process; numbers drawn in a kernel come again when recomputed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.parity import share_of_step, start
from colossal_core.testing.probes import record

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

STREAM: Mapping[str, Any] = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}
"""GPT-2 with dropout of the embeddings and of what every group adds to the stream."""
PROBABILITIES: Mapping[str, Any] = {"attention_dropout": 0.2}
"""Bloom with dropout of attention probabilities, in a module."""
MODELS = {"gpt2": STREAM, "bloom": PROBABILITIES}
COMPILED: Mapping[str, Any] = {
    "compile": {"enabled": True, "backend": "aot_eager"},
    "recompute": {"mode": "full"},
}


def dropping(run_of: Run, kind: str, size: int, *, sequence_parallel: bool, **sections: Any) -> RunSpec:
    tensor = {"parallel.tensor": {"size": size, "sequence_parallel": sequence_parallel}}
    return run_of(kind, {**tensor, **sections}, MODELS[kind], attention="eager")


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", MODELS)
def test_keyed_numbers_are_those_of_one_process(
    run_of: Run, exact: Exact, kind: str, size: int, sequence_parallel: bool
) -> None:
    """Three ranks have two, one and one of the heads."""
    exact(dropping(run_of, kind, size, sequence_parallel=sequence_parallel), size)


@pytest.mark.parametrize("kind", MODELS)
def test_compiled_and_recomputed(run_of: Run, exact: Exact, kind: str) -> None:
    exact(dropping(run_of, kind, 2, sequence_parallel=True, **COMPILED), 2)


def test_inside_a_part_that_is_computed_on_whole_sequences(run_of: Run, exact: Exact) -> None:
    """Where a rule leaves the attention whole every rank drops the same there, of all positions."""
    tensor = {"size": 2, "sequence_parallel": True, "rules": {"transformer.h.*.attn": "replicate"}}
    exact(run_of("gpt2", {"parallel.tensor": tensor}, STREAM), 2)


class FeedForward(nn.Module):
    """Drops what enters it before the first product."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.up, self.down = nn.Dropout(0.2), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(nn.functional.gelu(self.up(self.drop(x))))
        return result


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(16), FeedForward()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.mlp(self.norm(x))
        return result


class Dropping(nn.Module):
    """Token by token: [B, L] ids to [B, L, 96] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(96, 16), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 96)

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.head(x)}


def dropping_opt() -> nn.Module:
    """Its blocks call dropout as a function."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=96,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        dropout=0.2,
        attention_dropout=0.0,
    )
    built: nn.Module = transformers.OPTForCausalLM(config).train()
    return built


@pytest.mark.parametrize("model", [dropping_opt, Dropping])
def test_where_dropout_would_not_be_the_same_the_sequence_stays_whole(
    run_of: Run, exact: Exact, model: Callable[[], nn.Module]
) -> None:
    exact(replace(run_of("llama", {"parallel.tensor": {"size": 2}}), model=model), 2)


KERNELS: Mapping[str, Mapping[str, Any]] = {"llama": {"attention_dropout": 0.3}, "gpt2": {"attn_pdrop": 0.3}}
"""Attention that hands its probability to the kernel: kept as a number, and in a dropout module."""


def kernel_run(run_of: Run, kind: str, **sections: Any) -> RunSpec:
    return run_of(kind, {"parallel.tensor": {"size": 2}, **sections}, KERNELS[kind])


@pytest.mark.parametrize("kind", KERNELS)
def test_numbers_of_a_kernel_come_again(pool: WorkerPool, run_of: Run, kind: str) -> None:
    """Every rank ends with the same copies, whatever was thrown away and computed again."""
    plain = pool.run(2, record, kernel_run(run_of, kind))
    rows = compare(plain, plain[0], limit=0.0)
    assert all(row.passed for row in rows), f"\n{table(rows)}"
    rows = compare(pool.run(2, record, kernel_run(run_of, kind, recompute={"mode": "full"})), plain[0])
    assert all(row.passed for row in rows), f"\n{table(rows)}"


INSIDE = {"llama": "model.layers.0.self_attn.o_proj", "gpt2": "transformer.h.0.attn.c_proj"}
OUTSIDE = {"llama": "model.layers.0.mlp", "gpt2": "transformer.h.0.mlp"}


def drawn(collectives: Collectives, spec: RunSpec, places: tuple[str, str]) -> list[torch.Tensor]:
    """What torch's generator gives at these modules of this rank, in order."""
    trained = start(spec, collectives)
    found: list[torch.Tensor] = []
    for name in places:
        trained.module.get_submodule(name).register_forward_pre_hook(lambda *arguments: found.append(torch.rand(3)))
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    return found


@pytest.mark.parametrize("kind", KERNELS)
def test_ranks_draw_their_own_numbers_inside_and_the_same_outside(pool: WorkerPool, run_of: Run, kind: str) -> None:
    first, second = pool.run(2, drawn, kernel_run(run_of, kind), (INSIDE[kind], OUTSIDE[kind]))
    assert len(first) == len(second) == 4
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other) == (index % 2 == 1)
    assert not torch.equal(first[0], first[2])
