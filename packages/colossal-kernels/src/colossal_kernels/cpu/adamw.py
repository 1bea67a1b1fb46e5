"""AdamW on the CPU in one mixed pass, for masters and moments in float32: `adamw.cpp`.

Bytes an element: gradient 2 or 4, parameter and moments 24, bf16 copy 2; torch's fused step takes one dtype alone, so that casts before and
after it move 12 more. Loshchilov and Hutter 2019, algorithm 2.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from colossal_core.ops import adamw as reference
from colossal_core.ops.adamw import AdamWSettings
from colossal_core.rounding import Kept
from colossal_kernels.cpu.built import library
from colossal_kernels.library import define
from colossal_kernels.optimizers.lists import Lists

SOURCE = "adamw.cpp"
_WIDE = (torch.float32,)
_DTYPES = (_WIDE, (torch.float32, torch.bfloat16), _WIDE, _WIDE, (torch.bfloat16,))
"""Of parameters, gradients, moments and copies."""


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Kept],
    exp_avg_sqs: Sequence[Kept],
    *,
    settings: AdamWSettings,
    step: Tensor,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    copies: Sequence[Tensor] | None = None,
    seed: int | None = None,
) -> None:
    """`colossal_core.ops.reference.adamw_step`. What is not float32 on the CPU, or not contiguous, goes to the reference; all of it where
    there is no compiler.
    """
    lists = Lists(params, grads, (exp_avgs, exp_avg_sqs), copies)
    assert len(params) == len(grads) == len(exp_avgs) == len(exp_avg_sqs), "lists of one length"
    has_library = library(SOURCE) is not None
    taken = [index for index in range(len(params)) if has_library and _is_taken(lists.item(index))]
    left = sorted(set(range(len(params))) - set(taken))
    if taken:
        own = lists.where(taken)
        moments = [[kept for kept in moment if isinstance(kept, Tensor)] for moment in own.moments]
        copies = list(own.copies or ())
        _STEP(list(own.params), list(own.grads), *moments, copies, step, clip, skip, _numbers(settings))
        # An operator of one's own does not count as a change by itself: who saved these for a backward pass is told, as by torch's own.
        torch.autograd.graph.increment_version([*own.params, *moments[0], *moments[1], *copies])
    if left:
        rest = lists.where(left)
        reference.adamw_step(
            rest.params,
            rest.grads,
            *rest.moments,
            settings=settings,
            step=step,
            clip=clip,
            skip=skip,
            copies=rest.copies,
            seed=seed,
        )


def _is_taken(item: Sequence[Kept]) -> bool:
    return all(
        isinstance(kept, Tensor) and kept.device.type == "cpu" and kept.is_contiguous() and kept.dtype in dtypes
        for kept, dtypes in zip(item, _DTYPES, strict=False)
    )


def _numbers(settings: AdamWSettings) -> list[float]:
    return [settings.lr, settings.beta1, settings.beta2, settings.eps, settings.weight_decay]


def _launch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    copies: Sequence[Tensor],
    step: Tensor,
    clip: Tensor | None,
    skip: Tensor | None,
    numbers: Sequence[float],
) -> None:
    if skip is not None and bool(skip):
        for copy, param in zip(copies, params, strict=False):
            copy.copy_(param)
        return
    built = library(SOURCE)
    assert built is not None, "asked for with a library alone"
    lr, beta1, beta2, eps, weight_decay = numbers
    count = max(float(step), 1.0)
    scalars = array(
        "f", [1.0 if clip is None else float(clip), 1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2]
    )
    scalars.extend([lr / (1.0 - beta1**count), (1.0 - beta2**count) ** -0.5, eps])
    rows = array("q")
    for index, param in enumerate(params):
        copied_to = copies[index].data_ptr() if copies else 0
        pointers = (
            param.data_ptr(),
            grads[index].data_ptr(),
            exp_avgs[index].data_ptr(),
            exp_avg_sqs[index].data_ptr(),
        )
        rows.extend((*pointers, copied_to, param.numel(), int(grads[index].dtype == torch.bfloat16)))
    function = built.colossal_adamw
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    function.restype = None
    function(rows.buffer_info()[0], len(params), scalars.buffer_info()[0], torch.get_num_threads())


def _fake(*arguments: object) -> None:
    del arguments


_STEP = define(
    "cpu_adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies, "
    "Tensor step, Tensor? clip, Tensor? skip, float[] numbers) -> ()",
    _launch,
    _fake,
    device="CPU",
)
