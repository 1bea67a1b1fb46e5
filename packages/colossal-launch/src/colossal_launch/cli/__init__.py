"""The `colossal` command. `main` is its entry point."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; its exit status is the contract's: 2 before the first worker, 1 after, 130 and 143 for signals."""
    from colossal_launch.cli.application import run

    run()
