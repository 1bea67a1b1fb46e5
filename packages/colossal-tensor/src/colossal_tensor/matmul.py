"""Linear layers between which the sequence is cut (Korthikanti et al. 2022, section 4.2.2), as operators that torch.compile keeps whole.

`gather_columns`: all-gather along the sequence, then the column-cut products. Kept for the backward pass is the rank's part of the
input; the whole is gathered again, hidden behind the gradient of the input, whose reduce-scatter is hidden behind the gradients of the
weights. `row_scatter`: the row-cut product, then reduce-scatter; its backward pass gathers the gradient.

Where the gather comes before the product, or the sum after it, the samples are sent and multiplied one after another; over NVLink with
symmetric memory each rank's part is multiplied as it arrives, or sent as it is made (Wang et al. 2023, "Overlap communication with
dependent computation via decomposition").

Legend: L samples, n ranks, r rows of a rank, D features in, F features out of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F

from colossal_comm import RankCollectives
from colossal_tensor.operators import LIBRARY, Route, route_of
from colossal_tensor.products import (
    gathered_products,
    matrix_of,
    scattered_product,
    weight_gradient,
    write_input_gradient,
)
from colossal_tensor.ranges import in_rows, pieces_of, start_gather, start_scatter

if TYPE_CHECKING:
    from colossal_core.collectives import Axes, Collectives


@dataclass(frozen=True, eq=False)
class SequenceMatmul:
    """The products at the border of a group whose sequence is cut over the route's axes. Make it with `sequence_matmul`. A copy is
    itself.
    """

    route: Route

    def gather_columns(
        self,
        x: torch.Tensor,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        *,
        dim: int = 1,
        transposed: bool = False,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The whole input, and its product with each weight (plus bias).

        x: [..., s, ..., D], this rank's part along `dim`, which is not the last. weights: [F, D] each (nn.Linear), or [D, F] where
        `transposed` (transformers' Conv1D). Returns [..., n s, ..., D] and [..., n s, ..., F] each, contiguous. The gradients that
        arrive are summands, those of weights and biases are of this rank's features and all rows.
        Communication: an all-gather of x forward; backward an all-gather of x (where a weight needs a gradient) and a reduce-scatter of
        the same size (where x does): (n-1) x bytes sent each.
        """
        if self.route.size == 1:
            pairs = zip(weights, biases, strict=True)
            return x, [F.linear(x, weight.t() if transposed else weight, bias) for weight, bias in pairs]
        whole, outputs = torch.ops.colossal_tensor.gather_columns(
            x,
            list(weights),
            [bias for bias in biases if bias is not None],
            [bias is not None for bias in biases],
            dim % x.ndim,
            transposed,
            self.route.key,
        )
        return whole, outputs

    def row_scatter(
        self, h: torch.Tensor, weight: torch.Tensor, *, dim: int = 1, transposed: bool = False
    ) -> torch.Tensor:
        """This rank's part along `dim` of the sum over the ranks of h times its weight.

        h: [..., n s, ..., F] of this rank's features; `dim` is not the last and divides by n. weight: [D, F], or [F, D] where
        `transposed`. Returns [..., s, ..., D]. A bias is added by the caller, to the result. The gradient that arrives is that of this
        rank's part. Communication: a reduce-scatter forward, an all-gather backward: (n-1) times the result's bytes sent each.
        """
        if self.route.size == 1:
            return F.linear(h, weight.t() if transposed else weight)
        assert h.shape[dim] % self.route.size == 0, (
            f"dim {dim} of {tuple(h.shape)} does not divide by {self.route.size}"
        )
        result: torch.Tensor = torch.ops.colossal_tensor.row_scatter(
            h, weight, dim % h.ndim, transposed, self.route.key
        )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        del memo
        return self


def sequence_matmul(
    collectives: Collectives, axes: Axes, *, symmetric: bool = True, tag: str = "sequence"
) -> SequenceMatmul:
    """symmetric: symmetric memory is used where all ranks of the group have it (`RankCollectives.symmetric_group`). Every rank calls it
    at the same point of the program.
    """
    group = collectives.symmetric_group(axes) if symmetric and isinstance(collectives, RankCollectives) else ""
    return SequenceMatmul(Route(collectives, axes, tag, group))


def _resized(shape: torch.Size, dim: int, rows: int, features: int) -> tuple[int, ...]:
    return (*shape[:dim], rows, *shape[dim + 1 : -1], features)


def _gather_columns_now(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    biased: list[bool],
    dim: int,
    transposed: bool,
    key: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    route = route_of(key)
    matrices = [matrix_of(weight, transposed) for weight in weights]
    given = iter(biases)
    spread = [next(given) if there_is_one else None for there_is_one in biased]
    whole, outputs = gathered_products(in_rows(x, dim), matrices, spread, route)
    shape = _resized(x.shape, dim, route.size * x.shape[dim], -1)
    return whole.view(shape), [output.view(shape) for output in outputs]


def _gather_columns_shapes(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    biased: list[bool],
    dim: int,
    transposed: bool,
    key: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    rows = route_of(key).size * x.shape[dim]
    features = [weight.shape[1 if transposed else 0] for weight in weights]
    outputs = [x.new_empty(_resized(x.shape, dim, rows, number)) for number in features]
    return x.new_empty(_resized(x.shape, dim, rows, x.shape[-1])), outputs


def _gather_columns_gradients_now(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    of_whole: torch.Tensor | None,
    of_outputs: list[torch.Tensor],
    dim: int,
    transposed: bool,
    needed: list[bool],
    key: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of x and of the weights. needed: of x, and of each weight; the others are empty."""
    route, (of_x, *of_weights) = route_of(key), needed
    part = in_rows(x, dim)
    gradients = [in_rows(gradient, dim) for gradient in of_outputs]
    # The order is the point: the gather is on its way during the first loop, the reduce-scatter during the second.
    whole, gathers = start_gather(part, route) if any(of_weights) else (part, [])
    x_gradient, handles = part.new_empty(0), []
    if of_x:
        x_gradient = torch.empty_like(part)
        summand = part.new_empty(part.shape[0], route.size * part.shape[1], part.shape[2])
        for piece in pieces_of(len(part)):
            write_input_gradient(summand[piece], [gradient[piece] for gradient in gradients], weights, transposed)
            if of_whole is not None:
                summand[piece] += in_rows(of_whole, dim)[piece]
            handles.append(start_scatter(x_gradient, summand, piece, route))
        x_gradient = x_gradient.view(x.shape)
    for gather in gathers:
        gather.wait()
    weight_gradients = [
        weight_gradient(gradient, whole, transposed) if wanted else part.new_empty(0)
        for gradient, wanted in zip(gradients, of_weights, strict=True)
    ]
    for handle in handles:
        handle.wait()
    return x_gradient, weight_gradients


def _gather_columns_gradients_shapes(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    of_whole: torch.Tensor | None,
    of_outputs: list[torch.Tensor],
    dim: int,
    transposed: bool,
    needed: list[bool],
    key: str,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    of_weights = [
        x.new_empty(weight.shape if wanted else (0,)) for weight, wanted in zip(weights, needed[1:], strict=True)
    ]
    return x.new_empty(x.shape if needed[0] else (0,)), of_weights


def _keep_columns(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, _, *rest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *weights)
    ctx.rest = rest
    ctx.route = route_of(rest[-1])  # alive until the backward pass has run


def _gather_columns_backward(
    ctx: Any, of_whole: torch.Tensor | None, of_outputs: Sequence[torch.Tensor | None]
) -> tuple[Any, ...]:
    x, *weights = ctx.saved_tensors
    biased, dim, transposed, key = ctx.rest
    of_x, of_weights, of_biases, *_ = ctx.needs_input_grad
    arrived = {place: gradient for place, gradient in enumerate(of_outputs) if gradient is not None}
    needed = [of_x, *(of_weights[place] for place in arrived)]
    x_gradient: torch.Tensor | None = None
    weight_gradients: list[torch.Tensor | None] = [None] * len(weights)
    if any(needed):
        found, of_arrived = torch.ops.colossal_tensor.gather_columns_gradients(
            x, [weights[place] for place in arrived], of_whole, list(arrived.values()), dim, transposed, needed, key
        )
        x_gradient = found if of_x else None
        for place, gradient in zip(arrived, of_arrived, strict=True):
            weight_gradients[place] = gradient if of_weights[place] else None
    with_bias = [place for place, there_is_one in enumerate(biased) if there_is_one]
    bias_gradients = [
        arrived[place].flatten(0, -2).sum(0) if wanted and place in arrived else None
        for place, wanted in zip(with_bias, of_biases, strict=True)
    ]
    return x_gradient, weight_gradients, bias_gradients, None, None, None, None


def _row_scatter_now(h: torch.Tensor, weight: torch.Tensor, dim: int, transposed: bool, key: str) -> torch.Tensor:
    route = route_of(key)
    output = scattered_product(in_rows(h, dim), matrix_of(weight, transposed), route)
    return output.view(_resized(h.shape, dim, h.shape[dim] // route.size, -1))


def _row_scatter_shape(h: torch.Tensor, weight: torch.Tensor, dim: int, transposed: bool, key: str) -> torch.Tensor:
    rows = h.shape[dim] // route_of(key).size
    return h.new_empty(_resized(h.shape, dim, rows, weight.shape[1 if transposed else 0]))


def _row_scatter_gradients_now(
    gradient: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    dim: int,
    transposed: bool,
    needed: list[bool],
    key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of h and of the weight; one that is not needed is empty."""
    route, (of_h, of_weight) = route_of(key), needed
    matrices = [matrix_of(weight, transposed).t()] if of_h else []
    whole, found = gathered_products(in_rows(gradient, dim), matrices, [None] * len(matrices), route)
    h_gradient = found[0].view(h.shape) if of_h else h.new_empty(0)
    return h_gradient, weight_gradient(whole, in_rows(h, dim), transposed) if of_weight else h.new_empty(0)


def _row_scatter_gradients_shapes(
    gradient: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    dim: int,
    transposed: bool,
    needed: list[bool],
    key: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return h.new_empty(h.shape if needed[0] else (0,)), h.new_empty(weight.shape if needed[1] else (0,))


def _keep_rows(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    h, weight, *rest = inputs
    ctx.save_for_backward(h, weight)
    ctx.rest = rest
    ctx.route = route_of(rest[-1])  # alive until the backward pass has run


def _row_scatter_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    h, weight = ctx.saved_tensors
    dim, transposed, key = ctx.rest
    needed = list(ctx.needs_input_grad[:2])
    of_h, of_weight = torch.ops.colossal_tensor.row_scatter_gradients(gradient, h, weight, dim, transposed, needed, key)
    return of_h if needed[0] else None, of_weight if needed[1] else None, None, None, None


for _schema, _run, _shapes in (
    (
        "gather_columns(Tensor x, Tensor[] weights, Tensor[] biases, bool[] biased, int dim, bool transposed, str key) "
        "-> (Tensor, Tensor[])",
        _gather_columns_now,
        _gather_columns_shapes,
    ),
    (
        "gather_columns_gradients(Tensor x, Tensor[] weights, Tensor? of_whole, Tensor[] of_outputs, int dim, "
        "bool transposed, bool[] needed, str key) -> (Tensor, Tensor[])",
        _gather_columns_gradients_now,
        _gather_columns_gradients_shapes,
    ),
    (
        "row_scatter(Tensor h, Tensor weight, int dim, bool transposed, str key) -> Tensor",
        _row_scatter_now,
        _row_scatter_shape,
    ),
    (
        "row_scatter_gradients(Tensor gradient, Tensor h, Tensor weight, int dim, bool transposed, bool[] needed, str key) "
        "-> (Tensor, Tensor)",
        _row_scatter_gradients_now,
        _row_scatter_gradients_shapes,
    ),
):
    LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _name = _schema.split("(")[0]
    LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"colossal_tensor::{_name}", _shapes, lib=LIBRARY)

for _name, _backward, _keep in (
    ("gather_columns", _gather_columns_backward, _keep_columns),
    ("row_scatter", _row_scatter_backward, _keep_rows),
):
    torch.library.register_autograd(f"colossal_tensor::{_name}", _backward, setup_context=_keep, lib=LIBRARY)
