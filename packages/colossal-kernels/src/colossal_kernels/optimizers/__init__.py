"""Optimizer steps over lists of tensors in one launch, and the product of Muon's iteration."""
