"""Positions in attention."""
