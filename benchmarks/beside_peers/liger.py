"""Liger-Kernel's own patch of a transformers model, for one contestant alone: others in the same process keep theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

SERVED = ("llama",)
"""Architectures of these benchmarks that Liger has a patch for; it has none for GPT-2."""
REPLACED = ("LlamaRMSNorm", "LlamaMLP")
"""Classes of transformers' module that the patch replaces by its own, so that every model built afterwards would be Liger's too."""


def patch(model: nn.Module, architecture: str) -> None:
    """Its norms, gated activation and linear + cross-entropy, in this model's modules. Needs its rotary embedding around the steps."""
    if architecture not in SERVED:
        message = f"Liger-Kernel has no patch for {architecture}"
        raise ValueError(message)
    from liger_kernel.transformers import monkey_patch
    from transformers.models.llama import modeling_llama

    patches: Any = monkey_patch
    classes: Any = vars(modeling_llama)
    before = {name: classes[name] for name in REPLACED}
    patches.apply_liger_kernel_to_llama(rope=False, model=model)
    classes.update(before)


@contextlib.contextmanager
def liger_rotary() -> Iterator[None]:
    """Its rotary embedding in the place of Llama's, which is a function of transformers' module and so everybody's."""
    import liger_kernel.transformers.rope as liger
    from transformers.models.llama import modeling_llama

    module: Any = modeling_llama
    before = module.apply_rotary_pos_emb
    module.apply_rotary_pos_emb = liger.liger_rotary_pos_emb
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = before
