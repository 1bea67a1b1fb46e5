"""What one measurement is: a contestant, with its options, at one number of sequences a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from beside_peers.kinds import Contestant, kind_problems, read


@dataclass(frozen=True)
class Row:
    """contestant: a kind and its options, as `kinds.py` reads them (`zero3+prefetch=2`, `tp4+sequence_parallel=false`). micro_batch:
    sequences a GPU and step. optimizer: a name of the config's `optimizer` section.
    """

    model: str
    contestant: str
    micro_batch: int
    optimizer: str = "adamw"
    recompute: str = "none"
    compiled: bool = True

    @property
    def parsed(self) -> Contestant:
        return read(self.contestant)

    @property
    def is_peer(self) -> bool:
        return self.parsed.is_peer

    @property
    def sequences_a_pass(self) -> int:
        """Sequences of one forward pass on one rank: all that its tensor ranks have for a step, where nothing else is asked for."""
        return self.parsed.micro or self.micro_batch * self.parsed.tensor_size

    @property
    def compiles_blocks(self) -> bool:
        return self.compiled and not self.parsed.eager

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

    def as_dict(self) -> dict[str, str | int | bool]:
        return asdict(self)


def problems(rows: Sequence[Row], processes: int) -> list[str]:
    """What cannot be measured at all, found before anything starts."""
    found = []
    for row in rows:
        found += [f"--contestants: {row.contestant}: {problem}" for problem in kind_problems(row.contestant, processes)]
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
    rows = [
        Row(model, contestant, size, optimizer, mode, is_compiled)
        for size in micro_batches
        for is_compiled in compiled
        for mode in recompute
        for optimizer in optimizers
        for contestant in contestants
    ]
    return [row for row in rows if row.optimizer == "adamw" or not row.is_peer]
