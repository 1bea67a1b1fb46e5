"""Libraries of C++ functions on plain pointers, built on first use and kept in a cache.

Plain C functions through ctypes: no header of torch's or Python's is read, so a build takes about a second (27 s with torch's headers), one
build serves every version of both, and a call gives the interpreter free while it runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
NATIVE = (("-march=native",), ("-mcpu=native",), ())
"""For this machine's vectors, as x86's and ARM's compilers ask for them; else the least that its kind of processor has."""


def compiler() -> str | None:
    """The C++ compiler: `CXX` where that is set, else the system's; None where there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def cache_folder() -> Path:
    """`COLOSSAL_KERNELS_CACHE`, else `colossal-kernels` in the user's cache."""
    chosen = os.environ.get("COLOSSAL_KERNELS_CACHE")
    return (
        Path(chosen)
        if chosen
        else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "colossal-kernels"
    )


@lru_cache(maxsize=8)
def library(name: str) -> ctypes.CDLL | None:
    """The library of the source `name` beside this file, built if it is not in the cache. None, after a warning, where that fails.

    Processes may build at once: each into a file of its own, which it then moves to its place. The name holds source, flags, compiler and
    processor, since machines of different kinds may share a cache.
    """
    source = Path(__file__).with_name(name)
    found = compiler()
    if found is None:
        return None
    try:
        return ctypes.CDLL(str(_built(source, found, cache_folder())))
    except (OSError, subprocess.CalledProcessError) as error:
        told = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"{name} could not be built by {found}, torch's operations serve instead: {told}", stacklevel=2)
        return None


def _built(source: Path, found: str, folder: Path) -> Path:
    version = str(Path(found).resolve().stat().st_mtime_ns)  # of a compiler that was upgraded in its place
    key = "\0".join((source.read_text(), found, version, *FLAGS, _processor()))
    place = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}.so"
    if place.exists():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        target = Path(own) / place.name
        _compile(source, found, target)
        target.replace(place)
    return place


def _compile(source: Path, found: str, target: Path) -> None:
    for native in NATIVE:
        command = [found, *FLAGS, *native, str(source), "-o", str(target), "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)


def _processor() -> str:
    """The kind of processor, with the instructions that it has where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
