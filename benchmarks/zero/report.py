"""The table, line by line as rows come in, and the JSON file that is written again after each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from zero.models import PEAK_FLOPS, Shape
from zero.rows import Row

COLUMNS = (
    "contestant", "mb", "tokens/s/GPU", "MFU", "x best peer", "step ms (min - max)", "peak GiB", "reserved", "built",
    "between", "estimate", "loss first -> last", "build + warm-up s", "graphs",
)  # fmt: skip


@dataclass
class Report:
    """Everything that a run found. given: what it was asked for, its date among it."""

    shape: Shape
    given: Mapping[str, Any]
    path: Path
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
                "hidden": "time of communication kernels during which a computing kernel ran on the same GPU / their time",
            },
            "rows": [{**row.as_dict(), "title": row.title, **result} for row, result in self.rows],
        }
        self.path.write_text(json.dumps(found, indent=1))

    def best_peer(self, beside: Row) -> float | None:
        """Tokens a second and GPU of the fastest peer so far at a row's micro-batch, recomputation and compilation."""
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
        for line in self._optimizer_lines():
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

    def head(self) -> str:
        return f"| {' | '.join(COLUMNS)} |\n|{'|'.join(['---', *['---:'] * (len(COLUMNS) - 1)])}|"

    def _line(self, row: Row, result: Mapping[str, Any]) -> str:
        if "failed" in result:
            return f"| {row.title} | {row.micro_batch} | {result['failed']}: {result['message'][:200]} |"
        best = self.best_peer(row)
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
            f"{result['built_gib']:.2f}",
            f"{result['between_steps_gib']:.2f}",
            f"{estimate:.2f} ({_ratio(estimate, peak)})" if estimate is not None else "-",
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
