"""Random numbers that any mesh and any cut draws alike: a function of what is drawn for, not of what was drawn before.

Each number is a hash of (seed, step, layer, sample, position, feature), made by folding in one key after the other: `fold(state, key)` is
number `state ^ key` of the splitmix64 stream from 0 (Steele, Lea and Flood 2014, figure 17). It is written in int64 tensor operations,
which wrap around alike on every device, in eager mode and compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


@dataclass(frozen=True)
class RandomKey:
    """What all numbers of one step share. seed, step: 0-d int64 tensors on the model's device, so that a compiled model reads new ones."""

    seed: torch.Tensor
    step: torch.Tensor

    @staticmethod
    def of(seed: int, step: int, device: torch.device) -> RandomKey:
        """From plain numbers, without waiting for the device."""
        return RandomKey(
            torch.full((), seed, dtype=torch.int64, device=device),
            torch.full((), step, dtype=torch.int64, device=device),
        )


def fold(state: torch.Tensor, value: torch.Tensor | int) -> torch.Tensor:
    """One more key: int64 states and values, broadcast against each other. Returns new int64 states."""
    # The xor comes first: inductor (torch 2.11) takes an `arange` times a constant for a 32-bit index, and the constant does not fit.
    return _mixed(((state ^ value) + 1) * _signed(_GAMMA))


def fold_numbers(*values: int) -> int:
    """The same, for plain numbers, from the state 0: a number in [0, 2^64)."""
    state = 0
    for value in values:
        z = (((state ^ value) + 1) * _GAMMA) & _MASK
        z = ((z ^ (z >> 30)) * _FIRST) & _MASK
        z = ((z ^ (z >> 27)) * _SECOND) & _MASK
        state = z ^ (z >> 31)
    return state


def keyed_bits(
    key: RandomKey,
    sample_ids: torch.Tensor,
    shape: Sequence[int],
    layer: torch.Tensor | int,
    *,
    positions: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """64 random bits for each element of `shape`, as int64.

    sample_ids: [B] int64, each sample's index in the global batch of the step. shape: [B * k, ..., D], the last dimension being features;
    what lies between sample and feature (the k rows of a sample and the dimensions in the middle), flattened, is the position. positions,
    features: the global indices of the local positions and features where an axis of the mesh cuts them; 0, 1, 2, ... where None.
    """
    num_samples = sample_ids.shape[0]
    assert shape[0] % num_samples == 0, f"dim 0 of {tuple(shape)} is no multiple of {num_samples} samples"
    num_features = shape[-1] if len(shape) > 1 else 1
    num_positions = 1
    for size in (shape[0] // num_samples, *shape[1:-1]):
        num_positions *= size
    device = sample_ids.device
    if positions is None:
        positions = torch.arange(num_positions, device=device)
    if features is None:
        features = torch.arange(num_features, device=device)
    state = fold(fold(fold(torch.zeros_like(key.seed), key.seed), key.step), layer)
    state_B = fold(state, sample_ids)
    state_BP = fold(state_B.unsqueeze(1), positions)
    return fold(state_BP.unsqueeze(2), features).reshape(tuple(shape))


def keyed_uniform(
    key: RandomKey,
    sample_ids: torch.Tensor,
    shape: Sequence[int],
    layer: torch.Tensor | int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Uniform numbers in [0, 1): multiples of 2^-24 in float32 and of 2^-53 in float64. Arguments as in `keyed_bits`."""
    digits = {torch.float32: 24, torch.float64: 53}[dtype]
    return _shifted(keyed_bits(key, sample_ids, shape, layer), 64 - digits).to(dtype) * 2.0**-digits


def keyed_dropout(
    x: torch.Tensor,
    p: float,
    key: RandomKey,
    sample_ids: torch.Tensor,
    layer: torch.Tensor | int,
    *,
    positions: torch.Tensor | None = None,
    features: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zero with probability p, else x / (1 - p) (Srivastava et al. 2014, scaled at training time).

    x: [B * k, ..., D]; the other arguments as in `keyed_bits`. Any floating dtype drops the same elements.
    """
    assert 0.0 <= p <= 1.0, f"p={p}"
    if p == 0.0:
        return x
    if p == 1.0:
        return x * 0.0
    bits = keyed_bits(key, sample_ids, x.shape, layer, positions=positions, features=features)
    return torch.where(_shifted(bits, 32) >= round(p * 2**32), x * (1.0 / (1.0 - p)), 0.0)


def fused_key(*values: int) -> int:
    """One number in [-2^63, 2^63) for all values, as a generator's seed."""
    return _signed(fold_numbers(*(value & _MASK for value in values)))


def seed_fused(seed: int, step: int, first_sample: int) -> None:
    """Seeds torch's own generators for what draws inside a fused kernel: one key for each microbatch, by its first sample.

    Meshes that cut a batch into the same microbatches draw the same numbers; another micro size draws others.
    """
    torch.manual_seed(fused_key(seed, step, first_sample))


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """The logical shift to the right: torch's own copies the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mixed(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shifted(z, 30)) * _signed(_FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(_SECOND)
    return z ^ _shifted(z, 31)
