"""Low-rank adapters of PEFT on linears that are cut by their outputs and by their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from colossal_core.testing import RunSpec
from colossal_core.testing.parity import ModelBuilder, prepare

Run = Callable[..., RunSpec]
Exact = Callable[[RunSpec, int], None]


@dataclass(frozen=True)
class Adapted:
    """A frozen model with adapters, whose second matrices are not zero as PEFT starts them, or the first would get no gradient."""

    model: ModelBuilder
    modules: tuple[str, ...]
    dropout: float = 0.0

    def __call__(self) -> nn.Module:
        import peft

        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(self.modules), lora_dropout=self.dropout)
        model: Any = peft.inject_adapter_in_model(config, self.model())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        found: nn.Module = model
        return found


def adapted(spec: RunSpec, *modules: str, dropout: float = 0.0) -> RunSpec:
    assert not isinstance(spec.model, str)
    return replace(spec, model=Adapted(spec.model, modules, dropout))


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_adapters_are_exact(run_of: Run, exact: Exact, sequence_parallel: bool) -> None:
    tensor = {"size": 2, "sequence_parallel": sequence_parallel}
    spec = adapted(run_of("llama", {"parallel.tensor": tensor}), "q_proj", "o_proj", "down_proj")
    layouts = prepare(spec, 2).plan.layouts
    column = "model.layers.0.self_attn.q_proj"
    row = "model.layers.0.mlp.down_proj"
    cut = {
        name: layouts[name].compute.cuts[0].dim
        for name in (f"{column}.lora_B.default.weight", f"{row}.lora_A.default.weight", f"{column}.base_layer.weight")
    }
    assert list(cut.values()) == [0, 1, 0]
    assert layouts[f"{column}.lora_A.default.weight"].compute.partial == ("tp",)
    exact(spec, 2)


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_dropout_of_adapters_is_that_of_one_process(run_of: Run, exact: Exact, sequence_parallel: bool) -> None:
    """Before a column it sees whole sequences, before a row a part of the features, and of the heads."""
    spec = run_of("llama", {"parallel.tensor": {"size": 2, "sequence_parallel": sequence_parallel}})
    exact(adapted(spec, "q_proj", "o_proj", "down_proj", dropout=0.3), 2)


def test_adapters_on_every_linear_of_a_fused_model(run_of: Run, exact: Exact) -> None:
    exact(adapted(run_of("gpt2", {"parallel.tensor": {"size": 2}}), "c_attn", "c_proj", "c_fc"), 2)
