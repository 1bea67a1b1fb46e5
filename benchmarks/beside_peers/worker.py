"""One rank: measures rows one after the other and tells the supervisor of each. Ends itself where it cannot go on cleanly.

A failure of any kind ends the process: the other ranks may wait in a collective that will never finish, and only a new set of
processes is known to be in order. The supervisor starts one for the rows that are left.
"""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from beside_peers.contestants import Contestant, Recorded, build, cudnn_attention_first
from beside_peers.estimate import estimated_peak
from beside_peers.measure import Timing, allocated_gib, measure, over_ranks
from beside_peers.models import shapes
from beside_peers.overlap import profile
from beside_peers.rows import Row
from beside_peers.time_lines import idle_of
from beside_peers.tokens import Tokens
from beside_peers.world import World, join

RESTART = 75
"""Exit status: memory of a finished row was not given back, so the next one starts in new processes."""
MOST_LEFT_GIB = 0.25
PROFILED_STEPS = 3


@dataclass(frozen=True)
class Task:
    """What the supervisor asks for. events: the file that it reads. profiled: contestants to profile too."""

    rows: tuple[Row, ...]
    events: str
    timing: Timing
    profiled: tuple[str, ...]
    memory_estimate: bool

    def to_json(self) -> str:
        rows = [row.as_dict() for row in self.rows]
        return json.dumps(
            {
                "rows": rows,
                "events": self.events,
                "timing": vars(self.timing),
                "profiled": self.profiled,
                "memory_estimate": self.memory_estimate,
            }
        )

    @staticmethod
    def from_json(text: str) -> Task:
        found = json.loads(text)
        rows = tuple(Row(**row) for row in found["rows"])
        timing = Timing(**found["timing"])
        return Task(rows, found["events"], timing, tuple(found["profiled"]), found["memory_estimate"])


class Events:
    """The file in which this rank tells the supervisor: one JSON object a line, each written by one call."""

    def __init__(self, path: str, rank: int) -> None:
        self._path, self._rank = Path(path), rank

    def tell(self, event: str, **values: Any) -> None:
        line = json.dumps({"event": event, "rank": self._rank, **values}) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def work(task: Task) -> None:
    """The life of one rank."""
    _end_with_parent()
    torch.set_num_threads(1)
    events = Events(task.events, int(os.environ["RANK"]))
    index = 0
    try:
        world = join()
        gc.collect()
        gc.freeze()  # what the imports made is not looked at again in the middle of a step
        if world.rank == 0:
            events.tell("joined", machine=_machine(world))
        for index, row in enumerate(task.rows):
            left = over_ranks([allocated_gib(world.device)], world, torch.distributed.ReduceOp.MAX)[0]
            if left > MOST_LEFT_GIB and index > 0:
                _leave(RESTART)
            if world.rank == 0:
                events.tell("start", index=index, left_gib=left)
            result = _run(row, task, world)
            if world.rank == 0:
                events.tell("row", index=index, result=result)
            del result
            _free()
    except BaseException as error:
        text = traceback.format_exc()
        print(text, flush=True)
        events.tell("failed", index=index, kind=failure_kind(error), message=_short(error), traceback=text[-3000:])
        _leave(1)
    _leave(0)


def _run(row: Row, task: Task, world: World) -> dict[str, Any]:
    from torch._dynamo.utils import counters

    shape = shapes()[row.model]
    started = time.perf_counter()
    with cudnn_attention_first():
        contestant = build(row, shape, world, task.timing.warmup_steps + task.timing.timed_steps + 1)
        _give_back()  # what building needed for a moment is not held against the steps
        build_seconds = time.perf_counter() - started
        tokens = Tokens(shape, row.micro_batch, world, row.parsed.tensor_size, row.parsed.pipeline_size)
        result = measure(contestant, tokens, shape, world, task.timing, row.micro_batch)
        result |= {"build_seconds": build_seconds, "graphs": int(counters["stats"]["unique_graphs"])}
        if isinstance(contestant, Recorded):
            trace = contestant.recorded_step(tokens.draw())
            result |= idle_of(trace) if trace is not None else {}
        if row.contestant in task.profiled and world.device.type == "cuda":
            result["profile"] = _profile(contestant, tokens, world)
        del contestant
        if task.memory_estimate and not row.is_peer and world.rank == 0:
            result |= estimated_peak(row, shape, world.size, world.device.type)
    result["seconds"] = time.perf_counter() - started
    return result


def _profile(contestant: Contestant, tokens: Tokens, world: World) -> dict[str, Any] | None:
    return profile(lambda: contestant.step(tokens.draw()), PROFILED_STEPS, record=world.rank == 0)


def _free() -> None:
    """Gives back everything of the last row: compiled code holds on to its model, and reference cycles to their memory."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    _give_back()


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def failure_kind(error: BaseException) -> str:
    """`out of memory` where that is what the error, or the one behind it, is; else its class."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError):
            return "out of memory"
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:400]


def _leave(status: int) -> None:
    """At once: destructors of process groups may wait for ranks that are gone."""
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """Ends this process when its parent has gone, so that a killed supervisor leaves no rank on a GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _machine(world: World) -> dict[str, Any]:
    """What ran it."""
    import platform

    import transformers

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kernel": platform.release(),
        "ranks": world.size,
        "device": platform.processor() or platform.machine(),
    }
    if world.device.type == "cuda":
        backends, nccl = cast("Any", torch.backends), cast("Any", torch.cuda.nccl)
        found |= {
            "device": torch.cuda.get_device_name(world.device),
            "memory_gib": torch.cuda.get_device_properties(world.device).total_memory / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": backends.cudnn.version(),
            "nccl": ".".join(map(str, nccl.version())),
        }
    return found


def launch_arguments(task: Task) -> Sequence[str]:
    """What the entry script is called with to be one rank."""
    return ["--worker", task.to_json()]
