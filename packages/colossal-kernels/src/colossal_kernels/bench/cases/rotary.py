"""Rotary embedding of queries and keys that are views of [B, L, H, D], as models pass them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import rotary as reference
from colossal_kernels.bench.case import Call, Draw, Function, Knobs, OpBench, Shape, moved


def _shape(label: str, length: int, heads: tuple[int, int], width: int, *, in_place: bool, **keywords: Any) -> Shape:
    """in_place: over q and k, which then are no leaves of autograd's graph: only the forward pass is measured."""

    def call(draw: Draw) -> Call:
        turned = (draw.normal(1, length, num, width, grad=False).transpose(1, 2) for num in heads)
        q, k = (one if in_place else one.requires_grad_() for one in turned)
        angles = torch.arange(length, device=draw.device)[:, None] / 10000 ** (
            torch.arange(0, width, 2, device=draw.device) / width
        )
        repeats = 2 if keywords.get("interleaved") else 1
        both = angles.repeat_interleave(2, dim=-1) if repeats == 2 else torch.cat([angles, angles], dim=-1)
        cos, sin = both.cos().bfloat16()[None], both.sin().bfloat16()[None]
        more = {**keywords, "angles": "neighbours"} if repeats == 2 else keywords
        return Call((q, k, cos, sin), {**more, "overwrite": True} if in_place else more)

    each = 2 * length * sum(heads) * width
    least = {"forward": moved(2 * each, "2 E of q and k: read and written")}
    if not in_place:
        least["backward"] = moved(2 * each, "2 E of q and k: gradients read and written")
    where = "in place, " if in_place else ""
    title = f"{where}{label}{length} tokens h{heads[0]}/{heads[1]} d{width} bf16"
    return Shape(title, call, {**least}, restored=in_place)  # type: ignore[dict-item]


def _formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """As transformers writes it for Llama; other layouts as the reference does."""
    if keywords.get("interleaved"):
        return reference.rotary(q, k, cos, sin, **keywords)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)

    return turned(q), turned(k)


def _liger() -> Function:
    from liger_kernel.ops import LigerRopeFunction

    operator: Any = LigerRopeFunction

    def call(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **keywords: Any) -> Any:
        if keywords.get("interleaved"):
            message = "Liger has halves alone"
            raise ImportError(message)
        return operator.apply(q, k, cos, sin)

    return call


BENCH = OpBench(
    "rotary",
    (
        _shape("", 8192, (32, 8), 128, in_place=True),
        _shape("", 8192, (32, 8), 128, in_place=False),
        _shape("neighbours, ", 8192, (32, 8), 128, in_place=False, interleaved=True),
        _shape("", 1024, (16, 16), 64, in_place=True),
    ),
    eager=_formula,
    peers={"liger": _liger},
    knobs=(
        Knobs(
            ("forward", "backward"),
            {"positions.rotary:TILE_PAIRS": (1024, 2048), "positions.rotary:WARPS": (2, 4, 8)},
        ),
    ),
)
