"""Data parallelism beside torch's DDP and FSDP2: the same model, attention, loss, compilation and batch, in one run.

    python benchmarks/zero_vs_peers.py --model gpt2-1.5b --processes 4 --micro-batches 8,32 --out runs/zero-vs-peers
    python benchmarks/zero_vs_peers.py --model llama-8b --contestants fsdp2-z3,fsdp2-z2,zero3,zero3-keep --micro-batches 1,2
    python benchmarks/zero_vs_peers.py --model llama-1b --contestants zero1,zero3 --optimizers adamw,muon --micro-batches 4
    python benchmarks/zero_vs_peers.py --model tiny --processes 2 --micro-batches 2 --compile no      # on a laptop

Prints a row as soon as it is known, then the whole table; writes `NAME.json`, `NAME.png` and `NAME.log` into the folder. Options of
`parallel.zero` follow a contestant's name: `zero3+prefetch=2`. A row that fails, hangs or runs out of memory is reported, and the others
are measured in new processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULTS = {
    "contestants": "ddp,fsdp2-z3,fsdp2-z2,zero1,zero2,zero3,zero3-keep",
    "out": Path("runs/zero-vs-peers"),
}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from beside_peers.command import Benchmark, main

    sys.exit(main(Benchmark(Path(__file__), __doc__, defaults=DEFAULTS)))
