"""Statistics of gradients on one process, beside the same numbers made from the full gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core import gradient_statistics as module
from colossal_core.gradient_statistics import ALL_UNITS, units_not_finite
from colossal_core.trained import Trained

Boosted = Callable[..., Trained]
BatchOf = Callable[[int], dict[str, torch.Tensor]]


class WithRoot(nn.Module):
    """A parameter of the model itself, one that nothing reads, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 1)
        self.spare = nn.Linear(3, 3)
        self.frozen = nn.Linear(2, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(x * self.scale).relu())
        return found


def expected(gradients: list[torch.Tensor]) -> tuple[float, float, float, int]:
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    zeros = int((flat == 0).sum()) / flat.numel()
    return float(flat.norm()), float(flat.abs().max()), zeros, int((~flat.isfinite()).sum())


def check(trained: Trained) -> None:
    units: dict[str, list[torch.Tensor]] = {}
    for name, gradient in trained.gradients().items():
        units.setdefault(name.rpartition(".")[0], []).append(gradient)
    units[ALL_UNITS] = [gradient for unit in units.values() for gradient in unit]
    found = trained.gradient_statistics()
    assert list(found) == list(units)
    for unit, statistics in found.items():
        norm, max_abs, zeros, non_finite = expected(units[unit])
        assert math.isclose(float(statistics.norm), norm, rel_tol=1e-12), unit
        assert float(statistics.max_abs) == max_abs, unit
        assert float(statistics.zero_fraction) == zeros, unit
        assert int(statistics.non_finite) == non_finite, unit
        assert (statistics.norm.dtype, statistics.max_abs.dtype) == (torch.float64, torch.float64)
        assert (statistics.zero_fraction.dtype, statistics.non_finite.dtype) == (torch.float64, torch.int64)


@pytest.mark.parametrize("part", [1 << 24, 5])
def test_are_those_of_the_full_gradients(
    boosted: Boosted, batch_of: BatchOf, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(module, "PART_ELEMENTS", part)
    trained = boosted(config={"precision": "fp64", "optimizer": {"max_grad_norm": 1e-3}}, model=WithRoot())
    result = trained.train_step(batch_of(0))
    check(trained)
    found = trained.gradient_statistics()
    assert set(found) == {"", "first", "second", "spare", ALL_UNITS}
    assert math.isclose(float(found[ALL_UNITS].norm), float(result.grad_norm), rel_tol=1e-12)
    assert [float(number) for number in vars(found["spare"]).values()] == [0.0, 0.0, 1.0, 0.0]
    assert units_not_finite(found) == ()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_units_that_are_not_finite_are_named(boosted: Boosted, batch_of: BatchOf, poison: float) -> None:
    trained = boosted(model=WithRoot())

    def planted(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient[0, :3] = poison
        return gradient

    trained.module.get_parameter("first.weight").register_hook(planted)  # type: ignore[no-untyped-call]
    result = trained.train_step(batch_of(0))
    assert bool(result.skipped)
    assert not math.isfinite(float(result.grad_norm))
    found = trained.gradient_statistics()
    assert units_not_finite(found) == ("first",)
    assert int(found["first"].non_finite) == int(found[ALL_UNITS].non_finite) == 3
    assert not math.isfinite(float(found["first"].max_abs))
    assert math.isfinite(float(found["second"].norm))


def test_skipped_steps_are_counted_and_saved(boosted: Boosted, batch_of: BatchOf, tmp_path: Any) -> None:
    trained = boosted()
    poisoned: Mapping[str, torch.Tensor] = {**batch_of(1), "y": torch.full((4, 1), math.nan)}
    before = trained.skipped_steps
    results = [trained.train_step(batch) for batch in (batch_of(0), poisoned, poisoned, batch_of(2))]
    assert [bool(result.skipped) for result in results] == [False, True, True, False]
    assert (int(before), int(trained.skipped_steps), trained.skipped_steps.dtype) == (0, 2, torch.int64)
    trained.save(tmp_path)
    other = boosted()
    other.load(tmp_path)
    assert (other.step, int(other.skipped_steps)) == (4, 2)


def test_a_loss_that_is_not_finite_skips_where_the_gradients_are_finite(boosted: Boosted, batch_of: BatchOf) -> None:
    """As a loss of the user's with a constant term has it: its value is not finite, and its gradient knows nothing of it."""
    trained = boosted()
    plain = trained._engine.loss_owner._user_loss
    assert plain is not None

    def with_constant(outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | int]:
        total, items = plain(outputs, batch)
        return total + math.inf, items

    trained._engine.loss_owner._user_loss = with_constant
    before = trained.full_parameter("first.weight").clone()
    result = trained.train_step(batch_of(0))
    assert bool(result.skipped)
    assert math.isfinite(float(result.grad_norm))
    assert torch.equal(trained.full_parameter("first.weight"), before)
