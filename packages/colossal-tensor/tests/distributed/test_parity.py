"""A model on several tensor ranks beside one process, in float64: loss, raw gradients, norm, parameters and optimizer states to 1e-12."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.parity import share_of_step, start

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]

SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}
"""A width that three ranks divide."""
UNGROUPED = {"num_key_value_heads": 4}
"""Three ranks get 2, 1 and 1 of the four heads, and 32 of 96 words each."""


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_two_ranks(run_of: Run, exact: Exact, kind: str, sequence_parallel: bool, optimizer: str) -> None:
    tensor = {"size": 2, "sequence_parallel": sequence_parallel}
    exact(run_of(kind, {"parallel.tensor": tensor}, optimizer=optimizer), 2)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("changes", [SIX_HEADS, UNGROUPED], ids=["evenly", "unevenly"])
def test_three_ranks(run_of: Run, exact: Exact, changes: Mapping[str, Any], sequence_parallel: bool) -> None:
    exact(run_of("llama", {"parallel.tensor": {"size": 3, "sequence_parallel": sequence_parallel}}, changes), 3)


def test_uneven_heads_of_a_fused_projection(run_of: Run, exact: Exact) -> None:
    exact(run_of("gpt2", {"parallel.tensor": {"size": 3}}), 3)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_more_ranks_than_key_value_heads(run_of: Run, exact: Exact, sequence_parallel: bool) -> None:
    exact(run_of("llama", {"parallel.tensor": {"size": 4, "sequence_parallel": sequence_parallel}}), 4)


def test_four_ranks_of_a_tied_model(run_of: Run, exact: Exact) -> None:
    exact(run_of("gpt2", {"parallel.tensor": {"size": 4}}), 4)


@pytest.mark.parametrize(("kind", "recompute"), [("llama", "full"), ("llama", "selective"), ("gpt2", "full")])
def test_recomputed_blocks(run_of: Run, exact: Exact, kind: str, recompute: str) -> None:
    exact(run_of(kind, {"parallel.tensor": {"size": 2}, "recompute": {"mode": recompute}}), 2)


@pytest.mark.parametrize(
    ("kind", "sequence_parallel", "recompute"),
    [("llama", True, "full"), ("llama", False, "none"), ("gpt2", True, "none"), ("gpt2", False, "full")],
)
def test_compiled_blocks(run_of: Run, exact: Exact, kind: str, sequence_parallel: bool, recompute: str) -> None:
    overrides = {
        "parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel},
        "compile": {"enabled": True, "backend": "aot_eager"},
        "recompute": {"mode": recompute},
    }
    exact(run_of(kind, overrides), 2)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("name", ["self_attn", "mlp"])
def test_a_part_that_a_rule_leaves_whole(run_of: Run, exact: Exact, name: str, sequence_parallel: bool) -> None:
    """Three ranks cannot share two key/value heads, so the attention is left whole, or the feed-forward part on two."""
    rules = {f"model.layers.*.{name}": "replicate"}
    size = 3 if name == "self_attn" else 2
    tensor = {"size": size, "rules": rules, "sequence_parallel": sequence_parallel}
    exact(run_of("llama", {"parallel.tensor": tensor}), size)


def trained_whole_graphs(collectives: Collectives, spec: RunSpec) -> tuple[list[float], int]:
    """Losses of two steps with every block traced as one graph (a break in it is an error), and the number of graphs."""
    trained = start(spec, collectives)
    counter = CompileCounterWithBackend("aot_eager")
    for name in trained.plan.block_names:
        block = trained.module.get_submodule(name)
        vars(block)["forward"] = torch.compile(block.forward, backend=counter, fullgraph=True)
    shares = (share_of_step(spec, trained.plan, collectives.rank, step) for step in range(spec.num_steps))
    return [float(trained.train_step(share).loss) for share in shares], counter.frame_count


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_whole_graph_serves_all_blocks(
    pool: WorkerPool, run_of: Run, oracles: Any, kind: str, sequence_parallel: bool, recompute: str
) -> None:
    tensor = {"size": 2, "sequence_parallel": sequence_parallel}
    spec = run_of(kind, {"parallel.tensor": tensor, "recompute": {"mode": recompute}})
    wanted = [step.loss for step in oracles.of(spec).steps]
    for losses, num_graphs in pool.run(2, trained_whole_graphs, spec):
        assert max(abs(ours - true) / true for ours, true in zip(losses, wanted, strict=True)) <= 1e-12
        assert num_graphs == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_words_that_no_number_of_ranks_divides(run_of: Run, exact: Exact, kind: str) -> None:
    """A part of the last rank's words is padding."""
    exact(run_of(kind, {"parallel.tensor": {"size": 2}}, {"vocab_size": 97}), 2)
