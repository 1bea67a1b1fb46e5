"""The suites on what core itself contributes, in one process, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from colossal_core.ops import OpImplementation
from colossal_core.ops.reference import reference_ops, swiglu
from colossal_core.testing import OpSuite, StrategySuite
from colossal_core.testing.suites import CheckpointSuite, WrongConfig

REFERENCE = {implementation.op: implementation for implementation in reference_ops()}


class TestFullRecompute(StrategySuite):
    name = "recompute"
    plugin = "builtin"
    section = "recompute"
    config = {"mode": "full"}
    world_sizes = (1,)
    wrong_configs = (
        WrongConfig({"mode": "some"}, "recompute.mode"),
        WrongConfig({"mode": "full", "memory_budget": 2.0}, "recompute.memory_budget"),
    )


class TestSelectiveRecompute(StrategySuite):
    name = "recompute"
    plugin = "builtin"
    section = "recompute"
    config = {"mode": "selective", "memory_budget": 0.5}
    world_sizes = (1,)


class TestCompile(StrategySuite):
    """Through Dynamo alone: what a compiler makes faster it may also round otherwise."""

    name = "compile"
    plugin = "builtin"
    section = "compile"
    config = {"enabled": True, "backend": "eager"}
    world_sizes = (1,)
    wrong_configs = (WrongConfig({"enabled": True, "backend": "no-such-backend"}, "compile.backend"),)


class TestAdamWIsSaved(CheckpointSuite):
    kinds = ("adamw.exp_avg", "adamw.exp_avg_sq", "adamw.step")
    save_config = {"optimizer": {"lr": 0.001}}
    load_config = {"optimizer": {"lr": 0.001}}
    meshes = ((1, 1),)


class TestRmsNorm(OpSuite):
    implementation = REFERENCE["rms_norm"]


class TestLayerNorm(OpSuite):
    implementation = REFERENCE["layer_norm"]


class TestRotary(OpSuite):
    implementation = REFERENCE["rotary"]


class TestSwiglu(OpSuite):
    implementation = REFERENCE["swiglu"]


class TestAttention(OpSuite):
    implementation = REFERENCE["attention"]


class TestCrossEntropy(OpSuite):
    implementation = REFERENCE["cross_entropy"]


class TestMergeAttention(OpSuite):
    implementation = REFERENCE["merge_attention"]


class TestVocabularyStatistics(OpSuite):
    implementation = REFERENCE["vocabulary_statistics"]


class TestVocabularyGradient(OpSuite):
    implementation = REFERENCE["vocabulary_gradient"]


class TestLinearCrossEntropy(OpSuite):
    implementation = REFERENCE["linear_cross_entropy"]


class TestAdamWStep(OpSuite):
    implementation = REFERENCE["adamw_step"]


class TestLionStep(OpSuite):
    implementation = REFERENCE["lion_step"]


class TestSgdStep(OpSuite):
    implementation = REFERENCE["sgd_step"]


class TestSymmetricProduct(OpSuite):
    implementation = REFERENCE["symmetric_product"]


class _DetachedGate(torch.autograd.Function):
    """A fault: right values, and half of one gradient."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        sigmoid = torch.sigmoid(gate)
        return gradients[0] * up * sigmoid, gradients[0] * gate * sigmoid


def wrong_gradient(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = _DetachedGate.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


def wrong_value(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(gate, up) * (1.0 + 1e-9)


def wrong_dtype(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return swiglu(gate, up).float()


@pytest.mark.parametrize("function", [wrong_gradient, wrong_value, wrong_dtype])
def test_op_suite_rejects_a_fault(function: Callable[..., torch.Tensor]) -> None:
    class Faulty(OpSuite):
        implementation = OpImplementation("swiglu", "faulty", function)

    with pytest.raises(AssertionError):
        Faulty().test_values_and_gradients_are_the_reference_s("matrix", "float64")


def test_redefined_test_is_refused() -> None:
    with pytest.raises(TypeError) as raised:

        class Cheating(StrategySuite):
            def test_import_has_no_side_effects(self) -> None:
                """Nothing is checked."""

    assert str(raised.value) == (
        "Cheating redefines test_import_has_no_side_effects: a suite's tests cannot be changed or removed; state facts, or add tests"
    )


def test_removed_test_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^Cheating redefines test_arguments_are_left_alone: "):

        class Cheating(OpSuite):
            test_arguments_are_left_alone = None  # type: ignore[assignment]


def test_test_replaced_afterwards_is_noticed() -> None:
    class Cheating(OpSuite):
        implementation = REFERENCE["swiglu"]

    assert Cheating.changed_tests() == []
    vars_of_class: Any = Cheating
    vars_of_class.test_arguments_are_left_alone = None
    assert Cheating.changed_tests() == ["test_arguments_are_left_alone"]


def test_tests_may_be_added() -> None:
    class More(OpSuite):
        implementation = REFERENCE["swiglu"]

        def test_something_else(self) -> None:
            """An author's own."""

    assert More.changed_tests() == []
