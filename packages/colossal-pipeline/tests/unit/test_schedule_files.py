"""A schedule from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from colossal_core.errors import ConfigError
from colossal_core.program import Action, Program
from colossal_pipeline.checker import problems_of
from colossal_pipeline.schedule_files import document_of, parse_action, program_of_document, read_schedule
from colossal_pipeline.schedules.registry import SCHEDULES

ProgramFrom = Callable[..., Program]
EXAMPLE = """
stage_ranks: [0, 1, 1, 0]      # the rank of each stage
actions:                       # for each rank, in order
  - [F0.0, F3.0, I3.0, I0.0, W3.0, W0.0]
  - [F1.0, F2.0, B2.0, B1.0]
"""


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(SCHEDULES)), st.integers(1, 5), st.integers(1, 9))
def test_a_generated_schedule_comes_back(name: str, num_ranks: int, num_microbatches: int) -> None:
    program = SCHEDULES[name].generate(num_ranks, SCHEDULES[name].min_chunks, num_microbatches)
    assert program_of_document(document_of(program)) == program
    assert program_of_document(yaml.safe_load(yaml.safe_dump(document_of(program)))) == program
    full = [[str(action) for action in order] for order in program.actions]
    assert program_of_document({"stage_ranks": list(program.stage_ranks), "actions": full}) == program
    for order in program.actions:
        assert tuple(parse_action(str(action)) for action in order) == order


def test_yaml(tmp_path: Path, program_from: ProgramFrom) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(EXAMPLE)
    program = read_schedule(path)
    assert problems_of(program) == []
    assert program == program_from(
        1,
        (0, 1, 1, 0),
        "F0.0 S0>1.0 V3<2.0 F3.0 I3.0 S3>2.0 V0<1.0 I0.0 W3.0 W0.0 R3 R0",
        "V1<0.0 F1.0 F2.0 S2>3.0 V2<3.0 B2.0 B1.0 S1>0.0 R2 R1",
    )
    assert EXAMPLE.strip() in _docstring()


def _docstring() -> str:
    import colossal_pipeline.schedule_files as module

    assert module.__doc__ is not None
    return "\n".join(line.removeprefix("    ") for line in module.__doc__.splitlines())


def test_json(tmp_path: Path) -> None:
    program = SCHEDULES["zb-h1"].generate(3, 1, 4)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(document_of(program)))
    assert read_schedule(path) == program


def test_reductions_and_messages_stay_where_the_file_has_them(program_from: ProgramFrom) -> None:
    one = {"stage_ranks": [0, 0], "actions": [["F0.0", "F1.0", "B1.0", "R1", "B0.0", "R0"]]}
    assert program_of_document(one) == program_from(1, (0, 0), "F0.0 F1.0 B1.0 R1 B0.0 R0")
    texts = [
        "F0.0 F0.1 S0>1.0 S0>1.1 V0<1.0 B0.0 V0<1.1 B0.1",
        "V1<0.0 V1<0.1 F1.0 B1.0 S1>0.0 F1.1 B1.1 S1>0.1",
    ]
    two = {"stage_ranks": [0, 1], "actions": [text.split() for text in texts]}
    assert program_of_document(two) == program_from(2, (0, 1), f"{texts[0]} R0", f"{texts[1]} R1")


@pytest.mark.parametrize(
    "text", ["", "F", "F0", "X0.1", "F-1.0", "F0.1 ", "S0.1", "S0<1.0", "V0>1.0", "R0.0", "G0", "F0/model.0"]
)
def test_texts_that_are_no_action(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_action(text)
    assert str(caught.value) == "is no action such as F2.5, B2.5, I2.5, W2.5, S2>3.5, V3<2.5 or R2"


def test_actions_that_texts_stand_for() -> None:
    assert parse_action("F12.34") == Action("forward", 12, 34)
    assert parse_action("S2>1.5") == Action("send", 2, 5, "", 1)
    assert parse_action("V2<1.5") == Action("receive", 2, 5, "", 1)
    assert parse_action("R7") == Action("reduce", 7)


def problems_in(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_schedule(path)
    return str(caught.value).replace(str(path), "FILE").splitlines()


WRONG = {
    "- 1": ["FILE: holds a list, not keys and values: write `stage_ranks:` and `actions:`"],
    "{stage_ranks: [0], order: []}": [
        "FILE: order: is no key of a schedule: keys are stage_ranks and actions",
        "FILE: actions: is missing: keys are stage_ranks and actions",
    ],
    "{stage_ranks: 2, actions: F0.0}": [
        "FILE: stage_ranks=2: is no list of ranks: write one such as [0, 1]",
        "FILE: actions='F0.0': is no list of lists: write a list such as [F0.0, B0.0] for each rank",
    ],
    "{stage_ranks: [0], actions: [F0.0, B0.0]}": [
        "FILE: actions[0]='F0.0': is no list of actions: write one such as [F0.0, B0.0]",
        "FILE: actions[1]='B0.0': is no list of actions: write one such as [F0.0, B0.0]",
    ],
    "{stage_ranks: [0], actions: [[F0.0, B0]]}": [
        "FILE: actions[0]='B0': is no action such as F2.5, B2.5, I2.5, W2.5, S2>3.5, V3<2.5 or R2: correct it"
    ],
    "{stage_ranks: [0, 0], actions: [[F0.0, B0.0, F1.0]]}": [
        "FILE: actions[0]='B1.0': every stage runs every microbatch backward: add it, or both I1.0 and W1.0"
    ],
    "{stage_ranks: [0], actions: [[]]}": [
        "FILE: num_microbatches=0: a step has at least one microbatch: give 1 or more"
    ],
    "{stage_ranks: [0, 1], actions: [[F0.0, B0.0, F0.1, B0.1], [F1.0, F1.1, B1.0, B1.1]]}": [
        "FILE: actions[0]='V0<1.0': rank 0 waits here for S1>0.0 of rank 1, which waits at V1<0.1, for ever: "
        "put S1>0.0 before V1<0.1, or V0<1.0 later",
        "FILE: actions[1]='V1<0.1': rank 1 waits here for S0>1.1 of rank 0, which waits at V0<1.0, for ever: "
        "put S0>1.1 before V0<1.0, or V1<0.1 later",
    ],
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_with_a_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert problems_in(path) == WRONG[text]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert problems_in(path) == [
        "parallel.pipeline.schedule='FILE': there is no such file: give the path of a YAML or JSON file"
    ]
    path.write_text("actions: [")
    assert problems_in(path) == [
        "parallel.pipeline.schedule='FILE': is neither YAML nor JSON (while parsing a flow node expected the node content, "
        "but found '<stream end>' in \"<unicode string>\", line 1, column 11: actions: [ ^): correct it"
    ]
    path.write_bytes(b"\xff\xff")
    assert problems_in(path) == [
        "parallel.pipeline.schedule='FILE': cannot be read ('utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte): give a readable YAML or JSON file"
    ]
