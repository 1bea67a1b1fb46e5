"""Numbers kept narrower than they are computed in: stochastic rounding to bf16, and 8 bits with one scale for each block of 256.

Both are unbiased: the expected value of what is kept is what was given (a second moment below its block's smallest code is lifted to it,
so that no update is divided by zero). Rounding to the nearest would stop a slow average (a second
moment that changes by 1 - beta2 = 0.001 in a step is below bf16's half spacing of 0.002 to 0.004), and a parameter whose updates are small
beside it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

BLOCK = 256
"""Elements that share one scale (half of them, or twice, change neither error nor memory by much; Dettmers et al. 2022 use 2048)."""


_CERTAIN = 1e-4
"""A chance this near to 0 or 1 is float32's own error (2.5e-5 at most): what a code stands for is given the same code again."""


def keyed_seed(*key: int | str) -> int:
    """A seed in [0, 2^63) that depends on the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose numbers depend on the key alone: the same on every rank that asks with the same key on the same kind of device."""
    return torch.Generator(device).manual_seed(keyed_seed(*key))


def round_to_bf16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 values rounded to one of their two bf16 neighbours, the nearer one the more often. What bf16 holds is not changed.

    A bf16 is the upper half of a float32: the lower half plus 16 random bits carries into it with the right probability.
    """
    assert values.dtype == torch.float32, values.dtype
    bits = torch.empty(values.shape, dtype=torch.int32, device=values.device).random_(0, 1 << 16, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(-(1 << 16))
    rounded = bits.view(torch.float32).to(torch.bfloat16)
    return torch.where(torch.isfinite(values), rounded, values.to(torch.bfloat16))


@dataclass(frozen=True)
class Code:
    """An 8-bit code of blocks after Dettmers et al. 2022 ("8-bit optimizers via block-wise quantization"): a code c stands for
    scale * (c / levels)^power, the scale being the block's largest magnitude.

    The power puts most codes where most values are, near zero, in place of a table. positive: for a second moment, whose codes are 1 to
    255: none of its elements becomes zero beside a larger one, since its root divides.
    """

    power: int
    levels: int
    dtype: torch.dtype
    positive: bool

    def encode(self, values: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """values: float32 [k * 256]. Returns codes [k * 256] and scales, float32 [k]. Rounds to one of the two neighbouring codes, so that
        the expected value is the given one."""
        blocks = values.view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1)
        ratio = blocks.abs().div_(scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
        root = ratio.sqrt() if self.power == 2 else ratio.sqrt().sqrt_()
        low = root.mul_(self.levels).floor_().clamp_(max=self.levels - 1)
        floor = low**self.power
        chance = ratio.mul_(float(self.levels) ** self.power).sub_(floor).div_((low + 1.0) ** self.power - floor)
        chance = torch.where(chance < _CERTAIN, 0.0, torch.where(chance > 1.0 - _CERTAIN, 1.0, chance))
        draw = torch.rand(chance.shape, device=values.device, generator=generator)
        codes = low.add_((draw < chance).to(low.dtype))
        codes = codes.clamp_(min=1.0) if self.positive else codes.copysign_(blocks)
        return codes.to(self.dtype).view(-1), scales

    def decode(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 [k * 256]."""
        values = codes.to(torch.float32).div_(self.levels).view(-1, BLOCK)
        powered = values.square() if self.positive else values * values.abs()
        if self.power == 4:
            powered = powered.square_()
        return powered.mul_(scales[:, None]).view(-1)


FIRST_MOMENT = Code(power=2, levels=127, dtype=torch.int8, positive=False)
SECOND_MOMENT = Code(power=4, levels=255, dtype=torch.uint8, positive=True)


@dataclass(frozen=True)
class Coded:
    """A contiguous tensor of `numel` elements that is kept as codes: flat [k * 256], the last block padded, and scales, float32 [k]."""

    codes: torch.Tensor
    scales: torch.Tensor
    code: Code
    numel: int


Kept = torch.Tensor | Coded
"""A tensor of an optimizer's state, however it is kept."""
