"""Where a model computes ops: norms, gates, rotations, residual sums and experts, found and proven; and what looks like one and is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colossal_core.difference import EXACT, relative_difference
from colossal_core.float64 import Float64Throughout
from colossal_core.model_ops.experts import Experts, find_experts
from colossal_core.model_ops.gates import find_activation
from colossal_core.model_ops.norms import Norm, find_norm, is_candidate
from colossal_core.model_ops.replacing import install
from colossal_core.model_ops.rotations import Rotation, find_rotation, rotated
from colossal_core.model_ops.uses import Uses, find_uses
from colossal_core.ops import OpImplementation
from colossal_core.ops.experts import experts
from colossal_core.ops.reference import reference_ops
from colossal_core.ops.rotary import rotary


class Root(nn.Module):
    """x / sqrt(mean(x^2) + eps) times `offset + scale`, `eps` added where `inside` says."""

    def __init__(self, offset: float = 0.0, *, inside: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.offset, self.inside, self.small = offset, inside, eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        size = x.float().square().mean(-1, keepdim=True)
        root = (size + self.small).sqrt() if self.inside else size.sqrt() + self.small
        y = (x.float() / root * (self.offset + self.scale)).type_as(x)
        return y if gate is None else y * F.relu(gate)


class Shifted(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


NORMS = {
    "root": (Root(), Norm("rms_norm", "scale", None, 1e-6)),
    "offset": (Root(1.0), Norm("rms_norm", "scale", None, 1e-6, 1.0)),
    "eps outside": (Root(inside=False), None),
    "torch's": (nn.LayerNorm(6), Norm("layer_norm", "weight", "bias", 1e-5)),
    "no bias": (nn.LayerNorm(6, eps=1e-3, bias=False), Norm("layer_norm", "weight", None, 1e-3)),
    "no parameter": (nn.LayerNorm(6, elementwise_affine=False), Norm("layer_norm", None, None, 1e-5)),
    "torch's root": (nn.RMSNorm(6, eps=1e-5), Norm("rms_norm", "weight", None, 1e-5)),
    "eps by dtype": (nn.RMSNorm(6), None),
    "weight from one": (Shifted(6), Norm("layer_norm", "weight", "bias", 1e-5, 1.0)),
    "over groups": (nn.GroupNorm(1, 6), None),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_are_proven_on_any_device(name: str) -> None:
    module, wanted = NORMS[name]
    assert is_candidate(module)
    assert find_norm(module) == wanted
    assert find_norm(module.to("meta")) == wanted


def test_a_layer_or_two_dimensions_are_no_norm() -> None:
    assert [is_candidate(one) for one in (nn.Linear(6, 6), nn.LayerNorm((2, 3)), nn.BatchNorm1d(6))] == [False] * 3


class Gates(nn.Module):
    """Gated products in every form."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.both = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 16)
        self.act, self.other, self.learned = nn.SiLU(), nn.GELU(approximate="tanh"), nn.PReLU()

    def forward(self, x: Tensor) -> Any:
        first = self.act(self.one(x)) * self.two(x)
        second = self.two(x) * F.silu(self.one(x))
        gate = self.other(self.one(x))
        up = self.two(x)
        third = gate * up
        return first + second + third + self.halves(x) + self.not_gates(x)

    def halves(self, x: Tensor) -> Any:
        gate, up = self.both(x).chunk(2, dim=-1)
        up = F.gelu(gate, approximate="none") * up
        return up  # noqa: RET504 - as some models have it

    def not_gates(self, x: Tensor) -> Any:
        gate = self.act(self.one(x))
        kept = gate * self.two(x)
        early = self.act(x)
        x.add_(1.0)
        kept = kept + early * x
        return self.learned(self.one(x)) * self.two(x) + torch.sigmoid(self.one(x)) * kept + gate * 2.0


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return turned(q, k, cos, sin), not_turned(q, k, cos, sin)


def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def half(x: Tensor) -> Tensor:
        return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)

    return q * cos + half(q) * sin, k * cos + half(k) * sin


def not_turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return q * cos.unsqueeze(1) + sin.unsqueeze(1), k


class Block(nn.Module):
    """Sums and norms in the forms that blocks have."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between, self.after = Root(), Root(), nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        kept = x
        x = self.one(self.before(x))
        x = kept + x
        kept = x
        x = self.between(x)
        x = self.two(x)
        x = self.after(x + kept)
        y = x + kept
        y = y * 2
        y = y + 1.0
        y = self.before(y)
        return y * 2


def found(module: nn.Module) -> Uses:
    return find_uses(module, ())


def test_gates_are_found_in_every_form_and_nothing_else() -> None:
    uses = found(Gates())
    assert [(use.method, [edit.ops for edit in use.edits]) for use in uses.methods] == [
        ("forward", [("swiglu",), ("swiglu",), ("geglu",)]),
        ("halves", [("packed_geglu", "geglu")]),
    ]
    assert uses.left == ()


def test_rotations_and_sums_are_found() -> None:
    assert found(Attention()).modules == {"rotary": ("",)}
    assert found(Attention()).left == ("1 x not_turned of Attention (no op computes it)",)
    assert found(Block()).modules == {
        "rms_norm": ("before", "between"),
        "layer_norm": ("after",),
        "add_rms_norm": ("",),
        "add_layer_norm": ("",),
    }


def test_a_forward_of_the_users_own_is_left_alone() -> None:
    module = Block()
    vars(module.before)["forward"] = torch.relu
    assert found(module).modules["rms_norm"] == ("between",)
    gates = Gates()
    gates.act.register_forward_hook(lambda *_: None)
    assert [len(use.edits) for use in found(gates).methods] == [2, 1]


def test_the_forms_of_a_rotation() -> None:
    def pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rotary(q.float(), k.float(), cos, sin, interleaved=True, angles="neighbours")

    def whole(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = turned(q.float(), k.float(), cos, sin)
        return q.bfloat16(), k.bfloat16()

    assert find_rotation(turned) == Rotation(
        False, "halves", False, 1, partial=False, keeps_dtype=False, keeps_narrow=True
    )
    assert find_rotation(pairs) == Rotation(
        True, "neighbours", False, 1, partial=True, keeps_dtype=False, keeps_narrow=False
    )
    assert find_rotation(whole) == Rotation(
        False, "halves", False, 1, partial=False, keeps_dtype=True, keeps_narrow=True
    )
    assert find_rotation(not_turned) is None
    assert find_rotation(rotary) is not None
    assert find_rotation(print) is None


@pytest.mark.parametrize(
    ("change", "by_op"),
    [
        ({}, True),
        ({"unsqueeze_dim": 1}, True),
        ({"unsqueeze_dim": 2}, False),
        ({"cos": torch.ones(1, 5, 4)}, False),
        ({"q": torch.ones(2, 3, 5, 8, dtype=torch.float64)}, False),
        ({"cos": torch.ones(1, 1, 5, 8)}, False),
    ],
    ids=["plain", "keyword", "other heads", "partial", "dtype", "shape"],
)
def test_calls_that_were_not_proven_go_to_the_original(change: dict[str, Any], by_op: bool) -> None:
    calls: list[str] = []

    def op(q: Tensor, k: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        calls.append("op")
        return q, k

    def original(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        calls.append("original")
        return q, k

    rotation = find_rotation(turned)
    assert rotation is not None
    given = {
        "q": torch.ones(2, 3, 5, 8),
        "k": torch.ones(2, 1, 5, 8),
        "cos": torch.ones(1, 5, 8),
        "sin": torch.ones(1, 5, 8),
    }
    rotated(rotation, op, original)(**{**given, **change})  # type: ignore[arg-type]
    assert calls == ["op" if by_op else "original"]


class Layer(nn.Module):
    """Experts by the reference, or with another activation."""

    def __init__(self, *, plain: bool = True, width: int = 6) -> None:
        super().__init__()
        self.gates, self.out = nn.Parameter(torch.randn(4, 10, width)), nn.Parameter(torch.randn(4, width, 5))
        self.plain = plain

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return experts(x, self.gates, self.out, chosen, weights if self.plain else weights.square())


def test_experts_are_proven_in_small() -> None:
    with torch.device("meta"):
        huge = Layer(width=1 << 20)
    assert find_experts(Layer()) == find_experts(huge) == Experts("gates", "out")
    assert find_experts(Layer(plain=False)) is None
    assert find_experts(Gates()) is None


@pytest.mark.parametrize("touched", ["", "hook", "forward"])
def test_sums_go_the_old_way_where_a_norm_is_not_what_it_was(touched: str) -> None:
    calls: list[str] = []

    def counted(found: OpImplementation) -> Any:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append(found.op)
            return found.function(*args, **kwargs)

        return function

    plain, used = Block().double(), Block().double()
    used.load_state_dict(plain.state_dict())
    uses = found(used)
    install(used, uses, uses.modules, {one.op: counted(one) for one in reference_ops()})
    for block in (plain, used):
        if touched == "hook":
            block.between.register_forward_hook(lambda module, args, output: output * 2.0)
        if touched == "forward":
            vars(block.between)["forward"] = torch.tanh
    x = torch.randn(3, 6, dtype=torch.float64)
    with Float64Throughout():
        assert relative_difference(used(x), plain(x)) <= EXACT
    of_sums = 1 if touched else 2
    rest = {"": ["rms_norm"], "hook": ["rms_norm", "rms_norm"], "forward": ["rms_norm"]}[touched]
    assert sorted(calls) == sorted(["add_rms_norm"] * (of_sums - 1) + ["add_layer_norm"] + rest + ["rms_norm"])


class Limited(nn.Module):
    """gelu up to a limit, as transformers' gelu_10."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x).clamp(-10.0, 10.0)


class Held(nn.Module):
    """Experts whose rows are at most 10."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.out = nn.Parameter(torch.randn(4, 10, 6)), nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        return experts(x.clamp(-10.0, 10.0), self.gates, self.out, chosen, weights)


class Wide(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_what_differs_on_large_numbers_alone_or_in_its_dtype_is_no_op() -> None:
    assert find_activation(nn.GELU(), {}) is not None
    assert find_activation(Limited(), {}) is None
    assert find_experts(Held()) is None
    assert find_norm(Wide(6, eps=1e-5)) is None
