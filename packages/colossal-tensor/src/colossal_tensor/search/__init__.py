"""Which parameters of a model are cut together: found on a small model of the same kind, and proven there before a weight is moved."""
