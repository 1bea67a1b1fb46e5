"""`python -m colossal_launch` is the `colossal` command: for launchers that start a module."""

from __future__ import annotations

from colossal_launch.cli import main

if __name__ == "__main__":
    main()
