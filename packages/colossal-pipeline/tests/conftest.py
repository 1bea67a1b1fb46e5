"""What the tests of colossal-pipeline share: one pool of ranks for the whole session, small models of transformers, and their oracles."""

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
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_dropout": 0.0,
}
GPT2: Mapping[str, Any] = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5: Mapping[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
SEQUENCE_LENGTH = 8
KINDS: Mapping[str, tuple[str, str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", "causal-lm", LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", "causal-lm", GPT2),
    "t5": ("T5Config", "T5ForConditionalGeneration", "seq2seq-lm", T5),
}
"""Classes of the config and of the model, the task, and sizes: a chain, a tied head, two chains between which four tensors cross."""
MODULES = tuple(f"transformers.models.{kind}.modeling_{kind}" for kind in KINDS)
"""What every rank would import by itself, for seconds, were it not forked from a process that has."""
OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {"adamw": {**ADAMW, "eps": 1e-6}, "sgd": SGD}
"""AdamW's eps: a gradient that is zero in theory (of a key's bias) is rounding, and is divided by this."""


@dataclass(frozen=True)
class SmallModel:
    """Builds a model of transformers. kind: a key of `KINDS`; changes: of its config; frozen: beginnings of names."""

    kind: str
    changes: tuple[tuple[str, Any], ...] = ()
    frozen: tuple[str, ...] = ()

    def __call__(self) -> nn.Module:
        import transformers

        config_name, model_name, _, values = KINDS[self.kind]
        config = getattr(transformers, config_name)(**{**values, **dict(self.changes)}, attn_implementation="sdpa")
        built: nn.Module = getattr(transformers, model_name)(config).train()
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen or ("no name",)))
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
    microbatches: int = 4,
    frozen: tuple[str, ...] = (),
) -> RunSpec:
    """Two steps of a small model, clipped, with sequences of which different numbers of tokens count, one a microbatch. overrides: of the
    config, by dotted path; changes: of the model's config. colossal-zero and -tensor take part where the config asks for them.
    """
    config: dict[str, Any] = {
        "batch": {"global_size": microbatches, "micro_size": 1},
        "precision": "fp64",
        "optimizer": dict(OPTIMIZERS.get(optimizer, {"name": optimizer, "max_grad_norm": 0.1})),
    }
    model = SmallModel(kind, tuple(sorted((changes or {}).items())), frozen)
    task: Any = KINDS[kind][2]
    spec = RunSpec(config, model, TokenBatches(64, SEQUENCE_LENGTH), num_steps=2, task=task).with_overrides(overrides)
    parallel = spec.config.get("parallel", {})
    return replace(
        spec, plugins=",".join(["comm", "pipeline", *(name for name in ("tensor", "zero") if name in parallel)])
    )


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
def goes_on(pool: WorkerPool) -> Callable[..., None]:
    """(directory, (ranks, run) that saves, (ranks, run)... that load) -> every element comes back bit for bit, and the next step is the one
    that the run that saved has made, to the last digits of a sum in another order.
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
