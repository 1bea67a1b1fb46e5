"""Activation bytes traced on fake tensors, beside what a real forward pass saves and a real step holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from colossal_core.activations import ActivationTracer, Treatment
from colossal_core.examine import examine
from colossal_core.live_bytes import LiveBytes
from colossal_core.loss import LossOwner
from colossal_core.ops import OpTable
from colossal_core.ops.reference import reference_ops
from colossal_core.precision import precision
from colossal_core.recompute import Recomputation, install
from colossal_core.testing.models import TinyLM, TinyOptions, TokenBatches

OPTIONS = TinyOptions(vocab_size=96, hidden_size=64, num_heads=4, num_blocks=3, max_length=32, dropout=0.0)
BATCH = TokenBatches(vocab_size=96, length=32)


def batch() -> Mapping[str, Tensor]:
    given = BATCH(0, 8)
    return {"input_ids": given["input_ids"], "labels": given["labels"]}


def traced(model: nn.Module, treatment: Treatment) -> tuple[int, int, int]:
    blocks = tuple(name for name, _ in model.named_modules() if name.startswith("blocks.") and name.count(".") == 1)
    found = ActivationTracer(model, blocks, loss_owner(model), precision("fp32")).trace(batch(), treatment)
    assert found.problem == ""
    return found.kept_bytes, found.loss_bytes, found.backward_bytes


def loss_owner(model: nn.Module) -> LossOwner:
    anatomy = replace(examine(model, batch()), task="causal-lm")
    return LossOwner(anatomy, OpTable({op.op: op for op in reference_ops()}), None)


class Meter:
    """What a real step holds when the last block has run, and at the most before and after the loss's gradient reaches it."""

    def __init__(self, model: TinyLM) -> None:
        self.counted = LiveBytes()
        self.kept = 0
        self.loss_peak = 0
        model.blocks[-1].register_forward_hook(self._after_last)

    def _after_last(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        del module, inputs
        self.kept = self.counted.current
        output.register_hook(self._before_backward)  # type: ignore[no-untyped-call]

    def _before_backward(self, gradient: Tensor) -> None:
        del gradient
        self.loss_peak = self.counted.restart()


def real(model: TinyLM) -> tuple[int, int, int]:
    """One eager step on real tensors."""
    owner, inputs = loss_owner(model), loss_owner(model).with_targets(batch())
    meter = Meter(model)
    meter.counted.ignore((*model.parameters(), *model.buffers(), *inputs.values()))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
    with _collected(), meter.counted:
        loss = owner(model, inputs).sum
        scaled = loss / 2.0
        del loss
        scaled.backward()  # type: ignore[no-untyped-call]
    return meter.kept, meter.loss_peak - meter.kept, meter.counted.peak - meter.kept


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


@contextmanager
def _collected() -> Iterator[None]:
    """No garbage that is in a cycle is counted as alive."""
    gc.collect()
    yield


def model() -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(OPTIONS)


def near(found: int, expected: int, share: float) -> None:
    assert abs(found - expected) <= share * expected, f"traced {found}, real {expected}"


def test_nothing_recomputed() -> None:
    kept, loss, backward = traced(model(), Treatment())
    real_kept, real_loss, real_backward = real(model())
    assert (kept, loss) == (real_kept, real_loss)
    near(kept + backward, real_kept + real_backward, 0.05)


def test_saved_tensors_of_the_blocks() -> None:
    """The bytes of unique storages that autograd saves inside blocks, parameters and buffers aside."""
    saved: dict[int, Tensor] = {}
    whole = model()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*whole.parameters(), *whole.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in known:
            saved.setdefault(key, tensor)
        return tensor

    x = torch.randn(8, 32, 64, requires_grad=True)
    mask = torch.ones(8, 32, 32, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        whole.blocks[0](x, mask)
    expected = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    three, _, _ = traced(model(), Treatment())
    options = TinyOptions(**{**vars(OPTIONS), "num_blocks": 4})
    four, _, _ = traced(TinyLM(options), Treatment())
    near(four - three, expected - mask.numel(), 0.02)  # the mask is one for all blocks


def test_everything_recomputed() -> None:
    kept, loss, backward = traced(model(), Treatment("full"))
    checkpointed = model()
    for block in checkpointed.blocks:
        install(Recomputation(block, ()))
    real_kept, real_loss, real_backward = real(checkpointed)
    near(kept, real_kept, 0.02)
    near(kept + loss, real_kept + real_loss, 0.02)
    near(kept + backward, real_kept + real_backward, 0.1)


def test_a_selective_budget_keeps_what_selective_keeps() -> None:
    kept, loss, _ = traced(model(), Treatment("selective", 0.5))
    checkpointed = model()
    for block in checkpointed.blocks:
        install(Recomputation(block, (), 0.5))
    real(checkpointed)  # measures the blocks, once
    checkpointed.blocks[-1]._forward_hooks.clear()
    real_kept, real_loss, _ = real(checkpointed)
    assert kept == real_kept
    near(kept + loss, real_kept + real_loss, 0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_blocks_keep_what_the_partitioner_keeps(dropout: float) -> None:
    """With torch's own stack at work: the tensors that each compiled block's node saves."""
    from colossal_core.keyed_dropout import install_keyed_dropout

    options = TinyOptions(**{**vars(OPTIONS), "dropout": dropout})
    kept, _, _ = traced(TinyLM(options), Treatment(backend="aot_eager"))
    compiled = TinyLM(options)
    install_keyed_dropout(compiled).set(0, 0, torch.arange(8))
    for block in compiled.blocks:
        vars(block)["forward"] = torch.compile(block.forward, backend="aot_eager")
    real(compiled)  # compiles
    compiled.blocks[-1]._forward_hooks.clear()
    real_kept, _, _ = real(compiled)
    near(kept, real_kept, 0.03)


def test_a_model_that_looks_at_values_is_told_of() -> None:
    class Looking(TinyLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> object:  # type: ignore[override]
            return super().forward(input_ids[:, : int(input_ids.sum().item())])

    looking = Looking(OPTIONS)
    found = ActivationTracer(looking, (), loss_owner(looking), precision("fp32")).trace(batch(), Treatment())
    assert found.kept_bytes == 0
    assert found.problem.startswith("DataDependentOutputException: ")
