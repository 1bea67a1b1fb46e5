"""Rotary embedding of queries and keys in one launch.

Per pair `(a, b) -> (a cos - b sin, b cos + a sin)`; backward is the rotation by the negative angle. Bytes: queries and keys once in and
once out, backward the same for their gradients; a program's tokens have their angles in the cache. Any layout with neighbouring features is
taken by its strides, and the results have that of the arguments; others are copied first. Legend: H heads of
a tile, P pairs.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from colossal_core.ops import rotary as reference
from colossal_core.ops.rotary import Angles
from colossal_kernels.builds import Build
from colossal_kernels.fitting import changeable, kernels_take
from colossal_kernels.library import define, differentiate

TILE_PAIRS = 2048
"""Pairs in the registers of a program at a time."""
WARPS = 4


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    angles: Angles = "halves",
    to_halves: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """`colossal_core.ops.reference.rotary`, computed in float32 and rounded once.

    Angles are not differentiated here: the reference serves where they ask for it. `overwrite` is followed where autograd allows a change
    (no leaf that requires a gradient), outside of compiled code, and where pairs stay in their places.
    """
    pairs = cos.shape[-1] if angles == "once" else cos.shape[-1] // 2
    if not _fits(q, k, cos, sin, pairs):
        return reference.rotary(q, k, cos, sin, interleaved=interleaved, angles=angles, to_halves=to_halves)
    step = 2 if angles == "neighbours" else 1
    if overwrite and not to_halves and changeable(q) and changeable(k) and q.data_ptr() != k.data_ptr():
        return cast("tuple[Tensor, Tensor]", _Overwriting.apply(q, k, cos, sin, pairs, step, interleaved))
    to_neighbours = interleaved and not to_halves
    return cast("tuple[Tensor, Tensor]", _ROTARY(q, k, cos, sin, pairs, step, interleaved, to_neighbours, False))


def _fits(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> bool:
    angled = cos.requires_grad or sin.requires_grad
    if angled or q.dtype != k.dtype or not kernels_take(q, k, cos, sin):
        return False
    shapes = cos.shape[:2] in ((1, q.shape[2]), (q.shape[0], q.shape[2])) and cos.shape == sin.shape
    return shapes and 0 < 2 * pairs <= q.shape[-1] == k.shape[-1] and q.shape[::2] == k.shape[::2]


@triton.jit
def _read(
    x, heads, num_heads, stride, features, pairs, IN: tl.constexpr, PASS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Both sides of the pairs of these heads, as they are stored, and what is copied. IN: whether pairs are neighbours. PASS: features that
    are copied, rounded up.
    """
    pair = tl.arange(0, PAIRS)
    column = tl.arange(0, 2 * PAIRS)
    real = (heads < num_heads)[:, None]
    starts = (heads.to(tl.int64) * stride)[:, None]
    if IN:
        both = tl.load(x + starts + column[None, :], mask=real & (column < 2 * pairs)[None, :], other=0.0)
        a_HP, b_HP = tl.split(tl.reshape(both, (heads.shape[0], PAIRS, 2)))
    else:
        halves = real & (pair < pairs)[None, :]
        a_HP = tl.load(x + starts + pair[None, :], mask=halves, other=0.0)
        b_HP = tl.load(x + starts + (pairs + pair)[None, :], mask=halves, other=0.0)
    kept = a_HP
    if PASS > 0:
        rest = 2 * pairs + tl.arange(0, PASS)
        kept = tl.load(x + starts + rest[None, :], mask=real & (rest < features)[None, :], other=0.0)
    return a_HP, b_HP, kept


@triton.jit
def _write(
    out, tile, heads, num_heads, stride, features, pairs, cos_P, sin_P,
    OUT: tl.constexpr, PASS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """What `_read` has given, turned. OUT: whether pairs are neighbours there."""
    a_HP, b_HP, kept = tile[0].to(tl.float32), tile[1].to(tl.float32), tile[2]
    pair = tl.arange(0, PAIRS)
    column = tl.arange(0, 2 * PAIRS)
    real = (heads < num_heads)[:, None]
    places = (heads.to(tl.int64) * stride)[:, None]
    c_HP = (a_HP * cos_P[None, :] - b_HP * sin_P[None, :]).to(out.dtype.element_ty)
    d_HP = (b_HP * cos_P[None, :] + a_HP * sin_P[None, :]).to(out.dtype.element_ty)
    if OUT:
        turned = tl.reshape(tl.join(c_HP, d_HP), (heads.shape[0], 2 * PAIRS))
        tl.store(out + places + column[None, :], turned, mask=real & (column < 2 * pairs)[None, :])
    else:
        halves = real & (pair < pairs)[None, :]
        tl.store(out + places + pair[None, :], c_HP, mask=halves)
        tl.store(out + places + (pairs + pair)[None, :], d_HP, mask=halves)
    if PASS > 0:
        rest = 2 * pairs + tl.arange(0, PASS)
        tl.store(out + places + rest[None, :], kept, mask=real & (rest < features)[None, :])


@triton.jit
def _kernel(
    q, k, q_out, k_out, cos, sin, length, q_heads, k_heads, features, pairs,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token, angle_batch, angle_token,
    STEP: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, INVERSE: tl.constexpr, PASS: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // length).to(tl.int64)
    token = (tl.program_id(0) % length).to(tl.int64)
    pair = tl.arange(0, PAIRS)
    angle = batch * angle_batch + token * angle_token + pair * STEP
    cos_P = tl.load(cos + angle, mask=pair < pairs, other=0.0).to(tl.float32)
    sin_P = tl.load(sin + angle, mask=pair < pairs, other=0.0).to(tl.float32)
    if INVERSE:
        sin_P = -sin_P
    q_out += batch * q_out_batch + token * q_out_token
    k_out += batch * k_out_batch + token * k_out_token
    q += batch * q_batch + token * q_token
    k += batch * k_batch + token * k_token
    # Queries and keys are under way at once: most models have no more of either than this.
    q_first, k_first = tl.arange(0, Q_HEADS), tl.arange(0, K_HEADS)
    q_tile = _read(q, q_first, q_heads, q_head, features, pairs, IN, PASS, PAIRS)
    k_tile = _read(k, k_first, k_heads, k_head, features, pairs, IN, PASS, PAIRS)
    _write(q_out, q_tile, q_first, q_heads, q_out_head, features, pairs, cos_P, sin_P, OUT, PASS, PAIRS)
    _write(k_out, k_tile, k_first, k_heads, k_out_head, features, pairs, cos_P, sin_P, OUT, PASS, PAIRS)
    for first in range(Q_HEADS, q_heads, Q_HEADS):
        heads = first + q_first
        q_tile = _read(q, heads, q_heads, q_head, features, pairs, IN, PASS, PAIRS)
        _write(q_out, q_tile, heads, q_heads, q_out_head, features, pairs, cos_P, sin_P, OUT, PASS, PAIRS)
    for first in range(K_HEADS, k_heads, K_HEADS):
        heads = first + k_first
        k_tile = _read(k, heads, k_heads, k_head, features, pairs, IN, PASS, PAIRS)
        _write(k_out, k_tile, heads, k_heads, k_out_head, features, pairs, cos_P, sin_P, OUT, PASS, PAIRS)


def _launch(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, cos: Tensor, sin: Tensor, pairs: int, flags: dict[str, Any]
) -> None:
    """q_out, k_out: other tensors, or q and k themselves."""
    batches, _, length, features = q.shape
    copied = features - 2 * pairs if q_out is not q else 0
    q, k, cos, sin = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, cos, sin))
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    block = triton.next_power_of_2(pairs)
    heads = [min(triton.next_power_of_2(max(x.shape[1], 1)), max(TILE_PAIRS // block, 1)) for x in (q, k)]
    strides = [stride for tensor in (q, k, q_out, k_out) for stride in tensor.stride()[:3]]
    _kernel[(batches * length,)](
        q, k, q_out, k_out, cos, sin, length, q.shape[1], k.shape[1], features, pairs, *strides,
        cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), **flags,
        PASS=triton.next_power_of_2(copied) if copied else 0,
        Q_HEADS=heads[0], K_HEADS=heads[1], PAIRS=block, num_warps=WARPS,
    )  # fmt: skip


def _rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: int,
    step: int,
    neighbours: bool,
    to_neighbours: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _dense_like(q), _dense_like(k)
    _launch(
        q, k, q_out, k_out, cos, sin, pairs, {"STEP": step, "IN": neighbours, "OUT": to_neighbours, "INVERSE": inverse}
    )
    return q_out, k_out


def _rotary_fake(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    pairs: int,
    step: int,
    neighbours: bool,
    to_neighbours: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    return _dense_like(q), _dense_like(k)


def _dense_like(x: Tensor) -> Tensor:
    """In x's order where that leaves features neighbours, as the kernel stores them."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 else torch.empty_like(x, memory_format=torch.contiguous_format)


def _rotary_in_place(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int, step: int, neighbours: bool, inverse: bool
) -> None:
    _launch(q, k, q, k, cos, sin, pairs, {"STEP": step, "IN": neighbours, "OUT": neighbours, "INVERSE": inverse})


def _rotary_in_place_fake(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int, step: int, neighbours: bool, inverse: bool
) -> None:
    return None


_ROTARY = define(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, int pairs, int step, bool neighbours, bool to_neighbours, bool inverse)"
    " -> (Tensor, Tensor)",
    _rotary,
    _rotary_fake,
)
_ROTARY_IN_PLACE = define(
    "rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, int pairs, int step, bool neighbours, bool inverse) -> ()",
    _rotary_in_place,
    _rotary_in_place_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, *ctx.how = inputs
    ctx.save_for_backward(cos, sin)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
    pairs, step, neighbours, to_neighbours, inverse = ctx.how
    turned: list[Tensor | None] = [None, None]
    if grad_q is not None or grad_k is not None:
        given = _both(grad_q, grad_k)
        back = _ROTARY(*given, *ctx.saved_tensors, pairs, step, to_neighbours, neighbours, not inverse)
        turned = [new if old is not None else None for new, old in zip(back, (grad_q, grad_k), strict=True)]
    return (*turned, *[None] * 7)


def _both(grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """No heads stand for the one that nobody asks for."""
    given = grad_k if grad_q is None else grad_q
    assert given is not None
    nothing = given[:, :0]
    return (nothing if grad_q is None else grad_q), (nothing if grad_k is None else grad_k)


differentiate("rotary", _gradients, _save, twice=True)


class _Overwriting(torch.autograd.Function):
    """The results are where q and k were, with a history of their own; their old values count as changed."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, pairs: int, step: int, interleaved: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.how = (pairs, step, interleaved)
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        _ROTARY_IN_PLACE(q, k, cos, sin, pairs, step, interleaved, False)
        torch.autograd.graph.increment_version((q, k))
        return q.detach(), k.detach()

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in (grad_q, grad_k) if grad is not None]
        if not given:
            return (None,) * 7
        both = _both(grad_q, grad_k)
        is_one = len({grad.data_ptr() for grad in given}) < len(given)  # of `q + k`: it would be turned twice
        if torch.is_grad_enabled() or is_one or not all(changeable(grad) for grad in given):
            pairs, step, neighbours = ctx.how
            both = _ROTARY(*both, *ctx.saved_tensors, pairs, step, neighbours, neighbours, True)
        else:
            _ROTARY_IN_PLACE(*both, *ctx.saved_tensors, *ctx.how, True)
            torch.autograd.graph.increment_version(given)
        turned = [new if old is not None else None for new, old in zip(both, (grad_q, grad_k), strict=True)]
        return (*turned, *[None] * 5)


def builds() -> tuple[Build, ...]:
    """A Llama's (32 query heads, 8 key heads of 128), interleaved pairs, and partly turned heads (Phi, GPT-NeoX)."""
    found = []
    cases = (("halves", 64, False, False, 0), ("interleaved", 64, True, True, 0), ("to halves", 32, True, False, 0))
    for name, pairs, neighbours, to_neighbours, copied in (*cases, ("partly", 16, False, False, 64)):
        types = dict.fromkeys(("q", "k", "q_out", "k_out"), "*bf16") | {"cos": "*fp32", "sin": "*fp32"}
        sizes = [argument for argument in _kernel.arg_names if argument.islower() and argument not in types]
        constants = {"STEP": 1, "IN": neighbours, "OUT": to_neighbours, "INVERSE": False, "PASS": copied}
        constants |= {"Q_HEADS": min(32, TILE_PAIRS // pairs), "K_HEADS": 8, "PAIRS": pairs}
        types |= dict.fromkeys(sizes, "i32")
        aligned = tuple(size for size in sizes if size not in ("length", "q_heads", "k_heads"))
        found.append(Build(f"rotary bf16 {name}", _kernel, types, constants, WARPS, aligned=aligned))
    return tuple(found)
