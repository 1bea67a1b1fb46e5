"""Store addresses, their errors, and joining alone."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from colossal_comm import join, leave
from colossal_comm.startup import StoreAddress, bind_socket, debug_wanted, parse_store_address
from colossal_core.errors import ConfigError
from colossal_core.mesh import MeshLayout


def test_addresses() -> None:
    assert parse_store_address("file:///tmp/a%20b") == StoreAddress(path="/tmp/a b")
    assert parse_store_address("tcp://localhost:1") == StoreAddress(host="localhost", port=1)
    assert parse_store_address("tcp://[::1]:29500?hosted&prefix=attempt_1") == StoreAddress(
        host="::1", port=29500, hosted=True, prefix="attempt_1"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("env://", "neither a file nor a tcp address: give file:///path or tcp://host:port"),
        ("tcp://host", "neither a file nor a tcp address: give file:///path or tcp://host:port"),
        ("file://relative/path", "neither a file nor a tcp address: give file:///path or tcp://host:port"),
        ("tcp://h:1?shared", "unknown option shared: use hosted or prefix=name"),
        ("tcp://h:99999", "not an address (Port out of range 0-65535): give file:///path or tcp://host:port"),
    ],
)
def test_bad_addresses(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_store_address(text)
    assert str(caught.value) == f"store_address={text!r}: {message}"


def test_rank_zero_listens_only_where_its_host_is() -> None:
    with pytest.raises(ConfigError) as caught:
        bind_socket("192.0.2.1", 0)
    assert str(caught.value) == (
        "store_address='192.0.2.1:0': rank 0 cannot listen there (Cannot assign requested address): "
        "name an interface of the host that runs rank 0"
    )


def test_debug_variable() -> None:
    assert not debug_wanted({})
    assert debug_wanted({"COLOSSAL_DEBUG_COLLECTIVES": "1"})
    with pytest.raises(ConfigError) as caught:
        debug_wanted({"COLOSSAL_DEBUG_COLLECTIVES": "yes"})
    assert str(caught.value) == (
        "COLOSSAL_DEBUG_COLLECTIVES='yes': neither 0 nor 1: set it to 1 to check every collective, to 0 not to"
    )


def test_a_mesh_of_one_starts_nothing() -> None:
    collectives = join(MeshLayout(), 0, torch.device("cpu"), "", timedelta(seconds=1))
    assert not dist.is_initialized()
    assert collectives.gather_bytes(b"a", "dp") == [b"a"]
    leave(collectives)


def test_import_is_light() -> None:
    code = (
        "import sys, os; before = dict(os.environ); import colossal_comm; "
        "print('torch' in sys.modules, 'pydantic' in sys.modules, dict(os.environ) == before, 'join' in dir(colossal_comm))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False", "True", "True"]
