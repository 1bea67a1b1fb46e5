"""Builds of the norms' kernels, by the configuration that a launch would take."""

from __future__ import annotations

from colossal_kernels.builds import Build
from colossal_kernels.norms import backward, forward
from colossal_kernels.norms.config import backward_config, forward_config

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
LAYOUT = ("middle", "inner", "outer_stride", "middle_stride", "inner_stride")


def norm_builds(
    name: str, dtype: str, columns: int, *, centred: bool = False, added: bool = False, plain: bool = True
) -> tuple[Build, ...]:
    """Forward and backward with weight (and bias where `centred`). plain: rows with one stride; else with three."""
    flags = {"CENTRED": centred, "ADDED": added, "HAS_WEIGHT": True, "HAS_BIAS": centred}
    narrow, wide = f"*{dtype}", "*fp32"
    types = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total", "grad_y", "grad_total", "grad_x"), narrow)
    types |= dict.fromkeys(("mean", "rstd", "averages", "partial"), wide)
    types |= {"num_rows": "i32", "num_columns": "i32", "eps": "fp32", "offset": "fp32"}
    constants: dict[str, object] = dict(flags)
    for letter in "xg":
        types |= {f"{letter}_{part}": "i32" for part in LAYOUT}
        if plain:
            constants |= {f"{letter}_middle": 1, f"{letter}_inner": 1}
    for key in constants:
        types.pop(key, None)
    aligned = ("num_columns", *(f"{letter}_{part}" for letter in "xg" for part in LAYOUT[2:]))
    ahead = forward_config(columns, BYTES[dtype])
    back = backward_config(columns, (2 + added) * BYTES[dtype], centred)
    kernels = (
        forward.forward_kernel if columns <= ahead.block else forward.wide_forward_kernel,
        backward.backward_kernel if columns <= back.block else backward.wide_backward_kernel,
    )
    tiles = [
        {"ROWS": c.rows, "BLOCK": c.block, "STAGES": c.stages, "TWICE": c.twice, "EARLY": c.early}
        for c in (ahead, back)
    ]
    label = f"{dtype} {columns}" + (" added" if added else "") + ("" if plain else " three strides")
    found = [
        _build(title, kernels[i], types, {**constants, **tiles[i]}, config.warps, aligned)
        for i, (title, config) in enumerate(((f"{name} {label}", ahead), (f"{name}_backward {label}", back)))
    ]
    if columns > back.block:
        tile = {"BLOCK": back.rows * back.block, "STAGES": back.stages}
        title = f"{name}_backward {label} averages"
        found.append(_build(title, backward.averages_kernel, types, {**constants, **tile}, back.warps, aligned))
    return tuple(found)


def _build(
    name: str, kernel: object, types: dict[str, str], constants: dict[str, object], warps: int, aligned: tuple[str, ...]
) -> Build:
    """What the kernel has no argument for is left out."""
    names = set(kernel.arg_names)  # type: ignore[attr-defined]  # Triton's function
    typed = {key: value for key, value in types.items() if key in names}
    fixed = {key: value for key, value in constants.items() if key in names}
    return Build(name, kernel, typed, fixed, warps, aligned=tuple(key for key in aligned if key in typed))


def sum_build() -> Build:
    """Of the kernel that adds up the programs' sums."""
    types = {"partial": "*fp32", "weight": "*bf16", "bias": "*bf16"}
    types |= dict.fromkeys(("num_parts", "num_columns", "first_sum"), "i32")
    constants = {"ROWS": backward.SUM_ROWS, "BLOCK": backward.SUM_BLOCK}
    return Build("norm sums", backward.sum_kernel, types, constants, backward.SUM_WARPS, aligned=("num_columns",))
