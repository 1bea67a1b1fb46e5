"""What each stage costs, in closed form: state of each kind on a rank, buffers, and bytes sent (Rajbhandari et al. 2020, section 5).

Padding is left out: each parameter starts at a multiple of 64 elements, and each flat bucket is a multiple of 64 elements a rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from colossal_core.estimate import EstimateTable, HardwareProfile
from colossal_zero.plan import DEFAULT_BUCKET_BYTES

if TYPE_CHECKING:
    from colossal_zero.config import ZeroConfig

KEEP = {"use": 0.0, "microbatch": 1.0, "step": 2.0}
"""`keep_parameters` and `keep_gradients` as numbers of the table."""


def estimate_zero(table: EstimateTable, profile: HardwareProfile, config: ZeroConfig) -> EstimateTable:
    """Adds state, buffers and traffic of each candidate. config: for choices that the table has no column of.

    With P trained and F frozen elements of the rank's model shard, n = dp_shard x cp, and bytes of one element c (compute), m (master),
    g (gradient), s (optimizer state), r (gradient as it is sent):

    | stage | compute copy  | masters               | gradients | states |
    | 0     | c (P + F)     | m P, 0 where m = c    | g P       | s P    |
    | 1     | c (P + F)     | m P/n, 0 where m = c  | g P       | s P/n  |
    | 2     | c (P + F)     | m P/n, 0 where m = c  | g P/n     | s P/n  |
    | 3     | c (F/n + E)   | m P/n                 | g P/n     | s P/n  |

    (Frozen parameters of stage 3 are kept as a shard; it stands with the compute copy. E: elements outside every block and in one block,
    which are gathered while the optimizer runs and stay until the next step uses them. With `keep_gradients: step` gradients are g P.)
    """
    size = _Sizes(table, profile, config)
    stage, shards = size.stage, size.shards
    compute, master = profile.compute_element_bytes, profile.master_element_bytes
    sharded = compute * (size.frozen / size.ranks + size.early)
    kept = np.where(stage == 3, sharded, compute * (size.trained + size.frozen))
    table = table.adding("parameter_bytes", kept)
    own_master = np.where(stage == 3, float(master), float(master if master != compute else 0))
    table = table.adding("master_bytes", own_master * size.trained / shards)
    gradient_shards = np.where(size.whole_gradients, 1.0, size.ranks)
    table = table.adding("gradient_bytes", profile.kept_gradient_bytes * size.trained / gradient_shards)
    table = table.adding("optimizer_bytes", table.model.state_bytes(master) * size.trained / shards)
    table = table.adding("gathered_bytes", _gathered(table, profile, size))
    table = table.adding("transient_bytes", _transient(profile, size))
    table = table.adding("bytes_shard", _sent(table, profile, size))
    copies = table.inputs["dp_replicate"]
    on_shards = profile.kept_gradient_bytes * size.trained / shards
    return table.adding("bytes_dp_replicate", 2 * (copies - 1) / copies * on_shards)


class _Sizes:
    """What the formulas share: one number a row."""

    def __init__(self, table: EstimateTable, profile: HardwareProfile, config: ZeroConfig) -> None:
        model = table.model
        tensor = table.ranks_of("tp")
        parts = tensor * table.ranks_of("pp")
        self.stage = table.input("zero_stage", config.stage)
        self.ranks = table.inputs["dp_shard"] * table.inputs["cp"]
        self.shards = np.where(self.stage >= 1, self.ranks, 1.0)
        self.trained, self.frozen = model.num_trainable / parts, model.num_frozen / parts
        self.block = model.block_parameters / tensor
        self.outside = np.minimum(model.num_outside / tensor, self.trained + self.frozen)
        self.early = np.minimum(self.outside + self.block, self.trained + self.frozen)
        self.largest = model.largest_parameter / tensor
        default = np.where(table.inputs["pp"] > 1, KEEP["step"], KEEP["use"])
        asked_keep = default if config.keep_parameters is None else np.full(len(table), KEEP[config.keep_parameters])
        self.keep = table.inputs.get("keep_parameters", asked_keep)
        default = np.where(table.inputs["pp"] > 1, KEEP["step"], KEEP["microbatch"])
        asked_keep = default if config.keep_gradients is None else np.full(len(table), KEEP[config.keep_gradients])
        keeps_gradients = table.inputs.get("keep_gradients", asked_keep)
        self.whole_gradients = (self.stage < 2) | (keeps_gradients == KEEP["step"])
        self.prefetch = table.input("prefetch", 1 if config.prefetch is None else config.prefetch)
        wire = {None: profile.kept_gradient_bytes, "fp32": 4, "bf16": 2}[config.reduce_dtype]
        self.wire = table.input("reduce_element_bytes", wire)
        largest_block = float(np.max(self.block, initial=0.0)) * profile.kept_gradient_bytes
        asked = max(DEFAULT_BUCKET_BYTES, largest_block) if config.bucket_bytes is None else config.bucket_bytes
        bucket = table.input("bucket_bytes", asked) / profile.kept_gradient_bytes
        limited = np.maximum(np.minimum(bucket, self.trained), self.largest)
        by_block = np.maximum(self.block, np.maximum(np.minimum(bucket, self.outside), self.largest))
        self.bucket = np.minimum(np.where(self.stage >= 2, by_block, limited), self.trained)


def _gathered(table: EstimateTable, profile: HardwareProfile, size: _Sizes) -> np.ndarray:
    """Stage 3, beside what is gathered early: the blocks ahead of the one at work, or everything where it is kept."""
    everything = size.trained + size.frozen
    at_once = np.minimum(size.early + size.prefetch * size.block, everything)
    elements = np.where(size.keep == KEEP["use"], at_once, everything) - size.early
    found: np.ndarray = np.where(size.stage == 3, profile.compute_element_bytes * elements, 0.0)
    return found


def _transient(profile: HardwareProfile, size: _Sizes) -> np.ndarray:
    """What exists in the backward pass beside the activations and the work of the block at its turn.

    Whole gradients: those of one bucket as autograd leaves them, and, where gradients are sent in another format than they are kept, a
    copy of all of them. Else two flat buffers and the shards that arrive, of the largest bucket and of a block; the gradients
    of that block as autograd leaves them are part of its work.
    """
    arriving = profile.compute_element_bytes * size.bucket
    copied = np.where(size.wire != profile.kept_gradient_bytes, size.wire * size.trained, 0.0)
    second = np.where(size.block > 0, np.minimum(size.block, size.bucket), size.bucket)
    flat = size.wire * (size.bucket + second) * (1 + 1 / size.ranks)
    several = size.ranks > 1
    found: np.ndarray = np.where(
        size.whole_gradients, arriving + np.where(several, copied, 0.0), np.where(several, flat, arriving)
    )
    return found


def _sent(table: EstimateTable, profile: HardwareProfile, size: _Sizes) -> np.ndarray:
    """Bytes along the shard axes in one step of k microbatches, each by a ring: (n-1)/n of a buffer for a reduce-scatter or an all-gather.

    Stage 0: 2 r P. Stage 1: (r + c) P. Stage 2: (r k + c) P. Stage 3: r k P, and c times what is gathered, frozen parameters included:
    `use` k (P + all blocks), `microbatch` k P, `step` P. With `keep_gradients: step` r P in the place of r k P.
    """
    compute, count = profile.compute_element_bytes, table.inputs["num_microbatches"]
    everything = size.trained + size.frozen
    again = everything - size.outside
    gathered = np.select(
        [size.keep == KEEP["use"], size.keep == KEEP["microbatch"]],
        [count * (everything + again), count * everything],
        everything,
    )
    reduced = size.wire * size.trained
    times = np.where(size.whole_gradients, 1.0, count)
    per_stage = [
        2 * reduced,
        reduced + compute * size.trained,
        times * reduced + compute * size.trained,
        times * reduced + compute * gathered,
    ]
    found: np.ndarray = (
        (size.ranks - 1) / size.ranks * np.select([size.stage == stage for stage in range(4)], per_stage)
    )
    return found
