"""Closed-form cost of candidate plans: one row a candidate, one numpy column a quantity, filled by strategies in phase order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

COLUMNS: Mapping[str, str] = {
    "parameter_bytes": "compute copy of the parameters on the fullest rank",
    "master_bytes": "master weights where they are not the compute copy",
    "gradient_bytes": "gradients held between microbatches",
    "optimizer_bytes": "optimizer states",
    "transient_bytes": "buffers that exist during the step only (buckets, gathered blocks)",
    "activation_bytes_per_microbatch": "activations kept for the backward pass of one microbatch",
    "num_microbatches_in_flight": "microbatches whose activations are alive at once",
    "compute_seconds": "forward, backward and recomputation of the step",
    "exposed_communication_seconds": "communication that no computation hides",
    "optimizer_seconds": "the optimizer's pass over its states",
    "bytes_pp": "bytes a rank sends along pp in one step",
    "bytes_dp_replicate": "bytes a rank sends along dp_replicate in one step",
    "bytes_shard": "bytes a rank sends along dp_shard x cp in one step",
    "bytes_cp": "bytes a rank sends along cp in one step",
    "bytes_tp": "bytes a rank sends along tp in one step",
    "fits": "1 where the row's memory fits the device, else 0",
}
"""Every column and its meaning: float64, bytes or seconds on the fullest or slowest rank."""

INPUTS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "zero_stage", "micro_size", "num_microbatches", "recompute")
"""The columns that describe a candidate: sizes of the axes, choices as numbers (recompute: 0 none, 1 full)."""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that closed forms need. Counts are of elements; block_* are of one block.

    optimizer_state_elements: elements of optimizer state for each trained one (AdamW: 2).
    """

    num_parameters: int
    num_trainable: int
    num_blocks: int
    block_parameters: int
    hidden_size: int
    sequence_length: int
    vocab_size: int
    num_heads: int
    optimizer_state_elements: int = 2


@dataclass(frozen=True)
class HardwareProfile:
    """One device and its links. Rates are what is reached, not what a data sheet says."""

    name: str
    memory_bytes: float
    matmul_flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    link_latency_seconds: float
    compute_element_bytes: int = 2
    master_element_bytes: int = 4


@dataclass(frozen=True)
class EstimateTable:
    """Candidates (rows) and what they cost (columns). `with_columns` gives a new table; columns add up where two strategies write one."""

    model: ModelSize
    inputs: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs["dp_shard"])

    def column(self, name: str) -> np.ndarray:
        import numpy as np

        assert name in COLUMNS, f"no column {name}; core names them: {tuple(COLUMNS)}"
        return self.columns[name] if name in self.columns else np.zeros(len(self))

    def adding(self, name: str, values: np.ndarray) -> EstimateTable:
        """This table with `values` added to a column that starts at zero."""
        return replace(self, columns={**self.columns, name: self.column(name) + values})

    def setting(self, name: str, values: np.ndarray) -> EstimateTable:
        """This table with a column replaced."""
        assert name in COLUMNS, name
        return replace(self, columns={**self.columns, name: values})

    def peak_bytes(self) -> np.ndarray:
        """Memory of the fullest rank: states, transients, and activations of all microbatches in flight."""
        states = self.column("parameter_bytes") + self.column("master_bytes")
        states = states + self.column("gradient_bytes") + self.column("optimizer_bytes")
        activations = self.column("activation_bytes_per_microbatch") * self.column("num_microbatches_in_flight")
        total: np.ndarray = states + self.column("transient_bytes") + activations
        return total
