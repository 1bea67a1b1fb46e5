"""An optimizer's update of lists of tensors that are kept narrower than float32: widened, updated and rounded once, in chunks, so that the
wide copies are small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from colossal_core.rounding import BLOCK, Coded, Kept, round_to_bf16
from colossal_core.tensor_lists import Tensors, assign_unless

CHUNK_ELEMENTS = 1 << 24
"""Elements that are widened at a time: with two moments, 0.4 GB of float32."""

WideUpdate = Callable[[Tensors, Tensors, Sequence[Tensors]], None]
"""(parameters, gradients, one list a moment), all float32: in place on parameters and moments; nothing changes in a skipped step."""


def must_be_widened(params: Sequence[torch.Tensor], moments: Sequence[Sequence[Kept]], seed: int | None) -> bool:
    """Whether an update in the parameters' own dtype would not do: a moment is kept otherwise, or bf16 is to be rounded stochastically."""
    dtypes = {None if isinstance(kept, Coded) else kept.dtype for moment in moments for kept in moment}
    if not params or params[0].dtype == torch.float64:
        return False
    return not dtypes <= {params[0].dtype} or (seed is not None and params[0].dtype == torch.bfloat16)


def plain(moment: Sequence[Kept]) -> Tensors:
    """The moment's tensors, none of which is coded."""
    found = [kept for kept in moment if isinstance(kept, torch.Tensor)]
    assert len(found) == len(moment), "codes are widened first"
    return found


def update_in_float32(
    update: WideUpdate,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    moments: Sequence[Sequence[Kept]],
    skip: torch.Tensor | None,
    seed: int | None,
) -> None:
    """Runs `update` on float32 copies. Every result is rounded once: bf16 and codes stochastically by numbers that `seed` alone decides,
    other dtypes, and bf16 where there is no seed, to the nearest. Tensors are contiguous; codes need a seed.
    """
    if not params:
        return
    generator = None if seed is None else torch.Generator(params[0].device).manual_seed(seed)
    for parts in _chunks([param.numel() for param in params]):
        wide_params, wide_grads = _widened(params, parts), _widened(grads, parts)
        wide_moments = [_read(moment, parts) for moment in moments]
        update([wide_params], [wide_grads], [[moment] for moment in wide_moments])
        for moment, wide in zip(moments, wide_moments, strict=True):
            _write(moment, parts, wide, skip, generator)
        _write(params, parts, wide_params, skip, generator)


@dataclass(frozen=True)
class _Part:
    """Elements [start, stop) of a flattened tensor, at `offset` in a chunk; start and offset are whole blocks."""

    index: int
    start: int
    stop: int
    offset: int

    @property
    def end(self) -> int:
        return self.offset + self.stop - self.start

    @property
    def blocks(self) -> slice:
        return slice(self.start // BLOCK, -(-self.stop // BLOCK))

    @property
    def codes(self) -> slice:
        return slice(self.start, self.blocks.stop * BLOCK)


def _chunks(numels: Sequence[int]) -> Iterator[list[_Part]]:
    """The tensors behind one another, each from the start of a block, in chunks."""
    most = max(CHUNK_ELEMENTS // BLOCK, 1) * BLOCK
    parts: list[_Part] = []
    offset = 0
    for index, numel in enumerate(numels):
        start = 0
        while start < numel:
            stop = min(numel, start + most - offset)
            parts.append(_Part(index, start, stop, offset))
            offset += -(-(stop - start) // BLOCK) * BLOCK
            start = stop
            if offset == most:
                yield parts
                parts, offset = [], 0
    if parts:
        yield parts


def _length(parts: Sequence[_Part]) -> int:
    return -(-parts[-1].end // BLOCK) * BLOCK


def _views(flat: torch.Tensor, parts: Sequence[_Part]) -> Tensors:
    return [flat[part.offset : part.end] for part in parts]


def _pieces(tensors: Sequence[torch.Tensor], parts: Sequence[_Part]) -> Tensors:
    return [tensors[part.index].detach().view(-1)[part.start : part.stop] for part in parts]


def _widened(tensors: Sequence[torch.Tensor], parts: Sequence[_Part]) -> torch.Tensor:
    wide = torch.zeros(_length(parts), dtype=torch.float32, device=tensors[0].device)
    read = [tensors[part.index].detach().reshape(-1)[part.start : part.stop] for part in parts]
    torch._foreach_copy_(_views(wide, parts), read)
    return wide


def _read(moment: Sequence[Kept], parts: Sequence[_Part]) -> torch.Tensor:
    coded = [kept for kept in moment if isinstance(kept, Coded)]
    if not coded:
        return _widened(plain(moment), parts)
    codes, scales = _coded_pieces(coded, parts)
    return coded[0].code.decode(torch.cat(codes), torch.cat(scales))


def _write(
    moment: Sequence[Kept],
    parts: Sequence[_Part],
    wide: torch.Tensor,
    skip: torch.Tensor | None,
    generator: torch.Generator | None,
) -> None:
    """In a skipped step the values are what was read, which no float format changes; codes are kept."""
    coded = [kept for kept in moment if isinstance(kept, Coded)]
    if coded:
        assert generator is not None, "codes are rounded stochastically"
        codes, scales = _coded_pieces(coded, parts)
        new_codes, new_scales = coded[0].code.encode(wide, generator)
        blocks = [slice(part.offset // BLOCK, -(-part.end // BLOCK)) for part in parts]
        assign_unless(skip, codes, [new_codes[one.start * BLOCK : one.stop * BLOCK] for one in blocks])
        assign_unless(skip, scales, [new_scales[one] for one in blocks])
        return
    targets = _pieces(plain(moment), parts)
    if generator is not None and targets[0].dtype == torch.bfloat16:
        wide = round_to_bf16(wide, generator)
    torch._foreach_copy_(targets, _views(wide, parts))


def _coded_pieces(coded: Sequence[Coded], parts: Sequence[_Part]) -> tuple[Tensors, Tensors]:
    codes = [coded[part.index].codes[part.codes] for part in parts]
    return codes, [coded[part.index].scales[part.blocks] for part in parts]
