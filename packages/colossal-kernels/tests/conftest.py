"""Kernels run in Triton's interpreter here, which must be chosen before Triton is imported: so these tests have a process of their own."""

import os
import sys

import pytest
import torch

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    raise pytest.UsageError("Triton is imported already: run the tests of colossal-kernels by themselves")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
