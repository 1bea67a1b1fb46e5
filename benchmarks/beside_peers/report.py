"""The table, line by line as rows come in, and the JSON file that is written again after each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from beside_peers.models import PEAK_FLOPS, Shape
from beside_peers.rows import Row
from beside_peers.time_lines import table

AGREEMENT = 1e-3
"""Losses of bfloat16 runs agree in three digits."""


@dataclass
class Report:
    """Everything that a run found. given: what it was asked for, its date among it. beside: the contestant that rates are compared with,
    whatever its options; "" for the fastest peer.
    """

    shape: Shape
    given: Mapping[str, Any]
    path: Path
    beside: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    rows: list[tuple[Row, dict[str, Any]]] = field(default_factory=list)

    def add(self, row: Row, result: dict[str, Any], machine: Mapping[str, Any]) -> None:
        """One more row: printed at once, and written."""
        self.rows.append((row, result))
        self.machine = machine or self.machine
        print(self._line(row, result), flush=True)
        traceback = result.get("traceback", "")
        if result.get("estimate_problem"):
            print(f"estimate: {result['estimate_problem']}", flush=True)
        if traceback and result["message"] not in [earlier.get("message") for _, earlier in self.rows[:-1]]:
            print(traceback[-1500:], flush=True)
        self.write()

    def write(self) -> None:
        found = {
            "given": dict(self.given),
            "machine": dict(self.machine),
            "formulae": {
                "mfu": self.shape.formula,
                "peak_flops": dict(PEAK_FLOPS),
                "tokens_per_second_per_gpu": "micro-batch x sequence length / median step, slowest rank of each step",
                "peak GiB": "of torch's allocator, highest rank; other: CUDA, NCCL and symmetric memory outside it",
                "idle": "part of all ranks' time from the recorded step's first action to its last in which they run neither F, B, I nor W",
                "hidden": "time of communication kernels during which a computing kernel ran on the same GPU / their time",
            },
            "largest_difference_of_first_losses": self.loss_difference(),
            "rows": [self._row(row, result) for row, result in self.rows],
        }
        self.path.write_text(json.dumps(found, indent=1))

    @staticmethod
    def _row(row: Row, result: Mapping[str, Any]) -> dict[str, Any]:
        return {**row.as_dict(), "title": row.title, "is_peer": row.is_peer, **result}

    def compared_with(self, row: Row) -> float | None:
        """Tokens a second and GPU of the contestant that a row is held beside, at its micro-batch, recomputation and compilation."""
        if not self.beside:
            return self._best_peer(row)
        found = [
            result
            for other, result in self.rows
            if other.contestant.split("+")[0] == self.beside
            and other == replace(row, contestant=other.contestant, optimizer="adamw")
            and "failed" not in result
        ]
        return found[0]["tokens_per_second_per_gpu"] if found else None

    def loss_difference(self) -> float:
        """The largest difference between the losses of the first steps of rows that train the same, over their size."""
        largest = 0.0
        for _, losses in self._first_losses():
            for step in zip(*losses, strict=True):
                largest = max(largest, (max(step) - min(step)) / abs(step[0]))
        return largest

    def _first_losses(self) -> list[tuple[Row, list[list[float]]]]:
        """Of the rows that train the same: everything alike but the contestant."""
        groups: dict[Row, list[list[float]]] = {}
        for row, result in self.rows:
            if "failed" not in result:
                groups.setdefault(replace(row, contestant=""), []).append(result["losses_first"])
        return list(groups.items())

    def _best_peer(self, beside: Row) -> float | None:
        rates = [
            result["tokens_per_second_per_gpu"]
            for row, result in self.rows
            if row.is_peer
            and "failed" not in result
            and replace(beside, contestant=row.contestant, optimizer="adamw") == row
        ]
        return max(rates, default=None)

    def print_table(self) -> None:
        """The whole table, then the profiles, then what it was measured on."""
        print(self.head(), flush=True)
        for row, result in self.rows:
            print(self._line(row, result))
        pipelines = table([self._row(row, result) for row, result in self.rows])
        for line in [*pipelines, *self._optimizer_lines(), *self._loss_lines()]:
            print(line)
        for row, result in self.rows:
            if result.get("profile"):
                print(f"\n{row.title}, micro-batch {row.micro_batch}, rank 0, ms a step")
                print("\n".join(profile_lines(result["profile"])))
        print(self.shape.formula)
        print(", ".join(f"{key} {value}" for key, value in self.machine.items()), flush=True)

    def _optimizer_lines(self) -> list[str]:
        """A step with another optimizer over one with AdamW, everything else alike."""
        seconds = {row: result["step_seconds"] for row, result in self.rows if "failed" not in result}
        lines = []
        for row, taken in seconds.items():
            base = seconds.get(replace(row, optimizer="adamw"))
            if row.optimizer != "adamw" and base is not None:
                lines.append(f"{row.title}, micro-batch {row.micro_batch}: {taken / base:.3f} x AdamW's step")
        return lines

    def _loss_lines(self) -> list[str]:
        """The losses of the first steps, which everybody has in common."""
        lines = []
        for row, losses in self._first_losses():
            ranges = [f"{min(step):.4f} to {max(step):.4f}" for step in zip(*losses, strict=True)]
            lines.append(
                f"losses of the first steps, {row.optimizer}, micro-batch {row.micro_batch}: {', '.join(ranges)}"
            )
        agree = "they agree in three digits" if self.loss_difference() <= AGREEMENT else "THEY DIFFER"
        return [*lines, f"largest difference between contestants {self.loss_difference():.1e}: {agree}"]

    def head(self) -> str:
        columns = (
            "contestant", "mb", "tokens/s/GPU", "MFU", f"x {self.beside or 'best peer'}", "step ms (min - max)", "peak GiB", "reserved",
            "other", "built", "between", "estimate", "hidden", "loss first -> last", "build + warm-up s", "graphs",
        )  # fmt: skip
        return f"| {' | '.join(columns)} |\n|{'|'.join(['---', *['---:'] * (len(columns) - 1)])}|"

    def _line(self, row: Row, result: Mapping[str, Any]) -> str:
        if "failed" in result:
            return f"| {row.title} | {row.micro_batch} | {result['failed']}: {result['message'][:200]} |"
        best = self.compared_with(row)
        hidden = (result.get("profile") or {}).get("communication", {}).get("hidden")
        rate, peak = result["tokens_per_second_per_gpu"], result["peak_allocated_gib"]
        estimate = result.get("estimated_peak_gib")
        milliseconds = [1e3 * result[key] for key in ("step_seconds", "step_seconds_min", "step_seconds_max")]
        cells = [
            row.title,
            str(row.micro_batch),
            f"{rate:,.0f}",
            f"{result['mfu']:.1%}" if result["mfu"] is not None else "-",
            f"{rate / best:.3f}" if best else "-",
            "{:.1f} ({:.1f} - {:.1f})".format(*milliseconds),
            f"{peak:.2f}",
            f"{result['peak_reserved_gib']:.2f}",
            f"{result['beside_allocator_gib']:.2f}",
            f"{result['built_gib']:.2f}",
            f"{result['between_steps_gib']:.2f}",
            f"{estimate:.2f} ({_ratio(estimate, peak)})" if estimate is not None else "-",
            f"{hidden:.0%}" if hidden is not None else "-",
            f"{result['loss_first']:.4f} -> {result['loss_last']:.4f}",
            f"{result['build_seconds']:.1f} + {result['warmup_seconds']:.1f}",
            str(result["graphs"]),
        ]
        return f"| {' | '.join(cells)} |"


def _ratio(estimate: float, measured: float) -> str:
    return f"x {estimate / measured:.3f}" if measured else "-"


def profile_lines(profile: Mapping[str, Any]) -> Sequence[str]:
    """One profile as a small table."""
    lines = ["| what | ms | hidden | exposed ms | kernels |", "|---|---:|---:|---:|---:|"]
    for name, row in [*profile["by_kind"].items(), ("all communication", profile["communication"])]:
        hidden = f"{row['hidden']:.1%}" if row["hidden"] is not None else "-"
        lines.append(f"| {name} | {row['ms']:.2f} | {hidden} | {row['exposed_ms']:.2f} | {row['kernels']:.0f} |")
    lines.append(f"| compute | {profile['compute_ms']:.2f} | | | |")
    lines.append(f"| copies and casts | {profile['copy_ms']:.2f} | | | {profile['copy_kernels']:.0f} |")
    lines.append(f"| idle | {profile['idle_ms']:.2f} | | | |")
    lines.append(f"| step | {profile['step_ms']:.2f} | | | |")
    longest = profile["longest"][:10]
    return lines + [
        f"  {entry['ms']:8.2f} ms  {entry['kernels']:6.0f} x  {entry['kind']:<14} {entry['name'][:90]}"
        for entry in longest
    ]
