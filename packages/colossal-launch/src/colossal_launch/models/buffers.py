"""Buffers of a model that was built under `torch.device("meta")`: a constructor computed them, and their values are lost."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from colossal_core.errors import ConfigError, Problem


def restore_meta_buffers(model: nn.Module) -> None:
    """Gives buffers on the meta device their values back, in place: a transformers model is built once more, without parameters.

    Raises: ConfigError for any other model, naming the buffers.
    """
    lost = [name for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_meta]
    if not lost:
        return
    build: Any = getattr(type(model), "_from_config", None)
    config: Any = getattr(model, "config", None)
    if build is None or config is None:
        names = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        reason = f"buffers on the meta device have no values ({names})"
        remedy = "build it under colossal_launch.models.parameters_on_meta(), which keeps buffers"
        raise ConfigError([Problem("model", reason, remedy)])
    from colossal_core.quiet import quiet_transformers
    from colossal_launch.models.meta import parameters_on_meta

    with quiet_transformers(), parameters_on_meta():
        twin: nn.Module = build(copy.deepcopy(config))
    real = dict(twin.named_buffers(remove_duplicate=False))
    for name in lost:
        module_name, _, key = name.rpartition(".")
        module = model.get_submodule(module_name)
        persistent = key not in module._non_persistent_buffers_set
        module.register_buffer(key, real[name], persistent=persistent)
