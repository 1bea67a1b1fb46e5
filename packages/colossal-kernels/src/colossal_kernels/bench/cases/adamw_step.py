"""The AdamW step in mixed precision: bf16 gradients in, float32 parameters and moments, bf16 copies out, clipped, skippable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from colossal_core.ops import adamw as reference
from colossal_core.ops.adamw import AdamWSettings
from colossal_kernels.bench.case import Call, Draw, Knobs, Least, OpBench, Shape

SETTINGS = AdamWSettings(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
MIXED_BYTES = 28
"""An element: the gradient 2, parameter and two moments read and written 24, the copy 2."""
STEP_GOAL = 0.95


def llama_like(num_layers: int, hidden: int, feed_forward: int) -> tuple[tuple[int, ...], ...]:
    """Parameters of a few layers, norms among them."""
    layer = ((hidden, hidden),) * 4 + ((feed_forward, hidden),) * 2 + ((hidden, feed_forward), (hidden,), (hidden,))
    return layer * num_layers


def elements_of(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def lists(
    draw: Draw, shapes: Sequence[tuple[int, ...]], gradients: torch.dtype, num_moments: int
) -> list[list[Tensor]]:
    """Parameters, gradients, moments (the last one positive) and copies."""

    def drawn(dtype: torch.dtype) -> list[Tensor]:
        return [draw.normal(*shape, dtype=dtype, scale=0.1, grad=False) for shape in shapes]

    kept = [drawn(torch.float32) for _ in range(num_moments)]
    for tensor in kept[-1] if kept else []:
        tensor.square_()
    return [drawn(torch.float32), drawn(gradients), *kept, drawn(torch.bfloat16)]


def step_shape(
    label: str, shapes: Sequence[tuple[int, ...]], num_moments: int, least: Least, keywords: dict[str, Any]
) -> Shape:
    def call(draw: Draw) -> Call:
        *arguments, copies = lists(draw, shapes, torch.bfloat16, num_moments)
        told = {"clip": torch.tensor(0.5, device=draw.device), "skip": torch.tensor(False, device=draw.device)}
        if "step" in keywords:
            told["step"] = torch.tensor(float(keywords["step"]), device=draw.device)
        return Call(tuple(arguments), {**keywords, **told, "copies": copies})

    return Shape(f"{label} of {elements_of(shapes) / 1e6:.4g} M, mixed", call, {"step": least})


def _shape(label: str, shapes: Sequence[tuple[int, ...]]) -> Shape:
    least = Least(MIXED_BYTES * elements_of(shapes), "28 bytes an element: 2 + 12 + 12 + 2", goal_share=STEP_GOAL)
    return step_shape(label, shapes, 2, least, {"settings": SETTINGS, "step": 3})


def _plain(label: str, shapes: Sequence[tuple[int, ...]]) -> Shape:
    """Everything in float32, no copies."""

    def call(draw: Draw) -> Call:
        *arguments, _ = lists(draw, shapes, torch.float32, 2)
        return Call(tuple(arguments), {"settings": SETTINGS, "step": torch.tensor(3.0, device=draw.device)})

    least = Least(MIXED_BYTES * elements_of(shapes), "28 bytes an element: 4 + 12 + 12")
    return Shape(f"{label} of {elements_of(shapes) / 1e6:.4g} M, fp32", call, {"step": least})


def _formula(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    settings: AdamWSettings,
    step: Tensor,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> None:
    """For torch.compile: one pass over each tensor, as a training loop that compiles its optimizer has it."""
    del skip
    first = 1.0 - settings.beta1**step
    root = (1.0 - settings.beta2**step).sqrt()
    for index, param in enumerate(params):
        grad = grads[index].float() * (1.0 if clip is None else clip)
        exp_avg = torch.lerp(exp_avgs[index], grad, 1.0 - settings.beta1)
        exp_avg_sq = settings.beta2 * exp_avg_sqs[index] + (1.0 - settings.beta2) * grad * grad
        kept = param * (1.0 - settings.lr * settings.weight_decay)
        found = kept - settings.lr / first * exp_avg / (exp_avg_sq.sqrt() / root + settings.eps)
        exp_avgs[index].copy_(exp_avg)
        exp_avg_sqs[index].copy_(exp_avg_sq)
        param.copy_(found)
        if copies is not None:
            copies[index].copy_(found)


KNOBS = (
    Knobs(
        ("step",),
        {"optimizers.many_tensors:CODE_BLOCKS": (2, 4, 8, 16), "optimizers.many_tensors:NUM_WARPS": (4, 8, 16)},
    ),
)
"""Of every step over many tensors."""
BENCH = OpBench(
    "adamw_step",
    (
        _shape("flat", ((1 << 29,),)),
        _shape("72 tensors", llama_like(8, 2048, 5632)),
        _shape("90 tensors", llama_like(10, 512, 1408)),
        _plain("flat", ((1 << 28,),)),
    ),
    eager=reference.adamw_step,
    formula=_formula,
    peers={"torch_fused": lambda: reference.adamw_step_fused},
    cpu_shapes=(
        _shape("flat", ((1 << 23,),)),
        _shape("18 tensors", llama_like(2, 512, 1408)),
        _plain("flat", ((1 << 23,),)),
    ),
    knobs=KNOBS,
)
