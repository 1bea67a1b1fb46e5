"""The first run on this machine, by one command: one config with different numbers of local ranks, each a `colossal train` of its own.

    python benchmarks/first_run.py examples/pretrain_stdlib.yaml --processes 1 2 --out runs/first-run --set precision=bf16

Prints a table, writes `first_run.json` and `first_run.png`. Speed is the median over steps after the tenth, with the 10th and 90th
percentile; a step's seconds are the loop's own (metrics.jsonl), so evaluation and saving are not in them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

WARMUP_STEPS = 10


def read_run(folder: Path) -> dict[str, Any]:
    """The numbers of one run, from its metrics."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "tokens_per_second" in row]
    timed = steps[WARMUP_STEPS:] or steps
    rates = sorted(row["tokens_per_second"] for row in timed)
    held_out = [row for row in rows if "val_bits_per_byte" in row]
    return {
        "steps": len(steps),
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_p10": rates[len(rates) // 10],
        "tokens_per_second_p90": rates[len(rates) * 9 // 10],
        "mfu": statistics.median(row["mfu"] for row in timed) if "mfu" in timed[0] else None,
        "memory_gib": max(row["memory_bytes"] for row in steps) / 2**30,
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "val_bits_per_byte": held_out[-1]["val_bits_per_byte"] if held_out else None,
        "losses": [row["loss"] for row in steps],
    }


def run(config: Path, processes: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains once and reads what it left."""
    command = [sys.executable, "-m", "colossal_launch", "train", str(config), "--processes", str(processes)]
    for override in [*overrides, f"checkpoint.directory={folder}"]:
        command += ["--set", override]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)
    return {"processes": processes, **read_run(folder)}


def machine() -> dict[str, str]:
    """What ran it."""
    import platform

    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Loss by step of every run, and tokens a second beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for result in results:
        left.plot(result["losses"], label=f"{result['processes']} ranks", linewidth=1)
    left.set_xlabel("step")
    left.set_ylabel("loss (nats a token)")
    left.legend()
    right.bar([str(result["processes"]) for result in results], [result["tokens_per_second"] for result in results])
    right.set_xlabel("ranks")
    right.set_ylabel("tokens/s, all ranks")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/first-run"))
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = [run(given.config, count, given.out / f"ranks-{count}", given.overrides) for count in given.processes]
    report = {"machine": machine(), "config": str(given.config), "overrides": given.overrides, "results": results}
    (given.out / "first_run.json").write_text(json.dumps(report, indent=2))
    draw(results, given.out / "first_run.png")
    print(" ".join(f"{key} {value}" for key, value in report["machine"].items()))
    print(
        "| ranks | tokens/s (p10 - p90) | a rank | scaling | MFU | peak GiB a rank | loss first -> last | held-out bits/byte |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    base = results[0]["tokens_per_second"] / results[0]["processes"]
    for result in results:
        rate, count = result["tokens_per_second"], result["processes"]
        spread = f"{rate:,.0f} ({result['tokens_per_second_p10']:,.0f} - {result['tokens_per_second_p90']:,.0f})"
        mfu = f"{result['mfu']:.2%}" if result["mfu"] is not None else "-"
        bits = f"{result['val_bits_per_byte']:.4f}" if result["val_bits_per_byte"] is not None else "-"
        losses = f"{result['loss_first']:.4f} -> {result['loss_last']:.4f}"
        speed = f"{spread} | {rate / count:,.0f} | {rate / count / base:.2f} | {mfu}"
        print(f"| {count} | {speed} | {result['memory_gib']:.2f} | {losses} | {bits} |")


if __name__ == "__main__":
    main()
