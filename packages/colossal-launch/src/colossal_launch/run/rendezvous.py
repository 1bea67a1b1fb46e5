"""A rendezvous of one host, with a store on the loopback interface only, in which nothing is unpickled.

torch's own handlers serve a store on every interface and unpickle what they read there; one host has nobody to wait for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

if TYPE_CHECKING:
    from colossal_launch.run._elastic_private import Store


class LoopbackRendezvous(RendezvousHandler):
    """Hands out a store that this process serves; it is always complete."""

    def __init__(self, store: Store, port: int) -> None:
        self._store = store
        self._port = port
        self._closed = False

    def get_backend(self) -> str:
        return "colossal-loopback"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", self._port))

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return f"colossal-{os.getpid()}"

    def shutdown(self) -> bool:
        self._closed = True
        return True
