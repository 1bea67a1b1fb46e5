"""Ranks that hold only some of the parameters, as pipeline stages do: gradients, optimizers, checkpoints and what is read of the whole.

No pipeline runs here. A strategy says which stage holds what, and each backward pass of a stage is stood in for by gradients made of the
parameters' values, handed to the leaves between `begin_backward` and `end_backward`, stage by stage, in orders as schedules have them. What
comes out is compared with one process that gets all of them, in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from colossal_comm.simulated import run_simulated
from colossal_core.anatomy import ModelAnatomy
from colossal_core.collectives import Collectives, SingleProcess
from colossal_core.config import Section, TrainConfig, parse_config
from colossal_core.errors import ConfigError, Problem
from colossal_core.estimate import EstimateTable, HardwareProfile
from colossal_core.examine import examine
from colossal_core.gradients import sum_on_shards
from colossal_core.layout import ParameterLayout
from colossal_core.mesh import MeshLayout, SharingSet
from colossal_core.ops import build_op_table
from colossal_core.optimizers import OptimizerFactory
from colossal_core.plan import Plan, PlanDraft, make_plan
from colossal_core.plugins import discover
from colossal_core.program import Action, Program
from colossal_core.strategy import ApplyContext, Phase, Strategy
from colossal_core.testing.models import TinyLM, TinyOptions, TokenBatches, next_token_loss
from colossal_core.trained import Trained
from colossal_core.wrap import Parts, wrap
from colossal_zero.config import ZeroConfig
from colossal_zero.strategy import ZeroStrategy

NUM_BLOCKS, MICROBATCHES = 4, 4
"""MICROBATCHES: of a global step, over all data-parallel ranks."""
ONE_AT_A_TIME = threading.RLock()
"""Threads share torch's random numbers."""
PLUGINS = discover(allow="zero")
OPS = build_op_table(PLUGINS.ops(), "cpu", "float64")
Pass = tuple[int, int]
"""(stage, microbatch)."""
Trains = Literal["all", "first", "last"]
"""Which of two stages have parameters to train."""


@dataclass(frozen=True)
class Way:
    """How the model is spread. stage_ranks: the pp coordinate of each stage. zero: its stage; None: core's own state. replicate: data
    parallelism along `dp_replicate` instead of `dp_shard`. There is none without zero. shards: gradients are reduced in every backward
    pass, into shards (stages 2 and 3).
    """

    stage_ranks: tuple[int, ...]
    zero: int | None
    replicate: bool = False
    shards: bool = False

    @property
    def mesh(self) -> MeshLayout:
        shares = 1 if self.zero is None else 2
        copies, shards = (shares, 1) if self.replicate else (1, shares)
        return MeshLayout((max(self.stage_ranks) + 1, copies, shards, 1, 1))


def stages_reading(name: str, num_stages: int) -> tuple[int, ...]:
    """Embeddings on the first stage, norm and head on the last, a tied table on both. Nothing reads `spare`, which the first holds."""
    if name.startswith("blocks."):
        return (int(name.split(".")[1]) * num_stages // NUM_BLOCKS,)
    if name == "tokens.weight":
        return (0, num_stages - 1)
    return (num_stages - 1,) if name.startswith(("norm", "head")) else (0,)


class ByHand:
    """Says what is where, and cuts nothing."""

    name = "by_hand"
    axes = ("pp",)
    phase = Phase.SPLIT
    after: tuple[str, ...] = ()
    config = Section()

    def __init__(self, stage_ranks: Sequence[int]) -> None:
        self._ranks = tuple(stage_ranks)

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        del config, anatomy, mesh
        return []

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        del anatomy
        count, changed = len(self._ranks), {}
        units: list[dict[str, None]] = [{} for _ in self._ranks]
        for name, layout in draft.layouts.items():
            stages = stages_reading(name, count)
            for stage in () if name.startswith("spare") else stages:
                units[stage][layout.block] = None
            ranks = tuple(sorted({self._ranks[stage] for stage in stages}))
            partial = layout.compute.partial
            if len(ranks) > 1 and layout.trainable:
                draft = draft.with_mesh(draft.mesh.with_sharing(SharingSet(f"shared:{name}", ranks)))
                partial = (f"shared:{name}", *partial)
            left = tuple(axis for axis in layout.compute.replicated if axis != "pp")
            there = replace(layout.compute, replicated=left, partial=partial, present=(("pp", ranks),))
            changed[name] = replace(layout, compute=there, state=there)
        actions = tuple(
            tuple(
                Action(kind, stage, microbatch)
                for stage, rank in enumerate(self._ranks)
                if rank == coordinate
                for microbatch in range(draft.batch.num_microbatches)
                for kind in ("forward", "backward")
            )
            for coordinate in range(draft.mesh.size("pp"))
        )
        program = Program(draft.batch.num_microbatches, actions, self._ranks)
        return draft.with_layouts(changed).with_program(program).with_stage_units(tuple(tuple(each) for each in units))

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        del profile
        return table

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        del model, plan, context

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state


def build_model(trains: Trains = "all") -> nn.Module:
    """With buffers: beside parameters of the last stage, and of the whole model."""
    torch.manual_seed(0)
    options = TinyOptions(num_blocks=NUM_BLOCKS, dropout=0.0, unused=True, tied=trains == "all")
    model = TinyLM(options).double()
    model.blocks[3].register_buffer("count", torch.zeros(2))
    model.register_buffer("table", torch.zeros(3))
    if trains != "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_((stages_reading(name, 2)[-1] == 0) is (trains == "first"))
    return model


@cache
def anatomy_of(trains: Trains) -> ModelAnatomy:
    return examine(build_model(trains), TokenBatches()(0, 1))


OptimizerOf = Callable[[nn.Module], "torch.optim.Optimizer | OptimizerFactory"]


@dataclass(frozen=True)
class Task:
    """What is trained. optimizer: of the model; None: the config's."""

    config: Mapping[str, Any]
    trains: Trains = "all"
    optimizer: OptimizerOf | None = None

    def start(self, collectives: Collectives, way: Way | None = None) -> Trained:
        with ONE_AT_A_TIME:
            model, anatomy, plan, strategies = self.planned(collectives, way)
        parts = Parts(None if self.optimizer is None else self.optimizer(model), loss_fn=next_token_loss)
        seen = collectives.with_mesh(plan.mesh)
        return wrap(model, plan, anatomy, strategies, seen, OPS, PLUGINS.optimizers(), parts)

    def planned(
        self, collectives: Collectives, way: Way | None
    ) -> tuple[nn.Module, ModelAnatomy, Plan, list[Strategy]]:
        given = {"precision": "fp64", "batch": {"global_size": MICROBATCHES, "micro_size": 1}, **self.config}
        if way is not None and way.zero is not None:
            copies = way.mesh.size("dp_replicate")
            kept = {"keep_gradients": "microbatch"} if way.shards else {}
            given["parallel"] = {"zero": {"stage": way.zero, "bucket_bytes": 6000, "replicate": copies, **kept}}
        config = parse_config(given, PLUGINS.config_class())
        model = build_model(self.trains)
        anatomy = anatomy_of(self.trains)
        strategies: list[Strategy] = [] if way is None else [ByHand(way.stage_ranks)]
        sizes: dict[str, int] = {}
        if way is not None:
            sizes = {"pp": way.mesh.size("pp"), "dp_replicate": way.mesh.size("dp_replicate")}
            if way.zero is not None:
                section = config.section("parallel.zero")
                assert isinstance(section, ZeroConfig)
                strategies.append(ZeroStrategy(section))
        world = collectives.mesh.world_size
        return model, anatomy, make_plan(config, anatomy, strategies, sizes, OPS, world_size=world), strategies


def gradient_of(value: torch.Tensor, microbatch: int) -> torch.Tensor:
    """Any function of the parameter and the microbatch."""
    place = (torch.arange(value.numel(), dtype=value.dtype) % 11).view(value.shape)
    return torch.sin(value + 0.7 * place + microbatch) * (1.0 + microbatch)


def orders(stages: Sequence[int], step: int, num_microbatches: int) -> list[Pass]:
    """The backward passes of a rank, later stages first: one stage after the other, or in turns."""
    per_rank = range(num_microbatches)
    if step % 2:
        return [(stage, microbatch) for microbatch in per_rank for stage in reversed(stages)]
    return [(stage, microbatch) for stage in reversed(stages) for microbatch in per_rank]


def make_step(trained: Trained, step: int) -> None:
    """One step, but for the forward pass and the loss."""
    engine, plan = trained._engine, trained.plan
    state = engine.state
    values = {name: trained.full_parameter(name).clone() for name in plan.layouts}
    if plan.stage_units:
        share = engine.context.coordinate["dp"] * plan.batch.num_microbatches
        stages = plan.program.stages_of(engine.context.coordinate["pp"])
        passes = orders(stages, step, plan.batch.num_microbatches)
    else:
        share, passes = 0, [(0, microbatch) for microbatch in range(MICROBATCHES)]
    last = {stage: index for index, (stage, _) in enumerate(passes)}
    state.begin_step()
    for index, (stage, microbatch) in enumerate(passes):
        units = plan.stage_units[stage] if plan.stage_units else None
        for unit in plan.units if units is None else units:
            state.gather(unit)
        state.begin_backward(last=last[stage] == index, units=units)
        for name, part in parts_of(plan, stage):
            gradient = gradient_of(values[name], share + microbatch)
            torch.autograd.backward([state.shards[name].parameter], [gradient * part])
        state.end_backward()
    state.finish_reduce()
    sum_on_shards(state, engine.context.collectives)


def parts_of(plan: Plan, stage: int) -> Iterator[tuple[str, float]]:
    """What of each gradient a stage adds; the last parameters first. What two stages read gets different parts from them."""
    num_stages = len(plan.stage_units)
    for name in reversed(list(plan.layouts)):
        layout = plan.layouts[name]
        stages = stages_reading(name, num_stages) if num_stages else (0,)
        if layout.trainable and stage in stages and not name.startswith("spare"):
            yield name, 1.0 if len(stages) == 1 else 0.25 if stage == 0 else 0.75


def finish_step(trained: Trained) -> None:
    engine = trained._engine
    engine.optimizer.clipped_step(None, None)
    engine.state.publish()
    engine.step += 1


@dataclass
class Seen:
    """What a rank reads of the whole model."""

    gradients: list[dict[str, torch.Tensor]]
    parameters: dict[str, torch.Tensor]
    states: dict[tuple[str, str], torch.Tensor]


def read(trained: Trained) -> Seen:
    parameters = {name: trained.full_parameter(name).clone() for name in trained.plan.layouts}
    return Seen([], parameters, {(kind, name): tensor.clone() for kind, name, tensor in trained.full_states()})


def trained_steps(collectives: Collectives, task: Task, way: Way | None, steps: int = 2) -> tuple[Trained, Seen]:
    trained = task.start(collectives, way)
    found = []
    for step in range(steps):
        make_step(trained, step)
        found.append({name: gradient.clone() for name, gradient in trained.gradients().items()})
        finish_step(trained)
    seen = read(trained)
    seen.gradients = found
    return trained, seen


def compare(found: Seen, wanted: Seen) -> None:
    assert len(found.gradients) == len(wanted.gradients)
    for one, other in zip(found.gradients, wanted.gradients, strict=True):
        compare_tensors(one, other)
    compare_tensors(found.parameters, wanted.parameters)
    compare_tensors(found.states, wanted.states)


def compare_tensors(found: Mapping[Any, torch.Tensor], wanted: Mapping[Any, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13, msg=partial("{}: {}".format, name))


ADAMW = Task({"optimizer": {"lr": 0.01}})
ONE_EACH, IN_TURNS, A_V = (0, 1), (0, 1, 0, 1), (0, 1, 1, 0)
WAYS = [Way(ranks, zero) for ranks in (ONE_EACH, IN_TURNS, A_V) for zero in (None, 0, 1, 2, 3)]
WAYS += [Way(ONE_EACH, zero, replicate=True) for zero in (1, 3)]
WAYS += [Way(ranks, zero, shards=True) for ranks in (ONE_EACH, A_V) for zero in (2, 3)]


def name_of(way: Way) -> str:
    return (
        f"{'-'.join(map(str, way.stage_ranks))}-zero-{way.zero}"
        + ("-copies" if way.replicate else "")
        + ("-shards" if way.shards else "")
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone() -> Seen:
    return trained_steps(SingleProcess(torch.device("cpu")), ADAMW, None)[1]


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_stages_train_as_one_process(way: Way, alone: Seen) -> None:
    def run(collectives: Collectives) -> Seen:
        return trained_steps(collectives, ADAMW, way)[1]

    for seen in run_simulated(way.mesh, run):
        compare(seen, alone)


@pytest.mark.parametrize("way", [Way(ONE_EACH, None), Way(ONE_EACH, 3), Way(A_V, 2)], ids=name_of)
def test_checkpoints_go_from_stages_to_one_process_and_back(way: Way, tmp_path: Path) -> None:
    def save(collectives: Collectives) -> Seen:
        trained, seen = trained_steps(collectives, ADAMW, way)
        put_numbers_into_buffers(trained, 1.0 + trained._engine.context.coordinate["pp"])
        trained.save(tmp_path / "stages")
        return seen

    def load(collectives: Collectives) -> tuple[Seen, dict[str, float]]:
        trained = ADAMW.start(collectives, way)
        assert trained.load(tmp_path / "alone") is not None
        return read(trained), {name: float(buffer[0]) for name, buffer in trained.full_buffers()}

    wanted = run_simulated(way.mesh, save)[0]
    alone = ADAMW.start(SingleProcess(torch.device("cpu")))
    assert alone.load(tmp_path / "stages") is not None
    found = read(alone)
    compare_tensors(found.parameters, wanted.parameters)
    compare_tensors(found.states, wanted.states)
    of_last = 1.0 + way.stage_ranks[-1]
    assert {name: float(buffer[0]) for name, buffer in alone.full_buffers()} == {
        "table": 1.0,
        "blocks.3.count": of_last,
    }
    alone.save(tmp_path / "alone")
    for seen, buffers in run_simulated(way.mesh, load):
        compare_tensors(seen.parameters, wanted.parameters)
        compare_tensors(seen.states, wanted.states)
        assert buffers == {"table": 1.0, "blocks.3.count": of_last}


def put_numbers_into_buffers(trained: Trained, number: float) -> None:
    for buffer in trained.module.buffers():
        buffer.fill_(number)


def adam_with_its_own_groups(model: nn.Module) -> torch.optim.Optimizer:
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    groups: list[dict[str, Any]] = [{"params": vectors, "lr": 0.02}, {"params": matrices}]
    return torch.optim.Adam(groups, lr=0.01)


def sgd_of_whatever_there_is(model: nn.Module) -> OptimizerFactory:
    del model
    return lambda parameters: torch.optim.SGD(
        [
            {"params": group, "weight_decay": decay}
            for decay in (0.0, 0.1)
            if (group := [one for one in parameters if (one.dim() >= 2) is bool(decay)])
        ],
        lr=0.1,
        momentum=0.9,
    )


OPTIMIZERS: dict[str, Task] = {
    "adamw in the config": ADAMW,
    "sgd in the config": Task({"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}),
    "an instance": Task({}, optimizer=adam_with_its_own_groups),
    "a factory": Task({}, optimizer=sgd_of_whatever_there_is),
    "muon": Task({"optimizer": {"name": "muon", "lr": 0.01}}),
    "adafactor": Task({"optimizer": {"name": "adafactor", "lr": 0.01}}),
    "lamb": Task({"optimizer": {"name": "lamb", "lr": 0.01}}),
}


@pytest.mark.parametrize("trains", ["all", "first", "last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_runs_on_the_parameters_that_a_stage_has(name: str, trains: Trains, tmp_path: Path) -> None:
    task, way = replace(OPTIMIZERS[name], trains=trains), Way(ONE_EACH, None)

    def run(collectives: Collectives) -> tuple[Seen, Seen]:
        trained, seen = trained_steps(collectives, task, way)
        trained.save(tmp_path)
        again = task.start(collectives, way)
        assert again.load(tmp_path) is not None
        make_step(again, 0)
        finish_step(again)
        return seen, read(again)

    single = SingleProcess(torch.device("cpu"))
    two, three = trained_steps(single, task, None)[1], trained_steps(single, task, None, steps=3)[1]
    three.gradients = []
    for seen, after in run_simulated(way.mesh, run):
        compare(seen, two)
        compare(after, three)


NARROW = {"precision": "bf16", "optimizer": {"lr": 0.01, "states": "int8", "masters": "compute"}}


@pytest.mark.parametrize("trains", ["all", "first", "last"])
def test_states_that_are_rounded_by_chance_are_saved_and_loaded(trains: Trains, tmp_path: Path) -> None:
    task, way = Task(NARROW, trains=trains), Way(ONE_EACH, None)

    def run(collectives: Collectives) -> tuple[Seen, Seen]:
        trained, seen = trained_steps(collectives, task, way)
        trained.save(tmp_path)
        again = task.start(collectives, way)
        assert again.load(tmp_path) is not None
        return seen, read(again)

    single = task.start(SingleProcess(torch.device("cpu")))
    for seen, loaded in run_simulated(way.mesh, run):
        assert set(seen.states) == set(read(single).states)
        assert int(seen.states["adamw.draws", "optimizer"]) == 2
        assert all(torch.equal(loaded.parameters[name], value) for name, value in seen.parameters.items())
        assert loaded.states.keys() == seen.states.keys()
    assert single.load(tmp_path) is not None
    assert all(torch.equal(read(single).parameters[name], value) for name, value in seen.parameters.items())


@pytest.mark.parametrize(("zero", "shards"), [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)])
def test_gradients_are_reduced_once_a_step_or_in_every_pass(zero: int, shards: bool) -> None:
    """On a rank with both ends of a V: what they share is sent for the last time when both have had their last pass."""
    way = Way(A_V, zero, shards=shards)

    def run(collectives: Collectives) -> tuple[dict[str, int], dict[str, list[str]], int]:
        trained = ADAMW.start(collectives, way)
        ledger: Any = collectives
        open_buckets: Any = trained._engine.state
        before_end: list[int] = []
        finish = open_buckets.finish_reduce

        def counted() -> None:
            before_end.append(len(open_buckets._reduced))
            finish()

        open_buckets.finish_reduce = counted
        for step in range(2):
            ledger.ledger.reset()
            make_step(trained, step)
        rows = (row for row in ledger.ledger.rows() if row.tag.startswith("gradient bucket"))
        names = {f"gradient bucket {bucket.index}": bucket for bucket in open_buckets._trained}
        members = {tag: [layout.full_name for layout in bucket.layouts] for tag, bucket in names.items()}
        assert before_end == [len(members) - sum("spare.weight" in held for held in members.values())] * 2
        return {row.tag: row.num_calls for row in rows}, members, trained._engine.context.coordinate["pp"]

    for calls, members, coordinate in run_simulated(way.mesh, run):
        assert calls.keys() == members.keys()
        for tag, names in members.items():
            passes = 2 * len([stage for stage in stages_reading(names[0], 4) if A_V[stage] == coordinate])
            never_read = names[0].startswith("spare")
            assert calls[tag] == (passes if shards and not never_read else 1), names


def test_the_plan_says_what_is_where() -> None:
    def run(collectives: Collectives) -> Plan:
        return ADAMW.start(collectives, Way(A_V, 1)).plan

    plan = run_simulated(Way(A_V, 1).mesh, run)[0]
    lines = plan.describe().splitlines()
    block = sum(layout.numel for layout in plan.layouts.values() if layout.block == "blocks.0")
    table, positions, norm = 53 * 18, 12 * 18, 2 * 18
    assert next(line for line in lines if line.startswith("pipeline")) == (
        f"pipeline    stage 0 on rank 0: 3 units, {table + positions + block:,} elements; "
        f"stage 1 on rank 1: 1 units, {block:,} elements; stage 2 on rank 1: 1 units, {block:,} elements; "
        f"stage 3 on rank 0: 3 units, {table + block + norm:,} elements"
    )
    assert any(line.endswith("flat over dp_shard x cp on pp 1; reduced in backward over dp_shard") for line in lines)
    other = replace(plan, stage_units=plan.stage_units[::-1])
    assert other.fingerprint != plan.fingerprint


@pytest.mark.parametrize("zero", [0, 2, 3])
@pytest.mark.parametrize("ranks", [ONE_EACH, IN_TURNS, A_V])
def test_no_bucket_has_parameters_of_different_stages(ranks: tuple[int, ...], zero: int) -> None:
    def run(collectives: Collectives) -> Plan:
        return ADAMW.start(collectives, Way(ranks, zero)).plan

    plan = run_simulated(Way(ranks, zero).mesh, run)[0]
    buckets: Any = plan.data["zero"]["buckets"]

    def stages(layout: ParameterLayout) -> list[int]:
        return [stage for stage, units in enumerate(plan.stage_units) if layout.block in units]

    for bucket in buckets:
        places = [(stages(plan.layouts[name]), plan.layouts[name].compute.present) for name in bucket]
        assert all(place == places[0] for place in places), bucket
    assert sorted(name for bucket in buckets for name in bucket) == sorted(plan.layouts)


def test_a_pipeline_gathers_once_a_step() -> None:
    def run(collectives: Collectives) -> Plan:
        return ADAMW.start(collectives, Way(ONE_EACH, 3)).plan

    plan = run_simulated(Way(ONE_EACH, 3).mesh, run)[0]
    assert plan.gathering.keep == "step"
    assert any("parameters gathered for each step, 1 blocks ahead" in note for note in plan.notes)


@pytest.mark.parametrize("keep", ["use", "microbatch"])
def test_gathering_more_often_than_once_a_step_is_refused(keep: str) -> None:
    strategy = ZeroStrategy(ZeroConfig.model_validate({"stage": 3, "keep_parameters": keep}))
    config = parse_config({"batch": {"global_size": 4}}, PLUGINS.config_class())
    mesh = MeshLayout((2, 1, 1, 1, 1))
    with pytest.raises(ConfigError) as raised:
        raise ConfigError(strategy.check(config, anatomy_of("all"), mesh))
    assert str(raised.value) == (
        f"parallel.zero.keep_parameters='{keep}': a pipeline has several microbatches under way at once, which all need the "
        "parameters of their stage: remove it, or use step"
    )


def test_a_unit_gets_no_gradients_after_its_last() -> None:
    def run(collectives: Collectives) -> None:
        trained = ADAMW.start(collectives, Way(ONE_EACH, 1))
        state, units = trained._engine.state, trained.plan.stage_units[0]
        state.begin_step()
        for _ in range(2):
            state.begin_backward(last=True, units=units)
            state.end_backward()

    with pytest.raises(AssertionError, match=r"^[\w.]+ has had its last gradients of this step"):
        run_simulated(Way(ONE_EACH, 1).mesh, run)


def test_what_is_read_of_a_name_that_is_not_there() -> None:
    def run(collectives: Collectives) -> None:
        ADAMW.start(collectives, Way(ONE_EACH, 1)).full_parameter("other")

    with pytest.raises(KeyError) as raised:
        run_simulated(Way(ONE_EACH, 1).mesh, run)
    known = "tokens.weight, positions.weight, blocks.0.norm1.weight, blocks.0.norm1.bias"
    assert raised.value.args == (f"no parameter 'other'; the model has {known}, ...",)


def test_statistics_of_gradients_count_every_stage_once(alone: Seen) -> None:
    def run(collectives: Collectives) -> dict[str, float]:
        trained = ADAMW.start(collectives, Way(ONE_EACH, 2))
        make_step(trained, 0)
        return {unit: float(found.norm) for unit, found in trained.gradient_statistics().items()}

    whole = torch.cat([gradient.flatten() for gradient in alone.gradients[0].values()]).norm()
    for found in run_simulated(Way(ONE_EACH, 2).mesh, run):
        assert found["*"] == pytest.approx(float(whole), rel=1e-12)
        assert found["tokens"] == pytest.approx(float(alone.gradients[0]["tokens.weight"].norm()), rel=1e-12)
