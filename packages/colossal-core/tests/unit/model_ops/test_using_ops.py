"""Any model trained with ops of the table beside its own code, in float64: what is replaced, that nothing changes, and what is left."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossal_core.collectives import SingleProcess
from colossal_core.errors import ConfigError
from colossal_core.examine import examine
from colossal_core.float64 import Float64Throughout
from colossal_core.model_ops.planning import MODEL_OPS
from colossal_core.model_ops.replacing import chosen_in
from colossal_core.ops import OP_NAMES, OpImplementation, OpTable, op_problems
from colossal_core.ops.reference import reference_ops
from colossal_core.peak_estimate import PeakEstimator
from colossal_core.testing import EXACT, RunSpec, compare, relative_difference
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.op_twins import PROVIDER, twins, twins_under_compile
from colossal_core.testing.parity import oracle_of, prepare, record_run, start


class Root(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos[:, None], sin[:, None]

    def half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


class Mix(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (2, -1)).transpose(1, 2) for one in self.qkv(x).chunk(3, dim=-1))
        q, k = turn(q, k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return found


class Gated(nn.Module):
    def __init__(self, size: int, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.both, self.down = nn.Linear(size, 4 * size, bias=False), nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            return self.halves(x)
        gate, up = self.both(x).tensor_split(2, dim=-1)
        found: Tensor = self.down(F.silu(gate) * up)
        return found

    def halves(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        up = up * F.gelu(gate, approximate="tanh")
        found: Tensor = self.down(up)
        return found


class Layer(nn.Module):
    def __init__(self, size: int, *, packed: bool) -> None:
        super().__init__()
        self.before, self.between = Root(size), nn.LayerNorm(size)
        self.mix, self.gated = Mix(size), Gated(size, packed=packed)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kept = x
        x = self.mix(self.before(x), cos, sin)
        x = kept + x
        kept = x
        x = self.between(x)
        x = self.gated(x)
        return kept + x


class Output(NamedTuple):
    logits: Tensor


class Modern(nn.Module):
    """cap: of the logits, 0: none."""

    def __init__(self, cap: float = 0.0, *, tied: bool = False) -> None:
        super().__init__()
        size, self.cap = 12, cap
        self.table = nn.Embedding(53, size)
        self.layers = nn.ModuleList(Layer(size, packed=index == 1) for index in range(3))
        self.norm, self.head = Root(size), nn.Linear(size, 53, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Output:
        x = self.table(input_ids)
        position = torch.arange(input_ids.shape[1], device=x.device)[:, None]
        angle = position * 0.3 ** torch.arange(3, device=x.device)
        angle = torch.cat((angle, angle), dim=-1)[None].to(x.dtype)
        for layer in self.layers:
            x = layer(x, angle.cos(), angle.sin())
        logits = self.head(self.norm(x))
        return Output(logits if not self.cap else torch.tanh(logits / self.cap) * self.cap)


@dataclass(frozen=True)
class Model:
    cap: float = 0.0
    tied: bool = False

    def __call__(self) -> nn.Module:
        return Modern(self.cap, tied=self.tied)


CONFIG: Mapping[str, Any] = {
    "batch": {"global_size": 4, "micro_size": 2},
    "precision": "fp64",
    "optimizer": {"name": "adamw", "lr": 1e-3, "max_grad_norm": None},
}
SPEC = RunSpec(CONFIG, Model(), TokenBatches(), num_steps=2, task="causal-lm", plugins="", extra_ops=twins)
LAYERS = ("layers.0", "layers.1", "layers.2")
REPLACED = {
    "rms_norm": (*(f"{layer}.before" for layer in LAYERS), "norm"),
    "layer_norm": tuple(f"{layer}.between" for layer in LAYERS),
    "add_layer_norm": LAYERS,
    "rotary": tuple(f"{layer}.mix" for layer in LAYERS),
    "swiglu": tuple(f"{layer}.gated" for layer in LAYERS),
    "packed_geglu": tuple(f"{layer}.gated" for layer in LAYERS),
    "linear_cross_entropy": ("head",),
}


pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
"""Dynamo looks at every tensor that comes into a graph."""


def one_process() -> SingleProcess:
    return SingleProcess(torch.device("cpu"))


def replaced(spec: RunSpec) -> dict[str, tuple[str, ...]]:
    return chosen_in(prepare(spec, 1).plan.data)


def notes(spec: RunSpec) -> list[str]:
    return [note for note in prepare(spec, 1).plan.notes if note.startswith("ops: ")]


def counting(calls: list[str]) -> Sequence[OpImplementation]:
    """Twins that say when they are called."""

    def told(found: OpImplementation) -> OpImplementation:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append(found.op)
            return found.function(*args, **kwargs)

        return replace(found, function=function)

    return [told(one) for one in twins()]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"recompute.mode": "full"},
        {"recompute.mode": "selective"},
        {"compile": {"enabled": True, "backend": "aot_eager"}},
        {"ops": {"rms_norm": "reference", "add_layer_norm": "reference"}},
    ],
    ids=["plain", "recomputed", "selected", "compiled", "some"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_a_model_that_uses_ops_is_the_same_in_float64(overrides: Mapping[str, Any], tied: bool) -> None:
    spec = replace(SPEC, model=Model(tied=tied)).with_overrides(overrides)
    assert replaced(spec)
    found, truth = record_run(spec, one_process()), record_run(oracle_of(spec), one_process())
    assert max(row.difference for row in compare(found, truth)) <= EXACT
    assert list(found.parameters) == list(truth.parameters)


def test_what_is_replaced_is_called_and_printed() -> None:
    assert replaced(SPEC) == REPLACED
    assert notes(SPEC) == [
        "ops: rms_norm in 4, layer_norm in 3, add_layer_norm in 3, rotary in 3, swiglu in 3, packed_geglu in 3, "
        "linear_cross_entropy in 1 modules"
    ]
    calls: list[str] = []
    trained = start(replace(SPEC, extra_ops=lambda: counting(calls)), one_process())
    calls.clear()
    batch = TokenBatches()(0, 4)
    trained.train_step(batch)
    of_one = {
        "rms_norm": 4,
        "add_layer_norm": 3,
        "rotary": 3,
        "swiglu": 2,
        "packed_geglu": 1,
        "linear_cross_entropy": 1,
    }
    assert {op: calls.count(op) for op in MODEL_OPS if op in calls} == {op: 2 * count for op, count in of_one.items()}
    calls.clear()
    trained.eval_step(batch)
    assert "linear_cross_entropy" not in calls
    assert trained.module(batch["input_ids"]).logits.shape == (4, 12, 53)


def test_two_models_of_a_class_live_side_by_side_and_a_copy_stands_alone() -> None:
    spec = replace(SPEC, extra_ops=twins)
    used, plain = start(spec, one_process()).module, start(oracle_of(spec), one_process()).module
    assert all("forward" not in vars(module) for module in plain.modules())
    copied = copy.deepcopy(used)
    ids = TokenBatches()(0, 2)["input_ids"]
    with torch.no_grad(), Float64Throughout():
        before = used(ids).logits
        for parameter in copied.parameters():
            parameter.zero_()
        assert float(copied(ids).logits.abs().max()) == 0.0
        assert torch.equal(used(ids).logits, before)
        assert torch.allclose(plain(ids).logits, before, rtol=0, atol=1e-12)
    assert used.state_dict().keys() == plain.state_dict().keys()


def test_compiled_blocks_keep_what_is_not_meant_for_them() -> None:
    compiled = SPEC.with_overrides({"compile": {"enabled": True, "backend": "aot_eager"}})
    assert replaced(compiled) == {"rms_norm": ("norm",), "linear_cross_entropy": ("head",)}
    assert notes(compiled) == [
        "ops: rms_norm in 1, linear_cross_entropy in 1 modules",
        "ops: left to torch.compile inside compiled blocks: rms_norm, layer_norm, add_layer_norm, rotary, swiglu, geglu, packed_geglu",
    ]
    assert replaced(replace(compiled, extra_ops=twins_under_compile)) == REPLACED


def test_a_head_whose_logits_are_changed_keeps_them() -> None:
    spec = replace(SPEC, model=Model(cap=5.0))
    assert "linear_cross_entropy" not in replaced(spec)
    assert notes(spec)[1:] == ["ops: linear_cross_entropy: not used, the logits are not what the head makes alone"]
    found, truth = record_run(spec, one_process()), record_run(oracle_of(spec), one_process())
    assert max(row.difference for row in compare(found, truth)) <= EXACT


def test_nothing_is_looked_for_where_every_op_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("nobody has asked")

    monkeypatch.setattr("colossal_core.model_ops.uses.find_uses", never)
    plan = prepare(replace(SPEC, extra_ops=None), 1).plan
    assert (plan.data, plan.notes) == ({}, ())
    assert "ops         all reference" in plan.describe()
    assert prepare(SPEC.with_overrides({"ops.default": "reference"}), 1).plan.data == {}


def test_the_plan_prints_providers_that_are_not_the_reference() -> None:
    lines = prepare(SPEC.with_overrides({"ops.swiglu": "reference"}), 1).plan.describe().splitlines()
    names = ", ".join(op for op in MODEL_OPS if op != "swiglu")
    assert sorted(
        next(line for line in lines if line.startswith("ops  ")).split(": ")[1].split("; ")[0].split(", ")
    ) == sorted(names.split(", "))
    assert any(line.endswith("; others reference") for line in lines)


def test_ranks_with_other_ops_have_other_fingerprints() -> None:
    assert (
        len({prepare(one, 1).plan.fingerprint for one in (SPEC, SPEC.with_overrides({"ops.rotary": "reference"}))}) == 2
    )


def test_an_op_with_which_the_small_model_differs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from colossal_core.ops.swiglu import swiglu

    def wrong(gate: Tensor, up: Tensor, **_: Any) -> Tensor:
        return swiglu(gate, up) * 1.5

    broken = [replace(one, function=wrong) if one.op == "swiglu" else one for one in reference_ops()]
    monkeypatch.setattr("colossal_core.ops.reference.reference_ops", lambda: tuple(broken))
    anatomy = examine(Modern(), TokenBatches()(0, 2))
    from colossal_core.model_ops.proof import prove_ops

    assert anatomy.specimen is not None
    proof = prove_ops(anatomy, anatomy.specimen, ("rms_norm", "swiglu"))
    assert proof.same == {("rms_norm", "layers.*.before"), ("rms_norm", "norm")}
    assert [text.split(" by ")[0] for text in proof.left] == ["swiglu: not used, a small model of this kind differs"]


def test_a_model_without_a_specimen_is_left_alone() -> None:
    from colossal_core.model_ops.planning import plan_model_ops

    plan = prepare(replace(SPEC, extra_ops=None), 1).plan
    table = OpTable({one.op: one for one in (*reference_ops(), *twins())})
    found = plan_model_ops(plan, replace(examine(Modern(), TokenBatches()(0, 2)), specimen=None), table)
    assert found.data == {}
    assert found.notes == ("ops: the model's own code is left alone: no small model of its kind can prove the change",)


def test_providers_that_cannot_be_had_are_told_together() -> None:
    found = [*reference_ops(), OpImplementation("rotary", "fast", print, ("cuda",), ("bfloat16", "float16"))]
    asked = {
        "rotary": "fast",
        "swiglu": "slow",
        "swigloo": "fast",
        "x": "fast",
        "rms_norm": "reference",
        "attention": "auto",
    }
    assert [str(problem) for problem in op_problems(found, "cpu", "float32", asked)] == [
        "ops.rotary='fast': is for bfloat16 or float16 on cuda, and this run computes in float32 on cpu: use one of auto, reference",
        "ops.swiglu='slow': no installed package has this provider of it: use one of auto, reference",
        "ops.swigloo='fast': is no op: did you mean swiglu?",
        f"ops.x='fast': is no op: there are: {', '.join(OP_NAMES)}",
    ]
    with pytest.raises(ConfigError, match="no installed package has this provider"):
        prepare(SPEC.with_overrides({"ops.rotary": "other"}), 1)
    assert prepare(SPEC.with_overrides({"ops.rotary": PROVIDER}), 1).plan.ops["rotary"] == PROVIDER


def test_a_provider_that_the_config_names_is_used_inside_compiled_blocks() -> None:
    spec = SPEC.with_overrides({"compile.enabled": True, "ops.rms_norm": PROVIDER, "ops.swiglu": "reference"})
    found = next(note for note in prepare(spec, 1).plan.notes if "left to torch.compile" in note)
    left = found.partition("blocks: ")[2].split(", ")
    assert "rms_norm" not in left and "swiglu" not in left and "rotary" in left


def test_the_memory_of_a_model_with_ops_is_estimated_and_leaves_it_as_it_was() -> None:
    batch = TokenBatches()(0, 4)
    trained, plain = start(SPEC, one_process()), start(oracle_of(SPEC), one_process())
    engine = trained._engine
    estimator = PeakEstimator(
        engine.model, engine.plan, (), engine.loss_owner, batch, state_bytes=8.0, device_type="cpu"
    )
    assert estimator.estimate().total > 0
    losses = [one.train_step(batch).loss for one in (trained, plain)]
    assert relative_difference(*losses) <= EXACT


def test_fp16_keeps_the_logits() -> None:
    assert "linear_cross_entropy" not in replaced(SPEC.with_overrides({"precision": "fp16"}))
