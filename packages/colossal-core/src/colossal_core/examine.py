"""`examine`: the anatomy of any `nn.Module`, also on the meta device. Nothing is computed and nothing in the model is changed."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping

from torch import Tensor, nn

from colossal_core.anatomy import BlockChain, ModelAnatomy, ModuleFact, ParameterFact
from colossal_core.dataflow import (
    chains_by_data_flow,
    is_checkpointing_layer,
    module_lists,
    outermost,
    trace,
)
from colossal_core.example_batch import traced_batch
from colossal_core.flow import follow
from colossal_core.interfaces import ATTENTION_INTERFACE, EXPERTS_INTERFACE, modules_reaching
from colossal_core.model_ops.uses import ModelUses
from colossal_core.specimen import Specimen
from colossal_core.specimen_choice import specimen_of
from colossal_core.task import config_facts, find_task
from colossal_core.transformers_plans import expert_plan, is_transformers_model, tensor_plan

HEAD_COUNTS = (
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "num_kv_heads",
    "n_head",
    "n_heads",
    "n_head_kv",
    "kv_n_heads",
    "num_local_attention_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
"""Keys of configs that say how many heads there are, and that a forward pass may read."""


def examine(
    model: nn.Module, example_batch: Mapping[str, Tensor] | None = None, specimen: Specimen | None = None
) -> ModelAnatomy:
    """The facts that strategies plan from. Deterministic; the model is neither moved, called nor changed.

    example_batch: keyword arguments of the model's forward, any device, values unused; transformers models need none. With neither, or
    when the traced pass fails, block lists are found by structure and `untraced` says why. specimen: a small model of the same kind, from
    someone who knows how to make one; None: made by rule, from the config, or from the model and its batch.
    """
    batch = traced_batch(model, example_batch)
    found = trace(model, batch)
    chains = chains_by_data_flow(model, found)
    if found.error:
        chains = [chain for chain in chains if _is_whole_list(model, chain)]
    chains = _with_structure(model, chains, found.called, traced=not found.error)
    flow, unfollowed = follow(model, batch, chains, found)
    facts = config_facts(model)
    embeddings = _embeddings(model)
    vocab_size = facts.vocab_size if facts.vocab_size is not None else _table_size(model, embeddings)
    heads = _heads(model, vocab_size)
    return ModelAnatomy(
        class_name=type(model).__name__,
        task=find_task(model),
        chains=tuple(chains),
        parameters=_parameters(model, chains),
        buffers=_persistent_buffers(model),
        embeddings=embeddings,
        heads=heads,
        attention=modules_reaching(model, ATTENTION_INTERFACE),
        experts=modules_reaching(model, EXPERTS_INTERFACE),
        fused_dropout=tuple(name for name, _ in model.named_modules() if name in found.fused_dropout),
        forward_keys=_forward_keys(model),
        batch_statistics=_batch_statistics(model),
        auxiliary_loss=facts.auxiliary_loss,
        vocab_size=vocab_size,
        num_heads=facts.num_heads,
        num_key_value_heads=facts.num_key_value_heads,
        hidden_size=facts.hidden_size,
        tensor_plan=tensor_plan(model),
        expert_plan=expert_plan(model),
        untraced=found.error,
        modules=tuple(_module_fact(name, module) for name, module in model.named_modules()),
        flow=flow,
        unfollowed=unfollowed,
        specimen=specimen if specimen is not None else specimen_of(model, chains, example_batch),
        op_uses=ModelUses(model, heads),
    )


def _module_fact(name: str, module: nn.Module) -> ModuleFact:
    """Of a config the keys as it keeps them: transformers reads several names of one number."""
    numbers = {key: value for key, value in vars(module).items() if not key.startswith("_") and _is_number(value)}
    kept = getattr(vars(module).get("config"), "__dict__", {})
    numbers.update({f"config.{key}": kept[key] for key in HEAD_COUNTS if _is_number(kept.get(key))})
    return ModuleFact(name, type(module).__name__, tuple(sorted(numbers.items())))


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _batch_statistics(model: nn.Module) -> tuple[str, ...]:
    """BatchNorm in training mode. One that is kept in evaluation mode is an affine map; a SyncBatchNorm sums over the default group."""
    batch_norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return tuple(name for name, module in model.named_modules() if isinstance(module, batch_norms) and module.training)


def _is_whole_list(model: nn.Module, chain: BlockChain) -> bool:
    """Whether a chain of a trace that stopped early holds every element of its list: then the stop came after it."""
    parent = model.get_submodule(chain.names[0].rpartition(".")[0])
    return len(chain.names) == len(list(parent.children()))


def _with_structure(model: nn.Module, chains: list[BlockChain], called: set[str], *, traced: bool) -> list[BlockChain]:
    """Adds the lists of transformers' block classes that the trace did not reach (a vision tower of a text-only pass); without a trace
    and without those, the longest outermost list of one class of module.
    """
    names = _first_names(model)
    candidates = []
    for elements in module_lists(model).values():
        unique = tuple(dict.fromkeys(names[id(element)] for element in elements))
        repeated = tuple(name for name in unique if sum(names[id(element)] == name for element in elements) > 1)
        candidates.append((elements, BlockChain(unique, "structure", repeated)))
    marked = [
        chain
        for elements, chain in candidates
        if all(map(is_checkpointing_layer, elements)) and not called.intersection(chain.names)
    ]
    every = outermost([*chains, *marked])
    if every or traced:
        return every
    alike = [
        chain for elements, chain in candidates if len(elements) > 1 and len({type(item) for item in elements}) == 1
    ]
    if isinstance(model, nn.Sequential) and len(model) > 1:
        alike.insert(0, next(chain for elements, chain in candidates if elements == tuple(model)))
    return sorted(outermost(alike), key=lambda chain: -len(chain.names))[:1]


def _first_names(model: nn.Module) -> dict[int, str]:
    """The name of every module object, the first in `named_modules()`."""
    return {id(module): name for name, module in model.named_modules()}


def _parameters(model: nn.Module, chains: list[BlockChain]) -> tuple[ParameterFact, ...]:
    names: dict[int, list[str]] = {}
    tensors: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    block_of = _block_by_prefix(model, chains)
    facts = []
    for key, parameter in tensors.items():
        blocks = {_owner(name, block_of) for name in names[key]}
        block = blocks.pop() if len(blocks) == 1 else ""
        dtype = str(parameter.dtype).removeprefix("torch.")
        facts.append(ParameterFact(tuple(names[key]), tuple(parameter.shape), dtype, parameter.requires_grad, block))
    return tuple(facts)


def _block_by_prefix(model: nn.Module, chains: list[BlockChain]) -> dict[str, str]:
    """Every name of every block module -> the block's name in its chain."""
    modules = dict(model.named_modules())
    chained = {id(modules[name]): name for chain in chains for name in chain.names}
    everything = model.named_modules(remove_duplicate=False)
    return {name: chained[id(module)] for name, module in everything if id(module) in chained}


def _owner(parameter: str, block_of: Mapping[str, str]) -> str:
    """The outermost block whose name leads the parameter's, else ""."""
    parts = parameter.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((block_of[prefix] for prefix in prefixes if prefix in block_of), "")


def _persistent_buffers(model: nn.Module) -> tuple[str, ...]:
    saved = model.state_dict(keep_vars=True).keys()
    return tuple(name for name, _ in model.named_buffers() if name in saved)


def _accessor(model: nn.Module, name: str) -> nn.Module | None:
    """What a transformers accessor (`get_input_embeddings`) returns; None where it is missing or refuses."""
    method = getattr(model, name, None)
    if not callable(method):
        return None
    try:
        module = method()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


def _embeddings(model: nn.Module) -> tuple[str, ...]:
    names = _first_names(model)
    given = _accessor(model, "get_input_embeddings")
    if given is not None:
        return (names[id(given)],) if isinstance(given, nn.Embedding) and id(given) in names else ()
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Embedding))[:1]


def _heads(model: nn.Module, vocab_size: int | None) -> tuple[str, ...]:
    names = _first_names(model)
    given = _accessor(model, "get_output_embeddings")
    if given is not None and id(given) in names:
        return (names[id(given)],)
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(name for name, linear in linears if linear.out_features == vocab_size)[-1:]


def _table_size(model: nn.Module, embeddings: tuple[str, ...]) -> int | None:
    table = model.get_submodule(embeddings[0]) if embeddings else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _forward_keys(model: nn.Module) -> tuple[str, ...] | None:
    keys: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named = _typed_keys(parameter.annotation)
            if named is None and not is_transformers_model(model):
                return None
            keys += named or ()  # transformers hands them on to its loss and its kernels: no place for a column of data
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            keys.append(name)
    return tuple(dict.fromkeys(keys))


def _typed_keys(annotation: object) -> list[str] | None:
    """The keys of `**kwargs: Unpack[SomeTypedDict]`; None where anything goes."""
    if typing.get_origin(annotation) is not typing.Unpack:
        return None
    described = typing.get_args(annotation)[0]
    return list(described.__annotations__) if typing.is_typeddict(described) else None
