"""One rank of a mesh whose other ranks are not there: for runs on fake tensors, where operators give shapes and send nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from colossal_comm.collectives import RankCollectives
from colossal_comm.ledger import Ledger
from colossal_comm.session import Session

if TYPE_CHECKING:
    from colossal_core.mesh import MeshLayout


def silent_rank(mesh: MeshLayout, rank: int = 0) -> RankCollectives:
    """The collectives of one rank, without a transport. On fake tensors the differentiable ones have their shapes and what autograd keeps
    of them; a collective on real ones fails. Keep it alive as long as what runs on it.
    """
    return RankCollectives(mesh, rank, torch.device("cpu"), Session(None, Ledger(), None))
