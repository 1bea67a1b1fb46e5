"""The section `parallel.zero`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from colossal_core.config import Section


class ZeroConfig(Section):
    """Data parallelism, and what of the training state is sharded over it (Rajbhandari et al. 2020)."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: nothing is sharded. 1: master weights and optimizer states are. 2: gradients too. 3: parameters too, gathered block by block."""
    replicate: Annotated[int, Field(ge=1)] = 1
    """Number of copies of the sharded state: it is sharded inside `dp_shard` and copied along `dp_replicate` (hybrid sharding)."""
    bucket_bytes: Annotated[int, Field(ge=1)] | None = None
    """Gradients are reduced in buckets of about this many bytes. Smaller overlaps earlier, larger uses the links better. null: 128 MiB, or
    the largest block where that is more. In stages 2 and 3 a block is one bucket in any case."""
    reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Format in which gradients are sent and summed over `dp_shard` x `cp`; bf16 halves the traffic. null: that in which they are kept."""
    keep_parameters: Literal["use", "microbatch", "step"] | None = None
    """Stage 3: how long gathered parameters stay. `use`: through a block's forward pass, and again through its backward pass. `microbatch`:
    from the one to the other. `step`: gathered once for all microbatches, as a pipeline needs it. null: `use`, in a pipeline `step`."""
    keep_gradients: Literal["microbatch", "step"] | None = None
    """Stages 2 and 3: how long whole gradients stay. `microbatch`: each backward pass reduces them, and a shard is kept. `step`: they are
    added up whole, as in stage 1, and reduced once a step. null: `microbatch`, in a pipeline `step`."""
    prefetch: Annotated[int, Field(ge=0)] | None = None
    """Stage 3: how many blocks ahead parameters are gathered. null: 1. 0: each gather is waited for where it is needed."""
