"""The states of all random generators that training may draw from, as JSON values."""

from __future__ import annotations

import base64
import binascii
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

from colossal_core.errors import CheckpointError


def capture_random_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's CPU generator, that of `device` where it is an accelerator, Python's, and numpy's where it is imported.

    JSON values, about 25 kB. Reading an accelerator's generator waits for the device.
    """
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "device": None,
        "python": {"version": version, "words": list(words), "gauss": gauss},
        "numpy": None,
    }
    if device.type != "cpu":
        module = torch.get_device_module(device)
        state["device"] = {"type": device.type, "state": _encode(module.get_rng_state(device))}
    if "numpy" in sys.modules:
        import numpy as np

        found: Any = np.random.get_state(legacy=False)
        inner = {"key": found["state"]["key"].tolist(), "pos": int(found["state"]["pos"])}
        state["numpy"] = {
            "bit_generator": found["bit_generator"],
            "state": inner,
            "has_gauss": int(found["has_gauss"]),
            "gauss": float(found["gauss"]),
        }
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Takes back what `capture_random_state` returned. The state of an accelerator of another type is left alone.

    Errors: CheckpointError when the values are not those of a generator.
    """
    try:
        torch.set_rng_state(_decode(state["torch"]))
        if state["device"] is not None and state["device"]["type"] == device.type:
            torch.get_device_module(device).set_rng_state(_decode(state["device"]["state"]), device)
        python = state["python"]
        random.setstate((python["version"], tuple(python["words"]), python["gauss"]))
        if state["numpy"] is not None:
            _restore_numpy(state["numpy"])
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, binascii.Error) as error:
        raise CheckpointError(f"the random state cannot be restored: {type(error).__name__}: {error}") from error


def _restore_numpy(state: Mapping[str, Any]) -> None:
    import numpy as np

    inner = {"key": np.array(state["state"]["key"], dtype=np.uint32), "pos": state["state"]["pos"]}
    np.random.set_state({**state, "state": inner})


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.tensor(list(base64.b64decode(text, validate=True)), dtype=torch.uint8)
