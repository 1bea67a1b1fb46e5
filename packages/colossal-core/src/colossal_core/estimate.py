"""Closed-form cost of candidate plans: one row a candidate, one numpy column a quantity, filled by strategies in phase order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from colossal_core.plan import Plan

COLUMNS: Mapping[str, str] = {
    "parameter_bytes": "compute copy of the parameters that is always there, frozen ones included, on the fullest rank",
    "master_bytes": "master weights where they are not the compute copy",
    "gradient_bytes": "gradients as they are kept: from the first backward pass of a step to the begin of the next step",
    "optimizer_bytes": "optimizer states",
    "gathered_bytes": "compute copies that are there only while they are used, at the most",
    "transient_bytes": "buffers that exist during the backward pass only: gradients on their way, what is sent and received",
    "activation_bytes_per_microbatch": "activations kept for the backward pass of one microbatch",
    "loss_bytes": "what head, loss and its gradient take beyond the activations, at the most",
    "backward_bytes": "what the work of one block takes in the backward pass beyond the activations, at the most",
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

OPTIONAL_INPUTS = ("keep_parameters", "keep_gradients", "reduce_element_bytes", "prefetch", "bucket_bytes")
"""Further choices, as in the section of the strategy that reads them; where a table has no such column, the strategy's own config holds.

keep_parameters, keep_gradients: 0 use, 1 microbatch, 2 step. reduce_element_bytes: of one gradient element as it is sent.
"""


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a model that closed forms need. Counts are of elements; block_* are of one block, the largest.

    in_blocks: elements of all blocks together; None: num_blocks x block_parameters. largest_parameter: elements of the largest one.
    optimizer_state_elements: elements of optimizer state for each trained one (AdamW: 2), in the master format unless
    optimizer_state_bytes says how many bytes they take together.
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
    optimizer_state_bytes: float | None = None
    in_blocks: int | None = None
    largest_parameter: int = 0

    @property
    def num_frozen(self) -> int:
        return self.num_parameters - self.num_trainable

    @property
    def num_outside(self) -> int:
        """Elements outside every block: embedding, head, last norm."""
        inside = self.num_blocks * self.block_parameters if self.in_blocks is None else self.in_blocks
        return max(self.num_parameters - inside, 0)

    def state_bytes(self, master_element_bytes: int) -> float:
        """Bytes of optimizer state for each trained element."""
        if self.optimizer_state_bytes is not None:
            return self.optimizer_state_bytes
        return float(self.optimizer_state_elements * master_element_bytes)


@dataclass(frozen=True)
class HardwareProfile:
    """One device and its links, and the bytes of one element in the formats of the run. Rates are what is reached, not what a data sheet
    says.

    gradient_element_bytes: of a gradient as it is kept; None: as a master.
    """

    name: str
    memory_bytes: float
    matmul_flops_per_second: float
    memory_bytes_per_second: float
    link_bytes_per_second: float
    link_latency_seconds: float
    compute_element_bytes: int = 2
    master_element_bytes: int = 4
    gradient_element_bytes: int | None = None

    @property
    def kept_gradient_bytes(self) -> int:
        return self.master_element_bytes if self.gradient_element_bytes is None else self.gradient_element_bytes


@dataclass(frozen=True)
class EstimateTable:
    """Candidates (rows) and what they cost (columns). `adding` gives a new table; columns add up where two strategies write one.

    plan: where the table is of one plan, its only row; then `model` has the counts of its fullest rank. None: candidates of which nothing
    but the inputs is known; `model` has the counts of the whole model, which tp and pp are taken to divide evenly.
    """

    model: ModelSize
    inputs: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    plan: Plan | None = None

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

    def input(self, name: str, default: float) -> np.ndarray:
        """An input column; where the table has none, the same value in every row."""
        import numpy as np

        found: np.ndarray = self.inputs[name] if name in self.inputs else np.full(len(self), float(default))
        return found

    def ranks_of(self, axis: str) -> np.ndarray:
        """Among how many ranks of an axis (tp, pp) the counts of `model` are still to be divided."""
        import numpy as np

        return np.ones(len(self)) if self.plan is not None else self.inputs[axis]

    def state_bytes(self) -> np.ndarray:
        """Bytes of the fullest rank between two steps."""
        names = ("parameter_bytes", "master_bytes", "gradient_bytes", "optimizer_bytes")
        total: np.ndarray = sum((self.column(name) for name in names), self.column("fits") * 0)
        return total

    def moments(self) -> dict[str, np.ndarray]:
        """Memory of the fullest rank at the moments of which one is the highest: at the loss, at the begin of the backward pass, when all
        activations are still there, and at its end, when all gradients are. Gradients are there at the former two where another
        microbatch has left them.
        """
        import numpy as np

        gradients = self.column("gradient_bytes")
        always = self.state_bytes() - gradients + self.column("gathered_bytes")
        left = np.where(self.input("num_microbatches", 1) > 1, gradients, 0.0)
        activations = self.column("activation_bytes_per_microbatch") * self.column("num_microbatches_in_flight")
        in_backward = self.column("transient_bytes") + self.column("backward_bytes")
        return {
            "loss": always + left + activations + self.column("loss_bytes"),
            "begin of the backward pass": always + left + activations + in_backward,
            "end of the backward pass": always + gradients + in_backward,
        }

    def peak_bytes(self) -> np.ndarray:
        """Memory of the fullest rank at the highest moment of a step."""
        import numpy as np

        total: np.ndarray = np.max(np.stack(list(self.moments().values())), axis=0)
        return total
