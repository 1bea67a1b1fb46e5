"""torch's own tensor parallelism: DTensor styles with sequence parallelism and `loss_parallel`, beside FSDP2 over the other ranks.

Everything is as torch's guide to tensor parallelism has it for a Llama. FSDP2 is there even where no other ranks are left: it keeps the
float32 masters and casts. `async`: Inductor's micro-pipelining of products and collectives through symmetric memory, without multicast.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

import torch
from beside_peers.models import Filler, Shape, on_meta
from beside_peers.peers import Peer, loss_of, prepare_blocks
from beside_peers.rows import Row
from beside_peers.world import World

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle


def tensor_parallel(row: Row, shape: Shape, world: World) -> Peer:
    """Each block is cut and sharded as soon as it has its values, so that no rank ever holds the whole model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

    assert shape.architecture == "llama", f"there are styles for a Llama, not for {shape.architecture}"
    contestant = row.parsed
    mesh = world.mesh(contestant.tensor_size)
    data, tensor = mesh["data"], mesh["tensor"]
    if contestant.asynchronous:
        _enable_symmetric_memory(tensor)
    model = on_meta(shape)
    filler = Filler(model, shape.block_names(), world.device)
    prepare_blocks(model, row, shape)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    reshard = data.size() > 1  # alone, there is nothing to give back between forward and backward
    for name in shape.block_names():
        filler.fill(name)
        block = model.get_submodule(name)
        parallelize_module(block, tensor, block_styles(), src_data_rank=None)
        fully_shard(block, mesh=data, mp_policy=policy, reshard_after_forward=reshard)
    filler.fill("")
    parallelize_module(model, tensor, outer_styles(), src_data_rank=None)
    fully_shard(model, mesh=data, mp_policy=policy, reshard_after_forward=None if reshard else False)
    return Peer(model, loss_of(row), positions=True, around=loss_parallel)


def block_styles() -> dict[str, ParallelStyle]:
    """Of a layer of Llama whose stream is cut along the sequence."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    styles: dict[str, ParallelStyle] = {
        "input_layernorm": SequenceParallel(),
        "post_attention_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        ),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    }
    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    styles |= {name: ColwiseParallel() for name in columns}
    return styles | {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("self_attn.o_proj", "mlp.down_proj")}


def outer_styles() -> dict[str, ParallelStyle]:
    """Of the embedding, the last norm, and the head, whose logits stay cut by words."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

    return {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }


def set_pipelining(*, wanted: bool) -> None:
    """Turns Inductor's mode on, or off again after a row that had it. It is part of the key under which compiled code is cached."""
    import torch._inductor.config as inductor_config

    settings: Any = inductor_config
    settings._micro_pipeline_tp = wanted


def _enable_symmetric_memory(tensor: DeviceMesh) -> None:
    """What Inductor asks for before it pipelines products over a group's ranks."""
    assert tensor.device_type == "cuda", "torch's async mode needs GPUs"
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # some versions need the call, others say that they do not
        enable_symm_mem_for_group(tensor.get_group().group_name)
