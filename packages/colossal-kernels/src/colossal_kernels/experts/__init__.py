"""Mixture of experts: routing, sorting by expert, moving rows, products by expert, and the layer whole."""
