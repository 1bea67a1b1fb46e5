"""The section `parallel.tensor`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from colossal_core.config import Section

Style = Literal["column", "row", "packed2", "packed3", "qkv", "replicate"]


class TensorConfig(Section):
    """Tensor parallelism: matrices are cut over `size` ranks, which work on the same sequences (Shoeybi et al. 2019)."""

    size: Annotated[int, Field(ge=1)] = 1
    """Number of ranks that share each cut matrix, next to one another. 1: nothing is cut."""
    mode: Literal["1d", "2d", "2.5d", "3d"] = "1d"
    """How matrices are cut. `1d`: by their output or their input features. The others are not there yet and are refused."""
    sequence_parallel: bool | None = None
    """Whether activations between the cut matrices are cut along the sequence (Korthikanti et al. 2022): less memory, and all-gathers and
    reduce-scatters in the place of all-reduces. null: where the model's structure is proven to allow it."""
    overlap: Literal["auto", "plain"] = "auto"
    """Under sequence parallelism, how sending hides behind the products at a group's border. `auto`: through symmetric memory, piece by
    piece, where the GPUs reach one another's. `plain`: one sequence is sent while another is multiplied, through NCCL, on any hardware."""
    rules: dict[str, Style] = Field(default_factory=dict)
    """What to cut, by module name relative to the model, where the library's own choice is not wanted: `*` stands for a number. `column`,
    `row`: output or input features; `packed2`, `packed3`, `qkv`: output features that hold two, three, or query, key and value weights;
    `replicate`: not at all. Names that are not mentioned keep what the library chooses."""
