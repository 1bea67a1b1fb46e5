"""Products whose rows are gathered before or summed and scattered after, with the communication hidden as far as the order allows.

Without symmetric memory the samples follow one another: one is multiplied while the next is on its way. With it each rank's rows are
multiplied when they arrive, or sent when they are made (Wang et al. 2023, "Overlap communication with dependent computation via
decomposition"). Legend: L samples, n ranks, r rows of a rank, D features in, F features out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from colossal_comm import RankCollectives
from colossal_tensor import _torch_private
from colossal_tensor.operators import Route
from colossal_tensor.ranges import pieces_of, start_gather, start_scatter


def matrix_of(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """[in, out], whatever a layer keeps."""
    return weight.detach() if transposed else weight.detach().t()


def multiply(output: torch.Tensor, rows: torch.Tensor, matrix: torch.Tensor) -> None:
    """output [L, r, F] <- rows [L, r, D] times matrix [D, F]; both may be ranges of the rows of longer tensors."""
    if len(rows) == 1:
        torch.mm(rows[0], matrix, out=output[0])
    else:
        torch.bmm(rows, matrix.expand(len(rows), -1, -1), out=output)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1, tensor.shape[-1])


def gathered_products(
    part: torch.Tensor, matrices: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], route: Route
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """part [L, r, D] -> whole [L, n r, D] and its product with each matrix, [L, n r, F]; what arrives first is multiplied first."""
    samples, rows, features = part.shape
    outputs = [part.new_empty(samples, route.size * rows, matrix.shape[1]) for matrix in matrices]
    if not route.symmetric:
        whole, pieces = start_gather(part, route)
        for piece in pieces:
            piece.wait()
            for output, matrix, bias in zip(outputs, matrices, biases, strict=True):
                here, there = flat(whole[piece.samples]), flat(output[piece.samples])
                if bias is None:
                    torch.mm(here, matrix, out=there)
                else:
                    torch.addmm(bias.detach(), here, matrix, out=there)
        return whole, outputs
    own = route.collectives.index(route.axes)
    whole = part.new_empty(samples, route.size * rows, features)

    def consume(rank: int) -> None:
        at = slice(rank * rows, (rank + 1) * rows)
        for output, matrix in zip(outputs, matrices, strict=True):
            multiply(output[:, at], part if rank == own else whole[:, at], matrix)

    _announce(route, "all_gather", part)
    _torch_private.gather_and_consume(list(part), list(whole), consume, route.symmetric)
    for output, bias in zip(outputs, biases, strict=True):
        if bias is not None:
            output.add_(bias.detach())
    return whole, outputs


def _announce(route: Route, operation: Literal["all_gather", "reduce_scatter"], part: torch.Tensor) -> None:
    assert isinstance(route.collectives, RankCollectives), "only they have a symmetric group"
    route.collectives.announce(operation, part, route.axes, tag=route.tag)


def scattered_product(h: torch.Tensor, matrix: torch.Tensor, route: Route) -> torch.Tensor:
    """h [L, n r, F] -> this rank's [L, r, D] of the sum of h times matrix [F, D]; what is made first is sent first."""
    samples, all_rows, _ = h.shape
    rows, features = all_rows // route.size, matrix.shape[1]
    if not route.symmetric:
        product = h.new_empty(samples, all_rows, features)
        output = h.new_empty(samples, rows, features)
        handles = []
        for piece in pieces_of(samples):
            torch.mm(flat(h[piece]), matrix, out=flat(product[piece]))
            handles.append(start_scatter(output, product, piece, route))
        for handle in handles:
            handle.wait()
        return output

    def produce(rank: int, out: torch.Tensor) -> None:
        multiply(out, h[:, rank * rows : (rank + 1) * rows], matrix)

    received = h.new_empty(route.size * samples, rows, features)
    _announce(route, "reduce_scatter", received[:samples])
    _torch_private.produce_and_exchange(produce, received, route.symmetric)
    return received.view(route.size, samples, rows, features).sum(0)


def weight_gradient(gradient: torch.Tensor, inputs: torch.Tensor, transposed: bool) -> torch.Tensor:
    """Of a weight, in its own layout, from [L, rows, out] and [L, rows, in]."""
    left, right = (inputs, gradient) if transposed else (gradient, inputs)
    return flat(left).t() @ flat(right)


def write_input_gradient(
    output: torch.Tensor, gradients: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], transposed: bool
) -> None:
    """output [L, rows, D] <- the sum of each gradient [L, rows, F] times its weight."""
    if not gradients:
        output.zero_()
    for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
        matrix = matrix_of(weight, transposed).t()
        if place == 0:
            torch.mm(flat(gradient), matrix, out=flat(output))
        else:
            flat(output).addmm_(flat(gradient), matrix)
