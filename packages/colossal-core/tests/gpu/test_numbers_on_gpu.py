"""What must be the same on an accelerator as on the CPU: keyed numbers, float64 throughout, and steps that never wait."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from colossal_core.float64 import Float64Throughout
from colossal_core.ops.reference import AdamWSettings, adamw_step, cross_entropy, linear_cross_entropy
from colossal_core.random import RandomKey, keyed_bits, keyed_dropout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


# torch 2.11's own compiler still uses what torch.jit deprecates on Python 3.12.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_keyed_numbers_are_those_of_the_cpu_eager_and_compiled() -> None:
    ids = torch.arange(4) + 2**33
    expected = keyed_bits(RandomKey.of(7, 3, CPU), ids, (4, 33, 65), 5)
    key = RandomKey.of(7, 3, GPU)
    assert torch.equal(keyed_bits(key, ids.to(GPU), (4, 33, 65), 5).cpu(), expected)
    compiled = torch.compile(keyed_bits, fullgraph=True)
    assert torch.equal(compiled(key, ids.to(GPU), (4, 33, 65), 5).cpu(), expected)
    x = torch.ones(4, 33, 65)
    dropped = keyed_dropout(x.to(GPU, torch.bfloat16), 0.3, key, ids.to(GPU), 5)
    assert torch.equal(dropped.cpu() == 0, keyed_dropout(x, 0.3, RandomKey.of(7, 3, CPU), ids, 5) == 0)


def test_recomputation_on_the_device_thread_is_lifted() -> None:
    seen: list[torch.dtype] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        y = F.softmax((x * 1.1).to(torch.float32), dim=-1, dtype=torch.float32)
        seen.append(y.dtype)
        return y * x

    with Float64Throughout():
        x = torch.rand(3, 4, device=GPU, requires_grad=True)
        checkpoint(block, x, use_reentrant=False).square().sum().backward()
        (plain,) = torch.autograd.grad(block(x).square().sum(), x)
    assert seen == [torch.float64] * 3
    assert x.grad is not None
    torch.testing.assert_close(x.grad, plain, rtol=1e-14, atol=0.0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_the_ops_never_wait_for_the_device() -> None:
    params, grads, firsts, seconds = ([torch.rand(64, 64, device=GPU) for _ in range(3)] for _ in range(4))
    step, clip = torch.ones((), device=GPU), torch.full((), 0.5, device=GPU)
    skip = torch.zeros((), dtype=torch.bool, device=GPU)
    hidden = torch.rand(16, 8, device=GPU, requires_grad=True)
    weight = torch.rand(32, 8, device=GPU, requires_grad=True)
    labels = torch.arange(16, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_step(params, grads, firsts, seconds, settings=AdamWSettings(1e-3), step=step, clip=clip, skip=skip)
        total, _ = cross_entropy(hidden @ weight.T, labels)
        torch.autograd.backward(total + linear_cross_entropy(hidden, weight, labels, budget_bytes=5 * 32 * 4))
        key = RandomKey.of(7, 3, GPU)
        keyed_dropout(hidden, 0.3, key, labels, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert hidden.grad is not None
