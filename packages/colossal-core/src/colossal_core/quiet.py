"""Silence while transformers is asked for something that its advice is not about."""

from __future__ import annotations

import logging
import warnings


class quiet_transformers:  # noqa: N801 - used like the context managers of contextlib
    """Inside, transformers' advice on configs (token numbers outside the vocabulary, say) is not printed."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("transformers")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *details: object) -> None:
        self._warnings.__exit__(None, None, None)
        self._logger.setLevel(self._level)
