"""Bytes of live tensors under tensor parallelism beside the estimate: their state, and what a microbatch takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_comm import run_simulated, silent_rank
from colossal_core.activations import Activations, ActivationTracer
from colossal_core.dataflow import tensors_in
from colossal_core.examine import examine
from colossal_core.live_bytes import LiveBytes
from colossal_core.loss import LossOwner
from colossal_core.memory_report import live_bytes
from colossal_core.ops import OpTable
from colossal_core.ops.reference import reference_ops
from colossal_core.peak_estimate import PeakEstimator, treatment_of
from colossal_core.precision import precision_of
from colossal_core.rank_compute import rank_compute
from colossal_core.testing import RunSpec
from colossal_core.testing.parity import Prepared, prepare, share_of_step, start

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained

LENGTH, MICRO_SIZE, VOCABULARY = 32, 8, 512
Sized = Callable[..., RunSpec]


@dataclass(frozen=True)
class WholeTexts:
    """Tokens without padding, all of them labels."""

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCABULARY, (num_sequences, LENGTH), generator=generator)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(
    ("name", "ranks", "precision"),
    [("llama", 2, "bf16"), ("llama", 4, "fp32"), ("gpt2", 2, "fp32"), ("gpt2", 3, "bf16")],
)
def test_state_of_tensor_ranks(
    sized_run: Sized, keeps_as_estimated: Callable[[RunSpec, int], None], name: str, ranks: int, precision: str
) -> None:
    """Norms are whole on every rank, key/value heads on 4 ranks twice, and 3 ranks have 2, 1 and 1 of 4 heads."""
    keeps_as_estimated(sized_run(name, ranks, False, config={"precision": precision}), ranks)


# -- activations ---------------------------------------------------------------------------------------------------------------------


def larger_run(sized_run: Sized, name: str, ranks: int, sequence: bool, **sections: Any) -> RunSpec:
    """Three layers and one microbatch, of which activations take more than state."""
    config = {"batch": {"global_size": MICRO_SIZE, "micro_size": MICRO_SIZE}, **sections}
    spec = sized_run(name, ranks, sequence, layers=3, vocab_size=VOCABULARY, config=config)
    return replace(spec, batch=WholeTexts())


@dataclass(frozen=True)
class Measured:
    """One microbatch: kept when the last block has run, and the most beyond it before and after the loss's gradient reaches that block."""

    kept: int
    loss: int
    backward: int


def measured(trained: Trained) -> Measured:
    """Forward and backward pass on real tensors. Gradients of parameters are gone when they have arrived."""
    engine, counted, seen = trained._engine, LiveBytes(), dict[str, int]()
    model, inputs = engine.model, engine.loss_owner.with_targets(WholeTexts()(0, MICRO_SIZE))

    def arrives(gradient: torch.Tensor) -> None:
        del gradient
        if "loss" not in seen:
            seen["loss"] = counted.restart()

    def after_last(module: nn.Module, args: object, output: object) -> None:
        del module, args
        if "kept" not in seen:  # not when the block is recomputed
            seen["kept"] = counted.current
            next(tensors_in(output)).register_hook(arrives)  # type: ignore[no-untyped-call]

    model.get_submodule(trained.plan.block_names[-1]).register_forward_hook(after_last)
    model.zero_grad()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    counted.ignore((*model.parameters(), *model.buffers(), *inputs.values()))
    gc.collect()
    with counted:
        loss = engine.loss_owner(model, inputs).sum
        scaled = loss / 2.0
        del loss
        scaled.backward()  # type: ignore[no-untyped-call]
    return Measured(seen["kept"], seen["loss"] - seen["kept"], counted.peak - seen["kept"])


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


def traced_before(prepared: Prepared) -> Activations:
    """Of the model that nothing is applied to, without any rank."""
    plan = prepared.plan
    computes = rank_compute(plan, prepared.strategies, silent_rank(plan.mesh))
    tracer = ActivationTracer(
        prepared.model, plan.block_names, loss_owner(prepared), precision_of(plan.config), computes
    )
    return tracer.trace(WholeTexts()(0, MICRO_SIZE), treatment_of(plan))


def loss_owner(prepared: Prepared) -> LossOwner:
    anatomy = examine(prepared.model, WholeTexts()(0, 2))
    return LossOwner(anatomy, OpTable({op.op: op for op in reference_ops()}), None)


def traced_in_training(trained: Trained) -> Activations:
    """Of the model in training, as when memory has run out."""
    engine = trained._engine
    tracer = ActivationTracer(
        engine.model,
        trained.plan.block_names,
        engine.loss_owner,
        engine.context.precision,
        engine.context.computes,
    )
    return tracer.trace(WholeTexts()(0, MICRO_SIZE), treatment_of(trained.plan))


def run_both(spec: RunSpec, ranks: int) -> tuple[Activations, list[tuple[Activations, Measured]]]:
    prepared = prepare(spec, ranks)

    def one(collectives: Collectives) -> tuple[Activations, Measured]:
        trained = start(spec, collectives)
        return traced_in_training(trained), measured(trained)

    return traced_before(prepared), run_simulated(prepared.plan.mesh, one)


def near(found: int, expected: int, share: float) -> None:
    assert abs(found - expected) <= share * expected, f"traced {found}, real {expected}"


CASES = [
    ("llama", 2, False),
    ("llama", 2, True),
    ("llama", 4, True),
    ("gpt2", 2, False),
    ("gpt2", 2, True),
]


@pytest.mark.parametrize(("name", "ranks", "sequence"), CASES)
def test_activations_of_a_rank(sized_run: Sized, name: str, ranks: int, sequence: bool) -> None:
    """The first rank's, traced before and in training."""
    spec = larger_run(sized_run, name, ranks, sequence)
    before, found = run_both(spec, ranks)
    assert before.problem == ""
    in_training, real = found[0]
    assert in_training == before
    assert (before.kept_bytes, before.loss_bytes) == (real.kept, real.loss)
    near(before.kept_bytes + before.backward_bytes, real.kept + real.backward, 0.05)


@pytest.mark.parametrize(("name", "sequence"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_activations_of_recomputed_blocks(sized_run: Sized, name: str, sequence: bool) -> None:
    spec = larger_run(sized_run, name, 2, sequence, recompute={"mode": "full"})
    before, found = run_both(spec, 2)
    in_training, real = found[0]
    assert in_training == before
    near(before.kept_bytes, real.kept, 0.02)
    near(before.kept_bytes + before.loss_bytes, real.kept + real.loss, 0.02)
    near(before.kept_bytes + before.backward_bytes, real.kept + real.backward, 0.1)


@pytest.mark.parametrize("sequence", [False, True])
def test_sequence_and_heads_make_activations_smaller(sized_run: Sized, sequence: bool) -> None:
    """What a rank keeps of a block falls with the ranks; also where blocks are compiled."""
    compiled, kept = {"enabled": True, "backend": "aot_eager"}, []
    for ranks in (2, 4):
        spec = larger_run(sized_run, "llama", ranks, sequence, compile=compiled)
        traced = traced_before(prepare(spec, ranks))
        assert traced.problem == ""
        kept.append(traced.kept_bytes)
    assert kept[1] < (0.6 if sequence else 0.8) * kept[0]


@pytest.mark.parametrize("sequence", [False, True])
def test_the_peak_of_a_step(sized_run: Sized, sequence: bool) -> None:
    """State and activations together, at the highest moment, within 5 %."""
    spec = larger_run(sized_run, "llama", 2, sequence)
    prepared = prepare(spec, 2)
    plan = prepared.plan
    estimator = PeakEstimator(
        prepared.model,
        plan,
        prepared.strategies,
        loss_owner(prepared),
        WholeTexts()(0, MICRO_SIZE),
        state_bytes=8.0,
        device_type="cpu",
        computes=rank_compute(plan, prepared.strategies, silent_rank(plan.mesh)),
    )

    def one(collectives: Collectives) -> int:
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, plan, collectives.rank, 0))
        state = live_bytes(trained)
        found = measured(trained)
        return state["parameters"] + state["optimizer"] + found.kept + max(found.loss, found.backward)

    peak = estimator.estimate()
    assert (peak.moment, peak.problem, peak.gradients) == ("loss", "", 0)
    near(peak.total, max(run_simulated(plan.mesh, one)), 0.05)
