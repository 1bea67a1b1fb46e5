"""Pictures of time lines."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from colossal_core.errors import ConfigError
from colossal_core.program import Action
from colossal_pipeline.picture import draw_png, draw_text
from colossal_pipeline.schedules.registry import SCHEDULES
from colossal_pipeline.simulator import simulate
from colossal_pipeline.stage_costs import Costs
from colossal_pipeline.time_line import TimeLine


def simulated(name: str, num_ranks: int, num_microbatches: int) -> TimeLine:
    program = SCHEDULES[name].generate(num_ranks, SCHEDULES[name].min_chunks, num_microbatches)
    return simulate(program, Costs.alike(program.num_stages))


def test_microbatches_in_the_terminal() -> None:
    assert draw_text(simulated("1f1b", 3, 4), width=70).splitlines() == [
        "rank 0 F0-F1-F2-............B0----F3-B1----...B2----...B3----",
        "rank 1 ...F0-F1-......B0----F2-B1----F3-B2----...B3----......",
        "rank 2 ......F0-B0----F1-B1----F2-B2----F3-B3----............",
        "F forward; B backward; then microbatch",
        "18 s, idle 33.3%, one column is 0.333 s",
    ]


def test_several_stages_of_a_rank_in_the_terminal() -> None:
    assert draw_text(simulated("zbv", 2, 2), width=120).splitlines() == [
        "rank 0 F0.0----F0.1----........F3.0----I3.0----W3.0----F3.1----I3.1----W3.1----I0.0----W0.0----........I0.1----W0.1----",
        "rank 1 ........F1.0----F2.0----F1.1----F2.1----I2.0----W2.0----I1.0----W1.0----I2.1----W2.1----I1.1----W1.1----........",
        "F forward; I backward, input; W backward, weights; then stage.microbatch",
        "14 s, idle 14.3%, one column is 0.125 s",
    ]
    assert draw_text(simulated("zbv", 2, 3), width=60).splitlines() == [
        "rank 0 F-F-F-f-i-w-f-i-w-I-W-f-i-w-I-W-....I-W-",
        "rank 1 ..F-f-F-f-i-w-F-I-W-f-i-w-I-W-i-w-I-W-..",
        "F forward; I backward, input; W backward, weights; small:",
        "second stage of a rank",
        "20 s, idle 10.0%, one column is 0.5 s",
    ]


def test_no_line_is_wider_than_asked() -> None:
    for name in SCHEDULES:
        for width in (60, 61, 80, 200):
            lines = draw_text(simulated(name, 4, 8), width).splitlines()
            assert max(map(len, lines)) <= width
            assert [line[:7] for line in lines[:4]] == ["rank 0 ", "rank 1 ", "rank 2 ", "rank 3 "]
    assert draw_text(simulated("1f1b", 2, 2), 10) == draw_text(simulated("1f1b", 2, 2), 60)


def measured() -> TimeLine:
    forward, backward, receive = (
        Action("forward", 0, 0),
        Action("backward", 1, 0),
        Action("receive", 1, 0, "", 0),
    )
    spans = [(0, forward, 7.0, 7.5), (1, receive, 7.0, 7.6), (1, Action("forward", 1, 0), 7.6, 8.0)]
    return TimeLine.measured([*spans, (1, backward, 8.0, 9.0), (0, Action("backward", 0, 0), 9.1, 10.0)])


def test_what_was_measured_in_the_terminal() -> None:
    assert draw_text(measured(), width=67).splitlines() == [
        "rank 0 F0--------................................B0----------------",
        "rank 1 ............F0------B0------------------....................",
        "F forward; B backward; then microbatch",
        "3 s, idle 53.3%, one column is 0.05 s",
    ]
    assert draw_text(TimeLine(()), 80) == "0 s, idle 0.0%, one column is 1 s"


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return int(width), int(height)


def test_png(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_png({"simulated": simulated("zbv", 2, 4)}, one)
    draw_png({"simulated": simulated("1f1b", 2, 1), "measured": measured()}, two)
    assert size_of(one)[0] == size_of(two)[0] == 1680
    assert size_of(two)[1] > size_of(one)[1]


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ConfigError) as caught:
        draw_png({"measured": measured()}, tmp_path / "line.png")
    assert str(caught.value) == (
        "picture: a picture needs the package matplotlib, which is not installed: pip install 'colossal-pipeline[picture]'"
    )
