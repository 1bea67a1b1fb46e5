"""The config of one of ours, as a user would write it, and the optimizer's settings that everybody has."""

from __future__ import annotations

from typing import Any

from beside_peers.rows import Row

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1


def config_of(row: Row, world_size: int) -> dict[str, Any]:
    """The whole config. Every row at one number of sequences a GPU trains as many sequences a step, however many ranks share a matrix or
    stand behind one another.
    """
    optimizer: dict[str, Any] = {"name": row.optimizer, "lr": LEARNING_RATE, "max_grad_norm": None}
    if row.optimizer == "adamw":
        optimizer |= {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "no_decay": "none"}
    contestant = row.parsed
    sections = {
        "tensor": dict(contestant.tensor),
        "pipeline": dict(contestant.pipeline),
        "zero": dict(contestant.zero),
    }
    return {
        "batch": {"global_size": row.micro_batch * world_size, "micro_size": row.sequences_a_pass},
        "precision": "bf16",
        "optimizer": optimizer,
        "scheduler": {"name": "constant"},
        "train": {"num_steps": 10**6},
        "compile": {"enabled": row.compiles_blocks},
        "recompute": {"mode": row.recompute},
        "parallel": {name: section for name, section in sections.items() if section},
        **({"ops": asked_ops(contestant.ops)} if contestant.ops else {}),
    }


def asked_ops(names: tuple[str, ...]) -> dict[str, str]:
    """`plain`, or names of ops whose kernel is used in compiled blocks too."""
    return plain_ops() if names == ("plain",) else dict.fromkeys(names, "triton")


def plain_ops() -> dict[str, str]:
    """For every op the provider that core itself would choose here, were no plugin installed."""
    import torch

    from colossal_core.ops.reference import reference_ops, torch_ops
    from colossal_core.ops.table import build_op_table

    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return build_op_table([*reference_ops(), *torch_ops()], device_type, "bfloat16").providers()
