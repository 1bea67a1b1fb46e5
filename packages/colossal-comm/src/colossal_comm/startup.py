"""Joining and leaving a group of ranks. The store is made here, bound to the loopback or the named interface only.

torch's own TCPStore listens on every interface, even when it is given 127.0.0.1, and answers anyone; here the socket is bound first
and handed over. Addresses:

- `file:///path`: ranks of one host, through a file that does not exist yet.
- `tcp://host:port`: rank 0 listens on the interface that `host` names; the others connect.
- `tcp://host:port?hosted`: somebody else (torchrun's agent, a `StoreServer`) listens there; every rank connects.
- `&prefix=name`: a name space within the store, so that a restarted group does not read what the last one left.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

from colossal_comm.collectives import RankCollectives
from colossal_comm.ledger import Ledger
from colossal_comm.session import Session
from colossal_core.errors import CommunicationError, ConfigError, Problem

if TYPE_CHECKING:
    import torch

    from colossal_comm._torch_private import Store
    from colossal_core.mesh import MeshLayout

DEFAULT_TIMEOUT = timedelta(minutes=5)
"""How long a collective may take before it fails. torch's own default is half an hour on gloo."""

DEBUG_VARIABLE = "COLOSSAL_DEBUG_COLLECTIVES"


@dataclass(frozen=True)
class StoreAddress:
    """A parsed store address. path: for files; host and port: for tcp; hosted: somebody else listens."""

    path: str = ""
    host: str = ""
    port: int = 0
    hosted: bool = False
    prefix: str = ""


def parse_store_address(text: str) -> StoreAddress:
    """Reads `file:///path` or `tcp://host:port`, with the options above. Raises ConfigError."""
    remedy = "give file:///path or tcp://host:port"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError([Problem("store_address", f"not an address ({error})", remedy, text)]) from error
    options = parse_qs(parts.query, keep_blank_values=True)
    unknown = sorted(set(options) - {"hosted", "prefix"})
    if unknown:
        raise ConfigError([Problem("store_address", f"unknown option {unknown[0]}", "use hosted or prefix=name", text)])
    prefix = options.get("prefix", [""])[0]
    if parts.scheme == "file" and parts.path.startswith("/") and not parts.netloc:
        return StoreAddress(path=unquote(parts.path), prefix=prefix)
    if parts.scheme == "tcp" and parts.hostname and port is not None:
        return StoreAddress(host=parts.hostname, port=port, hosted="hosted" in options, prefix=prefix)
    raise ConfigError([Problem("store_address", "neither a file nor a tcp address", remedy, text)])


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening socket on the interface that `host` names, and on no other. Port 0: one that is free. Raises ConfigError."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        remedy = "give a name that every rank can resolve, or an IP address"
        raise ConfigError(
            [Problem("store_address", f"the host has no address ({error.strerror})", remedy, host)]
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            problem = Problem(
                "store_address", "the port is taken", "choose another port, or stop the other run", f"{host}:{port}"
            )
        else:
            problem = Problem(
                "store_address",
                f"rank 0 cannot listen there ({error.strerror})",
                "name an interface of the host that runs rank 0",
                f"{host}:{port}",
            )
        raise ConfigError([problem]) from error
    return listener


class StoreServer:
    """A store served by a process that is not a rank (a launcher, a test), on one interface only.

    `address` is what the ranks join with. The server ends with `close` or with the object.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0, timeout: timedelta = DEFAULT_TIMEOUT) -> None:
        listener = bind_socket(host, port)
        self.port: int = listener.getsockname()[1]
        self.address = f"tcp://{_bracketed(host)}:{self.port}?hosted"
        self._store: Store | None = _serve(host, listener, timeout)

    @property
    def store(self) -> Store:
        assert self._store is not None, "the server is closed"
        return self._store

    def close(self) -> None:
        self._store = None


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _serve(host: str, listener: socket.socket, timeout: timedelta) -> Store:
    from colossal_comm._torch_private import TCPStore

    port = listener.getsockname()[1]
    # torch takes the descriptor over and closes it with the store.
    return TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def open_store(address: StoreAddress, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The store at an address; rank 0 hosts it unless somebody else does."""
    from colossal_comm._torch_private import FileStore, PrefixStore, TCPStore

    store: Store
    if address.path:
        store = FileStore(address.path, world_size)
    elif rank == 0 and not address.hosted:
        store = _serve(address.host, bind_socket(address.host, address.port), timeout)
    else:
        try:
            store = TCPStore(address.host, address.port, is_master=False, timeout=timeout, wait_for_workers=False)
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {rank} could not reach the store at {address.host}:{address.port} within {timeout.total_seconds():g} s: "
                "check that rank 0 runs, that the host name means the same on every host, and that no firewall is between them"
            ) from error
    store.set_timeout(timeout)
    return PrefixStore(address.prefix, store) if address.prefix else store


def join(
    mesh: MeshLayout,
    rank: int,
    device: torch.device,
    store_address: str,
    timeout: timedelta = DEFAULT_TIMEOUT,
    *,
    debug: bool | None = None,
) -> RankCollectives:
    """Joins the group of `mesh.world_size` ranks. Blocks until all have joined, at most `timeout`.

    device: `cpu` (gloo) or an accelerator with an index (NCCL on CUDA), which becomes the current one. timeout: of joining and of
    every collective. debug: check a fingerprint before each collective (`debug.py`); None reads COLOSSAL_DEBUG_COLLECTIVES now.
    A mesh of one rank starts nothing. Raises ConfigError for what is wrong with the address, CommunicationError when other ranks do
    not come.
    """
    assert 0 <= rank < mesh.world_size, f"rank {rank} of {mesh.world_size}"
    _check_timeout(timeout)
    if mesh.world_size == 1:
        return RankCollectives(mesh, rank, device, Session(None, Ledger(), None))
    import torch.distributed as dist

    from colossal_comm._torch_private import PrefixStore
    from colossal_comm.debug import StoreGuard
    from colossal_comm.groups import TorchTransport

    if dist.is_initialized():
        remedy = "leave it first, or do not call torch.distributed.init_process_group yourself"
        raise ConfigError([Problem("torch.distributed", "this process already belongs to a process group", remedy)])
    _select_device(device)
    store = open_store(parse_store_address(store_address), rank, mesh.world_size, timeout)
    _meet(store, rank, mesh.world_size, timeout)
    try:
        dist.init_process_group(
            dist.get_default_backend_for_device(device),
            store=PrefixStore("colossal.world", store),
            rank=rank,
            world_size=mesh.world_size,
            timeout=timeout,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise CommunicationError(
            f"rank {rank} could not connect to the other {mesh.world_size - 1}: {reason}: look at their own messages"
        ) from error
    transport = TorchTransport(store, rank, mesh.world_size, device, timeout)
    wanted = debug_wanted(os.environ) if debug is None else debug
    guard = StoreGuard(store, rank, timeout) if wanted else None
    return RankCollectives(mesh, rank, device, Session(transport, Ledger(), guard))


def leave(collectives: RankCollectives, *, grace: timedelta = timedelta(seconds=10)) -> None:
    """Destroys every group and the store; no thread and no socket is left. Calling it again does nothing.

    Waits up to `grace` for the others to leave too (a rank may still be connecting, or reading the store that this one hosts), but not
    after a collective has failed. Pass zero when the run has failed for another reason.
    """
    collectives.close(grace)


def debug_wanted(environ: Mapping[str, str]) -> bool:
    """Whether COLOSSAL_DEBUG_COLLECTIVES asks for the debug mode. Raises ConfigError for anything but 0 and 1."""
    value = environ.get(DEBUG_VARIABLE, "0")
    if value not in ("", "0", "1"):
        raise ConfigError(
            [Problem(DEBUG_VARIABLE, "neither 0 nor 1", "set it to 1 to check every collective, to 0 not to", value)]
        )
    return value == "1"


def _check_timeout(timeout: timedelta) -> None:
    if timeout <= timedelta(0):
        raise ConfigError([Problem("timeout", "not a positive time", "give some seconds or minutes", str(timeout))])


def _select_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    import torch

    if ":" not in str(device):
        remedy = f"give {device.type}:0, or the one of this rank's local rank"
        raise ConfigError([Problem("device", "an accelerator needs an index", remedy, str(device))])
    torch.accelerator.set_device_index(device.index)


def _meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Waits for every rank, and names those that do not come (torch would only say that it timed out)."""
    store.set(f"colossal/joined/{rank}", "1")
    try:
        store.wait([f"colossal/joined/{other}" for other in range(world_size)], timeout)
    except RuntimeError as error:
        missing = [other for other in range(world_size) if not store.check([f"colossal/joined/{other}"])]
        names = ", ".join(str(other) for other in missing)
        raise CommunicationError(
            f"rank {rank} waited {timeout.total_seconds():g} s for rank{'s' if len(missing) > 1 else ''} {names} of {world_size} to join: "
            "look at their own messages, or check that all ranks were started with the same store address"
        ) from error
