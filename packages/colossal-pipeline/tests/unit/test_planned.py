"""What `colossal plan --show-schedule` prints and draws of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from colossal_core.examine import examine
from colossal_core.testing import RunSpec
from colossal_core.testing.models import TinyModel, TinyOptions, TokenBatches
from colossal_core.testing.parity import prepare
from colossal_pipeline.planned import planned_costs, planned_time_line, show_schedule

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.plan import Plan

MODEL = TinyModel(TinyOptions(hidden_size=16, num_blocks=4, dropout=0.0, tied=False, vocab_size=64))
BLOCK, HEAD, POSITIONS = 8 * 16 * 16, 64 * 16, 12 * 16
"""Elements of a block's products, of the head's, and of the table of positions, which is no table of words."""

TEXT = """\
schedule    1f1b, 2 stages on 2 ranks, 3 microbatches
by estimate: 1 s stands for the forward pass of one microbatch through an average stage; messages take no time
rank 0 F0--F1--..........B0------F2--...B1------......B2------
rank 1 ....F0---B0-------F1---B1--------F2--B2--------........
F forward; B backward; then microbatch
12.53 s, idle 28.2%, one column is 0.228 s
rank 0: idle 34.5%, activations kept at once: 2 (each a microbatch's of a stage)
rank 1: idle 21.8%, activations kept at once: 1 (each a microbatch's of a stage)"""


def planned(schedule: str, blocks: list[int] | None = None) -> tuple[Plan, ModelAnatomy]:
    pipeline = {"size": 2, "schedule": schedule, "blocks": blocks}
    config = {"batch": {"global_size": 3, "micro_size": 1}, "parallel": {"pipeline": pipeline}}
    spec = RunSpec(config, MODEL, TokenBatches(), task="causal-lm", plugins="comm,pipeline")
    prepared = prepare(spec, 2)
    return prepared.plan, examine(prepared.model, TokenBatches()(0, 2))


def test_the_time_line_as_text_and_as_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    plan, anatomy = planned("1f1b")
    assert show_schedule(plan, anatomy, None) == TEXT
    path = tmp_path / "schedule.png"
    assert show_schedule(plan, anatomy, path) == f"{TEXT}\npicture     {path}"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_stages_cost_what_their_blocks_cost() -> None:
    """The average stage's forward pass takes a second, both parts of a backward pass as long each."""
    first, second = (planned_costs(*planned("zb-h1", [1, 3]))).stages
    sizes = (BLOCK + POSITIONS, 3 * BLOCK + HEAD)
    assert (first.forward, second.forward) == pytest.approx([2 * size / sum(sizes) for size in sizes], rel=1e-12)
    for stage in (first, second):
        assert stage.backward_input == stage.backward_weight == stage.forward
        assert stage.whole_backward == 2 * stage.forward


def test_every_rank_computes_as_long_as_its_stages_take() -> None:
    time_line = planned_time_line(*planned("interleaved"))
    assert sum(time_line.busy_seconds) == pytest.approx(3 * 4 * 3, rel=1e-12)
