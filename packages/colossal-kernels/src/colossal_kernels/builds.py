"""Compiling kernels ahead of time for a GPU that need not be there: what a launch would compile, with the registers, shared memory and
spills of the binary.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHARED_BYTES = 227 * 1024
"""What one thread block may use on sm_90."""


@dataclass(frozen=True)
class Build:
    """One specialisation of a kernel, as a launch would ask for it.

    name: for the reader. kernel: the function under `triton.jit`. types: of the arguments that are no constants, by name, in Triton's
    letters (`*bf16`, `i64`, `fp32`). constants: the `tl.constexpr` arguments. aligned: arguments divisible by 16 (pointers are).
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildReport:
    """registers: of a thread. spilled_bytes: of a thread, stores and loads. shared_bytes: of a thread block."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str = field(repr=False, default="")


def compile_build(build: Build, capability: int = 90) -> BuildReport:
    """Compiles to a binary for `sm_<capability>`; needs no GPU and no driver. Must not run under Triton's interpreter.

    Errors: what Triton or ptxas says when it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    missing = [name for name in names if name not in build.types and name not in build.constants]
    assert not missing, f"{build.name}: neither typed nor constant: {missing}"
    signature = {name: build.types.get(name, "constexpr") for name in names}
    divisible = [name for name in names if signature[name].startswith("*") or name in build.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(build.kernel, signature, dict(build.constants), attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _assembled(compiled.asm["ptx"], capability)
    return BuildReport(build.name, registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])


def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes that the assembler reports."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\S+?),?\s", ptx, re.MULTILINE)
    assert target is not None, "a PTX file names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        assembler = get_ptxas(capability).path
        command = [assembler, "-v", f"-arch={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", told)
    spilled = re.findall(r"(\d+) bytes spill", told)
    assert used is not None, told
    return int(used[1]), sum(map(int, spilled))
