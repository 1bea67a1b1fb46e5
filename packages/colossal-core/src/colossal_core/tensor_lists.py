"""Lists of tensors as an optimizer's pass reads them: in bounded groups, gradients clipped into copies, old values kept in a skipped step.

The `torch._foreach_*` names are private to torch; tried on 2.11 and 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

Tensors = list[torch.Tensor]

GROUP_ELEMENTS = 1 << 26
"""Tensors are updated in groups of about this many elements, so that the temporaries stay small beside the states."""


def bounded_groups(*lists: Sequence[torch.Tensor], most: int | None = None) -> Iterator[tuple[Tensors, ...]]:
    """The lists in groups of at most `most` elements (`GROUP_ELEMENTS`). All lists agree in length, and item by item in shape.

    What is longer than that is cut into flat views where it is contiguous in every list (or one expanded number), and is a group of its own
    where it is not. Empty tensors are left out.
    """
    limit = GROUP_ELEMENTS if most is None else most
    group: tuple[Tensors, ...] = tuple([] for _ in lists)
    elements = 0
    for row in zip(*lists, strict=True):
        for views in _cut(row, limit):
            if group[0] and elements + views[0].numel() > limit:
                yield group
                group, elements = tuple([] for _ in lists), 0
            for members, view in zip(group, views, strict=True):
                members.append(view)
            elements += views[0].numel()
    if lists and group[0]:
        yield group


def _cut(row: tuple[torch.Tensor, ...], limit: int) -> Iterator[tuple[torch.Tensor, ...]]:
    length = row[0].numel()
    if length == 0:
        return
    if length <= limit or not all(tensor.is_contiguous() or not any(tensor.stride()) for tensor in row):
        yield row
        return
    flat = [tensor.detach().view(-1) for tensor in row]
    for start in range(0, length, limit):
        yield tuple(tensor[start : start + limit] for tensor in flat)


def clipped(gradients: Sequence[torch.Tensor], clip: torch.Tensor | None, dtype: torch.dtype | None = None) -> Tensors:
    """The gradients in `dtype` (their own) times the 0-d factor, as copies; themselves where nothing changes. Raw gradients stay readable
    after the step.
    """
    found = [gradient.to(dtype or gradient.dtype) for gradient in gradients]
    if clip is None or not found:
        return found
    return list(torch._foreach_mul(found, clip.to(found[0].dtype)))


def assign_unless(skip: torch.Tensor | None, targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    """Copies values to their targets, or nothing where the 0-d flag is true: selected, not multiplied, so that a NaN cannot leak."""
    if not targets:
        return
    if skip is not None:
        values = [torch.where(skip, old, new) for old, new in zip(targets, values, strict=True)]
    torch._foreach_copy_(list(targets), list(values))
