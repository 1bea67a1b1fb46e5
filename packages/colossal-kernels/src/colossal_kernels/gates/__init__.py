"""Gated activations, and their gradients in one pass."""
