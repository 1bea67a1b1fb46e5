"""The small model of a user's own factory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.config import parse_config
from colossal_core.plugins import discover
from colossal_core.specimen import SpecimenError
from colossal_launch.assembly import example_batch_of, factory_specimen


def build(size: int) -> nn.Module:
    if size < 2:
        raise ValueError("too small")
    return nn.Sequential(nn.Linear(3, size), nn.Dropout(0.1), nn.Linear(size, 3)).double().eval()


def batch(num_sequences: int) -> Mapping[str, torch.Tensor]:
    return {"input": torch.ones(num_sequences, 3, dtype=torch.float64)}


@pytest.fixture
def models() -> Iterator[str]:
    module = ModuleType("small_models_for_test")
    vars(module).update(build=build, batch=batch)
    sys.modules[module.__name__] = module
    yield module.__name__
    del sys.modules[module.__name__]


def config(models: str, **keys: Any) -> Any:
    model = {"factory": f"{models}:build", "config": {"size": 4096}, "example_batch": f"{models}:batch", **keys}
    return parse_config({"model": model, "batch": {"global_size": 2}}, discover([]).config_class())


def test_verify_config_makes_the_small_model(models: str) -> None:
    read = config(models, verify_config={"size": 8})
    specimen = factory_specimen(read, example_batch_of(read))
    assert specimen is not None
    small = specimen.build()
    assert small.training
    assert small.get_parameter("0.weight").shape == (8, 3)
    assert small(**specimen.batch()).shape == (2, 3)
    assert torch.equal(specimen.build().get_parameter("0.weight"), small.get_parameter("0.weight"))
    other = config(models, verify_config={"size": 16})
    found = factory_specimen(other, example_batch_of(other))
    assert found is not None and found.key != specimen.key


def test_without_it_core_makes_one_by_rule(models: str) -> None:
    read = config(models)
    assert factory_specimen(read, example_batch_of(read)) is None


def test_what_the_factory_refuses_is_told(models: str) -> None:
    read = config(models, verify_config={"size": 1})
    specimen = factory_specimen(read, example_batch_of(read))
    assert specimen is not None
    with pytest.raises(SpecimenError) as raised:
        specimen.build()
    assert str(raised.value) == (
        "small_models_for_test:build makes no model with model.verify_config (ValueError: too small)"
    )
