"""`Booster` on one process: what it takes, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.errors import ColossalError, ConfigError
from colossal_launch import Booster, launch

CONFIG: dict[str, Any] = {"batch": {"global_size": 4}, "precision": "fp64", "train": {"device": "cpu"}}


class Regression(nn.Module):
    """Two layers; its own loss where it is given targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.norm(self.first(x)).relu())
        return found


def squares(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return (outputs - batch["y"]).square().sum(), torch.tensor(batch["y"].shape[0])


def batch(size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(size, 6, generator=generator, dtype=torch.float64),
        "y": torch.randn(size, 3, generator=generator, dtype=torch.float64),
    }


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> float:
    model.double()
    optimizer.zero_grad()
    data = batch()
    loss = squares(model(data["x"]), data)[0] / 4
    loss.backward()  # type: ignore[no-untyped-call]
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.item()


def with_instance(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters[:2], "lr": 0.3}, {"params": parameters[2:]}]
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("form", ["instance", "factory", "config"])
def test_an_optimizer_is_an_instance_a_factory_or_the_configs(form: str) -> None:
    expected = Regression()
    made: dict[str, Callable[[], Any]] = {
        "instance": lambda: with_instance(model),
        "factory": lambda: lambda parameters: torch.optim.Adam(parameters, lr=0.01),
        "config": lambda: None,
    }
    model = Regression()
    own = (
        {}
        if form != "config"
        else {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0}, "scheduler": {"name": "constant"}}
    )
    optimizer = made[form]()
    trained = Booster({**CONFIG, **own}).boost(model, optimizer, loss_fn=squares)
    references: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "instance": lambda: with_instance(expected),
        "factory": lambda: torch.optim.Adam(expected.parameters(), lr=0.01),
        "config": lambda: torch.optim.SGD(expected.parameters(), lr=0.1),
    }
    reference = references[form]()
    losses = [float(trained.train_step(batch()).loss) for _ in range(3)]
    assert losses == pytest.approx([plain_step(expected, reference, 1.0) for _ in range(3)], rel=1e-12)
    for name, parameter in expected.named_parameters():
        assert torch.allclose(trained.full_parameter(name), parameter, rtol=0, atol=1e-14), name
    if form == "instance":
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
            id(p) for p in model.parameters()
        }


def test_a_scheduler_sets_the_rates_and_returns_with_the_checkpoint(tmp_path: Path) -> None:
    def boosted() -> tuple[Any, torch.optim.Optimizer]:
        model = Regression()
        optimizer = with_instance(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return Booster(CONFIG).boost(model, optimizer, loss_fn=squares, lr_scheduler=scheduler), optimizer

    trained, optimizer = boosted()
    seen = []
    trained.on_step(lambda result: seen.append(float(result.loss)))
    for _ in range(2):
        trained.train_step(batch())
    assert [group["lr"] for group in optimizer.param_groups] == [0.3 / 4, 0.1 / 4]
    trained.save(tmp_path)
    for _ in range(2):
        trained.train_step(batch())
    again, optimizer = boosted()
    found = again.load(tmp_path)
    assert found is not None
    assert (found.step, again.step) == (2, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3 / 4, 0.1 / 4]
    assert [float(again.train_step(batch()).loss) for _ in range(2)] == seen[2:]


def message(config: dict[str, Any], **given: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        Booster(config).boost(**given)
    return str(raised.value)


def test_what_boost_refuses() -> None:
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert message({**CONFIG, "optimizer": {"lr": 0.1, "max_grad_norm": 1.0}}, model=model, optimizer=optimizer) == (
        "optimizer.lr: is set beside an optimizer that was handed to boost: set it on the optimizer, and remove it here"
    )
    stranger = torch.optim.SGD(Regression().parameters(), lr=0.1)
    assert message(CONFIG, model=Regression(), optimizer=stranger) == (
        "optimizer: holds a parameter of shape (5, 6) that is not one of the model's: build it on model.parameters()"
    )
    used = Regression()
    stepped = torch.optim.Adam(used.parameters())
    plain_step(used, stepped, None)
    assert message(CONFIG, model=used, optimizer=stepped) == (
        "optimizer: the instance handed to boost already has state: hand over a fresh one; "
        "one that makes its state when it is built (Adagrad) as a factory `params -> optimizer`"
    )
    with torch.device("meta"):
        lost = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert message(CONFIG, model=lost) == (
        "model: buffers on the meta device have no values (1.running_mean, 1.running_var, 1.num_batches_tracked): "
        "build it under colossal_launch.models.parameters_on_meta(), which keeps buffers"
    )


def test_a_booster_is_for_one_model() -> None:
    booster = Booster(CONFIG)
    booster.boost(Regression(), loss_fn=squares)
    with pytest.raises(ConfigError, match=r"^booster: has boosted a model already: make a Booster for each model$"):
        booster.boost(Regression(), loss_fn=squares)


@pytest.mark.parametrize("size", [2, 6])
def test_a_batch_is_the_whole_share(size: int) -> None:
    trained = Booster(CONFIG).boost(Regression(), loss_fn=squares)
    with pytest.raises(ColossalError) as raised:
        trained.train_step(batch(size))
    assert str(raised.value) == (
        f"batch.x: has {size} sequences, and this rank's share of batch.global_size=4 is 4: "
        "take batches from booster.dataloader, or change batch.global_size"
    )


def test_a_model_without_buffers_may_be_on_the_meta_device() -> None:
    """Its values are its own initialisation, keyed by `train.seed`: the same twice."""

    def made(seed: int) -> torch.Tensor:
        with torch.device("meta"):
            model = Regression()
        config = {**CONFIG, "train": {"device": "cpu", "seed": seed}}
        return Booster(config).boost(model, loss_fn=squares).full_parameter("first.weight")

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))
    assert made(1).std() > 0


def test_a_loader_hands_out_whole_shares_and_ends_with_the_run(tmp_path: Path) -> None:
    class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"x": torch.full((6,), float(index), dtype=torch.float64), "y": torch.zeros(3, dtype=torch.float64)}

    def run(load: bool) -> tuple[list[list[float]], list[float]]:
        booster = Booster({**CONFIG, "train": {"device": "cpu", "num_steps": 5}})
        loader = booster.dataloader(Numbers())
        trained = booster.boost(Regression(), loss_fn=squares)
        if load:
            assert trained.load(tmp_path) is not None
        seen, losses = [], []
        for data in loader:
            seen.append(data["x"][:, 0].tolist())
            losses.append(float(trained.train_step(data).loss))
            if trained.step == 2:
                trained.save(tmp_path)
        return seen, losses

    seen, losses = run(load=False)
    assert [len(part) for part in seen] == [4] * 5
    assert sorted(value for part in seen for value in part)[:20:2] == [float(index) for index in range(10)]
    assert run(load=True) == (seen[2:], losses[2:])


def test_without_a_launcher_launch_stands_alone() -> None:
    ranks = launch("cpu")
    assert (ranks.rank, ranks.world_size, ranks.local_rank, str(ranks.device)) == (0, 1, 0, "cpu")
    assert launch("cpu") == ranks
