"""Two tensor ranks beside two data-parallel ones, under every stage of ZeRO, against one process in float64; also from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

pytest.importorskip("colossal_zero")

from colossal_core.testing import RunRecord, RunSpec
from colossal_core.testing.parity import ModelBuilder, prepare
from colossal_core.testing.probes import record

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

SMALL = 9000
"""Bytes: a block's parameters then lie in several buckets."""
UNEVEN = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 97}
"""Two ranks get four and two heads, and 49 and 48 words."""
DROPPING: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "bloom": {"attention_dropout": 0.2},
}
"""Dropout of the stream, and of attention probabilities in a module."""
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "lion": {"betas": (0.9, 0.99)},
    "lamb": {},
    "lars": {"lr": 1.0, "weight_decay": 0.01},
    "adafactor": {"lr": 0.01},
    "muon": {"lr": 0.01, "adamw_lr": 0.001},
}


def overrides(zero: Mapping[str, Any], size: int = 2, *, sequence_parallel: bool = True) -> dict[str, Any]:
    """Two microbatches on every rank."""
    tensor = {"size": size, "sequence_parallel": sequence_parallel}
    return {
        "batch.micro_size": 1,
        "parallel.tensor": tensor,
        "parallel.zero": {"bucket_bytes": SMALL, **zero},
    }


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_stage(run_of: Run, exact: Exact, kind: str, stage: int) -> None:
    exact(run_of(kind, overrides({"stage": stage}, sequence_parallel=stage != 2)), 4)


@pytest.mark.parametrize("stage", [1, 3])
def test_parts_of_different_size(run_of: Run, exact: Exact, stage: int) -> None:
    exact(run_of("llama", overrides({"stage": stage}), UNEVEN), 4)


def record_on_used_memory(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """As `record`, on memory that is not empty when it is handed out: what only pads the words must be set to 0 all the same."""
    empty = torch.empty

    def used(*arguments: Any, **options: Any) -> torch.Tensor:
        found = empty(*arguments, **options)
        return found.fill_(math.nan) if found.is_floating_point() and not found.is_meta else found

    prepare(spec, collectives.mesh.world_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", used)
        return record(collectives, spec)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_padding_is_zero_from_the_start(run_of: Run, different: Any, stage: int) -> None:
    spec = run_of("llama", overrides({"stage": stage}), UNEVEN)
    assert not different(spec, 4, record_on_used_memory)


@pytest.mark.parametrize("stage", [1, 3])
def test_copies_of_key_value_heads(run_of: Run, exact: Exact, stage: int) -> None:
    """Four tensor ranks, two key/value heads."""
    exact(run_of("llama", overrides({"stage": stage}, 4)), 4)


@pytest.mark.parametrize("keep", ["use", "step"])
def test_gathered_recomputed_and_compiled(run_of: Run, exact: Exact, keep: str) -> None:
    compiled = {"compile": {"enabled": True, "backend": "aot_eager"}, "recompute": {"mode": "full"}}
    exact(run_of("llama", {**overrides({"stage": 3, "keep_parameters": keep}), **compiled}), 4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(run_of: Run, exact: Exact, name: str) -> None:
    """Tied words, which the ranks cannot share evenly, nor the heads; then copies of key/value heads, whose elements count once."""
    optimizer = {f"optimizer.{key}": value for key, value in OPTIMIZERS[name].items()}
    shared = {"n_embd": 48, "n_head": 3, "vocab_size": 97}
    exact(run_of("gpt2", {**overrides({"stage": 1}), **optimizer}, shared, optimizer=name), 4)
    exact(run_of("llama", {**overrides({"stage": 1}, 4), **optimizer}, optimizer=name), 4)


@dataclass(frozen=True)
class Frozen:
    """A model of which all but the norms stays as it is; words are padded on the last rank."""

    model: ModelBuilder

    def __call__(self) -> nn.Module:
        built = self.model()
        for name, parameter in built.named_parameters():
            parameter.requires_grad_("norm" in name)
        return built


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_matrices_that_are_not_trained(run_of: Run, exact: Exact, stage: int) -> None:
    spec = run_of("llama", overrides({"stage": stage}), {"vocab_size": 97})
    assert not isinstance(spec.model, str)
    exact(replace(spec, model=Frozen(spec.model)), 4)


@pytest.mark.parametrize("kind", DROPPING)
def test_beside_data_parallel_ranks(run_of: Run, exact: Exact, kind: str) -> None:
    """Dropout: every rank drops what one process drops of its sequences."""
    config = {
        "batch.micro_size": 1,
        "parallel.tensor": {"size": 2, "sequence_parallel": True},
        "parallel.zero": {"stage": 1},
    }
    exact(run_of(kind, config, DROPPING[kind], attention="eager"), 4)


@pytest.mark.parametrize("stage", [1, 3])
def test_goes_on_from_tensor_ranks_with_shards(
    run_of: Run, goes_on: Callable[..., None], stage: int, tmp_path: Path
) -> None:
    """Saved by two tensor ranks beside two data-parallel ones; no number of ranks divides the words."""

    def spec(size: int, zero_stage: int) -> RunSpec:
        zero = {"stage": zero_stage, "bucket_bytes": SMALL}
        config = {"batch.micro_size": 1, "parallel.tensor.size": size, "parallel.zero": zero}
        return run_of("llama", config, {"vocab_size": 97})

    goes_on(str(tmp_path), (4, spec(2, stage)), (2, spec(1, stage)), (4, spec(4, 1)), (1, spec(1, 0)))
