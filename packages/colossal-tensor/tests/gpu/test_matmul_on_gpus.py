"""Two GPUs: products through symmetric memory and through NCCL are the whole product's, eager and compiled, in float64; so is the loss."""

from __future__ import annotations

import pytest
import torch

from colossal_core.collectives import Collectives
from colossal_core.mesh import MeshLayout
from colossal_core.ops.cross_entropy import cross_entropy
from colossal_core.testing import WorkerPool
from colossal_tensor.cross_entropy import Words, vocabulary_cross_entropy
from colossal_tensor.matmul import SequenceMatmul, sequence_matmul

pytestmark = pytest.mark.gpu
NUM_RANKS = 2
FEATURES, HIDDEN, ROWS = 96, 64, 256
SAMPLES = (1, 2, 9)
Named = dict[str, torch.Tensor]


def tensors(samples: int, device: torch.device) -> Named:
    generator = torch.Generator().manual_seed(samples)
    shapes = {
        "x": (samples, ROWS, FEATURES),
        "first": (NUM_RANKS * HIDDEN, FEATURES),
        "second": (NUM_RANKS * HIDDEN, FEATURES),
        "bias": (NUM_RANKS * HIDDEN,),
        "row": (FEATURES, NUM_RANKS * HIDDEN),
        "of result": (samples, ROWS, FEATURES),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device) / FEATURES**0.25
        for name, shape in shapes.items()
    }


DIMS = {"x": 1, "first": 0, "second": 0, "bias": 0, "row": 1, "of result": 1}


def own(found: Named, rank: int, transposed: bool) -> Named:
    parts = {name: tensor.chunk(NUM_RANKS, DIMS[name])[rank] for name, tensor in found.items()}
    if transposed:
        parts.update({name: parts[name].t() for name in ("first", "second", "row")})
    return {name: part.contiguous().requires_grad_(name != "of result") for name, part in parts.items()}


def run(matmul: SequenceMatmul, parts: Named, transposed: bool, compiled: bool) -> list[torch.Tensor]:
    def block(parts: Named) -> torch.Tensor:
        weights = [parts["first"], parts["second"]]
        _, (first, second) = matmul.gather_columns(parts["x"], weights, [None, parts["bias"]], transposed=transposed)
        return matmul.row_scatter(torch.tanh(first) * second, parts["row"], transposed=transposed)

    result = (torch.compile(block, fullgraph=True) if compiled else block)(parts)
    learned = [parts[name] for name in ("x", "first", "second", "bias", "row")]
    return [result.detach(), *torch.autograd.grad((result * parts["of result"]).sum(), learned)]


def expected(found: Named, rank: int, transposed: bool) -> list[torch.Tensor]:
    learned = {name: found[name].requires_grad_() for name in ("x", "first", "second", "bias", "row")}
    h = torch.tanh(found["x"] @ found["first"].t()) * (found["x"] @ found["second"].t() + found["bias"])
    result = h @ found["row"].t()
    gradients = torch.autograd.grad((result * found["of result"]).sum(), list(learned.values()))
    parts = own({name: grad.detach() for name, grad in zip(learned, gradients, strict=True)}, rank, transposed)
    return [result.detach().chunk(NUM_RANKS, 1)[rank], *(part.detach() for part in parts.values())]


def products(collectives: Collectives) -> list[tuple[str, float]]:
    rows = []
    for symmetric in (True, False):
        matmul = sequence_matmul(collectives, "tp", symmetric=symmetric)
        assert bool(matmul.route.symmetric) == symmetric, "these two GPUs do not reach each other's memory"
        for samples in SAMPLES:
            for transposed in (False, True):
                for compiled in (False, True):
                    torch.compiler.reset()
                    parts = own(tensors(samples, collectives.device), collectives.rank, transposed)
                    found = run(matmul, parts, transposed, compiled)
                    wanted = expected(tensors(samples, collectives.device), collectives.rank, transposed)
                    error = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, wanted, strict=True))
                    rows.append((f"{symmetric=} {samples=} {transposed=} {compiled=}", error))
    return rows


def losses(collectives: Collectives) -> list[tuple[str, float]]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 100, generator=generator, dtype=torch.float64).to(collectives.device).requires_grad_()
    labels = torch.randint(0, 100, (300,), generator=generator).to(collectives.device)
    labels[::7] = -100
    total, _ = cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(total, logits)
    words = Words(0, 60, 100) if collectives.rank == 0 else Words(60, 100, 100)
    rows = []
    for compiled in (False, True):
        loss = vocabulary_cross_entropy(collectives, "tp", words)
        loss = loss.compiled("inductor", dynamic=False) if compiled else loss
        part = torch.nn.functional.pad(logits.detach()[:, words.start : words.stop], (0, 4), value=9.0e9)
        found, _ = loss(part.requires_grad_(), labels)
        (found_gradient,) = torch.autograd.grad(found, part)
        wanted = gradient[:, words.start : words.stop]
        error = (found_gradient[:, : words.size] - wanted).norm() / wanted.norm()
        rows.append((f"loss {compiled=}", max(error.item(), ((found - total).abs() / total).item())))
    return rows


def errors(collectives: Collectives) -> list[tuple[str, float]]:
    tensor_ranks = collectives.with_mesh(MeshLayout((1, 1, 1, 1, NUM_RANKS)))
    return [*products(tensor_ranks), *losses(tensor_ranks)]


@pytest.mark.timeout(400)
def test_two_gpus_give_the_whole_product(gpus: WorkerPool) -> None:
    if torch.accelerator.device_count() < NUM_RANKS:
        pytest.skip(f"needs {NUM_RANKS} GPUs")
    for found in gpus.run(NUM_RANKS, errors):
        assert [row for row in found if not row[1] <= 1e-12] == []
