"""A checkpoint of any stage on any number of ranks goes on under any other, and saving it gathers nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from colossal_core.live_bytes import LiveBytes
from colossal_core.testing import RunSpec, WorkerPool
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import share_of_step, start
from colossal_core.testing.probes import Traffic, forget_traffic, traffic

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

Mesh = tuple[int, dict[str, Any]]
"""(ranks, keys of `parallel.zero`)."""

MESHES: tuple[Mesh, ...] = (
    (4, {"stage": 3}),
    (3, {"stage": 1, "bucket_bytes": 9000}),
    (4, {"stage": 2, "replicate": 2}),
    (1, {"stage": 3}),
    (2, {"stage": 3, "keep_parameters": "step"}),
    (3, {"stage": 2, "bucket_bytes": 8}),
    (2, {"stage": 0}),
    (4, {"stage": 3, "replicate": 2}),
    (1, {"stage": 0}),
    (3, {"stage": 3}),
)
"""Each loads what the one before has saved; the first loads what the last one has."""


AWKWARD = TinyOptions(frozen=True, unused=True)


def spec_of(zero: dict[str, Any], options: TinyOptions = AWKWARD) -> RunSpec:
    config = {
        "batch": {"global_size": 12, "micro_size": 1},
        "precision": "fp64",
        "optimizer": {"lr": 0.001, "max_grad_norm": 0.1},
        "parallel": {"zero": zero},
    }
    return RunSpec(config, TinyModel(options), TokenBatches(), task="causal-lm")


def go_on(collectives: Collectives, spec: RunSpec, load: str, save: str, num_steps: int) -> list[float]:
    """Losses and norms of some more steps after what was loaded."""
    trained = start(spec, collectives)
    if load:
        assert trained.load(load) is not None
    found = []
    for _ in range(num_steps):
        result = trained.train_step(share_of_step(spec, trained.plan, collectives.rank, trained.step))
        found += [float(result.loss), float(result.grad_norm)]
    if save:
        trained.save(save)
    return found


def test_every_stage_goes_on_where_every_other_stopped(pool: WorkerPool, tmp_path: Path) -> None:
    """One run of as many steps as there are meshes, each step on another one, beside the uninterrupted run."""
    wanted = pool.run(1, go_on, spec_of({"stage": 0}), "", "", len(MESHES) + 1)[0]
    found: list[float] = []
    for index, (num_ranks, zero) in enumerate((*MESHES, MESHES[0])):
        load = str(tmp_path / str(index)) if index else ""
        ranks = pool.run(num_ranks, go_on, spec_of(zero), load, str(tmp_path / str(index + 1)), 1)
        assert all(rank == ranks[0] for rank in ranks)
        found += ranks[0]
    assert len(found) == len(wanted)
    worst = max(abs(one - other) / abs(other) for one, other in zip(found, wanted, strict=True))
    assert worst <= 1e-12


def saved(collectives: Collectives, spec: RunSpec, directory: str) -> tuple[tuple[Traffic, ...], int, int]:
    """What a save sends; the most bytes of tensors that it makes; bytes of the masters of this rank."""
    trained = start(spec, collectives)
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    forget_traffic(collectives)
    live, engine = LiveBytes(), trained._engine
    live.ignore(shard.master for shard in engine.state.shards.values())
    live.ignore(state.tensor for state in engine.optimizer.state_tensors())
    with live:
        trained.save(directory)
    own = sum(shard.master.nbytes for shard in trained._engine.state.shards.values())
    return traffic(collectives), live.peak, own


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_save_gathers_nothing(pool: WorkerPool, stage: int, tmp_path: Path) -> None:
    """Only the manifest's text is sent, as long for a model of nine times the size, and the memory made is one copy of
    what a rank holds: masters and AdamW's two moments."""
    texts, memory, shards = [], [], []
    for size in (18, 54):
        spec = spec_of({"stage": stage}, TinyOptions(hidden_size=size, num_blocks=4))
        ranks = pool.run(4, saved, spec, str(tmp_path / str(size)))
        assert {row.tag for rows, _, _ in ranks for row in rows} == {"checkpoint"}
        texts.append(max(row.sent_bytes for rows, _, _ in ranks for row in rows))
        memory.append(max(made for _, made, _ in ranks))
        shards.append(max(own for _, _, own in ranks))
    assert texts[1] <= 1.1 * texts[0]
    assert memory[1] - memory[0] <= 3.1 * (shards[1] - shards[0])
