"""Output projection and cross-entropy in one, a chunk of rows at a time, so that the logits never exist whole. Of a chunk: its logits by
one matrix product, their gradient in their place by one kernel, and two products more; everything in the forward pass, without a host
synchronisation. The order of work is Hsu et al. 2024's (section 3.2), but for the chunks. Legend: N rows, D features, V vocabulary, C
rows of a chunk.

Few chunks are good, since each reads and writes the weight's gradient once (2 V D elements: 2.1 GB at V = 128256, D = 4096), and such
as fill the GPU with the product that gives the hidden states' gradient, which has few tiles of 128 x 256 and takes long for each: 1024
rows are one full wave of them there, 1792 are two, of which the second is 70 % full. So that product may be cut along the vocabulary into
parts that are computed at once and summed: 1536 rows in two parts are three full waves of half the time.

The weight's gradient is summed in the weight's dtype, by products that add to it in float32 and round once. In bfloat16 (unit u = 2^-9)
k chunks of like size round the running sum k times, at sizes that grow as a random walk: sqrt(k / 2) u of it, against sqrt(2) u of the
reference, which rounds each chunk's product and at last the float32 sum. Random matrices of 2048 rows against float64: 1.1, 1.5, 2.1 and
2.9 times the reference's error for 4, 8, 16 and 32 chunks. So with more than 12 the sum is taken in float32, the products a slice of the
vocabulary at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import linear_cross_entropy as reference
from colossal_core.ops.cross_entropy import LossTerms
from colossal_core.ops.linear_cross_entropy import LOGITS_BYTES, most_rows
from colossal_kernels.builds import Build
from colossal_kernels.library import define, differentiate
from colossal_kernels.losses.in_place import in_place_builds, write_losses_and_gradients
from colossal_kernels.losses.rows import MULTIPROCESSORS, losses
from colossal_kernels.losses.scaling import scale_builds, scale_in_place

MOST_NARROW_SUMS = 12
"""Chunks whose products are added to a weight's gradient in its own dtype."""
SLICE_BYTES = 64 * 2**20
"""Of a product that is added to a gradient in float32."""
MOST_PARTS = 3
"""Of the product that gives the hidden states' gradient: each is rounded to its dtype before they are summed."""
TILE_ROWS, TILE_COLUMNS = 128, 256
"""Of a matrix product in bfloat16 on an H200."""
FLOPS, BYTES_A_SECOND = 790e12, 4.2e12
"""Of an H200, measured 2026-11-21: a large product in bfloat16 and a large copy."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    budget_bytes: int = LOGITS_BYTES,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> Tensor:
    """`colossal_core.ops.reference.linear_cross_entropy`. budget_bytes bounds the only tensor of logits that there is, with the parts of
    the hidden states' gradient.

    Beside it only the gradients are made, that of the weight in float32 where there may be more than `MOST_NARROW_SUMS` chunks. The
    backward pass scales them where they are: a second one through the same graph is an error. All of hidden, weight and bias are of one
    dtype, or the reference serves.
    """
    terms = LossTerms(ignore_index, z_loss, smoothing)
    assert hidden.shape[:-1] == labels.shape, f"hidden {tuple(hidden.shape)} does not fit labels {tuple(labels.shape)}"
    given = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    if (
        hidden.dtype == torch.float64
        or len({tensor.dtype for tensor in given}) > 1
        or 0 in (*hidden.shape, *weight.shape)
    ):
        return reference.linear_cross_entropy(
            hidden, weight, labels, bias,
            budget_bytes=budget_bytes, ignore_index=ignore_index, z_loss=z_loss, smoothing=smoothing,
        )  # fmt: skip
    rows = hidden.reshape(-1, hidden.shape[-1])
    needs = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in (rows, weight, bias)]
    total: Tensor = _FORWARD(
        rows, weight, bias, labels.reshape(-1).contiguous(), needs,
        budget_bytes, ignore_index, float(terms.z_loss), float(terms.smoothing),
    )[0]  # fmt: skip
    return total


@dataclass(frozen=True)
class Chunks:
    """rows: of a chunk. parts: into which the product over the vocabulary is cut that gives the hidden states' gradient."""

    rows: int
    parts: int


def chunks_of(num_rows: int, num_features: int, vocabulary: int, most: int) -> Chunks:
    """Rows of a chunk, at most `most` with what the parts take and at least half of it: of the whole numbers of tiles, that with the
    shortest time by `_seconds`. Where all rows are one chunk, or a chunk is no tile, the product is not cut.
    """
    if num_rows <= most or most < TILE_ROWS:
        return Chunks(min(num_rows, most), 1)
    least = -(-most // 2 // TILE_ROWS) * TILE_ROWS
    possible = []
    for parts in range(1, MOST_PARTS + 1):
        # Parts begin at multiples of 16 bytes.
        if parts == 1 or vocabulary % (8 * parts) == 0:
            held = most * vocabulary // (vocabulary + (parts * num_features if parts > 1 else 0))
            possible += [Chunks(rows, parts) for rows in range(least, held + 1, TILE_ROWS)]
    if not possible:
        return Chunks(most, 1)
    return min(possible, key=lambda chunks: (_seconds(num_rows, num_features, vocabulary, chunks), -chunks.rows))


def _seconds(num_rows: int, num_features: int, vocabulary: int, chunks: Chunks) -> float:
    """What depends on the chunks: the products that give the hidden states' gradient, in whole waves of tiles, and the traffic of the
    weight's gradient and of parts.
    """
    whole, rest = divmod(num_rows, chunks.rows)

    def waves(rows: int) -> int:
        tiles = -(-rows // TILE_ROWS) * -(-num_features // TILE_COLUMNS) * chunks.parts
        return -(-tiles // MULTIPROCESSORS)

    num_waves = whole * waves(chunks.rows) + (waves(rest) if rest else 0)
    tile = 2.0 * TILE_ROWS * TILE_COLUMNS * vocabulary / chunks.parts
    numbers = 2 * (whole + (rest > 0)) * vocabulary * num_features
    if chunks.parts > 1:
        numbers += (2 * chunks.parts + 1) * num_rows * num_features
    return num_waves * tile * MULTIPROCESSORS / FLOPS + 2.0 * numbers / BYTES_A_SECOND


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs: list[bool],
    budget_bytes: int, ignore_index: int, z_loss: float, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    terms = LossTerms(ignore_index, z_loss, smoothing)
    (num_rows, num_features), vocabulary = hidden.shape, len(weight)
    most = most_rows(vocabulary, hidden.dtype, budget_bytes)
    chunks = chunks_of(num_rows, num_features, vocabulary, most)
    made = _gradients_to_be(hidden, weight, bias, needs, most)
    found = hidden.new_empty(num_rows, dtype=torch.float32)
    # Rows begin at multiples of 16 bytes, which products are several times as fast with.
    step = 16 // hidden.element_size()
    buffer = hidden.new_empty((chunks.rows, -(-vocabulary // step) * step))[:, :vocabulary]
    for start in range(0, num_rows, chunks.rows):
        rows = slice(start, min(start + chunks.rows, num_rows))
        some, of_rows = hidden[rows], labels[rows]
        logits = buffer[: len(some)]
        if bias is None:
            torch.mm(some, weight.t(), out=logits)
        else:
            torch.addmm(bias, some, weight.t(), out=logits)
        if not any(needs):
            found[rows] = losses(logits, of_rows, terms)[0]
            continue
        write_losses_and_gradients(logits, of_rows, terms, found[rows])
        grad_hidden, grad_weight, grad_bias = made
        if needs[0]:
            _write_product(grad_hidden[rows], logits, weight, chunks.parts)
        if needs[1]:
            _add_product(grad_weight, logits, some, first=start == 0)
        if needs[2]:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return found.sum(), *made


def _gradients_to_be(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool], most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias; empty where nobody asks for it. most: rows of a chunk, which are at least half of it."""
    none = hidden.new_empty(0)
    narrow = 2 * len(hidden) <= MOST_NARROW_SUMS * most and weight.dtype != torch.float16  # whose sums would pass 65504
    wide = weight.dtype if narrow else torch.float32
    return (
        hidden.new_empty(hidden.shape) if needs[0] else none,
        weight.new_empty(weight.shape, dtype=wide) if needs[1] else none.clone(),
        bias.new_zeros(bias.shape, dtype=torch.float32) if bias is not None and needs[2] else none.clone(),
    )


def _write_product(target: Tensor, grad_logits: Tensor, weight: Tensor, parts: int) -> None:
    """grad_logits [C, V] weight [V, D]; in parts, each of them rounded, and their sum."""
    if parts == 1:
        torch.mm(grad_logits, weight, out=target)
        return
    of_parts = grad_logits.unflatten(1, (parts, -1)).transpose(0, 1)
    torch.sum(torch.bmm(of_parts, weight.unflatten(0, (parts, -1))), 0, out=target)


def _add_product(total: Tensor, grad_logits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """total [V, D] + grad_logits [C, V]^T hidden [C, D]; with `first`, whatever total holds."""
    if total.dtype == hidden.dtype:
        if first:
            torch.mm(grad_logits.t(), hidden, out=total)
        else:
            torch.addmm(total, grad_logits.t(), hidden, out=total)
        return
    words = max(1, SLICE_BYTES // (hidden.shape[1] * hidden.element_size()))
    for part, of_part in zip(total.split(words), grad_logits.t().split(words), strict=True):
        product = of_part @ hidden
        if first:
            part.copy_(product)
        else:
            part += product


def _forward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, needs: list[bool],
    budget_bytes: int, ignore_index: int, z_loss: float, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    made = _gradients_to_be(hidden, weight, bias, needs, most_rows(len(weight), hidden.dtype, budget_bytes))
    return hidden.new_empty((), dtype=torch.float32), *made


_FORWARD = define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, bool[] needs, int budget_bytes, "
    "int ignore_index, float z_loss, float smoothing) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, bias, _, needs, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.needs, ctx.dtypes = needs, (weight.dtype, weight.dtype if bias is None else bias.dtype)


def _gradients(ctx: Any, grad_total: Tensor | None, *rest: None) -> tuple[Tensor | None, ...]:
    del rest
    nothing = (None,) * 6
    if grad_total is None:
        return None, None, None, *nothing
    # Of one dimension: a number of none would be rounded to the gradients' dtype before it is multiplied.
    factor = grad_total.reshape(1)
    hidden, weight, bias = (
        scale_in_place(gradient, factor) if needed else None
        for gradient, needed in zip(ctx.saved_tensors, ctx.needs, strict=True)
    )
    of_weight, of_bias = ctx.dtypes
    return (
        hidden,
        None if weight is None else weight.to(of_weight),
        None if bias is None else bias.to(of_bias),
        *nothing,
    )


differentiate("linear_cross_entropy", _gradients, _save)


def builds() -> tuple[Build, ...]:
    return (*in_place_builds(), *scale_builds())
