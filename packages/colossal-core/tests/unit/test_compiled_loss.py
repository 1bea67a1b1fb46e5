"""Core's own loss under the strategy `compile`: its values, what it keeps and makes, and when it is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from colossal_core.collectives import SingleProcess
from colossal_core.ops import OpImplementation
from colossal_core.ops.compiled_cross_entropy import compiled_cross_entropy
from colossal_core.ops.reference import cross_entropy
from colossal_core.testing import OpSuite, RunSpec, compare, table
from colossal_core.testing.models import TinyModel, TokenBatches, next_token_loss
from colossal_core.testing.parity import oracle_of, prepare, record_run, share_of_step, start

pytestmark = [
    # Dynamo looks at `.grad` of every tensor that enters a graph of a block, and torch warns where one is not a leaf.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),  # Inductor imports deprecated parts of torch
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def by(
    backend: str,
    dynamic: bool,
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    *,
    overwrite: bool = False,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op, made where it is called: making it loads the backend."""
    made = compiled_cross_entropy(backend, dynamic=dynamic)
    return made(logits, labels, ignore_index, overwrite=overwrite, z_loss=z_loss, smoothing=smoothing)


class TestTraced(OpSuite):
    implementation = OpImplementation("cross_entropy", "compiled (aot_eager)", partial(by, "aot_eager", False))
    dtypes = ("float64", "float32", "bfloat16")


class TestInductor(OpSuite):
    implementation = OpImplementation("cross_entropy", "compiled (inductor)", partial(by, "inductor", True))
    dtypes = ("bfloat16",)


def test_no_wide_copy_of_the_logits_is_kept_or_made() -> None:
    """Between the passes: the logits themselves and one float32 a row. In the code that inductor writes: no other buffer of their size."""
    from torch._inductor.utils import run_and_get_code

    logits = torch.randn(6, 1031, dtype=torch.bfloat16, requires_grad=True)
    rows, labels = logits * 1, torch.randint(1031, (6,))
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def both_passes() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            total, _ = compiled_cross_entropy("inductor", dynamic=False)(rows, labels)
        total.backward()  # type: ignore[no-untyped-call]

    _, sources = run_and_get_code(both_passes)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in kept] == [
        ((6, 1031), torch.bfloat16),
        ((6,), torch.int64),
        ((6,), torch.float32),
    ]
    assert kept[0].untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()
    made = [line for source in sources for line in source.splitlines() if "= empty_strided" in line and "1031" in line]
    assert [line.partition("= ")[2] for line in made] == ["empty_strided_cpu((6, 1031), (1031, 1), torch.bfloat16)"]


def test_nothing_of_the_logits_size_is_made_where_they_are_overwritten() -> None:
    from torch._inductor.utils import run_and_get_code

    factor = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    logits, labels = factor @ torch.randn(4, 1031, dtype=torch.bfloat16), torch.randint(1031, (6,))

    def both_passes() -> torch.Tensor:
        total, _ = compiled_cross_entropy("inductor", dynamic=False)(logits, labels, overwrite=True)
        (gradient,) = torch.autograd.grad(total, logits)
        return gradient

    (expected,) = torch.autograd.grad(cross_entropy(logits, labels)[0], logits)
    found, sources = run_and_get_code(both_passes)
    assert found.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)
    assert not [
        line for source in sources for line in source.splitlines() if "= empty_strided" in line and "1031" in line
    ]


@pytest.mark.parametrize(
    "of", [cross_entropy, compiled_cross_entropy("aot_eager", dynamic=False)], ids=["eager", "compiled"]
)
def test_the_gradient_is_the_same_where_it_overwrites(of: Any) -> None:
    factor = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(4, 11, dtype=torch.float64), torch.tensor([3, -100, 0, 10, 7])
    found = []
    for overwrite in (False, True):
        total, _ = of(factor @ weight, labels, overwrite=overwrite)
        found.append(torch.autograd.grad(total * 3.0, factor)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("dynamic", [False, True])
def test_another_number_of_rows_is_another_call(dynamic: bool) -> None:
    compiled = compiled_cross_entropy("aot_eager", dynamic=dynamic)
    for rows in (4, 3, 1, 7):
        ours, theirs = (torch.randn(rows, 2, 11, dtype=torch.float64).requires_grad_() for _ in range(2))
        with torch.no_grad():
            theirs.copy_(ours)
        labels = torch.randint(11, (rows, 2))
        compiled(ours, labels)[0].backward()  # type: ignore[no-untyped-call]
        cross_entropy(theirs, labels)[0].backward()  # type: ignore[no-untyped-call]
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def spec_of(backend: str, **config: Any) -> RunSpec:
    given = {
        "batch": {"global_size": 4, "micro_size": 2},
        "precision": "fp64",
        "compile": {"enabled": True, "backend": backend},
        **config,
    }
    return RunSpec(given, TinyModel(), TokenBatches(), task="causal-lm", plugins="")


def lines_about_the_loss(spec: RunSpec) -> list[str]:
    lines = prepare(spec, 1).plan.describe().splitlines()
    return [line for line in lines if line.startswith(("note        loss", "ops "))]


def test_the_plan_says_that_the_loss_is_compiled() -> None:
    reference = ["ops         all reference"]
    spec = spec_of("aot_eager")
    assert lines_about_the_loss(spec) == [
        "ops         compiled (aot_eager): cross_entropy; others reference",
        "note        loss: compiled (aot_eager)",
    ]
    assert lines_about_the_loss(replace(spec, loss_fn=next_token_loss)) == reference
    assert lines_about_the_loss(replace(spec, task="own-loss")) == reference
    assert lines_about_the_loss(spec.with_overrides({"compile.enabled": False})) == reference
    assert prepare(spec, 1).plan.fingerprint != prepare(replace(spec, task="own-loss"), 1).plan.fingerprint


def test_a_run_with_a_compiled_loss_is_exact() -> None:
    spec, alone = spec_of("aot_eager"), SingleProcess(torch.device("cpu"))
    rows = compare(record_run(spec, alone), record_run(oracle_of(spec), alone))
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def test_a_user_s_loss_is_not_compiled_and_another_table_of_ops_is_left_alone() -> None:
    def names(loss: Any) -> set[str]:
        trained = start(replace(spec_of("aot_eager"), loss_fn=loss), SingleProcess(torch.device("cpu")))
        assert trained.plan.ops["cross_entropy"] == trained._engine.context.ops.chosen["cross_entropy"].provider
        return {trained.plan.ops["cross_entropy"]}

    assert names(None) == {"compiled (aot_eager)"}
    assert names(next_token_loss) == {"reference"}


def test_evaluation_runs_the_same_loss_on_a_smaller_batch() -> None:
    alone = SingleProcess(torch.device("cpu"))
    compiled, plain = start(spec_of("aot_eager"), alone), start(oracle_of(spec_of("aot_eager")), alone)
    share: Mapping[str, torch.Tensor] = share_of_step(spec_of("aot_eager"), plain.plan, 0, 0)
    for size in (4, 3):
        part = {key: value[:size] for key, value in share.items()}
        torch.testing.assert_close(compiled.eval_step(part).loss, plain.eval_step(part).loss, rtol=1e-12, atol=1e-12)
