"""In a plain run, asking the parameter state for each unit's parameters around its use: the hooks that stand in for a program's actions.

Forward, block by block: wait for this block's parameters, start the gather of the next, compute, release. Backward: the same from the
other end, started by the gradient of a block's output; the block that was there before has then all its gradients, and is reduced and
released. Every hook is on the module, outside whatever recomputation and compilation put into `block.forward`, and eager.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from colossal_core._torch_private import in_backward
from colossal_core.dataflow import tensors_in
from colossal_core.errors import Problem

if TYPE_CHECKING:
    from torch.autograd.graph import Node

    from colossal_core.anatomy import ModelAnatomy
    from colossal_core.plan import Plan
    from colossal_core.shards import ParameterState


def install_gathering(model: nn.Module, plan: Plan, anatomy: ModelAnatomy, state: ParameterState) -> None:
    """Puts the hooks on the model and its blocks. A block that runs several times in a forward pass stays open until the backward pass
    ends. In a pipeline several microbatches are under way at once: a unit is gathered before its first use, and stays for the step.
    """
    repeated = frozenset(name for chain in anatomy.chains for name in chain.repeated)
    if plan.program.num_stages > 1:
        _install_waiting(model, plan, state)
        return
    walk = _Walk(plan, repeated, state)
    model.register_forward_pre_hook(walk.before_model)
    if walk.releases:
        model.register_forward_hook(walk.after_model)
    for position, block in enumerate(plan.block_names):
        module = model.get_submodule(block)
        module.register_forward_pre_hook(walk.before_block(position), with_kwargs=True)
        if walk.releases:
            module.register_forward_hook(walk.after_block(position))


def _install_waiting(model: nn.Module, plan: Plan, state: ParameterState) -> None:
    outside = plan.units_by_use[: len(plan.units_by_use) - len(plan.block_names)]

    def before_model(module: nn.Module, inputs: Any) -> None:
        del module, inputs
        for unit in outside:
            state.gather(unit)

    def before_block(position: int) -> Callable[[nn.Module, Any], None]:
        def gather(module: nn.Module, inputs: Any) -> None:
            del module, inputs
            state.gather(plan.block_names[position])
            for unit in plan.block_names[position + 1 : position + 1 + plan.gathering.prefetch]:
                state.prefetch(unit)

        return gather

    assert plan.gathering.keep in ("always", "step"), (
        f"a pipeline gathers once a step, not once a {plan.gathering.keep}"
    )
    model.register_forward_pre_hook(before_model)
    for position, block in enumerate(plan.block_names):
        model.get_submodule(block).register_forward_pre_hook(before_block(position))


def gathering_problems(model: nn.Module) -> Iterable[Problem]:
    """A model whose parameters another run releases between uses has no values to begin from, and its hooks would gather for that run."""
    for hook in model._forward_pre_hooks.values():
        if inspect.ismethod(hook) and isinstance(hook.__self__, _Walk) and hook.__self__.releases:
            reason = "is in training already, and that run releases its parameters between uses"
            yield Problem("model", reason, "make a new model for each boost, and load what the first has saved")


class _Walk:
    """The way through the units, forwards and backwards."""

    def __init__(self, plan: Plan, repeated: frozenset[str], state: ParameterState) -> None:
        self._blocks = plan.block_names
        self._outside = plan.units_by_use[: len(plan.units_by_use) - len(plan.block_names)]
        self._gathering = plan.gathering
        self._repeated = repeated
        self._state = state
        self._open: str | None = None
        self._differentiated = False
        self._awaits_backward = False
        self._made_before: dict[int, frozenset[Node]] = {}

    @property
    def releases(self) -> bool:
        return self._gathering.keep != "always"

    def before_model(self, module: nn.Module, inputs: Any) -> None:
        """A tied or functionally used parameter may be read by a module that is not its owner: units outside every block come first."""
        del module, inputs
        self._open = None
        self._made_before.clear()  # of a forward pass that an exception has ended, whose graph it would keep alive
        self._differentiated = torch.is_grad_enabled()
        self._awaits_backward |= self._differentiated
        for unit in self._outside:
            self._state.prefetch(unit)
        self._prefetch(range(min(1, len(self._blocks))))
        for unit in self._outside:
            self._state.gather(unit)

    def after_model(self, module: nn.Module, inputs: Any, output: Any) -> None:
        del module, inputs
        if not torch.is_grad_enabled():
            # A pass without gradients may lie between another's forward and backward pass (a target made by the model itself). The blocks
            # are gathered again for that; nothing asks anew for what is outside of them.
            for unit in (*(() if self._awaits_backward else self._outside), *self._blocks):
                self._state.release(unit)
        elif not in_backward():
            for tensor in tensors_in(output):
                if (
                    tensor.grad_fn is not None
                ):  # a hook on a leaf (a parameter that is also an output) would stay for good
                    tensor.register_hook(self._prefetch_last)  # type: ignore[no-untyped-call]

    def _prefetch_last(self, gradient: torch.Tensor) -> None:
        """While the gradient of what follows the blocks is computed, the last block is gathered."""
        del gradient
        self._awaits_backward = False
        last = len(self._blocks) - 1
        self._prefetch(range(last, max(last - self._gathering.prefetch, -1), -1))

    def before_block(self, position: int) -> Callable[[nn.Module, Any, Any], None]:
        def gather(module: nn.Module, args: Any, kwargs: Any) -> None:
            del module
            made = (tensor.grad_fn for tensor in tensors_in((args, kwargs)))
            self._made_before[position] = frozenset(node for node in made if node is not None)
            self._state.gather(self._blocks[position])
            if not in_backward():  # a checkpoint around the block runs it again there
                self._prefetch(range(position + 1, min(position + 1 + self._gathering.prefetch, len(self._blocks))))

        return gather

    def after_block(self, position: int) -> Callable[[nn.Module, Any, Any], None]:
        block = self._blocks[position]
        keeps = self._gathering.keep != "use"

        def release(module: nn.Module, inputs: Any, output: Any) -> None:
            del module, inputs
            # What a block only passes on gets its gradient when its maker's turn comes.
            before = self._made_before.pop(position)
            made = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
            differentiated = [tensor for tensor in made if tensor.grad_fn not in before]
            for tensor in differentiated if torch.is_grad_enabled() else ():
                tensor.register_hook(self._before_backward(position))  # type: ignore[no-untyped-call]
            if self._differentiated and not torch.is_grad_enabled():
                return  # its backward pass is its own (Reformer runs parts of the block again there): nothing says when it begins
            if in_backward():  # the second run of a checkpoint, whose graph is the real one where it is reentrant
                return
            if not differentiated or not torch.is_grad_enabled() or not keeps:
                self._state.release(block)

        return release

    def _before_backward(self, position: int) -> Callable[[torch.Tensor], None]:
        block = self._blocks[position]

        def gather(gradient: torch.Tensor) -> None:
            del gradient
            if self._open == block:
                return
            if self._open is not None and self._open not in self._repeated:
                self._state.reduce(self._open)
                self._state.release(self._open)
            self._open = block
            self._state.gather(block)
            self._prefetch(range(position - 1, max(position - 1 - self._gathering.prefetch, -1), -1))

        return gather

    def _prefetch(self, positions: range) -> None:
        for position in positions:
            self._state.prefetch(self._blocks[position])
