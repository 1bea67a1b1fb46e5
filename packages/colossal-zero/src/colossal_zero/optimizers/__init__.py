"""Optimizers that are right on any shard: each file is one, and names its paper.

`lion` is elementwise. `lamb`, `lars` and `adafactor` read norms and sums of whole parameters, which `sums` adds up over the ranks in one
message. `muon` reads whole matrices, each at one owner (`ownership`).
"""
