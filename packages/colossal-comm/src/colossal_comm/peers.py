"""Whether the ranks of a group can read and write each other's GPU memory directly: what symmetric memory needs.

Decided by all ranks from what all of them say, so that all decide alike, before anything is connected.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import torch

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def own_facts(device: torch.device) -> bytes:
    """What this rank tells the others: its machine, its GPU, and the GPUs whose memory it reaches (of those visible to this process)."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    others = [torch.device("cuda", index) for index in range(torch.cuda.device_count()) if index != device.index]
    reached = [_uuid(other) for other in others if torch.cuda.can_device_access_peer(device, other)]
    own = _uuid(device)
    return json.dumps({"machine": f"{socket.gethostname()} {boot}", "gpu": own, "reached": [own, *reached]}).encode()


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def reach_each_other(facts: Sequence[bytes]) -> bool:
    """Whether all ranks are on one machine, on a GPU of their own each, and every one reaches every other's memory."""
    ranks = [json.loads(fact) for fact in facts]
    gpus = {rank["gpu"] for rank in ranks}
    one_machine = len({rank["machine"] for rank in ranks}) == 1
    return one_machine and len(gpus) == len(ranks) and all(gpus <= set(rank["reached"]) for rank in ranks)
