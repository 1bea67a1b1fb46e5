"""A strategy that leaves logits cut brings its own cross-entropy, in training and in evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.anatomy import ModelAnatomy
from colossal_core.collectives import SingleProcess
from colossal_core.config import parse_config
from colossal_core.examine import examine
from colossal_core.loss import LossOwner
from colossal_core.ops import build_op_table
from colossal_core.plan import make_plan
from colossal_core.plugins import discover
from colossal_core.strategy import Phase
from colossal_core.testing.models import Output, TinyModel, TokenBatches
from colossal_core.testing.verification import default_variants, model_size_of, num_microbatches_of
from colossal_core.wrap import Parts, wrap


class Logits(nn.Module):
    def forward(self, logits: torch.Tensor) -> Output:
        return Output(logits)


class Halves:
    """Stands for a loss over ranks. calls: whether gradients were on; overwrites: whether the logits may be overwritten; opened: how often
    a forward pass was for it, and is now.
    """

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.overwrites: list[bool] = []
        self.opened: list[bool] = []

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, /, *, overwrite: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append(torch.is_grad_enabled())
        self.overwrites.append(overwrite)
        return logits.sum() / 2, (labels != -100).sum()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self.opened.append(True)
        yield
        self.opened[-1] = False


def test_the_loss_owner_takes_it_for_the_op() -> None:
    ops = build_op_table(discover([]).ops(), "cpu", "float64")
    anatomy = ModelAnatomy("Logits", "masked-lm", (), (), forward_keys=("logits",))
    batch = {"logits": torch.ones(2, 3, 5, dtype=torch.float64), "labels": torch.tensor([[1, 2, -100], [0, 4, 3]])}
    halves = Halves()
    own = LossOwner(anatomy, ops, None, halves)(Logits(), batch)
    assert (float(own.sum), float(own.items)) == (15.0, 5.0)
    usual = LossOwner(anatomy, ops, None)(Logits(), batch)
    assert float(usual.sum) == pytest.approx(5 * math.log(5.0), abs=1e-12)
    assert float(LossOwner(anatomy, ops, None, halves).with_ops(ops)(Logits(), batch).sum) == float(usual.sum)
    assert halves.opened == [False]
    assert float(LossOwner(anatomy, ops, None).with_cross_entropy(halves)(Logits(), batch).sum) == 15.0
    assert halves.opened == [False, False]


class SetsLoss(SimpleNamespace):
    """A strategy that does nothing but that."""

    def apply(self, model: nn.Module, plan: Any, context: Any) -> None:
        context.cross_entropy = self.loss


def test_it_is_used_in_training_and_in_evaluation() -> None:
    counted = Halves()
    plugins = discover([])
    config = parse_config({"batch": {"global_size": 2}}, plugins.config_class())
    model, ops = TinyModel()(), build_op_table(plugins.ops(), "cpu", "float32")
    batch = TokenBatches()(0, 2)
    anatomy = replace(examine(model, batch), task="causal-lm")
    plan = make_plan(config, anatomy, (), {}, ops, world_size=1)
    strategy: Any = SetsLoss(name="sets", phase=Phase.SHARD_COMPUTE, loss=counted)
    collectives = SingleProcess(torch.device("cpu"))
    trained = wrap(model, plan, anatomy, (strategy,), collectives, ops, plugins.optimizers(), Parts())
    trained.train_step(batch)
    trained.eval_step(batch)
    assert counted.calls == [True, False]
    assert counted.overwrites == [True, False]
    assert counted.opened == [False, False]


class Head(nn.Module):
    """Logits of a product with a bias or without; capped: through a function whose derivative reads its result."""

    def __init__(self, *, bias: bool, capped: bool) -> None:
        super().__init__()
        self.head, self.capped = nn.Linear(4, 5, bias=bias, dtype=torch.float64), capped

    def forward(self, hidden: torch.Tensor) -> Output:
        logits = self.head(hidden)
        return Output(torch.tanh(logits) if self.capped else logits)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_overwritten_where_a_product_has_made_them(bias: bool, capped: bool) -> None:
    ops = build_op_table(discover([]).ops(), "cpu", "float64")
    anatomy, halves = ModelAnatomy("Head", "masked-lm", (), (), forward_keys=("hidden",)), Halves()
    head = Head(bias=bias, capped=capped)
    batch = {"hidden": torch.ones(2, 3, 4, dtype=torch.float64), "labels": torch.tensor([[1, 2, -100], [0, 4, 3]])}
    LossOwner(anatomy, ops, None, halves)(head, batch)
    assert halves.overwrites == [not capped]
    LossOwner(anatomy, ops, None)(head, batch).sum.backward()  # type: ignore[no-untyped-call]
    found, weight = head.head.weight.grad, head.head.weight
    losses = nn.functional.cross_entropy(
        head(batch["hidden"]).logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
    )
    torch.testing.assert_close(found, torch.autograd.grad(losses, weight)[0], rtol=1e-12, atol=1e-12)


def test_variants_keep_the_ranks_of_one_data_share_together() -> None:
    assert model_size_of({"tp": 2, "dp_replicate": 2}, 8) == 2
    assert model_size_of({}, 8) == 1
    names = [variant.name for variant in default_variants(8, 2)]
    assert any("in 2 copies" in name for name in names)
    assert not any("in 2 copies" in variant.name for variant in default_variants(4, 2))
    sizes = {variant.overrides["batch"]["global_size"] for variant in default_variants(8, 2)}
    assert sizes == {8}
    assert default_variants(4) == default_variants(4, 1)


def test_variants_of_a_pipeline_have_more_microbatches_than_stages() -> None:
    assert num_microbatches_of({"tp": 2}) == num_microbatches_of({"pp": 1}) == 2
    assert num_microbatches_of({"pp": 4}) == 9
    variants = default_variants(8, model_size_of({"pp": 4}, 8), 9)
    assert variants[0].name == "as configured, 9 microbatches"
    sizes = {(v.num_microbatches, *v.overrides["batch"].values()) for v in variants}
    assert sizes == {(9, 18, 1), (1, 18, 9)}
