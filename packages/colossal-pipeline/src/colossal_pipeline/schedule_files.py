"""A user's own schedule, from a YAML or JSON file.

    stage_ranks: [0, 1, 1, 0]      # the rank of each stage
    actions:                       # for each rank, in order
      - [F0.0, F3.0, I3.0, I0.0, W3.0, W0.0]
      - [F1.0, F2.0, B2.0, B1.0]

`F2.5` is the forward pass of microbatch 5 through stage 2, `B` its backward pass, `I` and `W` that in its two parts. Messages (`S1>2.5`
sends stage 1's activations to stage 2, `V2<1.5` receives them there) and reductions (`R2`) are added where a file has none.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from colossal_core.errors import ConfigError, Problem, raise_problems
from colossal_core.program import LETTERS, Action, ActionKind, Program
from colossal_pipeline.checker import COMPUTED, compute_problems_of, problems_of
from colossal_pipeline.schedules.messages import program_of

_KINDS: dict[str, ActionKind] = {letter: kind for kind, letter in LETTERS.items()}
_TEXT = re.compile(
    r"(?P<letter>[FBIW])(?P<stage>\d+)\.(?P<microbatch>\d+)"
    r"|(?P<once>R)(?P<reduced>\d+)"
    r"|(?P<moves>S(?=\d+>)|V(?=\d+<))(?P<here>\d+)[<>](?P<there>\d+)\.(?P<moved>\d+)"
)
_KEYS = ("stage_ranks", "actions")


def parse_action(text: str) -> Action:
    """The action that a text stands for: `str(parse_action(text)) == text`. Raises ValueError for a text that stands for none."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError("is no action such as F2.5, B2.5, I2.5, W2.5, S2>3.5, V3<2.5 or R2")
    part = found.groupdict()
    if found["letter"]:
        return Action(_KINDS[part["letter"]], int(part["stage"]), int(part["microbatch"]))
    if found["once"]:
        return Action("reduce", int(part["reduced"]))
    return Action(_KINDS[part["moves"]], int(part["here"]), int(part["moved"]), "", int(part["there"]))


def read_schedule(path: str | Path) -> Program:
    """The program in a file, proven by the checker.

    It is for as many microbatches as the file names. Raises ConfigError with all problems when the file is missing, not YAML or JSON, not
    of this form, or its program is not right.
    """
    path = Path(path)
    document = _document(path)
    try:
        return program_of_document(document)
    except ConfigError as error:
        named = [_with_path(problem, path) for problem in error.problems]
        raise ConfigError(named) from None


def program_of_document(document: object) -> Program:
    """As `read_schedule`, from what a file holds."""
    raise_problems(_form_problems(document))
    assert isinstance(document, dict)
    actions, problems = [], []
    for rank, texts in enumerate(document["actions"]):
        order = []
        for text in texts:
            try:
                order.append(parse_action(text))
            except ValueError as error:
                problems.append(Problem(f"schedule.actions[{rank}]", str(error), "correct it", text))
        actions.append(tuple(order))
    raise_problems(problems)
    num_microbatches = 1 + max((action.microbatch for order in actions for action in order), default=-1)
    program = Program(num_microbatches, tuple(actions), tuple(document["stage_ranks"]))
    raise_problems(compute_problems_of(program))
    program = _completed(program)
    raise_problems(problems_of(program))
    return program


def document_of(program: Program) -> dict[str, list[int] | list[list[str]]]:
    """What to write into a file, for example to change a generated schedule: compute actions only, the rest is added on reading."""
    orders = [[str(action) for action in order if action.kind in COMPUTED] for order in program.actions]
    return {"stage_ranks": list(program.stage_ranks), "actions": orders}


def _completed(program: Program) -> Program:
    """The program with messages, where it has none, and with reductions, where it has none."""
    kinds = {action.kind for order in program.actions for action in order}
    computed = [[action for action in order if action.kind in COMPUTED] for order in program.actions]
    full = program_of(program.num_microbatches, program.stage_ranks, computed)
    if kinds <= COMPUTED:
        return full
    if not kinds & {"send", "receive"}:
        # Reductions stay where the file has them, each behind the same number of compute actions.
        return dataclasses.replace(full, actions=tuple(map(_with_reductions, full.actions, program.actions)))
    if "reduce" in kinds:
        return program
    lists = zip(program.actions, full.actions, strict=True)
    ends = ((order, (action for action in other if action.kind == "reduce")) for order, other in lists)
    return dataclasses.replace(program, actions=tuple((*order, *end) for order, end in ends))


def _with_reductions(full: tuple[Action, ...], given: tuple[Action, ...]) -> tuple[Action, ...]:
    after: dict[Action | None, list[Action]] = {}
    before: Action | None = None
    for action in given:
        if action.kind == "reduce":
            after.setdefault(before, []).append(action)
        else:
            before = action
    actions = list(after.get(None, []))
    for action in full:
        if action.kind != "reduce":
            actions += [action, *after.get(action, [])]
    return tuple(actions)


def _form_problems(document: object) -> list[Problem]:
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        found = type(document).__name__
        return [Problem("schedule", f"holds a {found}, not keys and values", "write `stage_ranks:` and `actions:`")]
    remedy = f"keys are {' and '.join(_KEYS)}"
    problems = [Problem(f"schedule.{key}", "is no key of a schedule", remedy) for key in document if key not in _KEYS]
    problems += [Problem(f"schedule.{key}", "is missing", remedy) for key in _KEYS if key not in document]
    ranks = document.get("stage_ranks", [])
    if not isinstance(ranks, list) or not all(type(rank) is int for rank in ranks):
        problems.append(Problem("schedule.stage_ranks", "is no list of ranks", "write one such as [0, 1]", ranks))
    lists = document.get("actions", [])
    if not isinstance(lists, list):
        remedy = "write a list such as [F0.0, B0.0] for each rank"
        return [*problems, Problem("schedule.actions", "is no list of lists", remedy, lists)]
    for rank, texts in enumerate(lists):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            remedy = "write one such as [F0.0, B0.0]"
            problems.append(Problem(f"schedule.actions[{rank}]", "is no list of actions", remedy, texts))
    return problems


def _document(path: Path) -> object:
    import yaml

    field = "parallel.pipeline.schedule"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problem = Problem(field, "there is no such file", "give the path of a YAML or JSON file", str(path))
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(field, f"cannot be read ({error})", "give a readable YAML or JSON file", str(path))
    except yaml.YAMLError as error:
        reason = f"is neither YAML nor JSON ({' '.join(str(error).split())})"
        problem = Problem(field, reason, "correct it", str(path))
    raise ConfigError([problem])


def _with_path(problem: Problem, path: Path) -> Problem:
    field = problem.field.removeprefix("schedule").removeprefix(".")
    return dataclasses.replace(problem, field=f"{path}: {field}" if field else str(path))
