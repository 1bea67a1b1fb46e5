"""What a test's rank runs: loads the test file by its path (test files are no importable modules) and calls one of its functions.

Started with `runpy.run_path`, which every forkserver child can import; `CALL` comes from the fixtures in conftest.py.
"""

from __future__ import annotations

import importlib.util
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any


def run(call: dict[str, Any]) -> None:
    import torch

    from colossal_comm import join, leave

    warnings.simplefilter("error")
    # Dynamo itself instantiates a Function for every one that it traces (torch 2.13, _dynamo/side_effects.py).
    warnings.filterwarnings("ignore", message=".*should not be instantiated", category=DeprecationWarning)
    # Inductor of torch 2.11 still uses what Python 3.12 makes it warn about.
    warnings.filterwarnings("ignore", message=".*torch.jit.script_method.*is deprecated", category=DeprecationWarning)
    torch.set_num_threads(1)
    reply: Connection = call["reply"]
    try:
        spec = importlib.util.spec_from_file_location("test_file", call["path"])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, call["function"])
        if call["mesh"] is None:
            result = function(call["rank"], call["address"], *call["arguments"])
        else:
            timeout = timedelta(seconds=call["timeout_seconds"])
            device = torch.device("cpu")
            collectives = join(call["mesh"], call["rank"], device, call["address"], timeout, debug=call["debug"])
            try:
                result = function(collectives, *call["arguments"])
            finally:
                leave(collectives, grace=timedelta(seconds=2))
        reply.send(("returned", result))
    except Exception as error:  # reported to the test, which compares the message
        reply.send(("raised", type(error).__name__, str(error), traceback.format_exc()))
    finally:
        reply.close()


run(globals()["CALL"])
