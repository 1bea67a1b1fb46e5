"""The strategy `recompute`: the same gradients, less memory, every state as in the first run; and what it says and plans."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from colossal_core.anatomy import ModelAnatomy
from colossal_core.collectives import SingleProcess
from colossal_core.config import build_config_class, parse_config
from colossal_core.config.sections import RecomputeConfig
from colossal_core.estimate import EstimateTable, HardwareProfile, ModelSize
from colossal_core.examine import examine
from colossal_core.mesh import MeshLayout
from colossal_core.recompute import Recomputation, Recompute, install, recompute_spec
from colossal_core.selective import BlockTrace, Decision, Operation, decide, trace_block
from colossal_core.strategy import Phase
from colossal_core.testing.parity import RunSpec, prepare, record_run


class Layer(nn.Module):
    """A residual block with everything that a second run could get wrong: dropout, running statistics, a counter of runs."""

    def __init__(self, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)
        self.up = nn.Linear(16, 64)
        self.down = nn.Linear(64, 16)
        self.dropout = nn.Dropout(dropout)
        self.num_runs = 0

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        self.num_runs += 1
        return x + scale * self.down(torch.relu(self.dropout(self.up(self.norm(x))))), None


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, scale=0.5)[0]
        return x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("budget", [None, 0.3, 0.9])
def test_gradients_and_buffers_are_those_of_the_plain_model(budget: float | None) -> None:
    torch.manual_seed(0)
    model = Stack().double()
    reference = copy.deepcopy(model)
    names = list(model.state_dict())
    for layer in model.layers:
        install(Recomputation(layer, [], budget))
    x = torch.randn(8, 16, dtype=torch.float64)
    for _ in range(2):
        for mine, its in zip(gradients(model, x), gradients(reference, x), strict=True):
            assert torch.equal(mine, its)
    assert list(model.state_dict()) == names
    for mine, its in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [None, 0.5])
def test_transformers_models_with_their_cache_switched_on(kind: str, budget: float | None) -> None:
    transformers = pytest.importorskip("transformers", reason="core works without transformers; these are its models")
    sizes = {
        "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16},
    }
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=64, bos_token_id=0, eos_token_id=0, use_cache=True, **sizes[kind]
    )
    model = transformers.AutoModelForCausalLM.from_config(config).double().train()
    reference = copy.deepcopy(model)
    blocks = examine(model).blocks
    assert len(blocks) == 2
    for block in blocks:
        install(Recomputation(model.get_submodule(block), [], budget))
    tokens = torch.randint(0, 64, (2, 8))
    found = []
    for each in (model, reference):
        torch.manual_seed(1)
        each(input_ids=tokens).logits.square().mean().backward()
        found.append([parameter.grad for parameter in each.parameters()])
    for mine, its in zip(*found, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_full_runs_twice_and_evaluation_once() -> None:
    layer = Layer()
    install(Recomputation(layer, []))
    with torch.no_grad():
        layer(torch.randn(4, 16))
    assert layer.num_runs == 1
    layer(torch.randn(4, 16, requires_grad=True))[0].sum().backward()
    assert layer.num_runs == 3


def test_selective_keeps_the_most_expensive_bytes_within_the_budget() -> None:
    first, second = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    trace = BlockTrace(
        operations=(Operation(first, 0, 100, 10), Operation(second, 0, 900, 30), Operation(first, 1, 400, 20)),
        activation_bytes=100,
        num_calls=((first, 2), (second, 1)),
    )
    assert decide(trace, 0.5) == Decision(frozenset({(second, 0), (first, 1)}), frozenset({second}), 50)
    assert decide(trace, 0.2) == Decision(frozenset({(first, 1)}), frozenset(), 20)
    assert decide(trace, 0.0) == Decision(frozenset(), frozenset(), 0)
    assert decide(trace, 1.0).kept_bytes == 60


def test_a_block_is_measured_by_what_autograd_keeps() -> None:
    layer = nn.Sequential(nn.Linear(16, 64, bias=False), nn.Tanh(), nn.Linear(64, 16, bias=False))
    x = torch.randn(4, 16, requires_grad=True)
    trace = trace_block(lambda: layer(x), layer, [x])
    assert [(operation.flops, operation.output_bytes) for operation in trace.operations] == [
        (2 * 4 * 16 * 64, 4 * 64 * 4),
        (2 * 4 * 64 * 16, 4 * 16 * 4),
    ]
    assert trace.activation_bytes == 4 * 64 * 4  # the output of tanh; the input is counted by who made it


@pytest.mark.parametrize(("budget", "recomputed"), [(None, 2), (0.5, 1), (0.9, 0)])
def test_selective_runs_only_the_products_again_that_it_does_not_keep(budget: float | None, recomputed: int) -> None:
    def flops(layer: nn.Module) -> int:
        x = torch.randn(8, 16, requires_grad=True)
        layer(x)[0].sum().backward()  # the first call measures
        with FlopCounterMode(display=False) as counter:
            layer(x)[0].sum().backward()
        return int(counter.get_total_flops())

    plain, layer = flops(Layer()), Layer()
    recomputation = Recomputation(layer, [], budget)
    install(recomputation)
    product = 2 * 8 * 16 * 64
    # The last product is where torch stops early: nothing behind it is needed.
    assert flops(layer) - plain == min(recomputed, 1) * product
    if recomputation.decision is not None:
        assert len(recomputation.decision.calls) == 2 - recomputed


class Key:
    """A replayable state: a number that the block reads."""

    def __init__(self) -> None:
        self.value = 1.0

    def capture(self) -> float:
        return self.value

    @contextmanager
    def replay(self, captured: float) -> Iterator[None]:
        before, self.value = self.value, captured
        try:
            yield
        finally:
            self.value = before


class ReadsState(nn.Module):
    call: Any

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.key = key
        self.weight = nn.Parameter(torch.ones(()))
        self.call = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.weight * self.key.value * self.call)


def test_states_are_those_of_the_microbatch_and_then_as_they_were() -> None:
    key = Key()
    block = ReadsState(key)
    replayed: list[Key] = []
    install(Recomputation(block, replayed))
    replayed.append(key)  # a state that is registered later counts too
    losses = []
    x = torch.tensor(0.5)
    for microbatch in (1.0, 2.0):
        key.value, block.call = microbatch, torch.tensor(microbatch)
        losses.append(block(x))
    key.value, block.call = 7.0, torch.tensor(7.0)
    for loss, factor in zip(losses, (1.0, 4.0), strict=True):
        (gradient,) = torch.autograd.grad(loss, [block.weight])
        torch.testing.assert_close(gradient, torch.cos(x * factor) * x * factor)
    assert [key.value, float(block.call)] == [7.0, 7.0]


def config(**section: Any) -> RecomputeConfig:
    return RecomputeConfig(**section)


def test_the_section_is_off_by_default() -> None:
    spec = recompute_spec()
    assert (spec.name, spec.section, spec.config_class) == ("recompute", "recompute", RecomputeConfig)
    assert spec.factory(config()) is None
    made = spec.factory(config(mode="full"))
    assert isinstance(made, Recompute)
    assert (made.name, made.axes, made.phase, made.after) == ("recompute", (), Phase.RECOMPUTE, ())


def test_no_blocks_is_a_problem() -> None:
    run = parse_config(
        {"batch": {"global_size": 4}, "model": {"architecture": "llama"}, "data": {}}, build_config_class([])
    )
    strategy = Recompute(config(mode="full"))
    anatomy = ModelAnatomy("Mine", "own-loss", (), ())
    problems = [str(problem) for problem in strategy.check(run, anatomy, MeshLayout())]
    assert problems == [
        "recompute.mode='full': no block list was found in this model: Mine: no list of modules feeds one into the next: use "
        "recompute.mode: none, or hold the repeated layers in a ModuleList (an example batch helps: model.example_batch)"
    ]
    assert strategy.check(run, examine(Stack(), {"x": torch.zeros(4, 16)}), MeshLayout()) == []


def table(rows: Sequence[float] | None = None) -> EstimateTable:
    size = ModelSize(1000, 1000, 4, 200, 16, 32, 64, 4)
    inputs = {"dp_shard": np.ones(2), "pp": np.array([1.0, 2.0]), "micro_size": np.array([2.0, 2.0])}
    if rows is not None:
        inputs["recompute"] = np.array(rows)
    filled = EstimateTable(size, inputs).setting("activation_bytes_per_microbatch", np.array([100_000.0, 50_000.0]))
    return filled.setting("compute_seconds", np.array([3.0, 3.0]))


@pytest.mark.parametrize(
    ("section", "rows", "activations", "seconds"),
    [
        ({"mode": "full"}, None, [8192.0, 4096.0], [4.0, 4.0]),
        ({"mode": "selective", "memory_budget": 1.0}, None, [100_000.0, 50_000.0], [3.0, 3.0]),
        ({"mode": "selective", "memory_budget": 0.5}, None, [54_096.0, 27_048.0], [3.5, 3.5]),
        ({"mode": "full"}, [0.0, 1.0], [100_000.0, 4096.0], [3.0, 4.0]),
    ],
)
def test_estimate(
    section: dict[str, Any], rows: list[float] | None, activations: list[float], seconds: list[float]
) -> None:
    profile = HardwareProfile("cpu", 1e9, 1e12, 1e11, 1e10, 1e-5)
    found = Recompute(config(**section)).estimate(table(rows), profile)
    np.testing.assert_allclose(found.column("activation_bytes_per_microbatch"), activations, rtol=1e-12)
    np.testing.assert_allclose(found.column("compute_seconds"), seconds, rtol=1e-12)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="core works without transformers; this is its model")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.2, "embd_pdrop": 0.2}
    config = transformers.GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    assert isinstance(model, nn.Module)
    return model


def tokens(step: int, num_sequences: int) -> dict[str, Tensor]:
    drawn = torch.randint(0, 64, (num_sequences, 8), generator=torch.Generator().manual_seed(step))
    return {"input_ids": drawn, "labels": drawn}


@pytest.mark.parametrize("section", [{"mode": "full"}, {"mode": "selective"}], ids=str)
def test_a_whole_run_is_the_same_with_keyed_dropout_and_accumulation(section: dict[str, Any]) -> None:
    run = {"batch": {"global_size": 4, "micro_size": 2}, "precision": "fp64", "train": {"num_steps": 2}}
    alone = SingleProcess(torch.device("cpu"))
    plain = RunSpec(run, gpt2, tokens, num_steps=2)
    recomputed = plain.with_overrides({"recompute": section})
    assert prepare(recomputed, 1).plan.decisions == {
        "recompute": dict.fromkeys(("transformer.h.0", "transformer.h.1"), section["mode"])
    }
    mine, its = record_run(recomputed, alone), record_run(plain, alone)
    assert [step.loss for step in mine.steps] == [step.loss for step in its.steps]
    assert all(torch.equal(parameter, its.parameters[name]) for name, parameter in mine.parameters.items())
