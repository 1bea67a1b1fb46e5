"""Every stage against one process in float64, for models and options that are awkward to shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.testing import RunSpec, WorkerPool, compare, relative_difference, table
from colossal_core.testing.models import RoutedBatches, TinyModel, TinyOptions, TokenBatches, next_token_loss
from colossal_core.testing.parity import RunRecord, oracle_of
from colossal_core.testing.probes import record


@dataclass(frozen=True)
class Case:
    """One run. zero: keys of `parallel.zero` beside the stage."""

    options: TinyOptions = field(default_factory=TinyOptions)
    world_size: int = 2
    zero: Mapping[str, Any] = field(default_factory=lambda: {"bucket_bytes": 9000})
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"lr": 0.001, "max_grad_norm": 0.1})
    stages: tuple[int, ...] = (0, 1, 2, 3)
    routed: bool = False
    own_loss: bool = False


CASES = {
    "unused parameters": Case(TinyOptions(unused=True)),
    "different unused parameters on different ranks": Case(TinyOptions(routed=True), routed=True),
    "frozen parameters": Case(TinyOptions(frozen=True)),
    "parameters shared by blocks": Case(TinyOptions(shared=True)),
    "no tied head": Case(TinyOptions(tied=False)),
    "every parameter larger than a bucket": Case(zero={"bucket_bytes": 8}, world_size=4),
    "one bucket for the blocks": Case(zero={"bucket_bytes": 2**20}, world_size=4),
    "size that no number of ranks divides": Case(TinyOptions(hidden_size=14, vocab_size=37), world_size=4),
    "three ranks": Case(world_size=3),
    "two copies of two shards": Case(zero={"bucket_bytes": 9000, "replicate": 2}, world_size=4),
    "a user's loss, counted after the forward pass": Case(own_loss=True),
    # A key bias has no gradient but rounding, of which Adam makes steps of lr * rounding / eps: not clipped, it needs the larger eps.
    "no clipping": Case(optimizer={"lr": 0.001, "max_grad_norm": None, "eps": 1e-6}),
    "parameters kept from forward to backward": Case(zero={"keep_parameters": "microbatch"}, stages=(3,)),
    "parameters gathered once a step": Case(zero={"keep_parameters": "step"}, stages=(3,)),
    "gradients reduced once a step": Case(
        TinyOptions(unused=True, shared=True), zero={"keep_gradients": "step"}, stages=(2, 3)
    ),
    "gathered and reduced once a step": Case(
        TinyOptions(routed=True, frozen=True),
        zero={"keep_parameters": "step", "keep_gradients": "step", "bucket_bytes": 9000},
        stages=(3,),
        world_size=4,
        routed=True,
    ),
    "nothing gathered ahead": Case(zero={"prefetch": 0}, stages=(3,)),
    "all gathered ahead, blocks shared": Case(TinyOptions(shared=True), zero={"prefetch": 5}, stages=(3,)),
    "one rank": Case(world_size=1),
    "a shard that is empty on some ranks": Case(TinyOptions(hidden_size=6, vocab_size=5), world_size=4),
    "everything at once": Case(
        TinyOptions(unused=True, frozen=True, shared=True, routed=True), world_size=4, routed=True
    ),
}


def spec_of(case: Case, stage: int, *, precision: str = "fp64") -> RunSpec:
    config = {
        "batch": {"global_size": 4 * case.world_size, "micro_size": 1},
        "precision": precision,
        "optimizer": dict(case.optimizer),
        "parallel": {"zero": {"stage": stage, **case.zero}},
    }
    tokens = TokenBatches(vocab_size=case.options.vocab_size)
    batch = RoutedBatches(tokens) if case.routed else tokens
    return RunSpec(
        config,
        TinyModel(case.options),
        batch,
        loss_fn=next_token_loss if case.own_loss else None,
        task=None if case.own_loss else "causal-lm",
    )


def check(pool: WorkerPool, specs: Sequence[RunSpec], world_size: int) -> None:
    """Runs that differ in their stage only, beside their one oracle."""
    oracle = pool.run(1, record, oracle_of(specs[0]))[0]
    for spec in specs:
        rows = compare(pool.run(world_size, record, spec), oracle)
        assert all(row.passed for row in rows), f"\n{table(rows)}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_exact(pool: WorkerPool, case: Case) -> None:
    check(pool, [spec_of(case, stage) for stage in case.stages], case.world_size)


def adam_with_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    """An instance on the user's own parameters, vectors in a group with another rate."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    return torch.optim.Adam([{"params": matrices, "lr": 1e-3}, {"params": vectors, "lr": 3e-4}], foreach=False)


def momentum_factory(model: nn.Module) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """A factory, called with the masters that a rank owns."""
    del model
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


@pytest.mark.parametrize("optimizer", [adam_with_two_groups, momentum_factory])
def test_optimizer_of_the_user_is_exact(pool: WorkerPool, optimizer: Callable[[nn.Module], Any]) -> None:
    case = Case(optimizer={"max_grad_norm": 0.1})
    check(pool, [replace(spec_of(case, stage), optimizer=optimizer) for stage in (0, 1, 2, 3)], 2)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_is_as_near_to_the_truth_as_one_process(pool: WorkerPool, stage: int) -> None:
    """The distance to the float64 run is at most twice that of the unsharded bf16 run (masters are float32 in both)."""
    spec = spec_of(Case(world_size=4), stage, precision="bf16")
    truth = pool.run(1, record, oracle_of(spec))[0]
    alone = pool.run(1, record, replace(spec, is_oracle=True))[0]
    sharded = pool.run(4, record, spec)[0]
    for wanted, near, ours in zip(_vectors(truth), _vectors(alone), _vectors(sharded), strict=True):
        assert 0.0 < relative_difference(ours, wanted) <= 2.0 * relative_difference(near, wanted)


def _vectors(run: RunRecord) -> list[torch.Tensor]:
    """Everything of one kind as one vector: gradients of each step, parameters, each kind of state with more than one element."""
    kinds = [list(step.gradients.values()) for step in run.steps]
    kinds.append(list(run.parameters.values()))
    moments = ("adamw.exp_avg", "adamw.exp_avg_sq")
    kinds += [[state for (found, _), state in run.states.items() if found == kind] for kind in moments]
    return [torch.cat([tensor.double().reshape(-1) for tensor in kind]) for kind in kinds]


def steep_loss(outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """So steep that fp16 overflows under the first loss scales, and no longer after a few halvings."""
    total, items = next_token_loss(outputs, batch)
    return total * 16.0, items


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_skips_steps_that_overflow(pool: WorkerPool, stage: int) -> None:
    """Every rank skips the same steps as one process does, halves the scale at each, and counts only the others."""
    spec = spec_of(Case(own_loss=True), stage, precision="fp16")
    spec = replace(spec, loss_fn=steep_loss, num_steps=8)
    alone = pool.run(1, record, replace(spec, is_oracle=True))[0]
    ranks = pool.run(2, record, spec)
    skipped = [step.skipped for step in alone.steps]
    assert skipped[0] and not skipped[-1], skipped
    for run in ranks:
        assert [step.skipped for step in run.steps] == skipped
        assert float(run.states["adamw.step", "optimizer"]) == skipped.count(False)
        assert float(run.states["loss_scale.scale", "step"]) == 2.0 ** (16 - skipped.count(True))
