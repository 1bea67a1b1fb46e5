"""The private functions of torch that are called have the arguments that they are called with, in this torch too."""

from __future__ import annotations

import inspect

from torch.distributed import _symmetric_memory


def test_arguments() -> None:
    pipelines = (
        _symmetric_memory._pipelined_multi_all_gather_and_consume,
        _symmetric_memory._pipelined_produce_and_all2all,
    )
    arguments = [list(inspect.signature(pipeline).parameters.values()) for pipeline in pipelines]
    assert [argument.name for argument in arguments[0][:4]] == ["shard", "shard_consumer", "ag_out", "group_name"]
    assert [argument.name for argument in arguments[1][:3]] == ["chunk_producer", "output", "group_name"]
    assert all(argument.default is not inspect.Parameter.empty for argument in (*arguments[0][4:], *arguments[1][3:]))
