"""Each optimizer in one process against a plain formula, or torch's own where the variants coincide, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.collectives import SingleProcess
from colossal_core.config import OptimizerConfig
from colossal_core.layout import ParameterLayout, Placement
from colossal_core.ops import build_op_table
from colossal_core.optimizers import ClippingOptimizer, OptimizerContext, OptimizerSpec
from colossal_core.plugins import discover
from colossal_core.shards import Shard
from colossal_core.testing import relative_difference
from colossal_zero.optimizers.newton_schulz import COEFFICIENTS, orthogonalise, plain_iteration

SHAPES = {"block.wide": (6, 9), "block.tall": (8, 5), "block.stack": (2, 4, 3), "outside": (7, 4), "block.bias": (5,)}
CLIP = 0.4
PLUGINS = discover()
SPECS = PLUGINS.optimizers()


class Run:
    """An optimizer over parameters of `SHAPES`, drawn once; gradients are drawn by step."""

    def __init__(self, spec: OptimizerSpec, dtype: torch.dtype = torch.float64, **keys: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.masters = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in SHAPES.values()
        ]
        self.shards = [
            Shard(
                ParameterLayout(
                    name, shape, Placement(shape), Placement(shape), block="block" if "." in name else name
                ),
                master,
                master,
            )
            for (name, shape), master in zip(SHAPES.items(), self.masters, strict=True)
        ]
        device = torch.device("cpu")
        collectives = SingleProcess(device)
        context = OptimizerContext(
            ops=build_op_table(PLUGINS.ops(), "cpu", "float64"),
            collectives=collectives,
            shards={id(shard.master): shard for shard in self.shards},
            coordinate=collectives.mesh.coordinate(0),
            device=device,
            seed=0,
            blocks=frozenset({"block"}),
        )
        decayed = [master for master in self.masters if master.dim() >= 2]
        vectors = [master for master in self.masters if master.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "decayed": True},
            {"params": vectors, "decayed": False, "weight_decay": 0.0},
        ]
        config = OptimizerConfig(name=spec.name, **keys)
        self.optimizer: ClippingOptimizer = spec.factory(groups, config, context)

    def step(self, step: int, clip: float | None = CLIP, skip: bool = False, poison: float | None = None) -> None:
        for shard, gradient in zip(self.shards, gradients_at(step), strict=True):
            shard.gradient = gradient.to(shard.master.dtype if shard.master.dtype == torch.float64 else torch.float32)
            if poison is not None:
                shard.gradient.fill_(poison)
        factor = None if clip is None else torch.tensor(clip, dtype=torch.float64)
        self.optimizer.clipped_step(factor, torch.tensor(skip))

    def everything(self) -> list[torch.Tensor]:
        found = [master.detach().clone() for master in self.masters]
        states = [s for s in self.optimizer.state_tensors() if not s.kind.endswith(".draws")]
        return found + [state.tensor.clone() for state in states]


def gradients_at(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES.values()]


def check(run: Run, expected: Sequence[torch.Tensor]) -> None:
    for name, master, wanted in zip(SHAPES, run.masters, expected, strict=True):
        difference = relative_difference(master.detach(), wanted)
        assert difference <= 1e-12, (name, difference)


Formula = Callable[[int, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def after_steps(run: Run, formula: Formula, num_steps: int = 4) -> list[torch.Tensor]:
    """Parameters after steps of a formula: (step from 1, parameter, clipped gradient, its own state) -> parameter."""
    found = [master.detach().clone() for master in run.masters]
    states: list[dict[str, torch.Tensor]] = [{} for _ in found]
    for step in range(1, num_steps + 1):
        run.step(step)
        for index, gradient in enumerate(gradients_at(step)):
            found[index] = formula(step, found[index], gradient * CLIP, states[index])
    return found


def decay_of(parameter: torch.Tensor, decay: float) -> float:
    return decay if parameter.dim() >= 2 else 0.0


def test_lion_is_its_formula() -> None:
    run = Run(SPECS["lion"], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)

    def formula(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        m = state.get("m", torch.zeros_like(p))
        state["m"] = 0.99 * m + 0.01 * g
        return p - 1e-2 * (torch.sign(0.9 * m + 0.1 * g) + decay_of(p, 0.1) * p)

    check(run, after_steps(run, formula))


def test_lamb_is_its_formula() -> None:
    run = Run(SPECS["lamb"], lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)

    def formula(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g
        state["v"] = 0.99 * state.get("v", torch.zeros_like(p)) + 0.01 * g**2
        corrected = (state["v"] / (1 - 0.99**step)).sqrt() + 1e-6
        u = state["m"] / (1 - 0.9**step) / corrected + decay_of(p, 0.1) * p
        ratio = p.norm() / u.norm() if p.dim() >= 2 else p.new_ones(())
        return p - 1e-2 * ratio * u

    check(run, after_steps(run, formula))


def test_lars_is_its_formula() -> None:
    run = Run(SPECS["lars"], lr=0.5, eps=1e-9, weight_decay=0.01, trust_coefficient=0.02)

    def formula(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        decay = decay_of(p, 0.01)
        ratio = 0.02 * p.norm() / (g.norm() + decay * p.norm() + 1e-9) if p.dim() >= 2 else p.new_ones(())
        state["v"] = 0.9 * state.get("v", torch.zeros_like(p)) + 0.5 * ratio * (g + decay * p)
        return p - state["v"]

    check(run, after_steps(run, formula))


def test_a_parameter_of_zeros_has_a_ratio_of_one() -> None:
    for name in ("lamb", "lars"):
        run = Run(SPECS[name], lr=0.1, weight_decay=0.0)
        with torch.no_grad():
            run.masters[0].zero_()
        run.step(1, clip=None)
        assert run.masters[0].detach().abs().max() > 0.01


def test_adafactor_is_torchs() -> None:
    keys: dict[str, Any] = {"lr": 0.05, "eps": 1e-6, "weight_decay": 0.1, "no_decay": "none"}
    run = Run(SPECS["adafactor"], **keys)
    run.optimizer.param_groups[1]["weight_decay"] = 0.1
    theirs = [nn.Parameter(master.detach().clone()) for master in run.masters]
    oracle: Any = torch.optim.Adafactor(theirs, lr=0.05, eps=(1e-6, 1e-3), weight_decay=0.1)
    for step in range(1, 5):
        run.step(step)
        for parameter, gradient in zip(theirs, gradients_at(step), strict=True):
            parameter.grad = gradient * CLIP
        oracle.step()
    check(run, [parameter.detach() for parameter in theirs])


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """By singular values: the polynomial acts on each of them by itself."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    found: torch.Tensor = left @ torch.diag(values) @ right
    return found


def test_muon_is_its_formula_for_hidden_matrices_and_adamw_for_the_rest() -> None:
    run = Run(SPECS["muon"], lr=0.02, adamw_lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)

    def formula(step: int, p: torch.Tensor, g: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        if p.shape in (SHAPES["block.wide"], SHAPES["block.tall"]):
            state["m"] = 0.95 * state.get("m", torch.zeros_like(p)) + 0.05 * g
            u = orthogonalised(0.05 * g + 0.95 * state["m"])
            return p * (1 - 0.02 * 0.1) - 0.02 * 0.2 * math.sqrt(max(p.shape)) * u
        state["m"] = 0.9 * state.get("m", torch.zeros_like(p)) + 0.1 * g
        state["v"] = 0.99 * state.get("v", torch.zeros_like(p)) + 0.01 * g**2
        corrected = (state["v"] / (1 - 0.99**step)).sqrt() + 1e-8
        return p * (1 - 3e-3 * decay_of(p, 0.1)) - 3e-3 * state["m"] / (1 - 0.9**step) / corrected

    check(run, after_steps(run, formula))


def test_muon_is_as_near_to_torchs_as_bf16_allows() -> None:
    """Torch iterates in bf16. In float64 ours is the exact step; torch's is at most twice as far from it as the plain iteration in bf16,
    rounded at the same places, and ours in bf16 at most twice as far as torch's.
    """
    run = Run(SPECS["muon"], lr=0.02, weight_decay=0.0)
    before = [master.detach().clone() for master in run.masters[:2]]
    theirs = [nn.Parameter(tensor.clone()) for tensor in before]
    oracle: Any = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for parameter, gradient in zip(theirs, gradients_at(1), strict=False):
        parameter.grad = gradient
    run.step(1, clip=None)
    oracle.step()
    for master, start, parameter, gradient in zip(run.masters[:2], before, theirs, gradients_at(1), strict=False):
        exact = start - master.detach()
        rounded = (gradient / gradient.norm()).bfloat16()[None]
        plain = plain_iteration(rounded) if start.shape[0] <= start.shape[1] else plain_iteration(rounded.mT).mT
        scale = 0.02 * 0.2 * math.sqrt(max(start.shape))
        distances = [float((step - exact).norm()) for step in (scale * plain[0].double(), start - parameter.detach())]
        ours = float((scale * orthogonalise(gradient.bfloat16()[None])[0].double() - exact).norm())
        assert distances[1] <= 2 * distances[0], distances
        assert ours <= 2 * distances[1], (ours, distances)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("name", "dtype", "keys"),
    [
        *((name, torch.float64, {}) for name in sorted(SPECS)),
        *((name, torch.float32, {"states": states}) for name in ("adamw", "lion") for states in ("bf16", "int8")),
        *((name, torch.bfloat16, {"masters": "compute", "states": "int8"}) for name in ("adamw", "lion")),
        ("adamw", torch.bfloat16, {"masters": "compute"}),
    ],
)
def test_a_skipped_step_changes_no_bit(name: str, dtype: torch.dtype, keys: dict[str, Any], poison: float) -> None:
    run = Run(SPECS[name], dtype, **keys)
    run.step(1)
    before = run.everything()
    run.step(2, clip=math.nan, skip=True, poison=poison)
    assert all(torch.equal(old, new) for old, new in zip(before, run.everything(), strict=True))
    run.step(3)
    assert all(bool(tensor.isfinite().all()) for tensor in run.everything())


def test_gradients_are_left_as_they_are() -> None:
    for name in SPECS:
        run = Run(SPECS[name])
        run.step(1)
        for shard, gradient in zip(run.shards, gradients_at(1), strict=True):
            assert shard.gradient is not None
            assert torch.equal(shard.gradient, gradient), name
