"""Pipelines beside torch's own and FSDP2: the same model, attention, loss, stages and sequences, in one run.

    python benchmarks/pipeline_vs_peers.py --processes 4
    python benchmarks/pipeline_vs_peers.py --processes 2 --contestants fsdp2-z3+micro=2,pp-1f1b,torch-pp-1f1b
    python benchmarks/pipeline_vs_peers.py --small      # on a laptop, every contestant

A step is 16 sequences on all GPUs together (`--sequences`). A pipeline takes them one by one; FSDP2 shares them out, and with `micro=2`
takes two at a time, because more do not fit on 2 GPUs. After the timed steps each pipeline makes one more, of which every rank
records when it works: `idle` is the part of it in which ranks do not, and a second picture shows it. All pipelines have the stages that the
library cuts. The rest is as in `zero_vs_peers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OURS = "pp-1f1b,pp-interleaved,pp-zb-h1,pp-zbv"
PEERS = "torch-pp-1f1b,torch-pp-interleaved,torch-pp-zbv+compile=false"
DEFAULTS = {
    "model": "llama-8b-4096",
    "sequences": 16,
    "contestants": f"fsdp2-z3+micro=2,{OURS},{PEERS}",
    "warmup_steps": 3,
    "timed_steps": 6,
    "memory_estimate": True,
    "out": Path("runs/pipeline-vs-peers"),
}
SMALL = {
    "model": "small-llama",
    "processes": 2,
    "sequences": 8,
    "compile": "no",
    "warmup_steps": 1,
    "timed_steps": 3,
}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from beside_peers.command import Benchmark, main

    sys.exit(main(Benchmark(Path(__file__), __doc__, beside="fsdp2-z3", defaults=DEFAULTS, small=SMALL)))
