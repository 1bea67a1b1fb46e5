"""A step asks the device for nothing: no number is read on the host, and no result has a shape that depends on numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from colossal_core.collectives import SingleProcess
from colossal_core.loss import MicrobatchLoss
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start
from colossal_core.trained import Trained

WAITING = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "is_nonzero",
    "equal",
    "bincount",
)
"""Operations that wait for the device on a GPU: they return a Python number, or a tensor whose shape depends on numbers."""

Counts = dict[str, int]


class NeverWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on an operation that would wait, in the forward pass, in the backward pass and in the optimizer; counts the others."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counts = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        assert not name.startswith(WAITING), func
        if name.startswith("index") and isinstance(args[1], list):  # an index of booleans is as long as they are true
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), func
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def made(num_blocks: int, **config: Any) -> tuple[Trained, Mapping[str, torch.Tensor]]:
    """A model in training, and a batch for it."""
    given = {"batch": {"global_size": 4, "micro_size": 2}, **config}
    model = TinyModel(TinyOptions(num_blocks=num_blocks))
    spec = RunSpec(given, model, TokenBatches(), task="causal-lm", plugins="")
    trained = start(spec, SingleProcess(torch.device("cpu")))
    return trained, share_of_step(spec, trained.plan, 0, 0)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1], ids=["not clipped", "clipped"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_reads_nothing_on_the_host(precision: str, max_grad_norm: float | None, name: str) -> None:
    trained, batch = made(2, precision=precision, optimizer={"name": name, "max_grad_norm": max_grad_norm})
    for _ in range(2):
        with NeverWaits() as mode:
            trained.train_step(batch)
        assert mode.counts["_foreach_norm"] == 1


def test_the_mode_sees_what_waits() -> None:
    for waiting in (
        lambda x: float(x.sum()),
        lambda x: x[x > 0.5],
        lambda x: x.nonzero(),
        lambda x: bool(x.sum() > 0),
    ):
        with pytest.raises(AssertionError), NeverWaits():
            waiting(torch.rand(4))


def test_finishing_a_step_launches_as_much_for_any_number_of_parameters() -> None:
    """Between backward and optimizer: loss, items and norm, and no pass over the gradients but the norm's."""

    def finishing(num_blocks: int) -> Counts:
        trained, batch = made(num_blocks)
        engine, mode = trained._engine, NeverWaits()
        finish = engine._finish

        def counted(losses: list[MicrobatchLoss], divisor: torch.Tensor) -> Any:
            with mode:
                return finish(losses, divisor)

        engine._finish = counted  # type: ignore[method-assign]
        trained.train_step(batch)
        return mode.counts

    few, many = finishing(1), finishing(4)
    for counts in (few, many):
        del counts["detach"]  # a view: it launches nothing, and an accumulated gradient has one
    assert few == many
    assert [name for name in few if "foreach" in name] == ["_foreach_norm"]
    assert sum(few.values()) <= 20, few
