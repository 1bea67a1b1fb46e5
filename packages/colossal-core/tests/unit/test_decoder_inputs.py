"""What the decoder of a sequence-to-sequence model reads, made from its labels."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from colossal_core.loss import decoder_inputs

LABELS = torch.tensor([[4, 5, -100], [6, -100, -100]])


class Starting(nn.Module):
    """As Whisper: a config and no method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(decoder_start_token_id=2, pad_token_id=1)


class Own(Starting):
    """As T5: the class has a rule."""

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return labels + 1


def test_labels_move_right_behind_the_first_token() -> None:
    assert decoder_inputs(Starting(), LABELS).tolist() == [[2, 4, 5], [2, 6, 1]]
    assert LABELS.tolist() == [[4, 5, -100], [6, -100, -100]]


def test_a_rule_of_the_model_goes_first() -> None:
    assert decoder_inputs(Own(), LABELS).tolist() == [[5, 6, -99], [7, -99, -99]]
