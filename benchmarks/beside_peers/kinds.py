"""The names of contestants on the command line, and what they stand for.

    ddp  fsdp2-z3  fsdp2-z2          torch's data parallelism
    torch-tp2  torch-tp4-async       torch's DTensor styles over so many ranks, the others in FSDP2; async: its symmetric-memory mode
    zero1  zero3  zero3-keep         the library's data parallelism
    tp4  tp2-zero3  tp2-zero1        the library's tensor parallelism, the other ranks data-parallel under a stage of ZeRO

Options follow after plus signs: keys of `parallel.zero` (`zero3+prefetch=2`) or of `parallel.tensor` (`tp4+sequence_parallel=false`), where
`zero.` before a key says the other one (`tp2-zero3+zero.prefetch=2`); `micro=4`: sequences of one forward pass on one rank; of torch's
tensor parallelism `loss=eager` alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DATA_PEERS = ("ddp", "fsdp2-z3", "fsdp2-z2")
_TORCH_TENSOR = re.compile(r"torch-tp(?P<size>\d+)(?P<asynchronous>-async)?\Z")
_ZERO = re.compile(r"zero(?P<stage>[0-3])(?P<keep>-keep)?\Z")
_TENSOR = re.compile(r"tp(?P<size>\d+)(-zero(?P<stage>[0-3]))?\Z")
KINDS = "ddp, fsdp2-z3, fsdp2-z2, torch-tpN, torch-tpN-async, zeroS, zero3-keep, tpN and tpN-zeroS (S: a stage, 0 to 3)"


@dataclass(frozen=True)
class Contestant:
    """zero, tensor: keys of these sections of `parallel`, for ours. tensor_size: ranks that share each matrix. micro: sequences of one
    forward pass on one rank, 0 where nothing is said. asynchronous, eager_loss: of torch's tensor parallelism.
    """

    kind: str
    is_peer: bool
    tensor_size: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    tensor: Mapping[str, Any] = field(default_factory=dict)
    micro: int = 0
    asynchronous: bool = False
    eager_loss: bool = False


def read(text: str) -> Contestant:
    """The contestant of this name. Raises ValueError where there is none."""
    kind, *written = text.split("+")
    options = dict(_option(option) for option in written)
    micro = options.pop("micro", 0)
    if kind in DATA_PEERS:
        return _without_options(Contestant(kind, is_peer=True), options)
    if found := _TORCH_TENSOR.match(kind):
        eager = options.pop("loss", "compiled") == "eager"
        contestant = Contestant(
            kind, True, int(found["size"]), asynchronous=bool(found["asynchronous"]), eager_loss=eager
        )
        return _without_options(contestant, options)
    if found := _ZERO.match(kind):
        keep = {"keep_parameters": "microbatch"} if found["keep"] else {}
        return Contestant(kind, False, zero={"stage": int(found["stage"]), **keep, **options}, micro=micro)
    if found := _TENSOR.match(kind):
        zero = {key.removeprefix("zero."): value for key, value in options.items() if key.startswith("zero.")}
        tensor = {key: value for key, value in options.items() if not key.startswith("zero.")}
        if found["stage"] is not None:
            zero = {"stage": int(found["stage"]), **zero}
        size = int(found["size"])
        return Contestant(kind, False, size, zero, {"size": size, **tensor}, micro)
    message = f"{kind} is none of {KINDS}"
    raise ValueError(message)


def kind_problems(text: str, processes: int) -> list[str]:
    """What is wrong with a contestant's name, for so many ranks."""
    try:
        contestant = read(text)
    except ValueError as error:
        return [str(error)]
    if processes % contestant.tensor_size:
        return [f"{contestant.tensor_size} tensor ranks do not divide {processes} processes"]
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
