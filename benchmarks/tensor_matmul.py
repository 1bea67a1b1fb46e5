"""How long the products at the border of a sequence-parallel group take, for the shapes of Llama 8B: alone, with their communication
through NCCL (`plain`), and through symmetric memory. NVLink multicast is off.

    python benchmarks/tensor_matmul.py --processes 2
    python benchmarks/tensor_matmul.py --processes 2 --device cpu --hidden 64 --ffn 96 --sequence 32 --warmup 1 --steps 2

Times are medians over the steps, of the slowest rank. Hidden: the part of the communication's own time by which the layer does not take
longer than the products alone; below zero, being together costs more than one after the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from colossal_comm import RankCollectives, join, leave
from colossal_core.mesh import MeshLayout
from colossal_tensor.matmul import SequenceMatmul, sequence_matmul


@dataclass(frozen=True)
class Options:
    processes: int
    device: str
    hidden: int
    ffn: int
    key_value: int
    sequence: int
    samples: int
    warmup: int
    steps: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """One layer in one direction. milliseconds: by variant."""

    layer: str
    sent_bytes: int
    communication_ms: float
    milliseconds: dict[str, float]


class Clock:
    """Median time of a call, of the slowest rank."""

    def __init__(self, collectives: RankCollectives, options: Options) -> None:
        self._ranks, self._options = collectives, options

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(self._options.warmup):
            call()
        times = [self._once(call) for _ in range(self._options.steps)]
        slowest = torch.tensor([statistics.median(times)], device=self._ranks.device)
        self._ranks.start_all_reduce(slowest, "tp", op="max", use="control").wait()
        return slowest.item()

    def _once(self, call: Callable[[], object]) -> float:
        self._ranks.barrier("tp")
        if self._ranks.device.type == "cpu":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def variants(collectives: RankCollectives) -> dict[str, SequenceMatmul]:
    """plain always; symmetric where the ranks have it."""
    found = {"plain": sequence_matmul(collectives, "tp", symmetric=False, tag="plain")}
    symmetric = sequence_matmul(collectives, "tp", tag="symmetric")
    return {**found, "symmetric": symmetric} if symmetric.route.symmetric else found


def backward(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    gradients = [torch.randn_like(output) for output in outputs]
    return lambda: torch.autograd.grad(list(outputs), list(inputs), gradients, retain_graph=True)


def columns(name: str, widths: Sequence[int], collectives: RankCollectives, options: Options) -> list[Row]:
    """A group's entry: the input is gathered, then multiplied with weights of these local widths."""
    clock, device, dtype = Clock(collectives, options), collectives.device, getattr(torch, options.dtype)
    size, rows = options.processes, options.sequence // options.processes
    part = torch.randn(options.samples, rows, options.hidden, device=device, dtype=dtype, requires_grad=True)
    weights = [torch.randn(width, options.hidden, device=device, dtype=dtype, requires_grad=True) for width in widths]
    whole = torch.randn(options.samples, options.sequence, options.hidden, device=device, dtype=dtype).requires_grad_()
    gathered = torch.empty_like(whole)
    sent = (size - 1) * part.numel() * part.element_size()
    gather = clock(lambda: collectives.start_all_gather(gathered, part.detach(), "tp", use="compute").wait())
    scattered = torch.empty_like(part)
    scatter = clock(lambda: collectives.start_reduce_scatter(scattered, gathered, "tp", use="compute").wait())
    outputs = [whole @ weight.t() for weight in weights]
    forward = {"alone": clock(lambda: [whole.detach() @ weight.detach().t() for weight in weights])}
    back = {"alone": clock(backward(outputs, [whole, *weights]))}
    biases = [None] * len(weights)
    for kind, matmul in variants(collectives).items():
        with torch.no_grad():
            forward[kind] = clock(lambda matmul=matmul: matmul.gather_columns(part, weights, biases))  # type: ignore[misc]
        found = matmul.gather_columns(part, weights, biases)[1]
        back[kind] = clock(backward(found, [part, *weights]))
    return [
        Row(f"{name} forward", sent, gather, forward),
        Row(f"{name} backward", 2 * sent, gather + scatter, back),
    ]


def row(name: str, width: int, collectives: RankCollectives, options: Options) -> list[Row]:
    """A group's exit: an input of this local width is multiplied, then the ranks' results are summed and scattered."""
    clock, device, dtype = Clock(collectives, options), collectives.device, getattr(torch, options.dtype)
    size = options.processes
    h = torch.randn(options.samples, options.sequence, width, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(options.hidden, width, device=device, dtype=dtype, requires_grad=True)
    whole = torch.empty(options.samples, options.sequence, options.hidden, device=device, dtype=dtype)
    part = torch.empty(whole.numel() // size, device=device, dtype=dtype)
    sent = (size - 1) * part.numel() * part.element_size()
    scatter = clock(lambda: collectives.start_reduce_scatter(part, whole, "tp", use="compute").wait())
    gather = clock(lambda: collectives.start_all_gather(whole, part, "tp", use="compute").wait())
    forward = {"alone": clock(lambda: h.detach() @ weight.detach().t())}
    back = {"alone": clock(backward([h @ weight.t()], [h, weight]))}
    for kind, matmul in variants(collectives).items():
        with torch.no_grad():
            forward[kind] = clock(lambda matmul=matmul: matmul.row_scatter(h, weight))  # type: ignore[misc]
        back[kind] = clock(backward([matmul.row_scatter(h, weight)], [h, weight]))
    return [Row(f"{name} forward", sent, scatter, forward), Row(f"{name} backward", sent, gather, back)]


def measure(rank: int, options: Options, folder: str) -> None:
    """One rank; rank 0 prints the table."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    device = torch.device("cpu") if options.device == "cpu" else torch.device("cuda", rank)
    if device.type == "cpu":
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    mesh = MeshLayout((1, 1, 1, 1, options.processes))
    collectives = join(mesh, rank, device, f"file://{folder}/store", timedelta(seconds=120))
    assert isinstance(collectives, RankCollectives), "one process has nothing to send"
    size, hidden = options.processes, options.hidden
    rows = [
        *columns("query, key, value", [hidden // size, *[options.key_value // size] * 2], collectives, options),
        *row("attention output", hidden // size, collectives, options),
        *columns("gate, up", [options.ffn // size] * 2, collectives, options),
        *row("down", options.ffn // size, collectives, options),
    ]
    if rank == 0:
        print(table(rows, options), flush=True)
    leave(collectives)


def table(rows: Sequence[Row], options: Options) -> str:
    kinds = list(rows[0].milliseconds)
    lines = [
        f"{options}",
        "",
        "| layer | MiB sent | sending alone ms | "
        + " | ".join(f"{kind} ms" for kind in kinds)
        + " | "
        + " | ".join(f"{kind} hidden %" for kind in kinds[1:])
        + " |",
        "| --- " + "| ---: " * (2 * len(kinds) + 1) + "|",
    ]
    total = Row(
        "all",
        sum(row.sent_bytes for row in rows),
        sum(row.communication_ms for row in rows),
        {kind: sum(row.milliseconds[kind] for row in rows) for kind in kinds},
    )
    for found in [*rows, total]:
        times = found.milliseconds
        hidden = [100 * (1 - (times[kind] - times["alone"]) / found.communication_ms) for kind in kinds[1:]]
        cells = [found.layer, f"{found.sent_bytes / 2**20:.1f}", f"{found.communication_ms:.3f}"]
        cells += [f"{times[kind]:.3f}" for kind in kinds] + [f"{share:.0f}" for share in hidden]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"processes": 2, "hidden": 4096, "ffn": 14336, "key-value": 0, "sequence": 4096, "samples": 2}
    for name, value in {**numbers, "warmup": 5, "steps": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="")
    given = parser.parse_args()
    given.key_value = given.key_value or given.hidden // 4
    given.dtype = given.dtype or ("float32" if given.device == "cpu" else "bfloat16")
    options = Options(**vars(given))
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=measure, args=(rank, options, folder)) for rank in range(options.processes)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
