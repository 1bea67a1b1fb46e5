"""Tensor parallelism beside FSDP2 and torch's own DTensor styles: the same model, attention, loss, compilation and batch, in one run.

    python benchmarks/tensor_vs_peers.py --model llama-8b-4096 --processes 4 --micro-batches 2 --profile ours
    python benchmarks/tensor_vs_peers.py --model llama-8b-4096 --contestants fsdp2-z3,tp4,tp4+overlap=plain,tp4+sequence_parallel=false
    python benchmarks/tensor_vs_peers.py --model tiny-llama --processes 2 --contestants fsdp2-z3,torch-tp2,tp2      # on a laptop

`--micro-batches` are sequences a GPU and step: ranks that share matrices put theirs together, so every row trains the same sequences in
a step, from the same first weights; the losses of the first steps are printed, and a run in which they differ has failed. Options of
`parallel.tensor` follow a contestant's name, those of `parallel.zero` with that word before them (`tp2-zero3+zero.prefetch=2`), and
`micro=4` cuts a rank's share into passes of 4 sequences. torch's `-async` is Inductor's micro-pipelining through symmetric memory. The rest
is as in `zero_vs_peers.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULTS = {
    "model": "tiny-llama",
    "micro_batches": "2",
    "contestants": "fsdp2-z3,tp4,tp2-zero3,torch-tp4-async,torch-tp2-async,torch-tp4,torch-tp2,tp2-zero1,zero3",
    "out": Path("runs/tensor-vs-peers"),
}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from beside_peers.command import Benchmark, main

    sys.exit(main(Benchmark(Path(__file__), __doc__, beside="fsdp2-z3", defaults=DEFAULTS)))
