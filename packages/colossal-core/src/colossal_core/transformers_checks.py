"""Two questions that a transformers model asks about the values of its batch in every forward pass, each of which waits for the device.

Whether its positions say that several sequences are packed into one row, and whether the batch holds padding without a mask (a
warning, shown once). Where a batch brings no positions of its own, transformers' models make them, the same in every step: the first
answer holds. A model of the user's around one may make other positions from each batch, and is asked every time.
Tried on transformers 5.17.0 and 5.23.0.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class FirstAnswers:
    """Lets a model ask in its first forward pass, and answers for it from then on; a packed row is looked at in every pass."""

    def __init__(self) -> None:
        self._is_known = False
        self._is_packed = False

    @contextmanager
    def remembered(self, model: nn.Module) -> Iterator[None]:
        """A context for one forward pass of `model` on a batch without positions; nothing for a model that is not transformers' own."""
        masks, modeling = sys.modules.get("transformers.masking_utils"), sys.modules.get("transformers.modeling_utils")
        if masks is None or modeling is None or not type(model).__module__.startswith("transformers."):
            yield
            return
        found: Any = masks
        model_class: Any = modeling.PreTrainedModel
        look, warn = found.find_packed_sequence_indices, model_class.warn_if_padding_and_no_attention_mask
        found.find_packed_sequence_indices = self._answering(look)
        if self._is_known:
            model_class.warn_if_padding_and_no_attention_mask = _says_nothing
        try:
            yield
            self._is_known = True
        finally:
            found.find_packed_sequence_indices = look
            model_class.warn_if_padding_and_no_attention_mask = warn

    def _answering(self, look: Callable[..., Any]) -> Callable[..., Any]:
        def packed_sequences(position_ids: Any) -> Any:
            if self._is_known and not self._is_packed:
                return None
            answer = look(position_ids)
            self._is_packed |= answer is not None
            return answer

        return packed_sequences


def _says_nothing(model: Any, input_ids: Any, attention_mask: Any) -> None:
    del model, input_ids, attention_mask
