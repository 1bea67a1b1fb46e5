"""The average is the one of the definition, and the weights come back after a swap."""

from __future__ import annotations

import torch
from colossal_ema import averaged

from colossal_core.collectives import SingleProcess
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start

CPU = torch.device("cpu")


def spec(every_steps: int) -> RunSpec:
    config = {"batch": {"global_size": 2}, "precision": "fp64", "ema": {"decay": 0.75, "every_steps": every_steps}}
    return RunSpec(config, TinyModel(TinyOptions(frozen=True)), TokenBatches(), task="causal-lm")


def test_average_is_the_one_of_the_definition() -> None:
    run = spec(every_steps=2)
    trained = start(run, SingleProcess(CPU))
    names = [name for name, layout in trained.plan.layouts.items() if layout.trainable]
    expected = {name: trained.full_parameter(name).clone() for name in names}
    for step in range(4):
        trained.train_step(share_of_step(run, trained.plan, 0, step))
        if step % 2 == 1:
            expected = {name: 0.75 * old + 0.25 * trained.full_parameter(name) for name, old in expected.items()}
    found = {name: tensor for kind, name, tensor in trained.full_states() if kind == "ema"}
    assert found.keys() == expected.keys()
    for name, average in found.items():
        torch.testing.assert_close(average, expected[name], rtol=1e-12, atol=1e-15)


def test_swapped_weights_are_used_and_come_back() -> None:
    run = spec(every_steps=1)
    trained = start(run, SingleProcess(CPU))
    batch = share_of_step(run, trained.plan, 0, 0)
    for _ in range(3):
        trained.train_step(batch)
    before, loss = trained.full_parameter("tokens.weight").clone(), trained.eval_step(batch).loss
    average = {name: tensor for kind, name, tensor in trained.full_states() if kind == "ema"}["tokens.weight"].clone()
    with averaged(trained):
        assert torch.equal(trained.full_parameter("tokens.weight"), average)
        assert trained.eval_step(batch).loss != loss
    assert torch.equal(trained.full_parameter("tokens.weight"), before)
    assert trained.eval_step(batch).loss == loss
