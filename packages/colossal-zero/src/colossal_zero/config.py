"""The section `parallel.zero`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from colossal_core.config import Section


class ZeroConfig(Section):
    """Data parallelism, and what of the training state is sharded over it (Rajbhandari et al. 2020)."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: nothing is sharded. 1: master weights and optimizer states are. 2 and 3 (gradients, parameters) are not part of this release."""
    replicate: Annotated[int, Field(ge=1)] = 1
    """Number of copies of the sharded state: it is sharded inside `dp_shard` and copied along `dp_replicate` (hybrid sharding)."""
    bucket_bytes: Annotated[int, Field(ge=1)] = 64 * 2**20
    """Gradients are reduced in buckets of about this many bytes. Smaller overlaps earlier, larger uses the links better."""
