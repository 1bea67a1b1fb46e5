"""Writing a model in training as a Hugging Face folder: parameters are gathered one at a time, rank 0 writes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colossal_core.errors import ColossalError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from colossal_core.trained import Trained


class HuggingFaceExporter:
    """Remembers the transformers config as it was before anything was wrapped; a model without one cannot be exported."""

    def __init__(self, model: nn.Module, tokenizer_file: Path | None = None) -> None:
        self._config: Any = copy.deepcopy(getattr(model, "config", None))
        self._architecture = type(model).__name__
        self._tokenizer_file = tokenizer_file

    def __call__(self, trained: Trained, directory: Path, dtype: torch.dtype | None) -> None:
        """Collective: every rank calls it. Communication: an all-gather of each parameter and, in a pipeline,
        of each buffer. Raises ColossalError without a config."""
        from colossal_core.mesh import WORLD
        from colossal_launch.models.export import write_hf_folder

        if self._config is None:
            message = f"export_hf: {self._architecture} has no transformers config: save its weights with `trained.full_parameter`"
            raise ColossalError(message)
        values = self._values(trained)
        if trained.collectives.rank == 0:
            write_hf_folder(
                self._config,
                values,
                directory,
                dtype if dtype is not None else _master_dtype(trained),
                architecture=self._architecture,
                tokenizer_file=self._tokenizer_file,
            )
        else:
            for _ in values:
                pass
        trained.collectives.barrier(WORLD, tag="export")

    @staticmethod
    def _values(trained: Trained) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and persistent buffer, from whichever ranks hold it. All ranks take part, and get all of them."""
        for name in trained.plan.layouts:
            yield name, trained.full_parameter(name).cpu()
        for name, buffer in trained.full_buffers():
            yield name, buffer.cpu()


def _master_dtype(trained: Trained) -> torch.dtype:
    from colossal_core.precision import precision_of

    return precision_of(trained.plan.config).master
