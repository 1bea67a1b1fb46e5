"""Trains every causal language model of transformers, shrunk, under ZeRO beside one process: `python tools/architectures.py`.

Results are kept in docs/data/architectures.json, row by row, and docs/architectures.md is written from them; a test compares the two.
Rows that were exact, with the same transformers and torch, are not run again. A model that crashes or hangs costs its own row.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colossal_launch.architectures import Checked

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "data" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
REASONS = ROOT / "docs" / "data" / "architectures_left_out.json"
"""Why a model is not trained here, by architecture, for a reader. A failing one without a reason fails the run."""

HEAD = """# Every causal language model of transformers

Written by `nox -s architectures`, which runs them all.

Each model is built small from its own config and trained for two steps of AdamW with clipping under `parallel.zero`, stages 1 and 3, on two
processes with two microbatches each. Loss, gradients, their norm, parameters and optimizer states are then those of one process
in float64: the table has the worst relative difference of them all, rounded up to a power of ten, and the limit is 1e-12.
"""


def row_of(checked: Checked) -> dict[str, Any]:
    """A result as it is kept: what does not change from run to run."""
    row: dict[str, Any] = {"architecture": checked.architecture}
    if checked.facts is not None:
        facts = checked.facts
        row |= {"class": facts.class_name, "parameters": facts.parameters, "blocks": list(facts.blocks)}
        row |= {"found_by": facts.found, "tied": facts.tied}
    for result in checked.stages:
        row[f"stage_{result.stage}"] = rounded_up(result.worst.difference)
        if not result.passed:
            row["different"] = f"stage {result.stage}: {result.worst.kind} {result.worst.where}"
    if checked.error:
        row["error"] = checked.error
    return row


def rounded_up(difference: float) -> str:
    """To a power of ten, so that the last bits of a machine do not change the table."""
    if difference == 0.0:
        return "0"
    return f"{10.0 ** math.ceil(math.log10(difference)):.0e}" if math.isfinite(difference) else "not finite"


def is_exact(row: dict[str, Any]) -> bool:
    return "stage_1" in row and "stage_3" in row and "different" not in row and "error" not in row


def page(results: dict[str, Any], reasons: dict[str, str]) -> str:
    """The whole page, from the kept results."""
    rows = results["rows"]
    exact = [row for row in rows if is_exact(row)]
    others = [row for row in rows if not is_exact(row)]
    versions = f"transformers {results['transformers']}, torch {results['torch']}"
    lines = [HEAD, f"{len(exact)} of {len(rows)} are exact ({versions}).", ""]
    lines += ["| architecture | class | parameters | blocks | found by | tied | stage 1 | stage 3 |"]
    lines += ["|---|---|---:|---|---|---|---|---|"]
    for row in exact:
        blocks = " + ".join(map(str, row["blocks"])) or "none"
        tied = "yes" if row["tied"] else ""
        lines.append(
            f"| `{row['architecture']}` | {row['class']} | {row['parameters']:,} | {blocks} | {row['found_by']} | {tied} "
            f"| {_bound(row['stage_1'])} | {_bound(row['stage_3'])} |"
        )
    lines += ["", "## Not in the table", "", "| architecture | why |", "|---|---|"]
    for row in others:
        name = row["architecture"]
        lines.append(f"| `{name}` | {reasons.get(name) or _unexplained(row)} |")
    return "\n".join(lines) + "\n"


def _bound(shown: str) -> str:
    return shown if shown == "0" else f"< {shown}"


def _unexplained(row: dict[str, Any]) -> str:
    text = str(row.get("error") or row.get("different", "was not run"))
    return f"not understood: {text.replace('|', chr(92) + '|')}"


def load() -> dict[str, Any]:
    """The kept results where they are of these versions, else none."""
    import torch
    import transformers

    versions = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    kept: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    same = all(kept.get(name) == version for name, version in versions.items())
    return {**versions, "rows": kept["rows"] if same else []}


def save(results: dict[str, Any]) -> None:
    """Writes data and page, rows in alphabetical order."""
    results["rows"].sort(key=lambda row: row["architecture"])
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in results["rows"])
    head = json.dumps({key: value for key, value in results.items() if key != "rows"})[:-1]
    RESULTS.write_text(f'{head}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    PAGE.write_text(page(results, json.loads(REASONS.read_text(encoding="utf-8"))), encoding="utf-8")


def sweep(names: Sequence[str], results: dict[str, Any], jobs: int, seconds: float) -> None:
    """Checks the named architectures, `jobs` at a time, and saves after each one."""
    from colossal_core.testing import WorkerPool
    from colossal_launch.architectures import check

    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    saving = threading.Lock()

    def work() -> None:
        with WorkerPool(timeout_seconds=seconds) as pool:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                row = row_of(check(name, pool))
                with saving:
                    results["rows"] = [kept for kept in results["rows"] if kept["architecture"] != name] + [row]
                    save(results)
                    print(f"{name}: {'exact' if is_exact(row) else row.get('error') or row['different']}", flush=True)

    workers = [threading.Thread(target=work) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def main(arguments: Sequence[str]) -> int:
    """0 where every architecture is exact, or is left out for a reason that is written down."""
    from colossal_launch.models.causal import causal_architectures

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--only", default="", help="architectures, separated by commas; run again even where they were exact"
    )
    parser.add_argument("--jobs", type=int, default=1, help="how many models at a time, each on two processes")
    parser.add_argument("--seconds", type=float, default=60.0, help="the time limit for one model")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    chosen = parser.parse_args(arguments)
    results = load()
    exact = {row["architecture"] for row in results["rows"] if is_exact(row) and not chosen.fresh}
    everything = causal_architectures()
    results["rows"] = [row for row in results["rows"] if row["architecture"] in everything]
    names = chosen.only.split(",") if chosen.only else [name for name in everything if name not in exact]
    sweep(names, results, chosen.jobs, chosen.seconds)
    save(results)
    reasons = json.loads(REASONS.read_text(encoding="utf-8"))
    left = [row["architecture"] for row in results["rows"] if not is_exact(row)]
    unexplained = [name for name in left if name not in reasons]
    print(
        f"{len(results['rows']) - len(left)} of {len(results['rows'])} are exact; not understood: {', '.join(unexplained) or 'none'}"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
