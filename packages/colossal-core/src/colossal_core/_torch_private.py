"""Every name of torch that is not public, and the versions on which each was tried. Nothing else in this package imports one.

All were tried on torch 2.13.0 (CPU); those of training and of the memory estimate on 2.11.0 (H200) too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch._compile import _disable_dynamo
from torch._ops import OpOverload
from torch.autograd.graph import Node
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

__all__ = [
    "OpOverload",
    "OperatorKinds",
    "TorchDispatchMode",
    "arguments_written",
    "call_node",
    "fused_adamw",
    "hidden_from_dynamo",
    "in_backward",
    "is_view_op",
    "num_gradients_in",
    "packet_of",
    "raise_recompile_limit",
    "selective_contexts",
]


def hidden_from_dynamo(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `torch.compiler.disable`, which imports Dynamo (0.8 s) where it is written; this one where the function is first called."""
    found: Callable[..., Any] = _disable_dynamo(function)
    return found


def raise_recompile_limit(num_blocks: int) -> None:
    """Lets one piece of code be compiled once for each of `num_blocks` blocks, beside the versions for other shapes that torch allows.

    Blocks of one class share their code, and torch would otherwise fall back to eager at the ninth. Process-wide, and only ever raised.
    """
    import torch._dynamo.config as dynamo_config

    settings: Any = dynamo_config
    settings.recompile_limit = max(settings.recompile_limit, num_blocks + 8)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, 32 * (num_blocks + 8))


def fused_adamw(
    lists: Sequence[Sequence[torch.Tensor]],
    steps: Sequence[torch.Tensor],
    settings: tuple[float, float, float, float, float],
    found_inf: torch.Tensor | None,
) -> None:
    """Torch's one-kernel AdamW, in place on three of the four lists (parameters, gradients, first and second moments; item by item of one
    shape, dtype and device). steps: for each parameter, the number of this update as a 0-d float32 tensor; read only. settings: lr, beta1,
    beta2, weight decay, eps. found_inf: 0-d float32; nothing changes where it is 1.

    Tried on torch 2.13.0 (CPU).
    """
    lr, beta1, beta2, weight_decay, eps = settings
    params, grads, exp_avgs, exp_avg_sqs = (list(tensors) for tensors in lists)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(steps),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


def in_backward() -> bool:
    """Whether this thread is inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_view_op(op: OpOverload) -> bool:
    """Whether the operator returns its input's storage or writes into it, by its schema."""
    schema = op._schema
    return any(returned.alias_info is not None for returned in schema.returns)


def arguments_written(op: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of a call's arguments that the operator writes into, by its schema: tensors, or lists of them; None for one left out."""
    return [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def packet_of(op: OpOverload) -> Any:
    """The operator without its overload (`aten.mm` of `aten.mm.default`), by which torch's flop formulas are kept."""
    return op._overloadpacket


def selective_contexts(
    policy: Callable[..., Any] | list[OpOverload],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Torch's contexts for the first run of a selectively checkpointed function and for the second. Public, but without types."""
    first, second = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return first, second


def num_gradients_in(node: Node) -> int:
    """How many gradients a node of autograd's graph takes: one for each output of the function that it is the derivative of."""
    return len(node._input_metadata)


def call_node(node: Node, gradients: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """Runs one node of autograd's graph by itself: the gradients that it passes on, one for each of `next_functions`.

    As autograd does between nodes, each is brought to the shape and dtype that the next node takes (a bias was broadcast).
    """
    callable_node: Any = node
    results = callable_node(*gradients)
    passed = results if isinstance(results, tuple) else (results,)
    return tuple(
        None if gradient is None or child is None else _fitted(gradient, child._input_metadata[output])
        for gradient, (child, output) in zip(passed, node.next_functions, strict=True)
    )


def _fitted(gradient: torch.Tensor, metadata: Any) -> torch.Tensor:
    return gradient.sum_to_size(metadata.shape).to(metadata.dtype)


def fake_tensor_mode() -> AbstractContextManager[object]:
    """Inside, tensors have shapes, strides and storages of a size, and no memory. Real ones are taken for fake ones of their shape."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode: AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no values."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def storage_key(tensor: torch.Tensor) -> int:
    """What tensors on one storage have in common, fake ones too, as long as one of them is alive."""
    key: int = tensor.untyped_storage()._cdata
    return key


def tree_flatten(value: object) -> tuple[list[Any], Any]:
    """The leaves of nested tuples, lists, mappings and registered outputs, and what puts them together again."""
    leaves, structure = _pytree.tree_flatten(value)
    return leaves, structure


def tree_unflatten(leaves: Sequence[object], structure: Any) -> Any:
    """The nest that `tree_flatten` took apart, with other leaves."""
    return _pytree.tree_unflatten(list(leaves), structure)


class OperatorKinds:
    """How inductor treats an operator of a graph, as the partitioner takes it to."""

    def __init__(self) -> None:
        from torch._functorch.partitioners import get_default_op_list

        self._kinds = get_default_op_list()

    def is_view(self, node: torch.fx.Node) -> bool:
        return node.target is operator.getitem or self._kinds.is_view(node)

    def is_fusible(self, node: torch.fx.Node) -> bool:
        """Whether it is computed inside another kernel: element by element, or a reduction of such."""
        return self._kinds.is_fusible(node)


@dataclass(frozen=True)
class PartitionedGraphs:
    """A function's forward and backward pass as a compiler gets them. num_outputs: of the function; the rest of the forward graph's
    outputs is what it keeps for the backward graph.
    """

    forward: torch.fx.GraphModule
    backward: torch.fx.GraphModule | None
    num_outputs: int


def partitioned(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], num_static: int, *, inductor: bool
) -> PartitionedGraphs:
    """Traces `function` of fake tensors forward and backward, and cuts the joint graph as torch.compile does (min-cut rematerialisation).

    num_static: how many of the inputs, the first ones, are parameters and buffers, which need not be kept. inductor: with inductor's
    decompositions; else as `aot_eager` has it. The function returns a tuple of tensors.
    """
    from torch._functorch._aot_autograd.utils import make_boxed_func
    from torch._functorch.aot_autograd import aot_function
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    decompositions: dict[Any, Any] = {}
    if inductor:
        from torch._inductor.decomposition import select_decomp_table

        decompositions = dict(select_decomp_table())
    graphs: dict[str, torch.fx.GraphModule] = {}
    outputs: list[int] = []

    def keep(which: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
            graphs[which] = graph
            return make_boxed_func(graph.forward)

        return compiler

    def cut(joint: torch.fx.GraphModule, joint_inputs: Any, **settings: Any) -> Any:
        outputs.append(settings["num_fwd_outputs"])
        settings["static_lifetime_input_indices"] = list(range(num_static))
        return min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **settings)

    compiled = aot_function(
        function,
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        partition_fn=cut,
        decompositions=decompositions,
    )
    made = compiled(*inputs)
    ends = [tensor for tensor in made if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    if ends and "backward" not in graphs:
        torch.autograd.backward(ends, [torch.empty_like(end) for end in ends])
    return PartitionedGraphs(graphs["forward"], graphs.get("backward"), outputs[0] if outputs else len(made))
