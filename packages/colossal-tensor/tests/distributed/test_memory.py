"""Bytes of live tensors under tensor parallelism beside the estimate: the state of every stage, and what a microbatch takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
from colossal_core.peak_estimate import PeakEstimator, state_table, treatment_of
from colossal_core.precision import precision_of
from colossal_core.rank_compute import rank_compute
from colossal_core.testing import RunSpec
from colossal_core.testing.parity import Prepared, prepare, share_of_step, start

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained

LENGTH, MICRO_SIZE, VOCABULARY = 32, 8, 512
STATE = {
    "parameters": "parameter_bytes",
    "masters": "master_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}
Models = Callable[..., Callable[[], "nn.Module"]]


@pytest.fixture
def small_model(run_of: Callable[..., RunSpec]) -> Models:
    """(kind, layers, width, vocabulary) -> what builds such a model."""

    def sized(kind: str, layers: int = 2, width: int = 64, vocab_size: int = 250) -> Callable[[], nn.Module]:
        names = ("num_hidden_layers", "hidden_size", "intermediate_size")
        if kind == "gpt2":
            names = ("n_layer", "n_embd", "n_inner")
        sizes = dict(zip(names, (layers, width, width * 11 // 4), strict=True))
        built = run_of(kind, {}, {**sizes, "vocab_size": vocab_size}).model
        assert not isinstance(built, str)
        return built

    return sized


@dataclass(frozen=True)
class WholeTexts:
    """Tokens without padding, all of them labels."""

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(VOCABULARY, (num_sequences, LENGTH), generator=generator)
        return {"input_ids": ids, "labels": ids}


def spec_of(model: Callable[[], nn.Module], ranks: int, sequence: bool, *, shards: int = 1, **more: Any) -> RunSpec:
    parallel = {"tensor": {"size": ranks, "sequence_parallel": sequence}, **more.pop("parallel", {})}
    batch = {"global_size": MICRO_SIZE * shards, "micro_size": MICRO_SIZE}
    config = {"batch": batch, "precision": "fp32", "parallel": parallel, **more}
    return RunSpec(config, model, WholeTexts(), task="causal-lm")


# -- state ---------------------------------------------------------------------------------------------------------------------------


def check_state(spec: RunSpec, world_size: int) -> None:
    """The fullest rank has what the estimate says, kind by kind, within 3 %."""
    prepared = prepare(spec, world_size)

    def live(collectives: Collectives) -> Mapping[str, int]:
        trained = start(spec, collectives)
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
        trained._engine.state.wait_published()
        return live_bytes(trained)

    found = run_simulated(prepared.plan.mesh, live)
    table = state_table(prepared.plan, prepared.strategies, 16.0 if prepared.config.precision == "fp64" else 8.0)
    for kind, column in STATE.items():
        measured, formula = max(rank[kind] for rank in found), float(table.column(column)[0])
        told = f"{kind}: measured {measured}, formula {formula:.0f}"
        assert abs(measured - formula) <= max(0.03 * formula, 64), told


@pytest.mark.parametrize(
    ("name", "ranks", "precision"),
    [("llama", 2, "bf16"), ("llama", 4, "fp32"), ("gpt2", 2, "fp32"), ("gpt2", 3, "bf16")],
)
def test_state_of_tensor_ranks(small_model: Models, name: str, ranks: int, precision: str) -> None:
    """Norms are whole on every rank, key/value heads on 4 ranks twice, and 3 ranks have 2, 1 and 1 of 4 heads."""
    check_state(spec_of(small_model(name), ranks, False).with_overrides({"precision": precision}), ranks)


@pytest.mark.parametrize(("name", "stage"), [*(("llama", stage) for stage in range(4)), ("gpt2", 3)])
def test_state_of_every_stage(small_model: Models, name: str, stage: int) -> None:
    pytest.importorskip("colossal_zero")
    spec = spec_of(small_model(name, width=128), 2, True, shards=2, parallel={"zero": {"stage": stage}})
    check_state(spec.with_overrides({"precision": "bf16"}), 4)


# -- activations ---------------------------------------------------------------------------------------------------------------------


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
def test_activations_of_a_rank(small_model: Models, name: str, ranks: int, sequence: bool) -> None:
    """The first rank's, traced before and in training."""
    spec = spec_of(small_model(name, 3, vocab_size=VOCABULARY), ranks, sequence)
    before, found = run_both(spec, ranks)
    assert before.problem == ""
    in_training, real = found[0]
    assert in_training == before
    assert (before.kept_bytes, before.loss_bytes) == (real.kept, real.loss)
    near(before.kept_bytes + before.backward_bytes, real.kept + real.backward, 0.05)


@pytest.mark.parametrize(("name", "sequence"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_activations_of_recomputed_blocks(small_model: Models, name: str, sequence: bool) -> None:
    spec = spec_of(small_model(name, 3, vocab_size=VOCABULARY), 2, sequence, recompute={"mode": "full"})
    before, found = run_both(spec, 2)
    in_training, real = found[0]
    assert in_training == before
    near(before.kept_bytes, real.kept, 0.02)
    near(before.kept_bytes + before.loss_bytes, real.kept + real.loss, 0.02)
    near(before.kept_bytes + before.backward_bytes, real.kept + real.backward, 0.1)


@pytest.mark.parametrize("sequence", [False, True])
def test_sequence_and_heads_make_activations_smaller(small_model: Models, sequence: bool) -> None:
    """What a rank keeps of a block falls with the ranks; also where blocks are compiled."""
    compiled, kept = {"enabled": True, "backend": "aot_eager"}, []
    for ranks in (2, 4):
        spec = spec_of(small_model("llama", 3, vocab_size=VOCABULARY), ranks, sequence, compile=compiled)
        traced = traced_before(prepare(spec, ranks))
        assert traced.problem == ""
        kept.append(traced.kept_bytes)
    assert kept[1] < (0.6 if sequence else 0.8) * kept[0]


@pytest.mark.parametrize("sequence", [False, True])
def test_the_peak_of_a_step(small_model: Models, sequence: bool) -> None:
    """State and activations together, at the highest moment, within 5 %."""
    spec = spec_of(small_model("llama", 3, vocab_size=VOCABULARY), 2, sequence)
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
