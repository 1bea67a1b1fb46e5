"""The search for a plan on a specimen: group by group, then the vocabulary and the sequence, each proven beside what is there already."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from functools import cached_property

from colossal_core.errors import Problem, raise_problems
from colossal_tensor.group import Group, TensorPlan, expand, matches
from colossal_tensor.search.boundary import streams, vocabularies
from colossal_tensor.search.candidates import Kind, kinds_of
from colossal_tensor.search.gathered import gathered_groups
from colossal_tensor.search.laboratory import Laboratory
from colossal_tensor.search.proof import Outcome, Proof
from colossal_tensor.search.question import Question
from colossal_tensor.search.rules import (
    Read,
    half_sharded,
    module_of,
    name_styles,
    not_exact,
    plan_styles,
    read_rules,
    vocabulary_styles,
)
from colossal_tensor.search.sites import find_sites, styled_sites


class Search:
    """One search. Make a new one for each question."""

    def __init__(self, question: Question, lab: Laboratory) -> None:
        self._question, self._lab = question, lab
        self._notes: list[str] = []
        self._source: dict[str, str] = {}

    def plan(self) -> TensorPlan:
        read = self._read()
        groups = self._found_groups(read)
        plan = self._together(groups)
        plan = self._with_vocabulary(plan, read.whole)
        plan = self._with_stream(plan)
        other = self._other_drops(plan) if plan.groups and plan.stream is None else ""
        if other:
            self._notes.append(f"dropout draws other numbers than one process: {other}")
        return replace(plan, notes=tuple(self._notes), source=self._source)

    # -- groups ------------------------------------------------------------------------------------------------------------------

    def _read(self) -> Read:
        """The user's rules, of products and of the vocabulary. Raises: ConfigError."""
        lab = self._lab
        read, problems = read_rules(self._question.rules, dict.fromkeys((*lab.weights, *sorted(lab.vocabulary))))
        raise_problems([*problems, *vocabulary_styles(self._question.rules, lab.vocabulary & set(read.styles))])
        return read

    def _found_groups(self, read: Read) -> list[Group]:
        found = []
        for kind, source in self._kinds(read):
            group, said = self._first_exact(kind)
            if group is not None:
                found.append(group)
                self._source[group.name] = source
            elif source == "rules":
                ruled = min((kind.columns | kind.rows) & set(read.styles))
                raise_problems([not_exact(self._question.rules, module_of(ruled), said)])
            elif source != "names":
                self._notes.append(f"{kind.name} has no cut from stream to stream: {said}")
        gathered = self._gathered(found, read)
        if gathered:
            names = ", ".join(group.name for group in gathered)
            self._notes.append(f"cut by output features, the results gathered: {names}")
        return [*found, *gathered]

    def _kinds(self, read: Read) -> list[tuple[Kind, str]]:
        """What to try, with where it comes from: the user's rules, else what the trace shows, else a plan or names for what it does not."""
        lab, setting = self._lab, self._lab.setting
        packings = {setting.names.pattern(weight): packing for weight, packing in read.packings.items()}
        planned = plan_styles(self._question.tensor_plan, lab.weights)
        found: list[tuple[Kind, str]] = []
        problems: list[Problem] = []
        for kind in kinds_of(find_sites(setting.trace, setting.shapes, lab.vocabulary), setting, packings):
            roles = {**dict.fromkeys(kind.columns, "column"), **dict.fromkeys(kind.rows, "row")}
            kept = sorted(set(roles) & read.whole)
            if kept:
                if set(roles) - read.whole:
                    others = [module_of(weight) for weight in roles if weight not in read.whole]
                    problems.append(half_sharded(self._question.rules, module_of(kept[0]), others))
                continue
            if any(read.styles.get(weight, role) != role for weight, role in roles.items()):
                continue
            ruled = bool(set(roles) & set(read.styles))
            agreed = all(planned.get(weight) == role for weight, role in roles.items())
            found.append((kind, "rules" if ruled else "transformers" if agreed else "graph"))
        taken = {weight for kind, _ in found for weight in (*kind.columns, *kind.rows)}
        asked = {weight: style for weight, style in read.styles.items() if weight not in taken}
        sites, alone = styled_sites(setting.trace, setting.shapes, asked)
        problems += [half_sharded(self._question.rules, module_of(weight), ()) for weight in alone[:1]]
        raise_problems(problems)
        found += [(kind, "rules") for kind in kinds_of(sites, setting, packings)]
        taken |= {*asked, *read.whole, *lab.vocabulary}
        rest = [weight for weight in lab.weights if weight not in taken and weight.startswith(lab.block_prefixes)]
        for styles, source in ((planned, "transformers"), (name_styles(rest), "names")):
            left = {weight: style for weight, style in styles.items() if weight in rest}
            more = kinds_of(styled_sites(setting.trace, setting.shapes, left)[0], setting)
            found += [(kind, source) for kind in more]
        return found

    def _gathered(self, groups: Sequence[Group], read: Read) -> list[Group]:
        """Groups for products that are in none yet, nor inside one: those that the ranks divide evenly."""
        lab = self._lab
        inside = {
            product.label
            for group in groups
            for product in lab.setting.trace.products
            for entry in group.entries
            if any(matches(entry.module, name) for name in _modules_around(product.module))
        }
        cut = {name for group in groups for part in group.cuts for name in expand(part.parameter, lab.setting.shapes)}
        early = {weight for weight in lab.weights if lab.is_before_blocks(weight)}
        left = [weight for weight in lab.weights if weight not in (inside | cut | early | lab.vocabulary | read.whole)]
        found = []
        for group in gathered_groups(lab, left):
            if self._question.divides(group) and self._proven(TensorPlan(groups=(group,))).passed:
                found.append(group)
                self._source[group.name] = "gathered"
        return found

    def _first_exact(self, kind: Kind) -> tuple[Group | None, str]:
        """The first group of a kind that is exact by itself; else why the best one was not."""
        said = ""
        for way in kind.ways():
            for group in way.groups:
                outcome = self._proven(TensorPlan(groups=(group,)))
                if outcome.passed:
                    return group, ""
                said = outcome.problem if outcome.forward or not said else said
                if not outcome.forward:
                    break
        return None, said or "its products are not followed"

    def _proven(self, plan: TensorPlan) -> Outcome:
        """The proof on two ranks, and on three or four where there are more: where the small model's sizes allow it, and in any case where
        ranks hold the same key/value head.
        """
        proof, size, whole = self._lab.proof, self._question.size, self._question.whole_logits
        outcome = proof.run(plan, 2, whole_outputs=whole)
        if not outcome.passed or size <= 2:
            return outcome
        more = proof.run(plan, 3 if size == 3 else 4, whole_outputs=whole)
        shares = self._question.copies and any(group.units.key_value_heads for group in plan.groups)
        return more if not more.passed and (more.possible or shares) else outcome

    def _together(self, groups: Sequence[Group]) -> TensorPlan:
        """As many groups at once as are exact together."""
        kept: list[Group] = list(groups)
        outcome = self._proven(TensorPlan(groups=tuple(kept)))
        if not outcome.passed:
            kept, outcome = [], Outcome(True, "")
            for group in groups:
                tried = self._proven(TensorPlan(groups=(*kept, group)))
                if tried.passed:
                    kept, outcome = [*kept, group], tried
                else:
                    self._notes.append(f"{group.name} stays whole on every rank: beside other groups, {tried.problem}")
        return self._settled(TensorPlan(groups=tuple(kept)), outcome)

    def _settled(self, plan: TensorPlan, outcome: Outcome) -> TensorPlan:
        """The plan with what the proof has told apart. A gradient that is zero in the small model is a summand where its place says so."""
        inside = [entry.module for group in plan.groups for entry in group.entries]
        assumed = [
            pattern
            for pattern in outcome.unseen
            if any(pattern.startswith(f"{module}.") for module in inside)
            or (plan.stream is not None and pattern.replace("*", "0").startswith(self._lab.block_prefixes))
        ]
        return replace(plan, partial=tuple(sorted({*outcome.partial, *assumed})))

    # -- the ends ----------------------------------------------------------------------------------------------------------------

    def _with_vocabulary(self, plan: TensorPlan, whole: Set[str]) -> TensorPlan:
        """whole: weights that the user's rules leave whole."""
        said = ""
        for vocabulary in vocabularies(self._lab.anatomy, whole_logits=self._question.whole_logits, whole=whole):
            changed = replace(plan, vocabulary=vocabulary)
            outcome = self._proven(changed)
            if outcome.passed:
                return self._settled(changed, outcome)
            said = said or outcome.problem
        if said:
            self._notes.append(f"the vocabulary stays whole on every rank: {said}")
        return plan

    def _other_drops(self, plan: TensorPlan) -> str:
        """Why dropout under a plan is not that of one process, "" where it is."""
        proof = self._dropping
        return proof.run(plan).problem if proof is not None else ""

    @cached_property
    def _dropping(self) -> Proof | None:
        from colossal_tensor.search.dropping import dropping_proof

        return dropping_proof(self._question.specimen, self._lab)

    def _with_stream(self, plan: TensorPlan) -> TensorPlan:
        if not self._question.sequence_parallel or not plan.groups:
            return plan
        said = ""
        for stream in streams(self._lab, plan):
            changed = replace(plan, stream=stream)
            outcome = self._proven(changed)
            if outcome.passed and not self._other_drops(changed):
                return self._settled(changed, outcome)
            drops = "dropout would draw other numbers than one process" if outcome.passed else ""
            said = drops or said or outcome.problem
        self._notes.append(f"the sequence is not cut between groups: {said or 'the blocks are not known'}")
        return plan


def _modules_around(module: str) -> list[str]:
    """A module and all that hold it."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
