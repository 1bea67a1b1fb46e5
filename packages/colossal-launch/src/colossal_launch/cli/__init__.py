"""The `colossal` command. `main` is its entry point."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; its exit status is the contract's: 2 before the first worker, 1 after, 130 and 143 for signals."""
    import os
    import sys

    from colossal_launch.cli.application import run

    # Functions that a config names (`my_pkg:build`) may lie in the current folder, as under `python -m`.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    run()
