"""Checkpoints: every tensor has one kind, one full name and one global shape, whatever the mesh; saved sharded, loaded on any mesh.

A checkpoint is a folder `step-00000042` of safetensors files, one or more for each rank that owns something, and `manifest.json`: which
box of which tensor lies where, with a CRC-32 for each. It is written aside as `step-00000042.tmp`, synced, the manifest last, then
renamed; so a folder with a final name is complete. Nothing in it is a pickle. Read in order: manifest, folders, agreement, write, saving,
find, loading.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from colossal_core.checkpoint.find import FoundCheckpoint, find_latest
    from colossal_core.checkpoint.inspection import describe, read_full
    from colossal_core.checkpoint.loading import load
    from colossal_core.checkpoint.manifest import Manifest
    from colossal_core.checkpoint.manifest_file import read_manifest
    from colossal_core.checkpoint.random_state import capture_random_state, restore_random_state
    from colossal_core.checkpoint.saving import save

__all__ = [
    "FoundCheckpoint",
    "Manifest",
    "capture_random_state",
    "describe",
    "find_latest",
    "load",
    "read_full",
    "read_manifest",
    "restore_random_state",
    "save",
]

_MODULES = {
    "FoundCheckpoint": "find",
    "Manifest": "manifest",
    "capture_random_state": "random_state",
    "describe": "inspection",
    "find_latest": "find",
    "load": "loading",
    "read_full": "inspection",
    "read_manifest": "manifest_file",
    "restore_random_state": "random_state",
    "save": "saving",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
