"""What one measurement is: a contestant, with its options, at one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PEERS = ("ddp", "fsdp2-z3", "fsdp2-z2")
OURS = ("zero0", "zero1", "zero2", "zero3", "zero3-keep")


@dataclass(frozen=True)
class Row:
    """contestant: one of `PEERS` and `OURS`, and options of `parallel.zero` after plus signs (`zero3+prefetch=2`). micro_batch: sequences
    a GPU and step. optimizer: a name of the config's `optimizer` section.
    """

    model: str
    contestant: str
    micro_batch: int
    optimizer: str = "adamw"
    recompute: str = "none"
    compiled: bool = True

    @property
    def kind(self) -> str:
        return self.contestant.split("+")[0]

    @property
    def is_peer(self) -> bool:
        return self.kind in PEERS

    @property
    def zero_options(self) -> dict[str, Any]:
        """The keys of `parallel.zero`."""
        options: dict[str, Any] = {"stage": int(self.kind.removeprefix("zero")[0])}
        if self.kind.endswith("-keep"):
            options["keep_parameters"] = "microbatch"
        for option in self.contestant.split("+")[1:]:
            key, _, value = option.partition("=")
            options[key] = int(value) if value.isdigit() else value
        return options

    @property
    def title(self) -> str:
        parts = [self.contestant]
        if self.optimizer != "adamw":
            parts.append(self.optimizer)
        if self.recompute != "none":
            parts.append(f"recompute {self.recompute}")
        if not self.compiled:
            parts.append("eager")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def problems(rows: Sequence[Row]) -> list[str]:
    """What cannot be measured at all, found before anything starts."""
    found = []
    for row in rows:
        if row.kind not in PEERS + OURS:
            found.append(f"--contestants: {row.kind} is none of {', '.join(PEERS + OURS)}")
        elif row.is_peer and "+" in row.contestant:
            found.append(f"--contestants: {row.contestant}: only ours have options of parallel.zero")
        if row.recompute not in ("none", "full"):
            found.append(f"--recompute: {row.recompute} is neither none nor full")
    return list(dict.fromkeys(found))


def all_rows(
    model: str,
    contestants: Sequence[str],
    micro_batches: Sequence[int],
    optimizers: Sequence[str],
    recompute: Sequence[str],
    compiled: Sequence[bool],
) -> list[Row]:
    """Every combination, micro-batch by micro-batch, so that a run that ends early has compared something. Peers run AdamW only."""
    return [
        Row(model, contestant, size, optimizer, mode, is_compiled)
        for size in micro_batches
        for is_compiled in compiled
        for mode in recompute
        for optimizer in optimizers
        for contestant in contestants
        if optimizer == "adamw" or contestant.split("+")[0] not in PEERS
    ]
