"""What stages 0 and 1 cost, in closed form: bytes of each kind of state on a rank, and bytes sent (Rajbhandari et al. 2020, section 5)."""

from __future__ import annotations

import numpy as np

from colossal_core.estimate import EstimateTable, HardwareProfile


def estimate_zero(table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
    """Adds state and traffic of each candidate. With P trained parameters on the rank's model shard and n = dp_shard x cp:

    compute copy c P; gradients m P (flat, kept whole in stages 0 and 1); masters m P where m != c, and states s m P (AdamW: s = 2), both
    divided by n in stage 1. Sent along the shard axes: stage 0, 2 (n-1)/n m P; stage 1, (n-1)/n (m + c) P. Along dp_replicate
    (r copies), 2 (r-1)/r m P of the shard.
    """
    compute, master = profile.compute_element_bytes, profile.master_element_bytes
    parameters = table.model.num_trainable / (table.inputs["tp"] * table.inputs["pp"])
    ranks = table.inputs["dp_shard"] * table.inputs["cp"]
    shards = np.where(table.inputs["zero_stage"] >= 1, ranks, 1)
    share = (ranks - 1) / ranks
    copies = table.inputs["dp_replicate"]
    table = table.adding("parameter_bytes", compute * parameters)
    table = table.adding("gradient_bytes", master * parameters)
    table = table.adding("master_bytes", (master if master != compute else 0) * parameters / shards)
    states = table.model.optimizer_state_elements
    table = table.adding("optimizer_bytes", states * master * parameters / shards)
    all_reduce, scatter_gather = 2 * share * master * parameters, share * (master + compute) * parameters
    sent = np.where(table.inputs["zero_stage"] >= 1, scatter_gather, all_reduce)
    table = table.adding("bytes_shard", sent)
    return table.adding("bytes_dp_replicate", 2 * (copies - 1) / copies * master * parameters / shards)
