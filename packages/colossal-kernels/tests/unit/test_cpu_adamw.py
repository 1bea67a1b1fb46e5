"""AdamW on the CPU in one mixed pass, compiled here."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from colossal_core.ops import adamw as reference
from colossal_core.ops.adamw import AdamWSettings
from colossal_core.testing import OpSuite
from colossal_kernels.cpu import adamw as module
from colossal_kernels.cpu import built
from colossal_kernels.table import implementations

pytestmark = pytest.mark.skipif(built.compiler() is None, reason="needs a C++ compiler")

SETTINGS = AdamWSettings(lr=1e-2, beta2=0.95, weight_decay=0.1)
KEYWORDS: dict[str, Any] = {"settings": SETTINGS, "step": torch.tensor(3.0)}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLOSSAL_KERNELS_CACHE", str(shared_cache))
    built.library.cache_clear()
    yield
    built.library.cache_clear()


if built.compiler() is not None:

    class TestAdamWStep(OpSuite):
        implementation = next(found for found in implementations() if found.provider == "cpu_simd")
        dtypes = ("float32",)


def drawn(numel: int, grad: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """A parameter, its gradient and moments."""
    generator = torch.Generator().manual_seed(numel)
    param, grads, first, second = (torch.randn(numel, generator=generator) for _ in range(4))
    return [param, grads.to(grad), first, second.square()]


def step(lists: list[list[torch.Tensor]], **keywords: Any) -> None:
    params, grads, firsts, seconds = (list(found) for found in zip(*lists, strict=True))
    module.adamw_step(params, grads, firsts, seconds, **KEYWORDS, **keywords)


def by_reference(lists: list[torch.Tensor]) -> None:
    params, grads, firsts, seconds = ([tensor] for tensor in lists)
    reference.adamw_step(params, grads, firsts, seconds, **KEYWORDS)


@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float32])
def test_one_mixed_pass(grad: torch.dtype) -> None:
    sizes = [1, 17, 64, 1000, 70001]
    lists = [drawn(size, grad) for size in sizes]
    copies = [torch.full((size,), math.nan, dtype=torch.bfloat16) for size in sizes]
    step(lists, clip=torch.tensor(0.3), skip=torch.tensor(False), copies=copies)
    for ours, copy, size in zip(lists, copies, sizes, strict=True):
        exact = [tensor.double() for tensor in drawn(size, grad)]
        near = [tensor.float() for tensor in drawn(size, grad)]
        for lists_of_one in (exact, near):
            params, grads, firsts, seconds = ([tensor] for tensor in lists_of_one)
            reference.adamw_step(params, grads, firsts, seconds, **KEYWORDS, clip=torch.tensor(0.3))
        for index in (0, 2, 3):
            allowed = 2.0 * (near[index] - exact[index]).abs().max() + 2.0**-23 * exact[index].abs().max()
            assert (ours[index] - exact[index]).abs().max() <= allowed
        assert torch.equal(ours[1], drawn(size, grad)[1])
        assert torch.equal(copy, ours[0].bfloat16())


def test_who_saved_what_a_step_changes_is_told() -> None:
    lists, copy = drawn(9), torch.zeros(9, dtype=torch.bfloat16)
    before = [tensor._version for tensor in (*lists, copy)]
    step([lists], copies=[copy])
    changed = [tensor._version > old for tensor, old in zip((*lists, copy), before, strict=True)]
    assert changed == [True, False, True, True, True]


def test_an_element_is_the_same_wherever_it_lies() -> None:
    """In one tensor or cut into odd pieces, by one thread or three: bit for bit."""
    numel = 200_003
    whole, cut = drawn(numel), drawn(numel)
    torch.set_num_threads(3)
    step([whole])
    torch.set_num_threads(1)
    bounds = [0, 1, 13, 100, 65_000, 65_001, 150_007, numel]
    pieces = [[tensor[low:high] for tensor in cut] for low, high in pairwise(bounds)]
    step(pieces)
    assert all(torch.equal(one, other) for one, other in zip(whole, cut, strict=True))


def test_a_skipped_step_changes_copies_alone() -> None:
    ours = drawn(100)
    ours[1].fill_(math.nan)
    copy = torch.zeros(100, dtype=torch.bfloat16)
    step([ours], clip=torch.tensor(math.inf), skip=torch.tensor(True), copies=[copy])
    assert all(torch.equal(ours[index], drawn(100)[index]) for index in (0, 2, 3))
    assert torch.equal(copy, ours[0].bfloat16())


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1e-40, 1.00390625, 1.01171875])
def test_copies_are_rounded_as_torch_rounds(value: float) -> None:
    """Ties to even; what is no number stays none."""
    param, zeros = torch.full((33,), value), [torch.zeros(33) for _ in range(3)]
    copy = torch.zeros(33, dtype=torch.bfloat16)
    settings = AdamWSettings(lr=0.0)
    module.adamw_step(
        [param], [zeros[0]], [zeros[1]], [zeros[2]], settings=settings, step=torch.tensor(1), copies=[copy]
    )
    assert torch.equal(copy.view(torch.int16), torch.full((33,), value).bfloat16().view(torch.int16)) or (
        math.isnan(value) and bool(copy.isnan().all())
    )


def test_what_it_does_not_take_goes_to_the_reference() -> None:
    for lists in (
        [tensor.double() for tensor in drawn(12)],
        [tensor.float().view(3, 4).t() for tensor in drawn(12)],
        [tensor.half() for tensor in drawn(12)],
    ):
        same = [tensor.clone(memory_format=torch.preserve_format) for tensor in lists]
        step([lists])
        by_reference(same)
        assert all(torch.equal(one, other) for one, other in zip(lists, same, strict=True))


def test_torch_knows_the_operator() -> None:
    step([drawn(5)])
    lists = [[tensor] for tensor in drawn(5)]
    arguments = (
        *lists,
        [torch.zeros(5).bfloat16()],
        torch.tensor(2.0),
        None,
        torch.tensor(False),
        [0.1, 0.9, 0.9, 1e-8, 0],
    )
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.colossal_kernels.cpu_adamw_step.default, arguments, test_utils=checks)


def test_processes_that_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends with the one library of the cache, which a later process only loads."""
    monkeypatch.setenv("COLOSSAL_KERNELS_CACHE", str(tmp_path))
    code = "from colossal_kernels.cpu.built import library; assert library('adamw.cpp') is not None"
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    kept = [path.name for path in tmp_path.iterdir()]
    assert len(kept) == 1
    monkeypatch.setattr(built, "_compile", None)
    assert built.library("adamw.cpp") is not None


def test_without_a_compiler_the_reference_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "cpu_simd" not in {found.provider for found in implementations()}
    ours, same = drawn(9, torch.float32), drawn(9, torch.float32)
    step([ours])
    by_reference(same)
    assert all(torch.equal(one, other) for one, other in zip(ours, same, strict=True))


def test_a_build_that_fails_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("COLOSSAL_KERNELS_CACHE", str(tmp_path / "cache"))
    expected = f"adamw.cpp could not be built by {broken}, torch's operations serve instead: no memory\n"
    with pytest.warns(UserWarning, match=f"^{re.escape(expected)}$"):
        step([drawn(9, torch.float32)])
    step([drawn(9, torch.float32)])
    assert list((tmp_path / "cache").iterdir()) == []
