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
    "compile_cutting",
    "fused_adamw",
    "hidden_from_dynamo",
    "in_backward",
    "is_compiled",
    "is_view_op",
    "num_gradients_in",
    "packet_of",
    "raise_recompile_limit",
    "running_node",
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


def is_compiled(node: Node) -> bool:
    """Whether a node of autograd's graph is a whole compiled graph (by AOTAutograd, with any backend)."""
    return node.name() == "CompiledFunctionBackward"


def running_node() -> Node:
    """The node whose backward function is being called, by autograd, on this thread."""
    node: Node = torch._C._current_autograd_node()
    return node


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

    def may_move(self, node: torch.fx.Node) -> bool:
        """Whether a call may run later or twice: an operator of torch's that draws no random numbers and talks to no other rank, or
        arithmetic on sizes.
        """
        if isinstance(node.target, OpOverload):
            if node.target.namespace in ("_c10d_functional", "c10d_functional", "symm_mem"):
                return False
            return torch.Tag.nondeterministic_seeded not in node.target.tags
        return getattr(node.target, "__module__", "") == "_operator"

    def writes(self, node: torch.fx.Node) -> bool:
        """Whether a call writes into one of its arguments."""
        return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def size_hint(size: int | torch.SymInt) -> int:
    """A number, or what a symbolic one was in the example that is being compiled; 0 where there was none."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return int(hint) if isinstance(hint, int) else 0
    return size


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


CompilePart = Callable[[torch.fx.GraphModule, Sequence[Any]], tuple[Callable[[list[Any]], Any], Any]]
"""(part of a graph, its example inputs) -> what to call, with one list of arguments, and the strides of what that returns (None: as the
graph says).
"""
CutBackward = Callable[[torch.fx.GraphModule, Sequence[Any], CompilePart], Callable[[list[Any]], Any] | None]
"""(backward graph, its example inputs, what compiles a part) -> what to call in its place, None: compile it as it is."""


def compile_cutting(
    backend: str, graph: torch.fx.GraphModule, example_inputs: Sequence[Any], cut: CutBackward
) -> Callable[..., Any]:
    """Compiles what Dynamo has traced as the backend of that name does, `inductor` or `aot_eager`, but the backward graph by `cut`.

    Nothing comes from AOTAutograd's own cache, which knows nothing of cuts; inductor's cache of kernels is used. No buffer is given to the
    backward graph to write over: a part that runs later may read it.

    Tried on torch 2.11.0 and 2.13.0 (CPU).
    """
    from torch._functorch import config

    def cut_safely(
        module: torch.fx.GraphModule, inputs: Sequence[Any], compile_part: CompilePart
    ) -> Callable[[list[Any]], Any] | None:
        context = torch._guards.TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            context.fw_metadata.bw_donated_idxs = []
        made = cut(module, inputs, compile_part)
        if made is not None:
            vars(made)["_boxed_call"] = True  # says that it takes one list of arguments
        return made

    compiling = _with_inductor if backend == "inductor" else _with_nothing
    with config.patch(enable_autograd_cache=False):
        compiled: Callable[..., Any] = compiling(graph, example_inputs, cut_safely)
    return compiled


def _with_inductor(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], cut: CutBackward) -> Any:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(module: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        if not settings.get("is_backward"):
            return compile_fx_inner(module, inputs, **settings)

        def compile_part(part: torch.fx.GraphModule, part_inputs: Sequence[Any]) -> tuple[Any, Any]:
            (output,) = (node for node in part.graph.nodes if node.op == "output")
            output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
            with torch._guards.TracingContext.report_output_strides() as strides:
                compiled = compile_fx_inner(part, part_inputs, **{**settings, "static_input_idxs": ()})
            return compiled, strides or None

        made = cut(module, inputs, compile_part)
        return compile_fx_inner(module, inputs, **settings) if made is None else made

    return compile_fx(graph, list(example_inputs), inner_compile=inner)


def _with_nothing(graph: torch.fx.GraphModule, example_inputs: Sequence[Any], cut: CutBackward) -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def compile_part(part: torch.fx.GraphModule, part_inputs: Sequence[Any]) -> tuple[Any, None]:
        return boxed_nop(part, list(part_inputs)), None

    def backward(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        made = cut(module, inputs, compile_part)
        return boxed_nop(module, list(inputs)) if made is None else made

    return aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )(graph, list(example_inputs))
