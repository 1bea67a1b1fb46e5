"""Nothing narrower than float64 is made inside the mode, by a model that tries everything and by transformers' models."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from colossal_core.float64 import Float64Throughout

NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)


class NoNarrowFloat(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails on the first operation whose result is narrower than float64."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.dtype for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        assert not any(dtype in NARROW for dtype in made), f"{func} gives {made}"
        return result


@pytest.fixture(autouse=True)
def _default_dtype_is_restored() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == before


CREATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float": lambda x: x.float(),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "float of an integer": lambda x: torch.arange(3).float(),
    "to dtype": lambda x: x.to(torch.float32),
    "to dtype by name": lambda x: x.to(dtype=torch.bfloat16),
    "to device and dtype": lambda x: x.to("cpu", torch.float16),
    "type": lambda x: x.type(torch.float32),
    "type by name": lambda x: x.type("torch.FloatTensor"),
    "type by class": lambda x: x.type(torch.HalfTensor),  # type: ignore[call-overload]
    "softmax": lambda x: F.softmax(x, dim=-1, dtype=torch.float32),
    "softmax method": lambda x: x.softmax(-1, torch.float32),
    "sum": lambda x: x.sum(dtype=torch.float32),
    "zeros": lambda x: torch.zeros(3),
    "ones float32": lambda x: torch.ones(3, dtype=torch.float32),
    "full": lambda x: torch.full((3,), 0.1),
    "tensor": lambda x: torch.tensor([0.1, 0.2]),
    "tensor float32": lambda x: torch.tensor([1, 2], dtype=torch.float32),
    "arange": lambda x: torch.arange(0.0, 1.0, 0.1),
    "arange float32": lambda x: torch.arange(3, dtype=torch.float32),
    "rand": lambda x: torch.rand(3),
    "randn float32": lambda x: torch.randn(3, dtype=torch.float32),
    "empty": lambda x: torch.empty(3).fill_(0.1),
    "linspace": lambda x: torch.linspace(0, 1, 7),
    "zeros_like": lambda x: torch.zeros_like(x, dtype=torch.bfloat16),
    "new_ones": lambda x: x.new_ones(3, dtype=torch.float32),
    "integer quotient": lambda x: torch.arange(1, 4) / 3,
    "integer product": lambda x: torch.arange(1, 4) * 0.1,
    "default dtype": lambda x: torch.ones(3, dtype=torch.get_default_dtype()),
}


@pytest.mark.parametrize("name", CREATIONS)
def test_whatever_asks_for_a_narrow_float_gets_float64(name: str) -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    with Float64Throughout(), NoNarrowFloat():  # type: ignore[no-untyped-call]
        made = CREATIONS[name](x)
    assert made.dtype == torch.float64


def test_complex_casts_are_lifted_too() -> None:
    with Float64Throughout(), NoNarrowFloat():  # type: ignore[no-untyped-call]
        assert torch.rand(2).to(torch.complex64).dtype == torch.complex128


def test_a_dtype_taken_from_a_narrow_tensor_is_lifted() -> None:
    narrow = torch.zeros(2, dtype=torch.float32)
    x = torch.rand(2, dtype=torch.float64)
    with Float64Throughout():
        assert torch.equal(x.to(narrow), x)
        assert torch.equal(x.type_as(narrow), x)
        assert x.to(narrow, copy=True).dtype == torch.float64


def test_values_are_never_rounded_on_the_way() -> None:
    with Float64Throughout():
        assert torch.tensor(0.1).item() == 0.1
        assert torch.full((1,), 0.1, dtype=torch.float32).item() == 0.1
        assert (torch.arange(1, 2) / 3).item() == 1 / 3


def test_integers_and_bytes_stay() -> None:
    with Float64Throughout():
        assert torch.arange(3).dtype == torch.int64
        assert torch.tensor([True]).dtype == torch.bool
        assert torch.zeros(4, dtype=torch.uint8).view(torch.float32).dtype == torch.float32
        assert torch.frombuffer(bytearray(4), dtype=torch.float32).dtype == torch.float32


def test_a_default_dtype_set_inside_does_not_hold() -> None:
    with Float64Throughout():
        torch.set_default_dtype(torch.float32)
        assert (torch.arange(1, 2) / 3).item() == 1 / 3
        assert nn.Linear(2, 2).weight.dtype == torch.float64


def test_nests_and_is_shared_by_threads() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with Float64Throughout():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with Float64Throughout():
        with Float64Throughout():
            thread.start()
            assert inside.wait(10)
        assert torch.zeros(1).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float64
    leave.set()
    thread.join(10)
    assert torch.get_default_dtype() == torch.float32


class Casting(nn.Module):
    """A block that casts as transformers' blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale: torch.Tensor
        self.register_buffer("scale", 1.0 / torch.arange(1, 5, dtype=torch.int64).float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.linear(x).to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        return x + F.softmax(wide, dim=-1, dtype=torch.float32).to(x.dtype)


def by_method(loss: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    loss.backward(inputs=list(leaves))  # type: ignore[no-untyped-call]


def by_function(loss: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    torch.autograd.backward([loss], [torch.ones_like(loss)])


def by_grad(loss: torch.Tensor, leaves: Sequence[torch.Tensor]) -> None:
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.grad = gradient


@pytest.mark.parametrize("differentiate", [by_method, by_function, by_grad])
@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputation_in_every_kind_of_backward_is_lifted_too(
    differentiate: Callable[[torch.Tensor, Sequence[torch.Tensor]], None], recomputed: bool
) -> None:
    gradients = []
    for block_runs in (False, recomputed):
        with Float64Throughout(), NoNarrowFloat():  # type: ignore[no-untyped-call]
            torch.manual_seed(0)
            block = Casting()
            x = torch.rand(3, 4, requires_grad=True)
            y = checkpoint(block, x, use_reentrant=False) if block_runs else block(x)
            leaves = [x, *block.parameters()]
            differentiate(y.square().sum(), leaves)
            gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_reentrant_recomputation_is_lifted_too() -> None:
    with Float64Throughout(), NoNarrowFloat():  # type: ignore[no-untyped-call]
        block = Casting()
        x = torch.rand(3, 4, requires_grad=True)
        checkpoint(block, x, use_reentrant=True).square().sum().backward()
        assert torch.autograd.gradcheck(block, (x,))


def test_a_backward_pass_that_cannot_be_says_so() -> None:
    with Float64Throughout():
        x = torch.rand(3)
        with pytest.raises(RuntimeError) as caught:
            x.sum().backward()  # type: ignore[no-untyped-call]
    assert str(caught.value) == "element 0 of tensors does not require grad and does not have a grad_fn"


SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 2, "n_positions": 32},
    "opt": {"hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    "gemma2": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "sliding_window": 4,
    },
}


# transformers has no sdpa for Gemma-2.
@pytest.mark.parametrize(
    ("architecture", "attention"),
    [
        ("llama", "eager"),
        ("llama", "sdpa"),
        ("gpt2", "eager"),
        ("gpt2", "sdpa"),
        ("opt", "eager"),
        ("opt", "sdpa"),
        ("gemma2", "eager"),
    ],
)
def test_transformers_models_are_float64_throughout(architecture: str, attention: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the package transformers (colossal-launch[hf])")
    sizes = dict(SIZES[architecture], vocab_size=31, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    if architecture != "gpt2":
        sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 32}
    config = transformers.AutoConfig.for_model(architecture, attn_implementation=attention, use_cache=False, **sizes)
    with Float64Throughout():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        assert model.config._attn_implementation == attention
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            assert not tensor.is_floating_point() or tensor.dtype == torch.float64, name
        tokens = torch.randint(3, 31, (2, 7))
        with NoNarrowFloat():  # type: ignore[no-untyped-call]
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        parameters = list(model.parameters())
        moves = [1e-7 * torch.randn_like(parameter) for parameter in parameters]
        assert all(parameter.grad is not None for parameter in parameters)
        predicted = sum(float((p.grad * move).sum()) for p, move in zip(parameters, moves, strict=True))
        measured = (_loss_moved(model, tokens, moves, 1.0) - _loss_moved(model, tokens, moves, -1.0)) / 2
    # A float32 rounding anywhere would be 1e-7 of the loss, as large as the whole move.
    assert abs(measured - predicted) <= 1e-7 * abs(predicted)


def _loss_moved(model: nn.Module, tokens: torch.Tensor, moves: Sequence[torch.Tensor], sign: float) -> float:
    """The loss with every parameter moved by sign * move, and the parameters put back."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move, alpha=sign)
        loss = float(model(input_ids=tokens, labels=tokens).loss)
        for parameter, old in zip(model.parameters(), kept, strict=True):
            parameter.copy_(old)
    return loss


def test_products_of_experts_are_made_without_their_kernel() -> None:
    """Experts of unequal numbers of rows, one of none, and rows that belong to nobody; the kernel itself takes no float64."""
    torch.manual_seed(0)
    rows, matrices = torch.randn(7, 3, requires_grad=True), torch.randn(3, 3, 2, requires_grad=True)
    stops = torch.tensor([2, 2, 6], dtype=torch.int32)
    with Float64Throughout():
        doubled = rows.to(torch.float64), matrices.to(torch.float64)
        found = F.grouped_mm(*doubled, offs=stops)
        found.square().sum().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        expected = torch.cat(
            [doubled[0][:2] @ doubled[1][0], doubled[0][2:6] @ doubled[1][2], torch.zeros(1, 2).double()]
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert rows.grad is not None and matrices.grad is not None
    assert matrices.grad[1].abs().sum() == 0 and rows.grad[6].abs().sum() == 0
    with pytest.raises(RuntimeError, match="Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double"):
        F.grouped_mm(*doubled, offs=stops)
