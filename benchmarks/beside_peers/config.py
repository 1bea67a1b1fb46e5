"""The config of one of ours, as a user would write it, and the optimizer's settings that everybody has."""

from __future__ import annotations

from typing import Any

from beside_peers.rows import Row

LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 0.1


def config_of(row: Row, world_size: int) -> dict[str, Any]:
    """The whole config. Every row at one number of sequences a GPU trains as many sequences a step, however many ranks share a matrix."""
    optimizer: dict[str, Any] = {"name": row.optimizer, "lr": LEARNING_RATE, "max_grad_norm": None}
    if row.optimizer == "adamw":
        optimizer |= {"betas": BETAS, "weight_decay": WEIGHT_DECAY, "no_decay": "none"}
    contestant = row.parsed
    sections = {"tensor": dict(contestant.tensor), "zero": dict(contestant.zero)}
    return {
        "batch": {"global_size": row.micro_batch * world_size, "micro_size": row.sequences_a_pass},
        "precision": "bf16",
        "optimizer": optimizer,
        "scheduler": {"name": "constant"},
        "train": {"num_steps": 10**6},
        "compile": {"enabled": row.compiled},
        "recompute": {"mode": row.recompute},
        "parallel": {name: section for name, section in sections.items() if section},
    }
