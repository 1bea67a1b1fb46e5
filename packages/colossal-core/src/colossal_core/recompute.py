"""Recomputation (activation checkpointing, Chen et al. 2016): a block keeps its inputs, and the backward pass runs its forward again.

`block.forward` is replaced on the instance, so no parameter changes its name. What a forward pass draws or reads beside its inputs
is brought back for the second run: torch's random state, the context's replayed states (dropout keys), the block's `call`, buffers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from colossal_core._torch_private import hidden_from_dynamo, selective_contexts
from colossal_core.dataflow import tensors_in
from colossal_core.errors import Problem
from colossal_core.selective import Decision, Policy, decide, trace_block
from colossal_core.strategy import Phase, StrategySpec

if TYPE_CHECKING:
    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.config import RecomputeConfig, TrainConfig
    from colossal_core.estimate import EstimateTable, HardwareProfile
    from colossal_core.mesh import MeshLayout
    from colossal_core.plan import Plan, PlanDraft
    from colossal_core.strategy import ApplyContext, Replayable

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]
Forward = Callable[..., Any]


class Recomputation:
    """How one block's forward is run, and run again.

    block: its `forward` at the time is the original. replayed: read at each call, so states may be added to the list later. memory_budget:
    None keeps block inputs only, a number in (0, 1) lets `selective` keep that share of the activations.
    """

    def __init__(self, block: nn.Module, replayed: Sequence[Replayable], memory_budget: float | None = None) -> None:
        self.block = block
        self.original: Forward = block.forward
        self.installed: Forward | None = None
        self.decision: Decision | None = None
        self._replayed = replayed
        self._memory_budget = memory_budget

    def forward(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """One call in training: what `original` returns, with a graph that recomputes."""
        args, kwargs = without_cache(args), without_cache(dict(kwargs))
        if torch.compiler.is_compiling():
            return self._traced(args, kwargs)
        self.measure(args, kwargs)
        return checkpoint(self.original, *args, use_reentrant=False, context_fn=self.contexts, **kwargs)

    def contexts(self) -> Contexts:
        """(for the first run, for the second) of one forward pass, the second with all states as they are now."""
        selective: Contexts = (nullcontext(), nullcontext())
        if self.decision is not None:
            selective = selective_contexts(Policy(self.decision))
        captured = [(state, state.capture()) for state in (*self._replayed, _BlockCall(self.block))]
        return selective[0], _SecondRun(self.block, captured, selective[1])

    def measure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Decides, at the first call, what is kept: one more run of the block that leaves no mark on any state."""
        if self._memory_budget is None or self.decision is not None:
            return
        inputs = tuple(tensors_in((args, dict(kwargs))))
        devices = {tensor.device.index for tensor in inputs if tensor.device.type == "cuda"}
        captured = [(state, state.capture()) for state in (*self._replayed, _BlockCall(self.block))]
        with torch.random.fork_rng(devices=sorted(devices)), _SecondRun(self.block, captured, nullcontext()):
            trace = trace_block(lambda: self.original(*args, **kwargs), self.block, inputs)
        self.decision = decide(trace, self._memory_budget)

    def _traced(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call as torch.compile sees it. States are inputs of the compiled graph there, which its own recomputation reads again."""
        if self._memory_budget is None:
            return checkpoint(self.original, *args, use_reentrant=False, **kwargs)
        if self.decision is None:
            self._measure_outside(args, kwargs)
        assert self.decision is not None
        keep = list(self.decision.whole_operators)
        contexts = functools.partial(selective_contexts, keep)
        return checkpoint(self.original, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    @hidden_from_dynamo
    def _measure_outside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.measure(args, kwargs)


def install(recomputation: Recomputation) -> None:
    """Replaces `block.forward` on the instance. Without gradients (evaluation) the original runs."""
    original = recomputation.original

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return recomputation.forward(args, kwargs)

    vars(forward)["recomputation"] = recomputation
    vars(recomputation.block)["forward"] = recomputation.installed = forward


def recomputation_of(block: nn.Module) -> Recomputation | None:
    """The recomputation that was installed on a block, for a runner that replays it itself. None of a block that was compiled after it:
    the compiled forward carries the attributes of what it has taken in.
    """
    forward = vars(block).get("forward")
    found = None if forward is None else vars(forward).get("recomputation")
    return found if isinstance(found, Recomputation) and found.installed is forward else None


def without_cache(value: Any) -> Any:
    """Arguments with transformers' generation caches replaced by None, by type: some blocks take theirs by position.

    A second run would append to the cache twice, and training does not read it.
    """
    if type(value) in (tuple, list):
        return type(value)(without_cache(item) for item in value)
    if type(value) is dict:
        return {key: without_cache(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) or type(value).__module__ in ("builtins", "torch"):
        return value  # Dynamo cannot walk the classes of a tensor or a bool, and would leave the whole block to eager
    kinds = type(value).__mro__
    is_cache = any(kind.__module__.startswith("transformers.") and kind.__name__.endswith("Cache") for kind in kinds)
    return None if is_cache else value


class _BlockCall:
    """The per-call state that a runner attaches to a block, as something to replay."""

    def __init__(self, block: nn.Module) -> None:
        self._attributes = vars(block)

    def capture(self) -> Any:
        return self._attributes.get("call")

    @contextmanager
    def replay(self, captured: Any) -> Iterator[None]:
        if "call" not in self._attributes:
            yield
            return
        current = self._attributes["call"]
        self._attributes["call"] = captured
        try:
            yield
        finally:
            self._attributes["call"] = current


class _SecondRun:
    """Everything as in the first run; buffers that the block updates (running statistics) are updated on copies that are dropped.

    Can be entered again: a graph that is kept may be run backward twice, each time with a recomputation of its own.
    """

    def __init__(
        self,
        block: nn.Module,
        captured: Sequence[tuple[Replayable, Any]],
        selective: AbstractContextManager[None],
    ) -> None:
        self._block = block
        self._captured = captured
        self._selective = selective
        self._stack = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for state, value in self._captured:
                stack.enter_context(state.replay(value))
            stack.enter_context(_buffers_set_aside(self._block))
            stack.enter_context(self._selective)
            self._stack = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


@contextmanager
def _buffers_set_aside(block: nn.Module) -> Iterator[None]:
    """The block works on copies of its buffers. Copies, since writing the old values back would invalidate what autograd saved."""
    kept = [(module, dict(module.named_buffers(recurse=False))) for module in block.modules()]
    for module, buffers in kept:
        for name, buffer in buffers.items():
            setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, buffers in kept:
            for name, buffer in buffers.items():
                setattr(module, name, buffer)


@dataclass(frozen=True)
class Recompute:
    """The built-in strategy `recompute`. Decisions: `recompute` -> block -> `full` or `selective`. No communication."""

    config: RecomputeConfig
    name: str = field(default="recompute", init=False)
    axes: tuple[str, ...] = field(default=(), init=False)
    phase: Phase = field(default=Phase.RECOMPUTE, init=False)
    after: tuple[str, ...] = field(default=(), init=False)

    def check(self, config: TrainConfig, anatomy: ModelAnatomy, mesh: MeshLayout) -> list[Problem]:
        del config, mesh
        if anatomy.blocks:
            return []
        return [Problem("recompute.mode", *no_blocks(anatomy, "recompute.mode: none"), self.config.mode)]

    def plan(self, draft: PlanDraft, anatomy: ModelAnatomy) -> PlanDraft:
        mode = self._mode()
        return draft if mode == "none" else draft.with_decisions("recompute", dict.fromkeys(anatomy.blocks, mode))

    def estimate(self, table: EstimateTable, profile: HardwareProfile) -> EstimateTable:
        """full: of each block's activations one input stays, [micro_size, L, D] elements, and the forward third of compute is done twice.
        selective: a mix of both by the budget. The rows' own `recompute` (1: full) goes before the config where the table has it.
        """
        import numpy as np

        model = table.model
        input_bytes = model.num_blocks * model.sequence_length * model.hidden_size * profile.compute_element_bytes
        pipeline = table.inputs.get("pp", np.ones(len(table)))
        inputs_only = table.inputs["micro_size"] * input_bytes / pipeline
        share = {"none": 1.0, "selective": self.config.memory_budget, "full": 0.0}[self._mode()]
        kept = 1 - table.inputs.get("recompute", np.full(len(table), 1 - share))
        whole = table.column("activation_bytes_per_microbatch")
        activations = np.minimum(whole, inputs_only + kept * np.maximum(whole - inputs_only, 0.0))
        seconds = table.column("compute_seconds") * (1 + (1 - kept) / 3)
        return table.setting("activation_bytes_per_microbatch", activations).setting("compute_seconds", seconds)

    def apply(self, model: nn.Module, plan: Plan, context: ApplyContext) -> None:
        for block, mode in plan.decisions.get("recompute", {}).items():
            budget = self.config.memory_budget if mode == "selective" else None
            install(Recomputation(model.get_submodule(block), context.replayed, budget))

    def state(self) -> Mapping[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        del state

    def _mode(self) -> str:
        """The ends of the budget are the other two modes."""
        if self.config.mode == "selective":
            return {0.0: "full", 1.0: "none"}.get(self.config.memory_budget, "selective")
        return self.config.mode


def no_blocks(anatomy: ModelAnatomy, remedy: str) -> tuple[str, str]:
    """Reason and remedy for a strategy that works on blocks where there are none. remedy: the setting that does without it."""
    why = "no list of modules feeds one into the next"
    if anatomy.untraced:
        why = f"its forward pass could not be traced ({anatomy.untraced})"
    reason = f"no block list was found in this model: {anatomy.class_name}: {why}"
    return (
        reason,
        f"use {remedy}, or hold the repeated layers in a ModuleList (an example batch helps: model.example_batch)",
    )


def recompute_spec() -> StrategySpec:
    """The section `recompute`: off by default."""
    from colossal_core.config.sections import RecomputeConfig

    return StrategySpec(
        name="recompute",
        section="recompute",
        config_class=RecomputeConfig,
        factory=lambda config: None if config.mode == "none" else Recompute(config),
    )
