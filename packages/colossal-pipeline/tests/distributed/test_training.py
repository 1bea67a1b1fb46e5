"""A pipeline in use: evaluation, sequences of changing length, checkpoints from one mesh to another, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from colossal_comm import run_simulated
from colossal_core.errors import ColossalError
from colossal_core.mesh import MeshLayout
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TokenBatches
from colossal_core.testing.parity import oracle_of, prepare, start

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.trained import Trained

Run = Callable[..., RunSpec]
LENGTHS = (8, 5, 8, 11)
"""Of the sequences of each step."""


def on_ranks(spec: RunSpec, num_ranks: int, use: Callable[[Trained, int], Any]) -> list[Any]:
    """What `use(trained, rank)` gives on every rank of a pipeline that is simulated."""

    def one(collectives: Collectives) -> Any:
        return use(start(spec, collectives), collectives.rank)

    return run_simulated(MeshLayout((num_ranks, 1, 1, 1, 1)) if num_ranks > 1 else MeshLayout(), one)


def batch_of(length: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
    """Not to be called on a simulated rank: another may have float64 for its default dtype meanwhile, and other numbers are drawn then."""
    return TokenBatches(64, length)(length, num_sequences)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv"])
def test_sequences_of_changing_length(run_of: Run, schedule: str) -> None:
    """Shapes are sent ahead once for each length; the third step has those of the first."""
    spec = run_of("llama", {"parallel.pipeline": {"size": 2, "schedule": schedule}}, microbatches=3)

    batches = [batch_of(length, 3) for length in LENGTHS]

    def losses(trained: Trained, rank: int) -> list[float]:
        del rank
        return [float(trained.train_step(batch).loss) for batch in batches]

    alone = on_ranks(oracle_of(spec), 1, losses)[0]
    for found in on_ranks(spec, 2, losses):
        assert found == pytest.approx(alone, rel=1e-12, abs=0)


@pytest.mark.parametrize("num_sequences", [1, 4, 5])
@pytest.mark.parametrize(("schedule", "microbatch"), [("1f1b", 2), ("interleaved", 1), ("zbv", 2)])
def test_evaluation(run_of: Run, schedule: str, microbatch: int, num_sequences: int) -> None:
    """Any number of sequences, the last microbatch smaller than the others, before and after a step."""
    spec = run_of("gpt2", {"parallel.pipeline": {"size": 2, "schedule": schedule}}, microbatches=4)
    spec = spec.with_overrides({"batch": {"global_size": 4, "micro_size": microbatch}})

    first, trained_on, second = batch_of(8, num_sequences), batch_of(8, 4), batch_of(9, num_sequences)

    def losses(trained: Trained, rank: int) -> list[float]:
        del rank
        before = trained.eval_step(first)
        trained.train_step(trained_on)
        after = trained.eval_step(second)
        return [float(before.loss), float(before.num_tokens), float(after.loss), float(after.loss_sum)]

    alone = on_ranks(oracle_of(spec), 1, losses)[0]
    for found in on_ranks(spec, 2, losses):
        assert found == pytest.approx(alone, rel=1e-12, abs=0)


def test_calling_the_model_itself_is_refused(run_of: Run) -> None:
    batch = batch_of(8, 1)

    def call(trained: Trained, rank: int) -> str:
        del rank
        with pytest.raises(ColossalError) as caught:
            trained.module(**batch)
        return str(caught.value)

    assert set(on_ranks(run_of("llama", {"parallel.pipeline": {"size": 2}}), 2, call)) == {
        "the model is cut into pipeline stages, and this rank holds some of them: call trained.train_step or trained.eval_step, which run "
        "them all, in the place of the model"
    }


def test_a_rank_holds_its_own_stages_alone(run_of: Run) -> None:
    """What other stages hold takes no memory: one element for each parameter."""
    spec = run_of("llama", {"parallel.pipeline": {"size": 4}})

    def held(trained: Trained, rank: int) -> tuple[list[str], int]:
        del rank
        own = [name for name in trained._engine.state.shards if ".layers." in name and name.endswith("q_proj.weight")]
        storages = {
            one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in trained.module.parameters()
        }
        return own, sum(storages.values())

    found = on_ranks(spec, 4, held)
    plan = prepare(spec, 4).plan
    assert [own for own, _ in found] == [[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)]
    for rank, (_, taken) in enumerate(found):
        coordinate = plan.mesh.coordinate(rank)
        elements = [one.numel if one.compute.is_present(coordinate) else 1 for one in plan.layouts.values()]
        assert taken == 8 * sum(elements), f"rank {rank}"


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_checkpoints_of_a_pipeline(run_of: Run, goes_on: Callable[..., None], schedule: str, tmp_path: Path) -> None:
    """Saved in two stages, loaded in four, in one process, and in two of another schedule; and back."""
    two = run_of("gpt2", {"parallel.pipeline": {"size": 2, "schedule": schedule}})
    four = run_of("gpt2", {"parallel.pipeline": {"size": 4}})
    other = run_of("gpt2", {"parallel.pipeline": {"size": 2, "schedule": "interleaved"}})
    alone = oracle_of(two)
    goes_on(str(tmp_path / "two"), (2, two), (4, four), (1, alone), (2, other))
    goes_on(str(tmp_path / "one"), (1, alone), (2, two), (4, four))


@dataclass(frozen=True)
class SometimesMasked:
    """Batches of which every other one has no mask."""

    def __call__(self, step: int, num_sequences: int) -> Mapping[str, torch.Tensor]:
        batch = dict(TokenBatches(64, 8)(step, num_sequences))
        if step == 1:
            del batch["attention_mask"]
        return batch


def test_batches_of_different_keys(run_of: Run) -> None:
    spec = replace(run_of("llama", {"parallel.pipeline": {"size": 2}}), batch=SometimesMasked())

    batches = [SometimesMasked()(step, 4) for step in range(3)]

    def losses(trained: Trained, rank: int) -> list[float]:
        del rank
        return [float(trained.train_step(batch).loss) for batch in batches]

    alone = on_ranks(oracle_of(spec), 1, losses)[0]
    for found in on_ranks(spec, 2, losses):
        assert found == pytest.approx(alone, rel=1e-12, abs=0)
