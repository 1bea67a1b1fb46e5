"""RMS normalisation in the interpreter."""

import torch

from colossal_core.testing import OpSuite
from colossal_kernels.table import implementations


class TestRmsNorm(OpSuite):
    implementation = next(found for found in implementations() if found.op == "rms_norm")
    dtypes = ("float32", "float16")


def test_torch_knows_the_operator() -> None:
    from colossal_kernels.norms import rms_norm as module

    module.rms_norm(torch.ones(1, 2), None, 1e-6)
    x, weight = torch.randn(3, 7, requires_grad=True), torch.randn(7, requires_grad=True)
    torch.library.opcheck(torch.ops.colossal_kernels.rms_norm.default, (x, weight, 1e-6))
