"""What an estimate of memory runs where strategies have changed what a rank computes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from colossal_core.block_memory import BlockCall
from colossal_core.fake_model import fake_copy
from colossal_core.rank_compute import AsItIs, hook_ids, rank_compute
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TokenBatches
from colossal_core.testing.parity import prepare


@dataclass(frozen=True)
class Doubling:
    """A hook that holds a module."""

    other: nn.Module

    def before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        del module
        assert args[0].dtype == next(self.other.parameters()).dtype
        return (torch.cat([args[0], args[0]]),)


def with_hooks() -> tuple[nn.Sequential, frozenset[int]]:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].register_forward_pre_hook(_fail)
    before = hook_ids(model)
    model[1].register_forward_pre_hook(Doubling(model[0]).before)
    return model, hook_ids(model) - before


def _fail(module: nn.Module, args: object) -> None:
    raise AssertionError("a user's hook")


def test_a_copy_keeps_the_hooks_of_strategies_and_no_others() -> None:
    """What a hook holds is the copy's too: it runs on fake tensors in the compute dtype."""
    model, hooks = with_hooks()
    fake = fake_copy(model, torch.bfloat16, (), hooks)
    with fake.mode:
        output = fake.model(torch.empty(3, 4, dtype=torch.bfloat16))
    assert tuple(output.shape) == (6, 4)
    assert model[0].weight.dtype == torch.float32
    assert len(hook_ids(model)) == 2


def test_a_copy_without_hooks() -> None:
    model, _ = with_hooks()
    fake = fake_copy(model, torch.bfloat16, ())
    with fake.mode:
        assert tuple(fake.model(torch.empty(3, 4, dtype=torch.bfloat16)).shape) == (3, 4)


def test_what_a_stopped_step_left_behind_is_not_copied() -> None:
    """Tensors that were on their way to a product inside."""
    model = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(2, 4, requires_grad=True)
    vars(model[0])["arrived"] = (x * 2, x * 3)
    fake = fake_copy(model, torch.float32, ())
    left = vars(fake.model.get_submodule("0"))["arrived"]
    assert [type(tensor).__name__ for tensor in left] == ["FakeTensor", "FakeTensor"]


def test_blocks_differ_by_what_is_put_on_modules_inside() -> None:
    def block(hooked: bool) -> nn.Sequential:
        made = nn.Sequential(nn.Linear(4, 4))
        if hooked:
            made[0].register_forward_pre_hook(Doubling(made[0]).before)
        return made

    x = torch.randn(2, 4)
    plain, hooked = block(False), block(True)
    assert BlockCall(plain, (x,), {}).key == BlockCall(block(False), (x,), {}).key
    assert BlockCall(plain, (x,), {}).key != BlockCall(hooked, (x,), {}).key
    assert BlockCall(hooked, (x,), {}).key == BlockCall(block(True), (x,), {}).key
    plain.register_forward_pre_hook(_fail)  # outside of the block
    assert BlockCall(plain, (x,), {}).key == BlockCall(block(False), (x,), {}).key


def test_nothing_to_apply() -> None:
    """Where no strategy changes what a rank computes, nobody's collectives are asked for."""
    config = {"batch": {"global_size": 2}, "precision": "fp32", "recompute": {"mode": "full"}}
    prepared = prepare(RunSpec(config, TinyModel(), TokenBatches(), task="causal-lm", plugins=""), 1)
    assert prepared.strategies
    assert rank_compute(prepared.plan, prepared.strategies, None) == AsItIs()


def test_collectives_are_asked_for() -> None:
    @dataclass(frozen=True)
    class Cutting:
        name: str = "cutting"
        phase: int = 2

    prepared = prepare(RunSpec({"batch": {"global_size": 2}}, TinyModel(), TokenBatches(), plugins=""), 1)
    with pytest.raises(AssertionError, match=r"\['cutting'\] need collectives of the plan's mesh"):
        rank_compute(prepared.plan, (Cutting(),), None)  # type: ignore[arg-type]
