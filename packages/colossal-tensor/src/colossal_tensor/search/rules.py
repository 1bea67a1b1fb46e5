"""What is known before anything is traced: the user's table of rules, transformers' plan, and, last, names that are usual.

A rule is a pattern of a module's name (`*` for a number) and a style: `column`, `row`, `packed2`, `packed3`, `qkv` or `replicate`. Names
that no rule mentions keep what is found without rules. A rule that matches nothing, and one that leaves a module half sharded, is an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from colossal_core.errors import Problem
from colossal_tensor.group import Packing, matches

FIELD = "parallel.tensor.rules"
MOST_RULES = 10

PACKINGS: Mapping[str, Packing] = {"column": "whole", "packed2": "two", "packed3": "three", "qkv": "qkv"}
"""A column's style -> what lies along its output features."""

_PLAN_STYLES: Mapping[str, str] = {
    "column": "column",
    "column_gathered": "column",
    "packed_column": "column",
    "row": "row",
    "row_split_input": "row",
    "packed_row": "row",
}
_ROW_NAMES = re.compile(
    r"(^|\.)(o_proj|out_proj|out_lin|down_proj|c_proj|fc2|lin2|dense_4h_to_h|attention\.dense|attention_out|output\.dense|fc_out|wo|w2|w_out)$"
)


@dataclass(frozen=True)
class Rule:
    """One line of the table."""

    pattern: str
    style: str

    def __str__(self) -> str:
        return f"{self.pattern}: {self.style}"

    @property
    def role(self) -> str:
        """`column`, `row` or `replicate`."""
        return "column" if self.style in PACKINGS else self.style


@dataclass(frozen=True)
class Read:
    """The table against a model's products, by their weights. styles: of those that are to be cut, `column` or `row`; packings: what lies
    along the columns among them; whole: those that are not to be cut.
    """

    styles: Mapping[str, str]
    packings: Mapping[str, Packing]
    whole: frozenset[str]


def read_rules(rules: Sequence[Rule], weights: Iterable[str]) -> tuple[Read, list[Problem]]:
    """What each rule says of each weight; later rules win. weights: of all matrix products, by full name."""
    known, problems = tuple(weights), []
    modules = sorted({module_of(weight) for weight in known})
    if len(rules) > MOST_RULES:
        reason = f"has {len(rules)} lines; a model takes {MOST_RULES} at most"
        problems.append(Problem(FIELD, reason, "use `*` for numbers, and leave out what the library finds by itself"))
    styles: dict[str, str] = {}
    packings: dict[str, Packing] = {}
    whole: set[str] = set()
    for rule in rules:
        found = [weight for weight in known if _applies(rule, module_of(weight))]
        if not found:
            problems.append(_unmatched(rule, modules))
        for weight in found:
            whole.discard(weight)
            styles.pop(weight, None)
            packings.pop(weight, None)
            if rule.role == "replicate":
                whole.add(weight)
                continue
            styles[weight] = rule.role
            if rule.role == "column":
                packings[weight] = PACKINGS[rule.style]
    return Read(styles, packings, frozenset(whole)), problems


def _unmatched(rule: Rule, modules: Sequence[str]) -> Problem:
    """A rule that says nothing of any of the modules. They are those of a small model, which has the first blocks of each kind alone."""
    general = replace(rule, pattern=_starred(rule.pattern))
    if general != rule and any(_applies(general, module) for module in modules):
        reason = "names one block; a rule holds for all blocks of a kind"
        return Problem(FIELD, reason, f"use `*`: `{general.pattern}`", str(rule))
    near = difflib.get_close_matches(re.sub(r"\d+", "*", rule.pattern), map(_starred, modules), n=1, cutoff=0.3)
    remedy = f"did you mean `{near[0]}`? " if near else ""
    remedy += "Name a module with a weight, relative to the model"
    return Problem(FIELD, f"`{rule.pattern}` matches no module with a weight", remedy, str(rule))


def vocabulary_styles(rules: Sequence[Rule], styled: Iterable[str]) -> list[Problem]:
    """Rules that cut the embedding or the head in a way of their own. styled: weights of those with a style."""
    modules = {module_of(weight) for weight in styled}
    reason = "an embedding or a head is cut by words, or not at all"
    return [
        Problem(FIELD, reason, "use `replicate`, or leave the rule out", str(rule))
        for rule in rules
        if rule.role != "replicate" and any(_applies(rule, module) for module in modules)
    ]


def _applies(rule: Rule, module: str) -> bool:
    """`replicate` also holds for everything inside a module."""
    if rule.role != "replicate":
        return matches(rule.pattern, module)
    parts = module.split(".")
    return any(matches(rule.pattern, ".".join(parts[:length])) for length in range(1, len(parts) + 1))


def half_sharded(rules: Sequence[Rule], module: str, others: Sequence[str]) -> Problem:
    """The rules cut, or leave whole, one part of what belongs together."""
    rule = next((rule for rule in rules if _applies(rule, module)), None)
    reason = f"leaves {_starred(module)} half sharded"
    if others:
        reason += f": it belongs together with {', '.join(sorted(set(map(_starred, others))))}"
    remedy = "give rules for all of them, or leave this one out"
    return Problem(FIELD, reason, remedy, str(rule) if rule is not None else _starred(module))


def not_exact(rules: Sequence[Rule], module: str, said: str) -> Problem:
    """What the rules ask for computes something else."""
    rule = next((rule for rule in rules if _applies(rule, module)), None)
    reason = f"cutting {_starred(module)} so is not the same as one process: {said}"
    return Problem(
        FIELD, reason, "use another style, or `replicate`", str(rule) if rule is not None else _starred(module)
    )


def plan_styles(plan: Sequence[tuple[str, str]], weights: Iterable[str]) -> dict[str, str]:
    """What transformers' own plan (in core's words) says of each weight: `column` or `row`."""
    found = {}
    for weight in weights:
        for pattern, style in plan:
            if style in _PLAN_STYLES and (matches(pattern, module_of(weight)) or matches(pattern, weight)):
                found[weight] = _PLAN_STYLES[style]
    return found


def name_styles(weights: Iterable[str]) -> dict[str, str]:
    """What a weight most often is, by its module's name."""
    return {weight: "row" if _ROW_NAMES.search(module_of(weight)) else "column" for weight in weights}


def module_of(weight: str) -> str:
    """The module that a user names for a weight: an adapted layer, not the layer inside the adapter; experts' tensors by their own name."""
    owner, _, last = weight.rpartition(".")
    return owner.removesuffix(".base_layer") if last == "weight" else weight


def _starred(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
