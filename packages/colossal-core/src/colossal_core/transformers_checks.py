"""Two questions that a transformers model asks about the values of its batch in every forward pass, each of which waits for the device.

Whether its positions say that several sequences are packed into one row, and whether the batch holds padding without a mask (a
warning, shown once). Where a batch brings no positions of its own, transformers' models make them, the same in every step: the first
answer holds. A model of the user's around one may make other positions from each batch, and is asked every time.
Tried on transformers 5.17.0 and 5.23.0.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from colossal_core.stages import StageEnd

if TYPE_CHECKING:
    from torch import nn


class FirstAnswers:
    """Lets a model ask in its first forward pass, and answers for it from then on; a packed row is looked at in every pass.

    transformers' functions are replaced while any thread (a simulated rank is one) is inside a forward pass, and answer each thread for
    its own model.
    """

    _running: ClassVar[ContextVar[FirstAnswers | None]] = ContextVar("running", default=None)
    _lock: ClassVar = threading.Lock()
    _num_inside: ClassVar[int] = 0
    _originals: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

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
        self._enter(masks, modeling.PreTrainedModel)
        token = self._running.set(self)
        try:
            yield
            self._is_known = True
        except StageEnd:  # the pass of a stage of a pipeline, which ends before the model does
            self._is_known = True
            raise
        finally:
            self._running.reset(token)
            self._leave(masks, modeling.PreTrainedModel)

    @classmethod
    def _enter(cls, masks: Any, model_class: Any) -> None:
        with cls._lock:
            cls._num_inside += 1
            if cls._num_inside > 1:
                return
            look, warn = masks.find_packed_sequence_indices, model_class.warn_if_padding_and_no_attention_mask
            cls._originals = (look, warn)
            masks.find_packed_sequence_indices = cls._answering(look)
            model_class.warn_if_padding_and_no_attention_mask = cls._warning(warn)

    @classmethod
    def _leave(cls, masks: Any, model_class: Any) -> None:
        with cls._lock:
            cls._num_inside -= 1
            if cls._num_inside == 0:
                masks.find_packed_sequence_indices, model_class.warn_if_padding_and_no_attention_mask = cls._originals

    @classmethod
    def _answering(cls, look: Callable[..., Any]) -> Callable[..., Any]:
        def packed_sequences(position_ids: Any) -> Any:
            running = cls._running.get()
            if running is None:
                return look(position_ids)
            if running._is_known and not running._is_packed:
                return None
            answer = look(position_ids)
            running._is_packed |= answer is not None
            return answer

        return packed_sequences

    @classmethod
    def _warning(cls, warn: Callable[..., None]) -> Callable[..., None]:
        def warn_once(model: Any, input_ids: Any, attention_mask: Any) -> None:
            running = cls._running.get()
            if running is None or not running._is_known:
                warn(model, input_ids, attention_mask)

        return warn_once
