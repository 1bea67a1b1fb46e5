"""The library's own estimates, of a step's peak and of what a pipeline idles, made as `colossal plan` makes them, to be held beside what
was measured.
"""

from __future__ import annotations

import traceback
from typing import Any

from beside_peers.config import config_of
from beside_peers.models import Shape, on_meta
from beside_peers.rows import Row
from beside_peers.time_lines import estimated_idle

GIB = 2**30


def estimated_peak(row: Row, shape: Shape, world_size: int, device_type: str) -> dict[str, Any]:
    """GiB on the fullest rank at the highest moment of a step, in all and by kind. No memory of the device is used; seconds.

    Where the estimate fails or is not complete, the row says why: it is beside the measurement, and must not end it.
    """
    from colossal_launch.assembly import assemble, read_setup
    from colossal_launch.cli.plan import peak_estimator

    try:
        setup = read_setup({**config_of(row, world_size), "data": {"sequence_length": shape.sequence_length}})
        model = on_meta(shape)
        assembly = assemble(setup, model, world_size=world_size, device_type=device_type)
        idle = estimated_idle(assembly.plan, assembly.anatomy)
        peak = peak_estimator(setup, assembly, model, device_type).estimate()
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        return {"estimate_problem": f"{type(error).__name__}: {error}"}
    kinds = {name: size / GIB for name, size in peak.by_kind().items()}
    found = {"estimated_peak_gib": peak.total / GIB, "estimated_gib_by_kind": kinds, **idle}
    return found | ({"estimate_problem": peak.problem} if peak.problem else {})
