"""The plan for a model: what the search finds for its specimen, kept there, in the names of the model itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from colossal_core.specimen import SpecimenError, pattern_of, patterns_of
from colossal_tensor.group import Stream, TensorPlan
from colossal_tensor.layouts import placed_groups
from colossal_tensor.search.laboratory import laboratory
from colossal_tensor.search.question import Question
from colossal_tensor.search.rules import Rule
from colossal_tensor.search.search import Search

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_tensor.config import TensorConfig


def find_plan(anatomy: ModelAnatomy, config: TensorConfig) -> TensorPlan:
    """What is cut in a model, every part of it proven on its specimen, where the answer is kept (`Specimen.answers`).

    Raises: ConfigError for rules that match nothing, leave a module half sharded, or are not exact.
    """
    specimen = anatomy.specimen
    if specimen is None:
        return TensorPlan(notes=("no small model of this kind can be made: give model.example_batch",))
    try:
        key = specimen.key
    except SpecimenError as error:
        return _untried(error)
    question = Question(
        key=key,
        size=config.size,
        rules=tuple(Rule(pattern, style) for pattern, style in config.rules.items()),
        sequence_parallel=config.sequence_parallel is not False,
        copies=False,
        whole_logits=anatomy.own_loss or anatomy.task == "own-loss",
        tensor_plan=anatomy.tensor_plan,
        shapes=frozenset((pattern_of(fact.full_name), fact.shape) for fact in anatomy.parameters),
        frozen=patterns_of(fact.full_name for fact in anatomy.parameters if not fact.trainable),
        specimen=specimen,
    )
    try:
        answer = _answer(question)
    except SpecimenError as error:
        return _untried(error)
    placed, _ = placed_groups(answer.plan, anatomy, config.size)
    if any(place.parts.copies > 1 for place in placed):
        answer = _answer(replace(question, copies=True))  # what was found without copies is not proven with them
    return replace(answer.plan, stream=_on_model(answer, anatomy))


@dataclass(frozen=True)
class _Answer:
    """A plan in the names of the small model, and that model's blocks."""

    plan: TensorPlan
    chains: tuple[tuple[str, ...], ...]


def _untried(error: SpecimenError) -> TensorPlan:
    return TensorPlan(notes=(f"no small model of this kind could be tried: {error}",))


def _answer(question: Question) -> _Answer:
    answers = question.specimen.answers
    known = answers.get(question.data)
    if isinstance(known, _Answer):
        return known
    lab = laboratory(question.specimen)
    found = _Answer(Search(question, lab).plan(), tuple(chain.names for chain in lab.anatomy.chains))
    answers[question.data] = found
    return found


def _on_model(answer: _Answer, anatomy: ModelAnatomy) -> Stream | None:
    """The stream between the first and the last blocks of the model itself, which has more of them than the small one."""
    stream = answer.plan.stream
    if stream is None:
        return None
    ends: dict[str, str] = {}
    for names in answer.chains:
        own = next((chain for chain in anatomy.chains if pattern_of(chain.names[0]) == pattern_of(names[0])), None)
        if own is None:
            return None
        ends |= {names[0]: own.names[0]} if names[0] in {entry.module for entry in stream.entries} else {}
        ends |= {names[-1]: own.names[-1]} if names[-1] in {exit_.module for exit_ in stream.exits} else {}
    entries = tuple(replace(entry, module=ends[entry.module]) for entry in stream.entries)
    exits = tuple(replace(exit_, module=ends[exit_.module]) for exit_ in stream.exits)
    return replace(stream, entries=entries, exits=exits)
