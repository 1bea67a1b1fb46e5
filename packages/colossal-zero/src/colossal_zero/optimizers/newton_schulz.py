"""The nearest matrix with orthonormal rows, about, by matrix products alone: the quintic Newton-Schulz iteration (Jordan et al. 2024,
"Muon"), in whichever of two forms takes fewer operations. The second iterates on the Gram matrix, in float16 in place of bfloat16, and
begins anew now and then, as in "Gram Newton-Schulz" (Dao, Zhang, Amsel, Chen 2026)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from colossal_core.ops.symmetric_product import symmetric_product

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial a x + b x^3 + c x^5, which lifts small singular values fast and leaves all between about 0.7 and 1.2."""
NUM_STEPS = 5
NORM_FLOOR = 1e-7
SEGMENTS = (2, 3)
"""Steps that the Gram form takes before it multiplies the matrix and forms its Gram matrix anew. What it takes for the Gram matrix drifts
away from that of the matrix, 12 times as far with every step; and a singular value of 1.2 that is taken for 0 is lifted to 4, from
where further steps diverge. All five at once do so in float16, and the first three of them in bfloat16 (4 x 300, condition 100)."""

Product = Callable[..., torch.Tensor]
"""The op `symmetric_product`: every product here but that with the matrix itself is of polynomials of one Gram matrix."""


def orthogonalise(matrices: torch.Tensor, product: Product = symmetric_product) -> torch.Tensor:
    """Replaces the singular values of each matrix of a batch [k, m, n] by numbers near 1. product: the plan's `symmetric_product`."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = x / norms.clamp_(min=NORM_FLOOR).to(x.dtype)
    iterate = gram_iteration if gram_form_saves(matrices.shape[-2:]) else plain_iteration
    x = iterate(x, product)
    return x.mT.contiguous() if is_tall else x


def plain_iteration(x: torch.Tensor, product: Product = symmetric_product) -> torch.Tensor:
    """x: [k, m, n], m <= n, of norms of at most 1. Each step: x <- a x + (b A + c A^2) x, with A = x x^T."""
    a, b, c = COEFFICIENTS
    for _ in range(NUM_STEPS):
        gram = product(x)
        x = torch.baddbmm(x, product(gram, gram, gram, alpha=c, beta=b), x, beta=a)
    return x


def gram_iteration(x: torch.Tensor, product: Product = symmetric_product) -> torch.Tensor:
    """The same polynomial of the same x: a step is x <- Z x with Z = a + b A + c A^2, and takes A to Z A Z.

    So the product of a segment's Z is found from A alone, [k, m, m], and multiplies x once. It is kept whole: what is left of it after
    its multiple of the identity is split off nearly cancels that, and three times the rounding remains. A bfloat16 matrix is iterated in
    float16: no number here is above 100, and those below 6e-5 keep an absolute precision of 6e-8.
    """
    dtype = x.dtype
    if dtype == torch.bfloat16:
        x = x.half()
    for num_steps in SEGMENTS:
        x = _product(product(x), num_steps, product) @ x
    return x.to(dtype)


def _product(gram: torch.Tensor, num_steps: int, product: Product) -> torch.Tensor:
    """The product of the Z of `num_steps` steps that begin with this A."""
    a, b, c = COEFFICIENTS
    change = product(gram, gram, gram, alpha=c, beta=b)
    total = change.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(num_steps - 1):
        half = product(change, gram, gram, beta=a)
        gram = product(half, change, half, beta=a)
        change = product(gram, gram, gram, alpha=c, beta=b)
        total = product(change, total, total, beta=a)
    return total


def plain_flops(shape: Sequence[int]) -> int:
    """Multiply-adds of the plain form, times two: 20 m^2 n + 10 m^3."""
    short, long = min(shape), max(shape)
    return NUM_STEPS * (4 * short * short * long + 2 * short**3)


def gram_flops(shape: Sequence[int]) -> int:
    """Multiply-adds of the Gram form, times two: 8 m^2 n + 28 m^3."""
    short, long = min(shape), max(shape)
    return sum(4 * short * short * long + (4 * num_steps - 3) * 2 * short**3 for num_steps in SEGMENTS)


def gram_form_saves(shape: Sequence[int]) -> bool:
    """Whether the Gram form takes fewer operations: where the long side is more than 1.5 times the short one."""
    return gram_flops(shape) < plain_flops(shape)


def flops(shape: Sequence[int]) -> int:
    """Multiply-adds, times two, of the form that is used."""
    return min(gram_flops(shape), plain_flops(shape))
