"""Whole training steps with colossal-kernels and without, beside torch's FSDP2 and Liger-Kernel's patch of it, eager and compiled.

    python benchmarks/end_to_end_kernels.py --model llama-1b
    python benchmarks/end_to_end_kernels.py --model gpt2-1.5b --micro-batches 16
    python benchmarks/end_to_end_kernels.py --small                    # on a laptop: the references on both sides

On one GPU: `zero1` is the library as it is installed, `zero1+ops=plain` the library with what core has alone, `zero1+ops=rms_norm/swiglu`
with these kernels inside compiled blocks as well, whatever the table of kernels says, `fsdp2-z2` torch's loop,
`fsdp2-z2+liger=true` the same with Liger's norms, rotary embedding, gated activation and linear + cross-entropy (for Llama; Liger has
no patch for GPT-2). The rest is as in `zero_vs_peers.py`: tokens/s, peak memory, a table, JSON and a picture.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIGER = "fsdp2-z2+liger=true"
DEFAULTS = {
    "model": "llama-1b",
    "processes": 1,
    "contestants": f"fsdp2-z2,{LIGER},zero1+ops=plain,zero1",
    "micro_batches": "8",
    "compile": "no,yes",
    "warmup_steps": 4,
    "timed_steps": 10,
    "minutes": 7.0,
    "out": Path("runs/end-to-end-kernels"),
}
SMALL = {
    "model": "tiny-llama",
    "contestants": "fsdp2-z2,zero1+ops=plain,zero1",
    "micro_batches": "2",
    "compile": "no",
    "warmup_steps": 1,
    "timed_steps": 3,
}


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from beside_peers.command import Benchmark, main

    if any(word.startswith("gpt2") for word in sys.argv):
        DEFAULTS["contestants"] = str(DEFAULTS["contestants"]).replace(f"{LIGER},", "")
    script = Path(__file__)
    sys.exit(main(Benchmark(script, __doc__, beside="fsdp2-z2", defaults=DEFAULTS, small=SMALL)))
