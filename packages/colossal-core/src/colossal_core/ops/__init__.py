"""The operations that have more than one implementation: each beside its reference, chosen once and printed with the
plan.
"""

from colossal_core.ops.table import OP_NAMES, OpImplementation, OpTable, build_op_table, op_problems

__all__ = ["OP_NAMES", "OpImplementation", "OpTable", "build_op_table", "op_problems"]
