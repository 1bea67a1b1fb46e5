"""The names of contestants on the command line, and what they stand for.

    ddp  fsdp2-z3  fsdp2-z2          torch's data parallelism
    torch-tp2  torch-tp4-async       torch's DTensor styles over so many ranks, the others in FSDP2; async: its symmetric-memory mode
    zero1  zero3  zero3-keep         the library's data parallelism
    tp4  tp2-zero3  tp2-zero1        the library's tensor parallelism, the other ranks data-parallel under a stage of ZeRO
    torch-pp4-1f1b  torch-pp-zbv     torch's pipelines, over all ranks; without a number: over as many as there are
    pp4-1f1b  pp-zbv  pp2-1f1b-zero1 the library's, by the names of its schedules; the other ranks as above

Options follow after plus signs: keys of `parallel.zero` (`zero3+prefetch=2`), of `parallel.tensor` (`tp4+sequence_parallel=false`) or of
`parallel.pipeline`, where `zero.` before a key says the first one (`tp2-zero3+zero.prefetch=2`). `micro=4`: sequences of one forward pass
on one rank, in a pipeline 1 where nothing is said. `compile=false`, of pipelines: blocks run as they are, and so does torch's loss. torch's
tensor parallelism has `loss=eager` alone, its data parallelism `micro` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

DATA_PEERS = ("ddp", "fsdp2-z3", "fsdp2-z2")
_TORCH_TENSOR = re.compile(r"torch-tp(?P<size>\d+)(?P<asynchronous>-async)?\Z")
_SCHEDULE = "(?P<schedule>gpipe|1f1b|interleaved|looped-bfs|zb-h1|zb-h2|zbv|dualpipev)"
_TORCH_SCHEDULE = "(?P<schedule>gpipe|1f1b|interleaved|looped-bfs|zbv)"
_TORCH_PIPELINE = re.compile(rf"torch-pp(?P<size>\d+)-{_TORCH_SCHEDULE}\Z")
_PIPELINE = re.compile(rf"pp(?P<size>\d+)-{_SCHEDULE}(-zero(?P<stage>[0-3]))?\Z")
_ZERO = re.compile(r"zero(?P<stage>[0-3])(?P<keep>-keep)?\Z")
_TENSOR = re.compile(r"tp(?P<size>\d+)(-zero(?P<stage>[0-3]))?\Z")
KINDS = (
    "ddp, fsdp2-z3, fsdp2-z2, torch-tpN, torch-tpN-async, torch-ppN-SCHEDULE, zeroS, zero3-keep, tpN, tpN-zeroS, ppN-SCHEDULE and "
    "ppN-SCHEDULE-zeroS (S: a stage, 0 to 3)"
)


@dataclass(frozen=True)
class Contestant:
    """zero, tensor, pipeline: keys of these sections of `parallel`, for ours. tensor_size: ranks that share each matrix; pipeline_size:
    ranks that stand behind one another. schedule: of a pipeline, else "". micro: sequences of one forward pass on one rank, 0 where
    nothing is said. eager: blocks are not compiled, whatever the row says. asynchronous: of torch's tensor
    parallelism. eager_loss: of torch's tensor parallelism and pipelines. ops: `plain`, or ops whose kernel is asked for by name.
    """

    kind: str
    is_peer: bool
    tensor_size: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    tensor: Mapping[str, Any] = field(default_factory=dict)
    micro: int = 0
    pipeline_size: int = 1
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = ""
    eager: bool = False
    asynchronous: bool = False
    eager_loss: bool = False
    liger: bool = False
    ops: tuple[str, ...] = ()


def read(text: str) -> Contestant:
    """The contestant of this name. Raises ValueError where there is none."""
    kind, *written = text.split("+")
    options = dict(_option(option) for option in written)
    if kind.startswith("fsdp2") and "liger" in options:
        return replace(_read(kind, _without(options, "liger")), liger=bool(options["liger"]))
    if "ops" in options:
        contestant = _read(kind, _without(options, "ops"))
        return contestant if contestant.is_peer else replace(contestant, ops=tuple(str(options["ops"]).split("/")))
    return _read(kind, options)


def _without(options: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {other: value for other, value in options.items() if other != key}


def _read(kind: str, options: dict[str, Any]) -> Contestant:
    micro = options.pop("micro", 0)
    if kind in DATA_PEERS:
        return _without_options(Contestant(kind, is_peer=True, micro=micro), options)
    if found := _TORCH_TENSOR.match(kind):
        eager = options.pop("loss", "compiled") == "eager"
        contestant = Contestant(
            kind, True, int(found["size"]), asynchronous=bool(found["asynchronous"]), eager_loss=eager
        )
        return _without_options(contestant, options)
    if found := _TORCH_PIPELINE.match(kind):
        eager = not options.pop("compile", True)
        size, schedule = int(found["size"]), found["schedule"]
        contestant = Contestant(
            kind, True, micro=micro or 1, pipeline_size=size, schedule=schedule, eager=eager, eager_loss=eager
        )
        return _without_options(contestant, options)
    if found := _PIPELINE.match(kind):
        return _pipeline(kind, found, micro or 1, options)
    if found := _ZERO.match(kind):
        keep = {"keep_parameters": "microbatch"} if found["keep"] else {}
        return Contestant(kind, False, zero={"stage": int(found["stage"]), **keep, **options}, micro=micro)
    if found := _TENSOR.match(kind):
        zero, tensor = _with_zero(found["stage"], options)
        size = int(found["size"])
        return Contestant(kind, False, size, zero, {"size": size, **tensor}, micro)
    message = f"{kind} is none of {KINDS}"
    raise ValueError(message)


def _pipeline(kind: str, found: re.Match[str], micro: int, options: dict[str, Any]) -> Contestant:
    eager = not options.pop("compile", True)
    zero, more = _with_zero(found["stage"], options)
    size, schedule = int(found["size"]), found["schedule"]
    pipeline = {"size": size, "schedule": schedule, **more}
    return Contestant(
        kind, False, 1, zero, micro=micro, pipeline_size=size, pipeline=pipeline, schedule=schedule, eager=eager
    )


def _with_zero(stage: str | None, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of `parallel.zero`, and the others."""
    zero = {key.removeprefix("zero."): value for key, value in options.items() if key.startswith("zero.")}
    others = {key: value for key, value in options.items() if not key.startswith("zero.")}
    return ({"stage": int(stage), **zero} if stage is not None else zero), others


def spelled_out(text: str, processes: int) -> str:
    """A contestant's name with the number of pipeline ranks, where it has none: all."""
    return re.sub(r"^(torch-)?pp-", rf"\g<1>pp{processes}-", text)


def kind_problems(text: str, processes: int) -> list[str]:
    """What is wrong with a contestant's name, for so many ranks."""
    try:
        contestant = read(text)
    except ValueError as error:
        return [str(error)]
    if processes % contestant.tensor_size:
        return [f"{contestant.tensor_size} tensor ranks do not divide {processes} processes"]
    if contestant.is_peer and contestant.schedule and contestant.pipeline_size != processes:
        return [f"torch's pipelines are measured over all {processes} processes"]
    if processes % contestant.pipeline_size:
        return [f"{contestant.pipeline_size} pipeline ranks do not divide {processes} processes"]
    return []


def _without_options(contestant: Contestant, options: Mapping[str, Any]) -> Contestant:
    if options:
        message = f"{contestant.kind} has no option {', '.join(options)}"
        raise ValueError(message)
    return contestant


def _option(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    known = {"true": True, "false": False, "null": None}
    return key, int(value) if value.isdigit() else known.get(value, value)
