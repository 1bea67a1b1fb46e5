"""What any `nn.Module` is made of: blocks, embeddings, head, shared parameters, and the interfaces of attention and experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from colossal_core.flow import Flow
    from colossal_core.model_ops.uses import ModelUses
    from colossal_core.specimen import Specimen

Task = Literal["causal-lm", "masked-lm", "seq2seq-lm", "own-loss"]


@dataclass(frozen=True)
class ParameterFact:
    """One parameter of the untouched model. names: all its names, the full name first. numel is the product of shape.

    dtype: torch's name without the prefix (`float32`). block: name of the block that holds it; "" where none does, or several do.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    trainable: bool
    block: str

    @property
    def full_name(self) -> str:
        return self.names[0]


@dataclass(frozen=True)
class ModuleFact:
    """One module of the untouched model. name: the first in `named_modules()`, "" for the model itself.

    numbers: sorted (name, value) of the module's own public integer attributes (`num_heads`, `split_size`), and of the numbers of heads in
    a config that it holds, as `config.num_attention_heads`.
    """

    name: str
    class_name: str
    numbers: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class BlockChain:
    """A list of blocks of which each one's output is the next one's input. names: full module names, in order of first execution.

    found_by: `data flow` (seen in a traced forward pass) or `structure` (the model could not be traced: a list of like modules).
    repeated: those of `names` that run more than once in one forward pass (a block shared by several layers).
    """

    names: tuple[str, ...]
    found_by: Literal["data flow", "structure"]
    repeated: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelAnatomy:
    """Facts about a model, as pure data: strategies plan from it without seeing the model.

    chains: the block lists (two for an encoder-decoder). embeddings, heads: module names. parameters: in the order of
    `named_parameters()`. buffers: names of persistent buffers. tied: groups of names that are one tensor.
    attention, experts: names of modules reached through transformers' registered interfaces, empty when there are none.
    own_loss: the user's `loss_fn` reads the outputs, so that no loss of core's is made.
    batch_statistics: modules in training mode that normalise over the batch (BatchNorm), so that samples depend on one another.
    fused_dropout: modules that draw random numbers inside a fused kernel, so that no mesh-independent key can be given.
    forward_keys: keyword arguments that `forward` takes; None when it takes any. tensor_plan, expert_plan: transformers' own plans as (name
    pattern with `*` for a number, style of `colossal_core.transformers_plans`). untraced: why no forward pass could be traced, else "".
    modules: every module, in the order of `named_modules()`. flow: what is handed from block to block, and where each parameter is
    read; None where that could not be followed, and `unfollowed` says why. specimen: a small model of the same kind, built when it is
    asked for; None where no batch is known for the model. op_uses: where the model computes what ops do, looked for when it is asked for.
    Neither is a part of what two anatomies are compared by.
    """

    class_name: str
    task: Task
    chains: tuple[BlockChain, ...]
    parameters: tuple[ParameterFact, ...]
    buffers: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    fused_dropout: tuple[str, ...] = ()
    forward_keys: tuple[str, ...] | None = None
    batch_statistics: tuple[str, ...] = ()
    auxiliary_loss: bool = False
    own_loss: bool = False
    vocab_size: int | None = None
    num_heads: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None
    tensor_plan: tuple[tuple[str, str], ...] = ()
    expert_plan: tuple[tuple[str, str], ...] = ()
    untraced: str = ""
    modules: tuple[ModuleFact, ...] = ()
    flow: Flow | None = None
    unfollowed: str = ""
    specimen: Specimen | None = field(default=None, compare=False, repr=False)
    op_uses: ModelUses | None = field(default=None, compare=False, repr=False)

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(name for chain in self.chains for name in chain.names)

    @property
    def tied(self) -> tuple[tuple[str, ...], ...]:
        return tuple(fact.names for fact in self.parameters if len(fact.names) > 1)
