"""What the tests of colossal-tensor share: one pool of ranks for the whole session, small models of transformers, and their oracles."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.testing import Oracles, RunRecord, RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.pool import PRELOAD
from colossal_core.testing.probes import load_and_go_on, record, save_and_go_on
from colossal_core.testing.suites import session_pool
from colossal_core.testing.verification import ADAMW, SGD

LLAMA: Mapping[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.0,
}
GPT2: Mapping[str, Any] = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_inner": 96,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BLOOM: Mapping[str, Any] = {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0}
SEQUENCE_LENGTH = 12
KINDS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM),
}
"""Classes of the config and of the model, and sizes: grouped key/value heads; a tied head, biases and fused projections; dropout of
attention probabilities in a module.
"""
MODULES = tuple(f"transformers.models.{kind}.modeling_{kind}" for kind in KINDS)
"""What every rank would import by itself, for seconds, were it not forked from a process that has."""
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {"adamw": {**ADAMW, "eps": 1e-6}, "sgd": SGD}
"""AdamW's eps: a gradient that is zero in theory (of a key's bias) is rounding, and is divided by this."""


@dataclass(frozen=True)
class SmallModel:
    """Builds a causal language model of transformers. kind: a key of `KINDS`; changes: of its config."""

    kind: str
    changes: tuple[tuple[str, Any], ...] = ()
    attention: str = "sdpa"

    def __call__(self) -> nn.Module:
        import transformers

        config_name, model_name, values = KINDS[self.kind]
        values = {**values, **dict(self.changes)}
        config = getattr(transformers, config_name)(**values, attn_implementation=self.attention)
        built: nn.Module = getattr(transformers, model_name)(config).train()
        return built


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Ranks that are simulated are threads of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pool(request: pytest.FixtureRequest) -> WorkerPool:
    pool = session_pool(request.config)
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *MODULES])
    return pool


@pytest.fixture
def gpus() -> Iterator[WorkerPool]:
    """Ranks on GPUs, other processes for each test: a group that uses symmetric memory can be made once in a process."""
    with WorkerPool(280.0, device_type="cuda") as pool:
        yield pool


@pytest.fixture(scope="session")
def run_of() -> Callable[..., RunSpec]:
    return make_run


def make_run(
    kind: str,
    overrides: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    *,
    optimizer: str = "adamw",
    attention: str = "sdpa",
) -> RunSpec:
    """Two steps of a small model, each of four sequences in at least two microbatches, clipped. overrides: of the config, by dotted path;
    changes: of the model's config. colossal-zero takes part where the config asks for it.
    """
    config: dict[str, Any] = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": "fp64",
        "optimizer": dict(OPTIMIZERS.get(optimizer, {"name": optimizer, "max_grad_norm": 0.1})),
    }
    changes = changes or {}
    vocab_size = changes.get("vocab_size", LLAMA["vocab_size"])
    spec = RunSpec(
        config,
        SmallModel(kind, tuple(sorted(changes.items())), attention),
        TokenBatches(vocab_size, SEQUENCE_LENGTH),
        num_steps=2,
        task="causal-lm",
    ).with_overrides(overrides)
    zero = "zero" in spec.config.get("parallel", {})
    return replace(spec, plugins="comm,tensor,zero" if zero else "comm,tensor")


_ORACLES = pytest.StashKey[Oracles]()


@pytest.fixture
def oracles(request: pytest.FixtureRequest, pool: WorkerPool) -> Oracles:
    if _ORACLES not in request.config.stash:
        request.config.stash[_ORACLES] = Oracles(pool)
    return request.config.stash[_ORACLES]


@pytest.fixture
def exact(pool: WorkerPool, oracles: Oracles) -> Callable[[RunSpec, int], None]:
    """Compares a run on so many ranks with one process, and fails with the table."""

    def check(spec: RunSpec, num_ranks: int) -> None:
        rows = compare(pool.run(num_ranks, record, spec), oracles.of(spec))
        assert all(row.passed for row in rows), f"\n{table(rows)}"

    return check


@pytest.fixture
def different(pool: WorkerPool, oracles: Oracles) -> Callable[..., bool]:
    """Whether a run, as another function than `record` makes it, is not that of one process."""

    def check(spec: RunSpec, num_ranks: int, function: Callable[..., RunRecord], *arguments: Any) -> bool:
        rows = compare(pool.run(num_ranks, function, spec, *arguments), oracles.of(replace(spec, mutant=None)))
        return not all(row.passed for row in rows)

    return check


@pytest.fixture
def goes_on(pool: WorkerPool) -> Callable[..., None]:
    """(directory, (ranks, run) that saves, (ranks, run)... that load) -> every element comes back bit for bit, and the next step is the one
    that the run that saved has made.
    """

    def check(directory: str, saving: tuple[int, RunSpec], *loading: tuple[int, RunSpec]) -> None:
        saved, after = pool.run(saving[0], save_and_go_on, saving[1], directory)[0]
        for num_ranks, spec in loading:
            for loaded, step in pool.run(num_ranks, load_and_go_on, spec, directory):
                rows = compare(loaded, saved, limit=0.0)
                assert all(row.passed for row in rows), f"{num_ranks} ranks\n{table(rows)}"
                rows = compare(RunRecord((step,), {}, {}, ""), RunRecord((after,), {}, {}, ""))
                assert all(row.passed for row in rows), f"{num_ranks} ranks\n{table(rows)}"

    return check
