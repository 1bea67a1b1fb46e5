"""Adafactor (Shazeer and Stern 2018, algorithms 4 and 5), in the variant of torch.optim.Adafactor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from colossal_core.layout import Piece
from colossal_core.optimizer_state import StateTensor
from colossal_core.optimizers import Groups, OptimizerContext, OptimizerSpec, with_defaults
from colossal_core.tensor_lists import assign_unless
from colossal_zero.optimizers.sums import ShardSums, SquareNorms, gradients_of, local_squares

if TYPE_CHECKING:
    from torch import nn

    from colossal_core.config import OptimizerConfig


class Adafactor:
    """Adam without a first moment, its second moment of a matrix kept as sums of rows and of columns (of the last two dimensions):

        d_t = 1 - t^-beta2_power;  R <- d_t R + (1 - d_t) mean over columns of g^2;  C the same over rows;  v = R C / mean(R)
        u = g / max(sqrt(v), eps);  u <- u / max(1, rms(u) / update_clip)
        p <- (1 - lr * weight_decay) p - max(scale_floor, rms(p)) min(lr, 1 / sqrt(t)) u

    Vectors keep v itself. R, C, rms(u) and rms(p) are the whole parameter's: rows and columns are summed from the boxes of which a shard
    consists, and kept whole on every rank. Memory beside masters: a row and a column a matrix.

    Communication: one all-reduce over the axes that cut the state, of all rows, columns and one number a parameter, and a second one of a
    number a parameter. The update is computed twice, once for its norm, one parameter at a time, so that it is never held whole.
    """

    def __init__(self, groups: Groups, config: OptimizerConfig, context: OptimizerContext) -> None:
        defaults = {
            "lr": config.lr,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
            "beta2_power": config.beta2_power,
            "update_clip": config.update_clip,
            "scale_floor": config.scale_floor,
        }
        self.param_groups = with_defaults(groups, defaults)
        self._step_count = torch.zeros((), dtype=torch.float32, device=context.device)
        self._context = context
        self._factored = [[_factors_of(master, context) for master in group["params"]] for group in self.param_groups]
        self._sums = [
            ShardSums(group["params"], [1 + found.num_numbers for found in factored], context)
            for group, factored in zip(self.param_groups, self._factored, strict=True)
        ]
        self._num_elements = [
            torch.tensor([float(found.numel) for found in factored], device=context.device)
            for factored in self._factored
        ]
        self._norms = [SquareNorms(group["params"], 1, context) for group in self.param_groups]

    @torch.no_grad()
    def clipped_step(self, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        self._step_count.add_(1.0 if skip is None else (~skip).to(self._step_count.dtype))
        for index, group in enumerate(self.param_groups):
            squares = self._average(index, clip, skip)
            elements = self._num_elements[index]
            floor = group["scale_floor"]
            scales = (squares / elements).sqrt().clamp(min=floor) * self._rate(group)
            of_updates = self._square_norms_of_updates(index, clip)
            excess = ((of_updates / elements).sqrt() / group["update_clip"]).clamp(min=1.0)
            self._apply(index, scales / excess, clip, skip)

    def _rate(self, group: dict[str, Any]) -> torch.Tensor:
        return self._step_count.double().clamp(min=1.0).rsqrt().clamp(max=group["lr"])

    def _average(self, index: int, clip: torch.Tensor | None, skip: torch.Tensor | None) -> torch.Tensor:
        """Brings every second moment up to date. Returns the squared norm of each parameter: one vector."""
        group, factored, sums = self.param_groups[index], self._factored[index], self._sums[index]
        masters: list[nn.Parameter] = group["params"]
        vectors = sums.zeros(masters[0].dtype)
        clip_square = None if clip is None else clip.to(masters[0].dtype).square()
        weight = self._step_count.double().clamp(min=1.0).pow(-group["beta2_power"]).to(masters[0].dtype)
        parts = [sums.view(vectors, position) for position in range(len(masters))]
        for part, square in zip(parts, local_squares(masters), strict=True):
            part[0].copy_(square)
        for found, gradient, part in zip(factored, gradients_of(masters, self._context), parts, strict=True):
            if isinstance(found, _Factors):
                found.add_squares(gradient, part[1:])
        sums.reduce(vectors, "rows and columns")
        for found, gradient, part in zip(factored, gradients_of(masters, self._context), parts, strict=True):
            means = found.means(part[1:]) if isinstance(found, _Factors) else [gradient.square()]
            if clip_square is not None:
                means = [mean * clip_square for mean in means]
            fresh = [torch.lerp(old, mean, weight) for old, mean in zip(found.moments, means, strict=True)]
            assign_unless(skip, found.moments, fresh)
        return torch.stack([part[0] for part in parts])

    def _square_norms_of_updates(self, index: int, clip: torch.Tensor | None) -> torch.Tensor:
        squares = []
        for master, updates in self._updates(index, clip):
            found = [local_squares([update])[0] for _, update in updates]
            squares.append(torch.stack(found).sum() if found else master.new_zeros(()))
        return self._norms[index].of([squares], "norms of updates")[0]

    def _updates(
        self, index: int, clip: torch.Tensor | None
    ) -> Iterator[tuple[nn.Parameter, Iterator[tuple[torch.Tensor, torch.Tensor]]]]:
        """For each master, (part of the master, its update before any scaling)."""
        group = self.param_groups[index]
        gradients = gradients_of(group["params"], self._context)
        for master, gradient, found in zip(group["params"], gradients, self._factored[index], strict=True):
            yield master, found.updates(master, gradient, clip, group["eps"])

    def _apply(self, index: int, rates: torch.Tensor, clip: torch.Tensor | None, skip: torch.Tensor | None) -> None:
        group = self.param_groups[index]
        keep = 1.0 - group["lr"] * group["weight_decay"]
        for rate, (_, updates) in zip(rates, self._updates(index, clip), strict=True):
            for part, update in updates:
                assign_unless(skip, [part], [part * keep - update.mul_(rate.to(part.dtype))])

    def state_tensors(self) -> Iterable[StateTensor]:
        yield StateTensor("adafactor.step", None, self._step_count)
        for group, factored in zip(self.param_groups, self._factored, strict=True):
            for master, found in zip(group["params"], factored, strict=True):
                state = self._context.shard(master).layout.state
                if isinstance(found, _Factors):
                    for name, moment in (("row", found.row), ("column", found.column)):
                        placement = state.as_replicated(tuple(moment.shape))
                        yield StateTensor(f"adafactor.{name}", master, moment, placement)
                else:
                    yield StateTensor("adafactor.variance", master, found.variance)


@dataclass(frozen=True)
class _Variance:
    """The second moment of a vector: it lies as the master does."""

    numel: int
    variance: torch.Tensor
    num_numbers: int = 0

    @property
    def moments(self) -> list[torch.Tensor]:
        return [self.variance]

    def updates(
        self, master: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor | None, eps: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield master, _clipped(gradient, clip) * self.variance.clamp(min=eps * eps).rsqrt_()


@dataclass(frozen=True)
class _Factors:
    """The second moment of a matrix, or of a stack of them: row [..., m, 1] and column [..., 1, n], whole on every rank.

    pieces: the boxes of the full [..., m, n] of which this rank's elements consist.
    """

    numel: int
    row: torch.Tensor
    column: torch.Tensor
    pieces: tuple[Piece, ...]

    @property
    def num_numbers(self) -> int:
        return self.row.numel() + self.column.numel()

    @property
    def moments(self) -> list[torch.Tensor]:
        return [self.row, self.column]

    def add_squares(self, gradient: torch.Tensor, numbers: torch.Tensor) -> None:
        """Adds this rank's sums of squares over columns and over rows to the flat `numbers` (rows first)."""
        row, column = self._split(numbers)
        for piece in self.pieces:
            square = piece.view(gradient).square()
            row[_row_box(piece)].add_(square.sum(dim=-1, keepdim=True))
            column[_column_box(piece)].add_(square.sum(dim=-2, keepdim=True))

    def means(self, numbers: torch.Tensor) -> list[torch.Tensor]:
        """Means over columns and over rows, from the sums of all ranks."""
        row, column = self._split(numbers)
        return [row / self.column.shape[-1], column / self.row.shape[-2]]

    def _split(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.row.numel()
        return numbers[:rows].view(self.row.shape), numbers[rows:].view(self.column.shape)

    def updates(
        self, master: torch.Tensor, gradient: torch.Tensor, clip: torch.Tensor | None, eps: float
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        row = self.row / self.row.mean(dim=-2, keepdim=True).clamp_(min=eps)
        for piece in self.pieces:
            square = row[_row_box(piece)] * self.column[_column_box(piece)]
            update = square.clamp_(min=eps * eps).rsqrt_().mul_(_clipped(piece.view(gradient), clip))
            yield piece.view(master), update


def _clipped(gradient: torch.Tensor, clip: torch.Tensor | None) -> torch.Tensor:
    return gradient if clip is None else gradient * clip.to(gradient.dtype)


def _row_box(piece: Piece) -> tuple[slice, ...]:
    return (*piece.box[:-1], slice(None))


def _column_box(piece: Piece) -> tuple[slice, ...]:
    return (*piece.box[:-2], slice(None), piece.box[-1])


def _factors_of(master: nn.Parameter, context: OptimizerContext) -> _Factors | _Variance:
    layout = context.shard(master).layout
    shape = layout.shape
    if len(shape) < 2:
        return _Variance(math.prod(shape), torch.zeros_like(master, requires_grad=False))
    row = master.new_zeros((*shape[:-1], 1), requires_grad=False)
    column = master.new_zeros((*shape[:-2], 1, shape[-1]), requires_grad=False)
    pieces = layout.state.pieces(context.coordinate, context.collectives.mesh)
    return _Factors(math.prod(shape), row, column, pieces)


ADAFACTOR = OptimizerSpec(
    "adafactor",
    Adafactor,
    state_elements=lambda config: 0,
    keys=("lr", "eps", "weight_decay", "no_decay", "beta2_power", "update_clip", "scale_floor"),
    on_shards="aware",
)
"""state_elements: a row and a column of a matrix are no elements for each of its own; vectors are few."""
