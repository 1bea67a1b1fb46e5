"""Muon's two forms of the Newton-Schulz iteration beside one another: time, rate, and distance to the exact iteration.

    python benchmarks/muon_forms.py                                   # shapes of GPT-2 1.5B and Llama 1B and 8B, on the GPU
    python benchmarks/muon_forms.py --shapes 64x176,64x256 --batch 2  # on a laptop

The rate counts what each form multiplies; the one that the optimizer takes for a shape is marked.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from colossal_zero.optimizers.newton_schulz import (
    gram_flops,
    gram_form_saves,
    gram_iteration,
    plain_flops,
    plain_iteration,
)

SHAPES = "1600x1600,1600x4800,1600x6400,2048x2048,2048x5632,1024x4096,4096x4096,4096x14336"
FORMS = {"plain": (plain_iteration, plain_flops), "Gram": (gram_iteration, gram_flops)}
EXACT_MOST = 2048
"""Largest short side for which the iteration is also done in float64."""


def seconds(work: Callable[[], torch.Tensor], device: torch.device, repeats: int) -> float:
    """Median of some runs after two to warm up, each waited for."""
    taken = []
    for index in range(repeats + 2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if index >= 2:
            taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def distance(found: torch.Tensor, matrices: torch.Tensor) -> str:
    if min(matrices.shape[-2:]) > EXACT_MOST:
        return "-"
    exact = plain_iteration(matrices[:1].double())
    return f"{float((found[:1].double() - exact).norm() / exact.norm()):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES, help="of matrices, SHORTxLONG, separated by commas")
    parser.add_argument("--batch", type=int, default=8, help="matrices of a shape at once")
    parser.add_argument("--repeats", type=int, default=10)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| shape | form | TFLOP | ms | TFLOP/s | x plain | distance to exact |\n|---|---|---:|---:|---:|---:|---:|")
    for shape in ([int(side) for side in text.split("x")] for text in given.shapes.split(",")):
        drawn = torch.randn((given.batch, *shape), device=device)
        matrices = (drawn / torch.linalg.vector_norm(drawn, dim=(-2, -1), keepdim=True)).bfloat16()
        del drawn
        base = 0.0
        for name, (form, flops) in FORMS.items():
            taken = seconds(lambda form=form, matrices=matrices: form(matrices), device, given.repeats)  # type: ignore[misc]
            base = base or taken
            work = given.batch * flops(shape) / 1e12
            mark = " (used)" if (name == "Gram") == gram_form_saves(shape) else ""
            far = distance(form(matrices), matrices)
            title = "x".join(map(str, shape))
            cells = (
                f"{given.batch} x {title}",
                name + mark,
                f"{work:.2f}",
                f"{1e3 * taken:.2f}",
                f"{work / taken:.0f}",
            )
            print(f"| {' | '.join(cells)} | {taken / base:.3f} | {far} |", flush=True)


if __name__ == "__main__":
    main()
