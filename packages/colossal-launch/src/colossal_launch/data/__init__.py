"""Text in, batches out: where documents come from, how they become tokens, and which tokens a step holds."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_launch.data.loader import BatchShare, DistributedLoader
    from colossal_launch.data.packing import TextDataset
    from colossal_launch.data.preparation import PreparedText, open_text, prepare_text

__all__ = ["BatchShare", "DistributedLoader", "PreparedText", "TextDataset", "open_text", "prepare_text"]

_HOMES = {
    "BatchShare": "loader",
    "DistributedLoader": "loader",
    "TextDataset": "packing",
    "PreparedText": "preparation",
    "open_text": "preparation",
    "prepare_text": "preparation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
