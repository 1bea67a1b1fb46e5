"""What stage 3 frees and when: observed in a run, from the storages behind the parameters."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from colossal_core.errors import ColossalError, ConfigError
from colossal_core.testing import RunSpec, WorkerPool, compare, table
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import oracle_of, record_end, record_step, share_of_step, start
from colossal_core.testing.probes import record
from colossal_zero.flat_bucket import FlatBucket
from colossal_zero.plan import most_in_flight

if TYPE_CHECKING:
    from colossal_core.collectives import Collectives
    from colossal_core.testing.parity import RunRecord
    from colossal_core.trained import Trained

NUM_BLOCKS = 4
KEEPS = ("use", "microbatch", "step")


def spec_of(zero: Mapping[str, Any], *, num_microbatches: int = 2) -> RunSpec:
    config = {
        "batch": {"global_size": 4 * num_microbatches, "micro_size": 2},
        "precision": "fp64",
        "optimizer": {"lr": 0.001, "max_grad_norm": 0.1},
        "parallel": {"zero": dict(zero)},
    }
    options = TinyOptions(num_blocks=NUM_BLOCKS, tied=False, dropout=0.0)
    return RunSpec(config, TinyModel(options), TokenBatches(), task="causal-lm")


def is_whole(module: nn.Module) -> bool:
    """Whether memory stands behind a module's parameters (a gather into it may be on its way). What is released reads as not-a-number."""
    states = {parameter.untyped_storage().nbytes() > 8 for parameter in module.parameters()}
    assert len(states) == 1
    whole = states.pop()
    assert whole or all(bool(parameter.isnan().all()) for parameter in module.parameters())
    return whole


def whole_units(model: Any) -> list[str]:
    blocks = [f"blocks.{index}" for index, block in enumerate(model.blocks) if is_whole(block)]
    return [name for name in ("tokens", "positions", "norm", "head") if is_whole(getattr(model, name))] + blocks


@dataclass
class Seen:
    """The units that were whole at each look, by the kind of moment."""

    forward: list[tuple[int, list[str]]] = field(default_factory=list)
    backward: list[tuple[int, list[str]]] = field(default_factory=list)
    rest: list[list[str]] = field(default_factory=list)
    storages: set[int] = field(default_factory=set)


def watch(trained: Trained, seen: Seen) -> None:
    """Looks inside every block, in its forward and in its backward pass."""
    model: Any = trained.module

    def look_inside(position: int) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            seen.forward.append((position, whole_units(model)))
            if output.requires_grad:
                output.register_hook(lambda gradient: seen.backward.append((position, whole_units(model))))

        return look

    for position, block in enumerate(model.blocks):
        block.down.register_forward_hook(look_inside(position))


def run_watched(collectives: Collectives, spec: RunSpec) -> Seen:
    trained, seen = start(spec, collectives), Seen()
    seen.rest.append(whole_units(trained.module))
    watch(trained, seen)
    trained.eval_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    seen.rest.append(whole_units(trained.module))
    seen.forward.clear()
    trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    seen.rest.append(whole_units(trained.module))
    trained.eval_step(share_of_step(spec, trained.plan, collectives.rank, 1))
    seen.rest.append(whole_units(trained.module))
    state: Any = trained._engine.state
    seen.storages = {bucket._compute.untyped_storage().nbytes() for bucket in state._buckets}
    return seen


@pytest.mark.parametrize("keep", KEEPS)
def test_everything_is_released_but_what_is_gathered_early(pool: WorkerPool, keep: str) -> None:
    """After wrapping, and after evaluation before and after the first step: no memory, and not-a-number to read. After a step what the
    next one begins with is there.
    """
    for seen in pool.run(2, run_watched, spec_of({"stage": 3, "keep_parameters": keep})):
        assert seen.rest == [[], [], ["tokens", "positions", "norm", "head", "blocks.0"], []]
        assert seen.storages == {0}


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_one_block_and_those_ahead_are_whole_at_once(pool: WorkerPool, prefetch: int) -> None:
    outside = ["tokens", "positions", "norm", "head"]
    for seen in pool.run(2, run_watched, spec_of({"stage": 3, "prefetch": prefetch})):
        for position, units in seen.forward[: 2 * NUM_BLOCKS]:
            ahead = range(position, min(position + prefetch + 1, NUM_BLOCKS))
            assert units == outside + [f"blocks.{index}" for index in ahead]
        assert [position for position, _ in seen.backward] == [3, 2, 1, 0] * 2
        for position, units in seen.backward:
            ahead = range(max(position - prefetch, 0), position + 1)
            assert units == outside + [f"blocks.{index}" for index in ahead]


def test_what_is_kept_is_kept(pool: WorkerPool) -> None:
    for keep, first in (("microbatch", 1), ("step", 4)):
        seen = pool.run(2, run_watched, spec_of({"stage": 3, "keep_parameters": keep, "prefetch": 0}))[0]
        counts = [sum(unit.startswith("blocks") for unit in units) for _, units in seen.forward[:8]]
        assert counts == [1, 2, 3, 4, *range(first, 5)] if keep == "microbatch" else [1, 2, 3, 4, 4, 4, 4, 4]


def transient_bytes(collectives: Collectives, spec: RunSpec) -> tuple[int, int]:
    """The most bytes of flat gradient buffers that were alive at once beside the kept ones, and the most that may be."""
    trained = start(spec, collectives)
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []
    most = 0
    taken = FlatBucket.take_gradients

    def count(bucket: FlatBucket) -> None:
        nonlocal most
        taken(bucket)
        assert bucket._sent is not None
        alive.append(weakref.ref(bucket._sent))
        sizes.append(bucket._sent.nbytes)
        most = max(most, sum(sent.nbytes for sent in (reference() for reference in alive) if sent is not None))

    patch = pytest.MonkeyPatch()
    patch.setattr(FlatBucket, "take_gradients", count)
    try:
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    finally:
        patch.undo()
    return most, most_in_flight(sizes)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_usual_gradient_buffers_or_the_largest_exist_at_once(pool: WorkerPool, stage: int) -> None:
    for most, allowed in pool.run(2, transient_bytes, spec_of({"stage": stage, "bucket_bytes": 9000})):
        assert most <= allowed


class BrokenError(Exception):
    """What the tests raise inside a model."""


def fail_in(model: Any, *, backward: bool) -> Callable[[], None]:
    """The third block raises, in its forward or in its backward pass, until the returned function is called."""

    def in_backward(gradient: torch.Tensor) -> None:
        del gradient
        raise BrokenError

    def fail(module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if not backward:
            raise BrokenError
        output.register_hook(in_backward)

    handle: RemovableHandle = model.blocks[1].up.register_forward_hook(fail)
    return handle.remove


def broken_off(collectives: Collectives, spec: RunSpec, backward: bool, at: int) -> RunRecord:
    """Steps as usual; before step `at`, one on the batch of another step that an exception ends."""
    trained = start(spec, collectives)
    steps = []
    for step in range(spec.num_steps):
        if step == at:
            repair = fail_in(trained.module, backward=backward)
            try:
                trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 7))
            except BrokenError:
                repair()
            else:
                raise AssertionError("nothing was raised")
        steps.append(record_step(trained, share_of_step(spec, trained.plan, collectives.rank, step)))
    return record_end(trained, steps)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "zero", [{"stage": 1}, {"stage": 2}, {"stage": 3}, {"stage": 3, "keep_parameters": "step"}], ids=str
)
def test_a_step_that_an_exception_ends_leaves_no_trace(
    pool: WorkerPool, zero: dict[str, Any], backward: bool, at: int
) -> None:
    spec = spec_of({**zero, "bucket_bytes": 9000})
    oracle = pool.run(1, record, oracle_of(spec))[0]
    rows = compare(pool.run(2, broken_off, spec, backward, at), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def loaded_after_reading(collectives: Collectives, spec: RunSpec, directory: str) -> tuple[float, float]:
    """Losses of a step after `load` into a run whose parameters a user's own forward pass has gathered, and of the run that saved."""
    first = start(spec, collectives)
    share = share_of_step(spec, first.plan, collectives.rank, 0)
    first.train_step(share)
    first.save(directory)
    expected = float(first.train_step(share).loss)
    second = start(spec, collectives)
    inputs = {key: value for key, value in share.items() if key != "labels"}
    second.module(**inputs)  # with gradients: nothing tells that they are never asked for
    assert whole_units(second.module)
    second.load(directory)
    return float(second.train_step(share).loss), expected


@pytest.mark.parametrize("keep", KEEPS)
def test_what_a_user_has_gathered_is_not_used_after_a_load(pool: WorkerPool, keep: str, tmp_path: Any) -> None:
    spec = spec_of({"stage": 3, "keep_parameters": keep})
    for found, expected in pool.run(2, loaded_after_reading, spec, str(tmp_path)):
        assert abs(found - expected) <= 1e-12 * abs(expected)


def own_backward(trained: Trained, share: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A user's own backward pass through the module: gradients of this rank's share alone."""
    outputs: Any = trained.module(input_ids=share["input_ids"])
    outputs.logits.square().mean().backward()
    found = {name: p.grad.clone() for name, p in trained.module.named_parameters() if p.grad is not None}
    assert len(found) == len(list(trained.module.parameters()))
    return found


def with_own_backward(collectives: Collectives, spec: RunSpec) -> tuple[RunRecord, list[dict[str, torch.Tensor]]]:
    """Steps as usual, with a user's own backward pass before each, and one after the last."""
    trained, own, steps = start(spec, collectives), [], []
    for step in range(spec.num_steps):
        share = share_of_step(spec, trained.plan, collectives.rank, step)
        own.append(own_backward(trained, share))
        steps.append(record_step(trained, share))
    own.append(own_backward(trained, share))
    return record_end(trained, steps), own


@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3}, {"stage": 3, "keep_parameters": "step"}], ids=str)
def test_a_users_own_backward_pass_is_its_own(pool: WorkerPool, zero: dict[str, Any]) -> None:
    """It leaves this rank's gradients on the parameters, as stage 0 does, and no trace in the steps."""
    spec = spec_of({**zero, "bucket_bytes": 9000})
    oracle = pool.run(1, record, oracle_of(spec))[0]
    found = pool.run(2, with_own_backward, spec)
    rows = compare([run for run, _ in found], oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"
    whole = pool.run(2, with_own_backward, spec_of({"stage": 0, "bucket_bytes": 9000}))
    for (_, ours), (_, theirs) in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def runs_twice(collectives: Collectives, spec: RunSpec) -> str:
    trained = start(spec, collectives)
    model = trained.module

    def again(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> Any:
        del inputs
        handle.remove()
        return output._replace(logits=output.logits + module(**kwargs).logits)

    handle = model.register_forward_hook(again, with_kwargs=True)
    try:
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, 0))
    except ColossalError as error:
        return str(error)
    return ""


def test_a_model_that_runs_twice_before_a_backward_pass_is_an_error(pool: WorkerPool) -> None:
    for message in pool.run(2, runs_twice, spec_of({"stage": 3})):
        assert message == (
            "the gradient of blocks.3.down.bias came twice in one backward pass: a part of the model that runs several times is "
            "recomputed by torch.utils.checkpoint with use_reentrant=True, which adds to it each time: set use_reentrant=False; or the "
            "model ran several times before one backward pass (a loss_fn that calls it again), while stage 3 reduces a block when its "
            "backward pass ends: use parallel.zero.stage: 2"
        )
    assert pool.run(2, runs_twice, spec_of({"stage": 2})) == ["", ""]


def with_own_target(collectives: Collectives, spec: RunSpec) -> RunRecord:
    """Steps of a model whose outputs are compared with what it says itself, in a second pass without gradients."""
    trained = start(spec, collectives)

    def less_target(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> Any:
        del inputs
        if not torch.is_grad_enabled():
            return output
        with torch.no_grad():
            target = module(**kwargs)
        return output._replace(logits=output.logits - 0.5 * target.logits)

    trained.module.register_forward_hook(less_target, with_kwargs=True)
    shares = [share_of_step(spec, trained.plan, collectives.rank, step) for step in range(spec.num_steps)]
    found = record_end(trained, [record_step(trained, share) for share in shares])
    trained.eval_step(shares[0])
    assert not whole_units(trained.module) or spec.config["parallel"]["zero"]["stage"] < 3
    return found


@pytest.mark.parametrize("keep", KEEPS)
def test_a_pass_without_gradients_before_the_backward_pass_releases_nothing_of_it(pool: WorkerPool, keep: str) -> None:
    oracle = pool.run(1, with_own_target, spec_of({"stage": 0}))[0]
    rows = compare(pool.run(2, with_own_target, spec_of({"stage": 3, "keep_parameters": keep})), oracle)
    assert all(row.passed for row in rows), f"\n{table(rows)}"


def boosted_again(collectives: Collectives, spec: RunSpec) -> str:
    trained = start(spec, collectives)
    try:
        start(replace(spec, model=lambda: trained.module), collectives)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_that_is_gathered_is_not_boosted_again(pool: WorkerPool) -> None:
    expected = (
        "model: is in training already, and that run releases its parameters between uses: make a new model for each boost, and load what "
        "the first has saved"
    )
    assert pool.run(2, boosted_again, spec_of({"stage": 3})) == [expected] * 2


def hooks_on_parameters(collectives: Collectives, spec: RunSpec) -> list[int]:
    """The number of hooks on the parameters after each of three steps of a model that returns a parameter."""
    trained = start(spec, collectives)
    model: Any = trained.module

    def adds_parameter(module: nn.Module, inputs: Any, output: Any) -> Any:
        del module, inputs
        return {"logits": output.logits, "scale": model.norm.weight}

    model.register_forward_hook(adds_parameter, prepend=True)
    counts = []
    for step in range(3):
        trained.train_step(share_of_step(spec, trained.plan, collectives.rank, step))
        counts.append(sum(len(parameter._backward_hooks or ()) for parameter in model.parameters()))
    return counts


def test_steps_leave_no_hooks_behind(pool: WorkerPool) -> None:
    assert pool.run(2, hooks_on_parameters, spec_of({"stage": 3})) == [[0, 0, 0]] * 2


def alive_after_a_failure(collectives: Collectives, spec: RunSpec) -> tuple[bool, bool]:
    """Whether what a block has saved is alive after an exception in a later one, and when the next forward pass begins."""
    trained = start(spec, collectives)
    model: Any = trained.module
    saved: list[weakref.ref[torch.Tensor]] = []
    begun: list[bool] = []
    watched = model.blocks[0].up.register_forward_hook(lambda module, inputs, output: saved.append(weakref.ref(output)))
    repair = fail_in(model, backward=False)
    share = share_of_step(spec, trained.plan, collectives.rank, 0)
    with contextlib.suppress(BrokenError):
        trained.train_step(share)
    repair()
    watched.remove()
    gc.collect()
    kept = saved[0]() is not None
    model.tokens.register_forward_hook(lambda module, inputs, output: begun.append(saved[0]() is not None))
    trained.train_step(share)
    return kept, begun[0]


def test_a_forward_pass_that_an_exception_ends_is_freed_by_the_next(pool: WorkerPool) -> None:
    assert [begun for _, begun in pool.run(2, alive_after_a_failure, spec_of({"stage": 3}))] == [False, False]


def read_while_released(collectives: Collectives, spec: RunSpec) -> tuple[bool, bool]:
    trained = start(spec, collectives)
    weight = trained.module.get_parameter("blocks.0.up.weight")
    return bool(weight.isnan().all()), bool(trained.full_parameter("blocks.0.up.weight").isfinite().all())


def test_a_released_parameter_reads_as_not_a_number(pool: WorkerPool) -> None:
    assert pool.run(2, read_while_released, spec_of({"stage": 3})) == [(True, True)] * 2


def allocated_at_the_start(collectives: Collectives, spec: RunSpec) -> tuple[int, int]:
    """The most bytes of compute copies that are whole at once while the state is made; bytes of the largest."""
    most, largest = 0, 0
    made: list[FlatBucket] = []
    begun = FlatBucket.__init__

    def count(self: FlatBucket, *args: Any) -> None:
        nonlocal most, largest
        begun(self, *args)
        made.append(self)
        largest = max(largest, self._compute.nbytes)
        most = max(most, sum(bucket._compute.untyped_storage().nbytes() for bucket in made))

    patch = pytest.MonkeyPatch()
    patch.setattr(FlatBucket, "__init__", count)
    try:
        start(spec, collectives)
    finally:
        patch.undo()
    return most, largest


def test_no_rank_holds_the_model_while_it_is_wrapped(pool: WorkerPool) -> None:
    for most, largest in pool.run(2, allocated_at_the_start, spec_of({"stage": 3})):
        assert most <= largest
