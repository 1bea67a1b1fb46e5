"""Every optimizer on shards against one process in float64, and what is saved of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_core import tensor_lists
from colossal_core.layout import DimCut, FlatCut, ParameterLayout, Placement, take_local
from colossal_core.mesh import MeshLayout
from colossal_core.rounding import FIRST_MOMENT, SECOND_MOMENT
from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import RunRecord, oracle_of, share_of_step, start
from colossal_core.testing.probes import forget_traffic, load_and_go_on, record, save_and_go_on, traffic
from colossal_zero.optimizers import muon
from colossal_zero.optimizers.ownership import MatrixExchange

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {},
    "sgd": {"momentum": 0.9, "lr": 0.1},
    "lion": {"betas": (0.9, 0.99)},
    "lamb": {},
    "lars": {"lr": 1.0, "weight_decay": 0.01},
    "adafactor": {"lr": 0.01},
    "muon": {"lr": 0.01, "adamw_lr": 0.001},
}
ODD = TinyOptions(hidden_size=14, vocab_size=37, frozen=True, shared=True)


def spec_of(name: str, stage: int, world_size: int, options: TinyOptions = ODD, **keys: Any) -> RunSpec:
    """Two microbatches on every rank, clipped in every step."""
    optimizer = {"name": name, "lr": 0.001, "max_grad_norm": 0.1, **OPTIMIZERS[name], **keys}
    zero = {"stage": stage, "bucket_bytes": 9000}
    config: dict[str, Any] = {
        "batch": {"global_size": 12, "micro_size": 6 // world_size if world_size < 4 else 1},
        "precision": "fp64",
        "optimizer": optimizer,
        "parallel": {"zero": zero},
    }
    batch = TokenBatches(vocab_size=options.vocab_size, length=8)
    return RunSpec(config, TinyModel(options), batch, task="causal-lm", num_steps=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_is_exact_on_shards(pool: WorkerPool, name: str) -> None:
    """Sizes that nothing divides, a tied head, a frozen parameter, one shared by blocks."""
    oracle = pool.run(1, record, oracle_of(spec_of(name, 0, 1)))[0]
    for stage, world_size in ((0, 2), (1, 3), (2, 4), (3, 2)):
        rows = compare(pool.run(world_size, record, spec_of(name, stage, world_size)), oracle)
        assert all(row.passed for row in rows), f"stage {stage} on {world_size}\n{table(rows)}"


@pytest.mark.parametrize(("name", "stage"), [("lamb", 1), ("adafactor", 1), ("muon", 1), ("muon", 0)])
def test_copies_of_shards_are_counted_once(pool: WorkerPool, name: str, stage: int) -> None:
    oracle = pool.run(1, record, oracle_of(spec_of(name, 0, 1)))[0]
    spec = spec_of(name, stage, 4).with_overrides({"parallel.zero.replicate": 2})
    rows = compare(pool.run(4, record, spec), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


@pytest.mark.parametrize("name", ["lion", "lamb", "lars", "adafactor", "muon"])
def test_goes_on_from_another_mesh(pool: WorkerPool, name: str, tmp_path: Path) -> None:
    """Saved by stage 1 on two ranks; loaded by one process, and by stage 3 on three ranks."""
    saved, expected = pool.run(2, save_and_go_on, spec_of(name, 1, 2), str(tmp_path))[0]
    for stage, world_size in ((0, 1), (3, 3)):
        spec = spec_of(name, stage, world_size)
        for loaded, following in pool.run(world_size, load_and_go_on, spec, str(tmp_path)):
            rows = compare(loaded, saved)
            assert all(row.passed for row in rows), f"\n{table(rows)}"
            assert abs(following.loss - expected.loss) <= 1e-12 * expected.loss
            assert abs(following.grad_norm - expected.grad_norm) <= 1e-12 * expected.grad_norm


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("keys", [{"states": "int8"}, {"masters": "compute", "states": "bf16"}])
@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_narrow_states_on_shards(pool: WorkerPool, name: str, keys: Mapping[str, Any], stage: int) -> None:
    """Copies stay bit-identical (each rank's parameters are its own in stage 0), and the run is repeated bit for bit."""
    spec = spec_of(name, stage, 2, **keys).with_overrides({"precision": "bf16"})
    first, second = pool.run(2, record, spec)
    again = pool.run(2, record, spec)[0]
    for parameter, value in first.parameters.items():
        if parameter in first.steps[0].gradients:
            assert value.dtype == (torch.bfloat16 if "masters" in keys else torch.float32)
        assert torch.equal(value, second.parameters[parameter])
        assert torch.equal(value, again.parameters[parameter])
    for state, value in first.states.items():
        assert torch.equal(value, second.states[state]), state


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_narrow_states_go_on_from_another_mesh(pool: WorkerPool, states: str, tmp_path: Path) -> None:
    """bf16 bit for bit; 8-bit states are saved as float32, and coded again in the blocks of the new shards."""
    spec = spec_of("adamw", 1, 2, states=states).with_overrides({"precision": "bf16"})
    saved, _ = pool.run(2, save_and_go_on, spec, str(tmp_path))[0]
    spec = spec_of("adamw", 0, 1, states=states).with_overrides({"precision": "bf16"})
    loaded, _ = pool.run(1, load_and_go_on, spec, str(tmp_path))[0]
    for key, value in saved.states.items():
        assert value.dtype == loaded.states[key].dtype
        if states == "bf16" or value.dim() == 0:
            assert torch.equal(loaded.states[key], value), key
            continue
        # One more rounding, to a neighbour: at most the widest gap between two codes, that below the largest value.
        code = SECOND_MOMENT if key[0].endswith("exp_avg_sq") else FIRST_MOMENT
        gap = 1.0 - (1.0 - 1.0 / code.levels) ** code.power
        assert (loaded.states[key] - value).abs().max() <= 1.0001 * gap * value.abs().max(), key
    for name, value in saved.parameters.items():
        assert torch.equal(value, loaded.parameters[name])


EXPECTED_CALLS = {
    ("lion", 1): [],
    ("lamb", 1): [("all_reduce", "trust ratios", 1)],
    ("lars", 1): [("all_reduce", "trust ratios", 1)],
    ("adafactor", 1): [("all_reduce", "norms of updates", 2), ("all_reduce", "rows and columns", 2)],
    ("muon", 1): [("all_to_all", "matrices from owners", 1), ("all_to_all", "matrices to owners", 1)],
    ("muon", 0): [("all_gather", "matrices from owners", 1)],
}
"""Collectives of one optimizer step: (operation, tag, calls). Adafactor's two groups (decayed and not) each ask once."""


def calls_of_a_step(collectives: Collectives, spec: RunSpec) -> list[tuple[str, str, int]]:
    trained = start(spec, collectives)
    tags = {tag for calls in EXPECTED_CALLS.values() for _, tag, _ in calls}
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    forget_traffic(collectives)
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 1))
    return sorted((row.operation, row.tag, row.num_calls) for row in traffic(collectives) if row.tag in tags)


@pytest.mark.parametrize(("name", "stage"), EXPECTED_CALLS)
def test_few_messages_serve_all_parameters(pool: WorkerPool, name: str, stage: int) -> None:
    for calls in pool.run(2, calls_of_a_step, spec_of(name, stage, 2)):
        assert calls == EXPECTED_CALLS[name, stage]


def record_in_small_buckets(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """As `record`, every matrix of Muon's in a bucket of its own, and every tensor cut into short groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "OWNED_ELEMENTS", 8)
        patch.setattr(tensor_lists, "GROUP_ELEMENTS", 50)
        return record(collectives, spec)


@pytest.mark.parametrize("name", ["lamb", "lars", "lion", "muon", "sgd"])
def test_buckets_and_groups_change_nothing(pool: WorkerPool, name: str) -> None:
    oracle = pool.run(1, record, oracle_of(spec_of(name, 0, 1)))[0]
    rows = compare(pool.run(3, record_in_small_buckets, spec_of(name, 1, 3)), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def there_and_back(collectives: Collectives) -> list[bool]:
    """Matrices cut along tp and then along dp_shard, one with columns that take turns, one with padding: whole at their owners, and what
    the owners make of them (three times as much) back in every shard."""
    seen = collectives.with_mesh(MeshLayout((1, 1, 2, 1, 2)))
    coordinate = seen.mesh.coordinate(seen.rank)
    columns = DimCut(1, ("tp",), (((0, 2), (4, 6)), ((2, 4),)))
    padded = DimCut(0, ("tp",), (((0, 3),), ((3, 5),)), (0, 1))
    states = [
        Placement((7, 6), (columns,), FlatCut(("dp_shard",), (((0, 5), (5, 28)), ((0, 14), (14, 14))))),
        Placement((5, 4), (padded,), replicated=("dp_shard",)),
        Placement((5, 4), (padded,), FlatCut(("dp_shard",), (((0, 5), (5, 12)),))),
    ]
    found = []
    for state in states:
        full = torch.arange(math.prod(state.shape), dtype=torch.float64).view(state.shape) + 1.0
        layout = ParameterLayout("matrix", state.shape, Placement(state.shape), state, block="block")
        local = torch.zeros(state.local_shape(coordinate, seen.mesh), dtype=torch.float64)
        pieces = state.pieces(coordinate, seen.mesh)
        take_local(local, full, pieces)
        exchange = MatrixExchange([layout, layout], [1, 0], state.cut_axes, seen, torch.float64)
        owned = exchange.finish_gather(exchange.start_gather([local, 10.0 * local]))
        mine = seen.index(state.cut_axes)
        wanted = [full.mul(1.0 if mine == 1 else 10.0)[None]] if mine < 2 else []
        found.append(len(owned) == len(wanted))
        found += [torch.equal(ours, true) for ours, true in zip(owned, wanted, strict=True)]
        back = exchange.finish_scatter(exchange.start_scatter([3.0 * batch for batch in owned]), [local, local])
        found += [torch.equal(back[0], 3.0 * local), torch.equal(back[1], 30.0 * local)]
    return found


def test_matrices_that_another_axis_cuts_too_find_their_owner(pool: WorkerPool) -> None:
    for found in pool.run(4, there_and_back):
        assert all(found), found
